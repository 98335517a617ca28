"""--engine llama: a GGUF file that llama.cpp holds answers with prompts as our own engine does, in float32 on a tiny llama."""

import asyncio
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf import GGMLQuantizationType
from openai import OpenAI
from other_engines import LENGTH, some_prompt, tiny_gguf
from test_serve_verb import serving_it
from test_serving_engine import answered

from softprompt import Ensemble, Sampling, generate, load_base, load_prompt
from softprompt.config import ModelConfig
from softprompt.engine.decode import OpenBatch, Question, Token
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import no_prompt
from softprompt.errors import ArtifactError, ConfigError, ModelError, RunError
from softprompt.generation import without_prompt
from softprompt.llama import context
from softprompt.llama.base import GgufBase, load_gguf
from softprompt.serve.asking import Ask, Said
from softprompt.serve.own import OwnEngine, start

NEAR, EXACT = 2e-2, 1e-4  # of logprobs: llama.cpp's flash attention rounds what it multiplies; the rest does not
QUESTIONS = ("Hello", "bring tea", "水, please", "What is the moon made of, and who has been there?")
KINDS = {
    "rows": {"length": 8},
    "behind": {"length": 5, "position": "after_bos"},
    "deep": {"length": 9, "deep": True},
    "deep-behind": {"length": 30, "deep": True, "position": "after_bos"},
}


@dataclass(frozen=True)
class Scene:
    """The same base twice, and prompts for it. `base` is ours, `held` is llama.cpp's."""

    folder: Path
    file: Path
    base: FrozenBase
    held: GgufBase
    prompts: dict[str, Path]


def held_by_llama(file: Path, **how: Any) -> GgufBase:
    return load_gguf(ModelConfig(gguf_file=str(file), device="cpu"), cache_type="f32", **how)


