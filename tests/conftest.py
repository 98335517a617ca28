"""Shared fixtures: one tiny base per family and session, a run's settings, and a home of its own for caches."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from softprompt.artifact import say_precision
from softprompt.config import Config, load_config
from softprompt.engine.model import FrozenBase

# Quick, without browser, tracker, other engine, or extra beyond data, metrics and near-duplicates; what systems differ in is in them.
FAST = (
    "artifact", "bank", "cli", "config", "data", "decode", "deep", "draft", "encode", "events", "evaluation", "extras", "generation",
    "invariants", "package", "platforms", "prepared", "run", "shapes", "shell", "show", "step", "stopping", "templates", "turns",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in FAST:
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def one_precision() -> Iterator[None]:
    """model.dtype = "auto" is float32 in every test of this process, also where the processor multiplies in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture(autouse=True)
def unsaid() -> None:
    """What is said once in a process is said in every test."""
    say_precision.cache_clear()


@pytest.fixture(autouse=True)
def standard_error_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """absl's handler keeps what standard error was when absl came, and closes it when alembic (of mlflow) sets logging up anew, unless it
    is standard error at that moment, which pytest's own is not while `capsys` is at work."""
    if absl := sys.modules.get("absl.logging"):
        monkeypatch.setattr(absl.get_absl_handler().python_handler, "stream", sys.__stderr__)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenBase]:
    """bases("llama", adds_bos=False): loaded once per kind."""
    loaded: dict[str, FrozenBase] = {}

    def get(family: str = "llama", **how: Any) -> FrozenBase:
        key = f"{family}{sorted(how.items())}"
        if key not in loaded:
            loaded[key] = tiny.tiny_base(tmp_path_factory.mktemp(family), family, **how)
        return loaded[key]

    return get


@pytest.fixture
def make_config(tmp_path: Path, bases: Callable[..., FrozenBase]) -> Callable[..., Config]:
    """make_config("train.steps=3", ...): a small run on the tiny llama."""
    rows = tiny.write_rows(tmp_path / "train.jsonl", tiny.some_rows(24))
    held = tiny.write_rows(tmp_path / "eval.jsonl", tiny.some_rows(7))

    def make(*overrides: str) -> Config:
        own = [
            f"model.name={bases().name}",
            "model.device=cpu",
            "model.dtype=float32",  # said, so that a child process keeps it too
            f"data.train={rows}",
            f"data.eval={held}",
            "prompt.text=Repeat the drink.",
            "optim.relative_lr=0.25",
            "train.examples_per_step=4",
            "train.epochs=1",
            f"train.out={tmp_path / 'run'}",
        ]
        return load_config(None, [*own, *overrides])

    return make


@pytest.fixture
def contrary(tmp_path: Path) -> str:
    """Held-out rows with other answers than the training rows: what is learned makes them worse, the best rows are not the last."""
    return f"data.eval={tiny.write_rows(tmp_path / 'contrary.jsonl', [{'prompt': 'bring tea', 'completion': 'QQQQ'}] * 2)}"


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    """Held-out rows of the same kind as the training rows, none of them a training row."""
    rows = tiny.some_rows(7, lambda n: {key: text.replace("bring", "kindly bring") for key, text in tiny.some_rows(7)[n].items()})
    return f"data.eval={tiny.write_rows(tmp_path / 'fresh.jsonl', rows)}"
