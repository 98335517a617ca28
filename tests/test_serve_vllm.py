"""Our engine over a real vLLM server, on real weights: `make test-engines`. vLLM runs in an environment of its own, named by VLLM_PYTHON.

Every answer is compared with what the base says here with the same prompt.
"""

import asyncio
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from other_engines import CPU, some_prompt
from test_other_engines import CUT, QUESTIONS, smollm2

from softprompt import load_prompt
from softprompt.artifact import StoredPrompt
from softprompt.config import ModelConfig
from softprompt.data import Message
from softprompt.demo import demo_base
from softprompt.encode import make_encoder
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import no_prompt
from softprompt.errors import ArtifactError, ConfigError, DataError, ModelError, RunError
from softprompt.generation import generate, without_prompt
from softprompt.sampling import Sampling
from softprompt.serve import vllm
from softprompt.serve.asking import Ask, Begun, NotServed, Said
from softprompt.serve.vllm import VllmEngine

pytestmark = pytest.mark.engines
TOKENS, BARE = 16, "bare"
GREEDY = Sampling(max_new_tokens=TOKENS)
ROOMY = ("--enforce-eager", "--max-model-len", "2048")
LONG = {"gemma": 700, "smollm2": 300}  # positions: more than a sliding layer of Gemma sees, and several blocks
# no prefix cache, texts in pieces of 32 tokens, and so few blocks that answers in progress have to give theirs up
PRESSED = (
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--no-enable-prefix-caching",
    "--max-num-batched-tokens",
    "32",
    "--max-num-seqs",
    "12",
)
FEW_BLOCKS = {"gemma": "60", "smollm2": "10"}


@dataclass(frozen=True)
class Scene:
    """A base and its prompts by name. `ours`: what we say to QUESTIONS with one, or with none in the template of "rows"."""

    name: str
    folder: Path
    config: ModelConfig
    base: FrozenBase
    prompts: dict[str, Path]
    said: dict[tuple[str, str], str] = field(default_factory=dict)

    def ours(self, name: str, questions: list[str] = QUESTIONS) -> list[str]:
        new = [question for question in questions if (name, question) not in self.said]
        if new:
            prompt = without_prompt(self.base, self.stored("rows")) if name == BARE else self.stored(name)
            self.said.update(zip([(name, question) for question in new], generate(self.base, prompt, new, GREEDY), strict=True))
        return [self.said[name, question] for question in questions]

    def stored(self, name: str) -> StoredPrompt:
        return load_prompt(self.prompts[name], self.base)


@dataclass(frozen=True)
class Served:
    """An engine whose event loop runs in another thread."""

    engine: VllmEngine
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    @property
    def address(self) -> str:
        return str(self.engine.server.client.base_url).removesuffix("/v1/")

    def whole(self, ask: Ask) -> "Whole":
        return self.run(whole(self.engine, ask))

    def together(self, asks: list[Ask]) -> list[str]:
        async def all_of_them() -> list[str]:
            return [one.text for one in await asyncio.gather(*(whole(self.engine, ask) for ask in asks))]

        return self.run(all_of_them())

    def counted(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.split()[-1]) for line in lines)


@dataclass(frozen=True)
class Whole:
    begun: Begun
    pieces: list[Said]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def scores(self) -> list[Any]:
        return [score for piece in self.pieces for score in piece.scores]


async def whole(engine: VllmEngine, ask: Ask) -> Whole:
    first, *rest = [piece async for piece in engine.ask(ask)]
    assert isinstance(first, Begun)
    assert rest[-1].finish is not None
    assert all(piece.finish is None for piece in rest[:-1])
    return Whole(first, rest)