def unpacked(file: Path) -> FrozenBase:
    return load_base(ModelConfig(gguf_file=str(file), device="cpu", dtype="float32"))


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def scene(request: pytest.FixtureRequest, bases: Callable[..., FrozenBase], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("llama")
    kinds = {name: how for name, how in KINDS.items() if request.param or "position" not in how}
    file = tiny_gguf(folder / "base.gguf", bases(adds_bos=request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_CACHE", str(folder / "cache"))
        base, setting = unpacked(file), f"model.gguf_file={file}"
        made = {name: some_prompt(folder / name, base, seed, model=setting, **how) for seed, (name, how) in enumerate(kinds.items())}
        yield Scene(folder, file, base, held_by_llama(file), made)


def alike(said: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """All but a few are equal: random weights have near ties, and llama.cpp's sums are rounded otherwise."""
    assert len(said) == len(wanted)
    return sum(one == other for one, other in zip(said, wanted, strict=True)) >= 0.8 * len(wanted)


# ---- answers -------------------------------------------------------------------------------------------------------


def test_prompts_of_every_kind_in_one_batch_answer_as_ours(scene: Scene) -> None:
    ours, theirs = ([load_prompt(path, base) for path in scene.prompts.values()] for base in (scene.base, scene.held))
    ours.append(without_prompt(scene.base, ours[0]))
    theirs.append(without_prompt(scene.held, theirs[0]))
    pairs = [(one, text) for one in range(len(ours)) for text in QUESTIONS]
    texts = [text for _, text in pairs]
    wanted = generate(scene.base, [ours[one] for one, _ in pairs], texts, Sampling(20))
    assert alike(generate(scene.held, [theirs[one] for one, _ in pairs], texts, Sampling(20)), wanted)
    assert len({*wanted}) > len(pairs) // 2


def test_the_scores_behind_every_kind_of_prompt_are_ours(scene: Scene) -> None:
    for name, path in scene.prompts.items():
        ours, theirs = (scores_behind(base, load_prompt(path, base).soft).log_softmax(dim=0) for base in (scene.base, scene.held))
        assert (ours - theirs).abs().max() < NEAR, name


def test_without_flash_attention_rows_are_read_exactly(scene: Scene, monkeypatch: Any) -> None:
    monkeypatch.setattr(context, "FLASH", 0)
    held = held_by_llama(scene.file)
    for name in {"rows", "behind"} & set(scene.prompts):
        ours, theirs = (scores_behind(base, load_prompt(scene.prompts[name], base).soft).log_softmax(dim=0) for base in (scene.base, held))
        assert (ours - theirs).abs().max() < EXACT, name


@pytest.mark.parametrize("by", ["mean", "vote"])
def test_prompts_that_answer_together_do_so_too(scene: Scene, by: Any) -> None:
    ours, theirs = (Ensemble(tuple(load_prompt(path, base) for path in scene.prompts.values()), by) for base in (scene.base, scene.held))
    said, wanted = generate(scene.held, theirs, QUESTIONS * 3, Sampling(6)), generate(scene.base, ours, QUESTIONS * 3, Sampling(6))
    assert sum(one[:1] == other[:1] for one, other in zip(said, wanted, strict=True)) >= 0.8 * len(wanted)


def test_rows_join_and_leave_and_nothing_stays_behind(scene: Scene) -> None:
    """Batches of both engines are led through the same steps; the longest question is read in pieces, its beginning is kept."""
    soft = {name: (load_prompt(path, scene.base).soft, load_prompt(path, scene.held).soft) for name, path in scene.prompts.items()}
    soft["bare"] = tuple(no_prompt(base, scene.base.tokenizer.bos_token_id) for base in (scene.base, scene.held))  # type: ignore[assignment]
    said = [run_of(base, [pair[number] for pair in soft.values()]) for number, base in enumerate((scene.base, scene.held))]
    assert alike(list(said[1].values()), list(said[0].values()))
    assert sum(len(ids) for ids in said[0].values()) > 100
    assert len(scene.held.sequences._free) == context.SEQUENCES - len(scene.held.sequences._kept)


def run_of(base: Any, softs: list[Any]) -> dict[int, list[int]]:
    draw, batch, said = random.Random(3), OpenBatch(base, piece=16), dict[int, list[int]]()
    head = tuple(draw.randrange(9, 200) for _ in range(24))
    for step in range(60):
        if step % 3 == 0:
            ids = tuple(draw.randrange(9, 200) for _ in range(draw.randrange(1, 30)))
            keep = len(head) if draw.random() < 0.5 else 0
            sampling = Sampling(draw.randrange(1, 14), presence_penalty=0.5, logit_bias={draw.randrange(9, 200): 1.0})
            batch.admit([Question(((draw.choice(softs), ()),), ((*head, *ids) if keep else ids,), sampling, keep=keep)])
        if step % 10 == 9 and batch.answers:
            batch.drop({draw.choice([answer.number for answer in (*batch.answers, *batch.arriving)])})
        for event in batch.advance():
            if isinstance(event, Token) and event.id is not None:
                said.setdefault(event.row, []).append(event.id)
    batch.drop({answer.number for answer in (*batch.answers, *batch.arriving)})
    return said


def test_a_small_cache_lets_go_of_prompts_and_reads_them_again(scene: Scene) -> None:
    base = held_by_llama(scene.file, memory_bytes=1)
    assert base.context_length == base.rows().most_positions == 256
    softs = [load_prompt(path, base) for path in scene.prompts.values()]
    ours = [load_prompt(path, scene.base) for path in scene.prompts.values()]
    long, answers, wanted = QUESTIONS[-1] * 4, list[str](), list[str]()
    for _ in range(3):
        for mine, theirs in zip(ours, softs, strict=True):
            answers += generate(base, theirs, [long, *QUESTIONS], Sampling(5))
            wanted += generate(scene.base, mine, [long, *QUESTIONS], Sampling(5))
    assert alike(answers, wanted)
    assert len(base.sequences._kept) < len(softs) or len(softs) < 3, "there is no room for all"
    batch = OpenBatch(base)
    batch.admit([Question(((one.soft, ()),), (tuple(range(9, 209)),), Sampling(5)) for one in softs])
    with pytest.raises(RunError, match="cache of 256 positions is full: give more by --memory"):
        batch.advance()


# ---- serving -------------------------------------------------------------------------------------------------------


def serving(base: Any, prompts: dict[str, Path], do: Callable[[OwnEngine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        engine = start(base, prompts)
        try:
            return await do(engine)
        finally:
            await engine.close(5)

    return asyncio.run(run())


def test_what_requests_ask_for_is_given_as_ours_gives_it(scene: Scene) -> None:
    """Many at once: greedy and sampled, with stops, penalties, a schema, logprobs of answers and of texts."""
    names = [*scene.prompts, ""]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    hows: list[dict[str, Any]] = [
        {"sampling": Sampling(12)},
        {"sampling": Sampling(9, frequency_penalty=0.4), "logprobs": 3},
        {"sampling": Sampling(0), "logprobs": 2, "echo": True},
        {"sampling": Sampling(12), "stops": ("a", "e")},
        {"sampling": Sampling(16), "schema": schema},
    ]
    pairs = [(names[number % len(names)], hows[number % len(hows)]) for number in range(4 * len(hows) + 1)]
    asks = [Ask(name, f"bring {number} tea, {QUESTIONS[-1] * 3}", **how) for number, (name, how) in enumerate(pairs)]

    async def ask_all(engine: OwnEngine) -> Any:
        base = engine.models()[0].name
        return await asyncio.gather(*(answered(engine, replace(ask, model=ask.model or base)) for ask in asks))

    ours, theirs = (serving(base, scene.prompts, ask_all) for base in (scene.base, scene.held))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine[0].num_tokens, mine[0].num_virtual) == (other[0].num_tokens, other[0].num_virtual)
        both = zip((*mine[0].scores, *mine[2]), (*other[0].scores, *other[2]), strict=False)
        for one, two in takewhile(lambda pair: pair[0].id == pair[1].id, both):
            assert (one.logprob is None) == (two.logprob is None)
            assert one.logprob is None or one.logprob == pytest.approx(two.logprob, abs=NEAR)
            assert len(one.top) == len(two.top)
    assert alike([(text, finish) for _, text, _, finish in theirs], [(text, finish) for _, text, _, finish in ours])
    assert any(begun.scores for begun, *_ in theirs)
    assert any(scores for _, _, scores, _ in theirs)


def test_prompts_come_and_go_while_it_answers(scene: Scene) -> None:
    (name, old), *_, (_, new) = scene.prompts.items()
    ask = Ask(name, "bring tea", Sampling(1))

    async def do(engine: OwnEngine) -> list[str]:
        said = [(await answered(engine, ask))[1]]
        async with aclosing(engine.ask(replace(ask, sampling=Sampling(400)))) as left:
            async for event in left:
                if isinstance(event, Said):
                    break
        await engine.add(name, new)
        said.append((await answered(engine, ask))[1])
        await engine.remove(name)
        assert len(engine.models()) == 1
        return said

    wanted = [serving(scene.base, {name: path}, lambda engine: answered(engine, ask))[1] for path in (old, new)]
    assert serving(scene.held, {name: old}, do) == wanted
    assert wanted[0] != wanted[1]


def test_over_http_and_on_the_command_line(scene: Scene) -> None:
    name, path = next(reversed(scene.prompts.items()))
    words = [f"{name}={path}", "--engine", "llama"]
    wanted = generate(scene.base, load_prompt(path, scene.base), ["bring tea"], Sampling(8))[0]
    with serving_it(scene.folder, *words) as (address, _):
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        how: dict[str, Any] = {"model": name, "messages": [{"role": "user", "content": "bring tea"}], "max_tokens": 8, "temperature": 0}
        assert [choice.message.content for choice in client.chat.completions.create(**how, n=2).choices] == [wanted] * 2
        assert "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**how, stream=True)) == wanted
    for verb, given in (("generate", ["bring tea"]), ("chat", [])):
        command = [sys.executable, "-m", "softprompt", verb, str(path), *given, "--engine", "llama", "--max-new-tokens", "8"]
        done = subprocess.run(command, input="bring tea\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert wanted.strip("\n").split("\n")[0] in done.stdout


# ---- what is checked, and refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_prompt_of_another_base_is_told_by_its_bos(
    bases: Callable[..., FrozenBase], tmp_path: Path, monkeypatch: Any, deep: bool
) -> None:
    """Of a file that was never unpacked here nothing else is known."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    file, other = tiny_gguf(tmp_path / "base.gguf", bases()), tiny_gguf(tmp_path / "other.gguf", bases(seed=5))
    mine = some_prompt(tmp_path / "mine", unpacked(file), deep=deep, position="after_bos")
    theirs = some_prompt(tmp_path / "theirs", unpacked(other), deep=deep, position="after_bos")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "another"))
    held = held_by_llama(file)
    assert not held.fingerprints
    if load_prompt(mine, held).soft.bos_id is None:
        pytest.skip("this transformers does not read from a GGUF file that its texts begin with BOS")
    with pytest.raises(ArtifactError, match="whose weights differ from those of"):
        load_prompt(theirs, held)
    assert load_prompt(theirs, held, allow_other_base=True).soft.length == LENGTH


def test_a_file_that_was_unpacked_here_is_known_by_its_weights(bases: Callable[..., FrozenBase], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    file, other = tiny_gguf(tmp_path / "base.gguf", bases()), tiny_gguf(tmp_path / "other.gguf", bases(seed=5))
    base = unpacked(file)
    held = held_by_llama(file.rename(tmp_path / "moved.gguf"))
    assert held.fingerprints == {base.fingerprint}
    load_prompt(some_prompt(tmp_path / "own", base, position="start"), held)
    with pytest.raises(ArtifactError, match="whose weights differ from those of"):
        load_prompt(some_prompt(tmp_path / "theirs", unpacked(other), position="start"), held)


def test_what_it_cannot_serve_is_refused_in_a_sentence(scene: Scene, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="is no GGUF file: --engine llama serves those alone"):
        load_gguf(ModelConfig(name=str(tiny.tiny_folder(tmp_path / "folder"))))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(scene.file.read_bytes()[:-4000])
    with pytest.raises(ModelError, match=r"cut\.gguf: llama\.cpp .* cannot load it: "):
        context.Context(cut, 256, "f16", 1, gpu=False)
    with pytest.raises(ModelError, match="cannot be loaded as a model"):
        held_by_llama(cut)
    monkeypatch.setitem(context.DEFAULTS, context.ContextSettings, {**context.DEFAULTS[context.ContextSettings], "n_ctx": 4096})
    context.library.cache_clear()
    with pytest.raises(ModelError, match=r"is a build that --engine llama does not know: pip install xllamacpp==2026"):
        held_by_llama(scene.file)
    context.library.cache_clear()


def test_a_quantised_file_stays_as_it_is(bases: Callable[..., FrozenBase], tmp_path: Path, monkeypatch: Any) -> None:
    """Its table in 8 bits: rows are compared with what it holds, prompts trained on the unpacked file fit."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "base.gguf", bases(hidden_size=32), GGMLQuantizationType.Q8_0)
    base, held = unpacked(file), held_by_llama(file)
    for deep in (False, True):
        folder = some_prompt(tmp_path / f"p{deep}", base, position="after_bos", deep=deep)
        ours, theirs = (scores_behind(one, load_prompt(folder, one).soft) for one in (base, held))
        assert (ours - theirs).abs().max() < 0.1 * ours.abs().max()


def scores_behind(base: Any, soft: Any) -> torch.Tensor:
    batch = OpenBatch(base)
    batch.admit([Question(((soft, ()),), ((40, 50, 60),), Sampling(2))])
    batch.advance()
    return batch.rows.logits()[0]