@pytest.fixture(scope="module", params=["gemma", "smollm2"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    file = demo_base() if name == "gemma" else smollm2()
    config = ModelConfig(gguf_file=str(file), device="cpu", dtype="float32")
    base, setting = load_base(config), f"model.gguf_file={file}"
    how = {"position": "after_bos"} if name == "gemma" else {"template": "chat"}
    prompts = {
        "rows": some_prompt(folder / "rows", base, 1, position="start", model=setting, length=12),
        "behind": some_prompt(folder / "behind", base, 2, model=setting, length=140, **how),
        "keys": some_prompt(folder / "keys", base, 3, model=setting, length=24, deep=True, **how),
        "long": some_prompt(folder / "long", base, 4, position="start", model=setting, length=LONG[name], deep=True),
    }
    return Scene(name, folder, config, base, prompts)


@contextmanager
def serving(scene: Scene, prompts: dict[str, Path], folder: Path, options: tuple[str, ...], **how: Any) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        engine = run(vllm.start(BARE, scene.config, prompts, folder, options=options, **how))
        try:
            yield Served(engine, run)
        finally:
            run(engine.close(5))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def served(scene: Scene) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in CPU.items():
            patch.setenv(key, value)
        with serving(scene, scene.prompts, scene.folder / "kv", ROOMY, python=Path(os.environ["VLLM_PYTHON"])) as one:
            yield one


def asked(scene: Scene, name: str, questions: list[str] = QUESTIONS) -> list[Ask]:
    """As conversations, or of the bare base as token ids."""
    encoder = scene.stored("rows").encoder
    return [Ask(name, encoder.question(one) if name == BARE else (Message("user", one),), GREEDY) for one in questions]


def bare(texts: list[str]) -> list[str]:
    """A character that the last token cuts is shown by some engines only, and makes no difference."""
    return [text.rstrip(CUT) for text in texts]


def interleaved(scene: Scene, names: list[str]) -> list[Ask]:
    return [ask for row in zip(*(asked(scene, name) for name in names), strict=True) for ask in row]


def same(scene: Scene, names: list[str], said: list[str]) -> dict[str, int]:
    return {
        name: sum(one == other for one, other in zip(bare(said[index :: len(names)]), bare(scene.ours(name)), strict=True))
        for index, name in enumerate(names)
    }


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_greedy_texts_are_ours_with_every_kind_of_prompt_and_with_none_mixed_in_one_batch(scene: Scene, served: Served) -> None:
    names = [*scene.prompts, BARE]
    assert len({tuple(scene.ours(name)) for name in names}) == len(names), "the prompts do nothing"
    counts = same(scene, names, served.together(interleaved(scene, names)))
    print("\n", scene.name, counts)
    assert counts == dict.fromkeys(names, len(QUESTIONS))


def test_prompts_from_the_prefix_cache_are_the_same(scene: Scene, served: Served) -> None:
    names = ["long", "behind", "keys"]
    asks = [ask for name in names for ask in asked(scene, name, QUESTIONS[:4])]
    served.together(asks)
    before = served.counted("vllm:prefix_cache_hits_total")
    said = served.together(asks)
    assert served.counted("vllm:prefix_cache_hits_total") - before >= 4 * 128
    assert bare(said) == bare([text for name in names for text in scene.ours(name, QUESTIONS[:4])])


def test_a_prompt_is_added_replaced_and_removed_while_it_runs(scene: Scene, served: Served, tmp_path: Path) -> None:
    setting = f"model.gguf_file={scene.config.gguf_file}"
    for seed, deep in ((11, True), (12, False)):
        path = some_prompt(tmp_path / f"late{seed}", scene.base, seed, position="start", model=setting, length=9, deep=deep)
        model = served.run(served.engine.add("late", path))
        assert (model.name, model.kind, model.num_virtual) == ("late", "prompt", 9)
        said = served.together(asked(scene, "late", QUESTIONS[:10]))
        assert bare(said) == bare(generate(scene.base, load_prompt(path, scene.base), QUESTIONS[:10], GREEDY))
        assert num_files(served) == len(scene.prompts) + 1
    ids = served.engine._known["late"].before
    served.run(served.engine.remove("late"))
    with pytest.raises(RunError, match="vLLM"):
        served.run(served.engine._complete({"model": served.engine.server.model, "prompt": [*ids, 5], "max_tokens": 1}))
    assert num_files(served) == len(scene.prompts)
    with pytest.raises(NotServed):
        served.together(asked(scene, "late", QUESTIONS[:1]))
    with pytest.raises(ConfigError, match="which stays"):
        served.run(served.engine.remove(BARE))
    with pytest.raises(ConfigError, match="name of the base"):
        served.run(served.engine.add(BARE, path))


def test_a_prompt_that_is_removed_while_it_answers_is_finished_first(scene: Scene, served: Served, tmp_path: Path) -> None:
    setting = f"model.gguf_file={scene.config.gguf_file}"
    path = some_prompt(tmp_path / "going", scene.base, 13, position="start", model=setting, length=9)
    served.run(served.engine.add("going", path))

    async def answer() -> tuple[str, int]:
        stream = served.engine.ask(asked(scene, "going")[0])
        await anext(stream)
        await served.engine.remove("going")
        still = num_files(served)
        return "".join([piece.text async for piece in stream]), still

    said, still = served.run(answer())
    assert still == len(scene.prompts) + 1
    assert num_files(served) == len(scene.prompts)
    assert bare([said]) == bare(generate(scene.base, load_prompt(path, scene.base), QUESTIONS[:1], GREEDY))


def num_files(served: Served) -> int:
    return len(list(served.engine.folder.path.glob("*.safetensors")))


# ---- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows", "behind", "keys", BARE])
def test_texts_and_answers_are_scored_as_the_base_scores_them_here(scene: Scene, served: Served, name: str) -> None:
    text = " The weather is fine today, and so"
    said = served.whole(Ask(name, text, replace(GREEDY, max_new_tokens=4), logprobs=3, echo=True))
    base = scene.base
    soft = no_prompt(base, make_encoder(base.tokenizer, "human-assistant").bos_id) if name == BARE else scene.stored(name).soft
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [score.id for score in said.scores]
    ids_1T = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        read = base.continue_from(soft.prefix(base), torch.tensor([0]), ids_1T, torch.ones_like(ids_1T))
        logprobs_TV = base.logits(read.hidden_BTH[0]).log_softmax(dim=-1)
    assert said.begun.text == text
    assert [score.id for score in said.begun.scores] == ids
    assert b"".join(score.data for score in said.begun.scores).decode() == text
    assert (said.pieces[-1].finish, sum(piece.num_tokens for piece in said.pieces), len(answer)) == ("length", 4, 4)
    for place, score in enumerate([*said.begun.scores, *said.scores][1:]):
        best = logprobs_TV[place].topk(3)
        assert score.id == ids_1T[0, place + 1]
        assert score.logprob == pytest.approx(logprobs_TV[place, score.id].item(), abs=2e-3)
        assert [one.logprob for one in score.top] == pytest.approx(best.values.tolist(), abs=2e-3)
        assert score.top[0].id == best.indices[0]


def test_a_text_alone_is_scored_where_no_answer_is_wanted(served: Served) -> None:
    said = served.whole(Ask("keys", "One two three", replace(GREEDY, max_new_tokens=0), logprobs=0, echo=True))
    assert (said.text, said.scores, said.pieces[-1].finish) == ("", [], "length")
    assert len(said.begun.scores) >= 3
    assert not any(score.top for score in said.begun.scores)


def test_an_answer_ends_before_its_stop_text_also_across_tokens(scene: Scene, served: Served) -> None:
    text = scene.ours("long", QUESTIONS[0:1])[0]
    stop = text[len(text) // 2 :][:6]
    said = served.whole(replace(asked(scene, "long")[0], stops=("never said", stop)))
    assert said.text == text[: text.index(stop)]
    assert said.pieces[-1].finish == "stop"


def test_chosen_tokens_obey_what_is_asked_of_them(scene: Scene, served: Served) -> None:
    ask = asked(scene, "keys")[1]
    first = served.whole(replace(ask, logprobs=0)).scores[0].id
    forbidden = served.whole(replace(ask, logprobs=0, sampling=replace(GREEDY, logit_bias={first: -100.0})))
    assert first not in [score.id for score in forbidden.scores]
    penalised = replace(GREEDY, presence_penalty=2.0, frequency_penalty=2.0, max_new_tokens=40)
    ids = [score.id for score in served.whole(replace(ask, logprobs=0, sampling=penalised)).scores]
    plain = [score.id for score in served.whole(replace(ask, logprobs=0, sampling=replace(GREEDY, max_new_tokens=40))).scores]
    assert len(set(ids)) / len(ids) > len(set(plain)) / len(plain)
    hot = replace(GREEDY, temperature=2.0, seed=5)
    drawn = [served.whole(replace(ask, sampling=one)).text for one in (hot, hot, replace(hot, seed=6))]
    assert drawn[0] == drawn[1] != drawn[2]
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert bare([served.whole(replace(ask, sampling=replace(hot, **narrow))).text]) == bare([scene.ours("keys", QUESTIONS[1:2])[0]])


def test_an_answer_keeps_to_its_schema(scene: Scene, served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"drink": {"enum": ["tea", "milk"]}, "cups": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["drink", "cups"],
        "additionalProperties": False,
    }
    said = served.whole(replace(asked(scene, "rows")[0], schema=schema, sampling=replace(GREEDY, max_new_tokens=64)))
    answer = json.loads(said.text)
    assert answer["drink"] in ("tea", "milk")
    assert 0 <= answer["cups"] <= 9


def test_what_cannot_be_answered_is_refused(scene: Scene, served: Served) -> None:
    ask = asked(scene, "rows")[0]
    refused: list[tuple[Ask, type[Exception], str]] = [
        (replace(ask, model="nobody"), NotServed, "nobody"),
        (replace(ask, text=""), DataError, "empty"),
        (replace(ask, text=(Message("user", " "),)), DataError, "empty"),
        (replace(ask, text="one two " * 3000), DataError, "room for 2048"),
        (replace(ask, text=(2**30,)), DataError, "token ids go from 0 to"),
        (replace(ask, logprobs=21), ConfigError, "logprobs"),
        (replace(ask, sampling=replace(GREEDY, logit_bias={2**30: 1.0})), ConfigError, "logit_bias"),
        (replace(ask, sampling=replace(GREEDY, top_p=2.0)), ConfigError, "top_p"),
        (replace(ask, schema={"type": "nothing known"}), ConfigError, "vLLM refuses"),
    ]
    for one, kind, words in refused:
        with pytest.raises(kind, match=words):
            served.whole(one)
    assert served.engine.load().running == served.engine.load().waiting == 0
    assert bare([served.whole(ask).text]) == bare(scene.ours("rows", QUESTIONS[:1]))


def test_an_answer_that_is_closed_gives_its_place_back(scene: Scene, served: Served) -> None:
    async def begin() -> None:
        stream = served.engine.ask(replace(asked(scene, "rows")[0], sampling=Sampling(max_new_tokens=1500, temperature=1.0)))
        await anext(stream)
        await anext(stream)
        assert served.engine.load().running == 1
        await stream.aclose()

    served.run(begin())
    assert served.engine.load().running == 0

    async def empty() -> bool:
        for _ in range(100):
            if served.counted("vllm:num_requests_running") == 0:
                return True
            await asyncio.sleep(0.1)
        return False

    assert served.run(empty())


# ---- the server ------------------------------------------------------------------------------------------------------


def test_a_server_at_an_address_is_taken_if_it_reads_our_folder_and_has_our_weights(scene: Scene, served: Served, tmp_path: Path) -> None:
    one = {"keys": scene.prompts["keys"]}
    with serving(scene, one, served.engine.folder.path, (), address=served.address) as other:
        assert bare(other.together(asked(scene, "keys", QUESTIONS[:3]))) == bare(scene.ours("keys", QUESTIONS[:3]))
    assert served.together(asked(scene, BARE, QUESTIONS[:1])), "a server that was not started here goes on"
    with pytest.raises(ModelError, match="without our connector"), serving(scene, one, tmp_path / "kv", (), address=served.address):
        pass
    config = ModelConfig(gguf_file=str(smollm2() if scene.name == "gemma" else demo_base()), device="cpu", dtype="float32")
    other = replace(scene, config=config)
    with pytest.raises(ModelError, match="other weights"), serving(other, {}, served.engine.folder.path, (), address=served.address):
        pass
    with pytest.raises(ModelError, match="no vLLM server answers"), serving(scene, {}, tmp_path / "kv", (), address="http://127.0.0.1:9"):
        pass


def test_a_damaged_or_missing_file_fails_its_requests_and_no_others(scene: Scene, served: Served, tmp_path: Path) -> None:
    setting = f"model.gguf_file={scene.config.gguf_file}"
    path = some_prompt(tmp_path / "lost", scene.base, 17, position="start", model=setting, length=9)
    served.run(served.engine.add("lost", path))
    file = served.engine.folder.path / f"{served.engine._known['lost'].placed.key}.safetensors"
    file.unlink()
    with pytest.raises(RunError, match="vLLM"):
        served.together(asked(scene, "lost", QUESTIONS[:1]))
    assert bare(served.together(asked(scene, "keys", QUESTIONS[:1]))) == bare(scene.ours("keys", QUESTIONS[:1]))
    served.run(served.engine.remove("lost"))


def test_answers_are_right_where_blocks_are_few_and_texts_are_read_in_pieces(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in CPU.items():
        monkeypatch.setenv(key, value)
    options = (*PRESSED, "--num-gpu-blocks-override", FEW_BLOCKS[scene.name])
    names = [*scene.prompts, BARE]
    more = replace(GREEDY, max_new_tokens=120)
    asks = [replace(ask, sampling=more) for ask in interleaved(scene, names)[:25]]
    scored = [
        Ask(name, " The weather is fine today, and so am I", replace(GREEDY, max_new_tokens=1), logprobs=0, echo=True) for name in names
    ]
    with serving(scene, scene.prompts, scene.folder / "pressed", options, python=Path(os.environ["VLLM_PYTHON"])) as served:

        async def all_of_them() -> list[Whole]:
            return await asyncio.gather(*(whole(served.engine, ask) for ask in [*asks, *scored]))

        said = served.run(all_of_them())
        alone = [served.whole(ask) for ask in scored]
        preempted = served.counted("vllm:num_preemptions_total")
    print("\n", scene.name, "preempted", preempted)
    assert preempted > 0
    ours = {name: generate(scene.base, scene.stored(name), QUESTIONS[:5], more) for name in scene.prompts}
    for index, name in enumerate(scene.prompts):
        assert bare([one.text for one in said[: len(asks)][index :: len(names)]]) == bare(ours[name])
    for one, other in zip(said[len(asks) :], alone, strict=True):
        assert [score.logprob for score in one.begun.scores[1:]] == pytest.approx(
            [score.logprob for score in other.begun.scores[1:]], abs=1e-3
        )


def test_a_server_that_does_not_start_says_why(scene: Scene, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = Path(os.environ["VLLM_PYTHON"])
    with pytest.raises(ModelError, match="vLLM did not start"), serving(scene, {}, tmp_path / "kv", ("--no-such-option",), python=python):
        pass
    assert "no-such-option" in capfd.readouterr().err
    with pytest.raises(ModelError, match="--vllm-python"), serving(scene, {}, tmp_path / "kv", (), python=Path("/no/such/python")):
        pass


def test_a_prompt_of_another_base_is_refused_and_nothing_else_is_disturbed(scene: Scene, served: Served, tmp_path: Path) -> None:
    config = ModelConfig(gguf_file=str(smollm2() if scene.name == "gemma" else demo_base()), device="cpu", dtype="float32")
    path = some_prompt(tmp_path / "foreign", load_base(config), 1, position="start", model=f"model.gguf_file={config.gguf_file}")
    with pytest.raises(ArtifactError):
        served.run(served.engine.add("foreign", path))
    assert [model.name for model in served.engine.models()] == [BARE, *sorted(scene.prompts)]
    assert bare(served.together(asked(scene, "keys", QUESTIONS[:1]))) == bare(scene.ours("keys", QUESTIONS[:1]))
