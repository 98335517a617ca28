"""Writes the kept folders of this version, tests/kept/VERSION: python tests/kept/make.py. What is kept is never written again."""

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import softprompt  # noqa: E402

KEPT = HERE / softprompt.__version__
if KEPT.exists():
    sys.exit(f"{KEPT} is kept as it is: a change of format comes with a new version")

import tiny  # noqa: E402
from other_engines import tiny_gguf  # noqa: E402

from softprompt import cli, load_base, load_config, train  # noqa: E402
from softprompt.engine.model import FrozenBase  # noqa: E402

PLACE = Path("/tmp/softprompt-kept")  # where it is made: what is written holds paths, which should tell nothing of a machine
SMALL = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
LABELLED = [
    {"text": f"{'very ' * (n % 3)}{('good', '好', 'bad', '坏')[n % 4]} {n}", "label": "no" if n % 4 > 1 else "yes"} for n in range(20)
]
COMMON = ("model.device=cpu", "model.dtype=float32", "train.examples_per_step=4", "train.keep=1")
EVALUATED = ("--answers", "--max-new-tokens", 4, "--metric", "accuracy", "--metric", "loss", "--metric", "exact_match")
BANK = (
    'prompt.bank=[{name = "rows", prompt = {length = 3, init = "random"}}, {name = "deep", prompt = {length = 2, method = "prefix"}}]',
    "prompt.text=Say 水.",
    "prompt.position=after_bos",
    "data.template=chat",
    "train.steps=6",
    "train.save_every=2",
    "train.eval_every=3",
)


def make(place: Path) -> None:
    """Everything that this version writes and a later one reads, below `place`."""
    tiny.tiny_folder(place / "base", chat=True, **SMALL, dtype="float16")
    base = load_base(load_config(None, [f"model.name={place / 'base'}", *COMMON[:2]]).model)
    for name, rows in (("labelled", LABELLED), ("turns", tiny.some_rows(20))):
        tiny.write_rows(place / f"{name}.jsonl", rows[:12])
        tiny.write_rows(place / f"{name}-held.jsonl", rows[12:])
    _runs(place)
    verb("eval", place / "finished", *EVALUATED)
    verb("inspect", place / "finished")
    _answers(place)
    _exports(place, base)
    for left in (*place.rglob(".lock"), *place.rglob("*.lock"), place / "base.gguf"):
        left.unlink(missing_ok=True)


def _runs(place: Path) -> None:
    """A finished run of one prompt on labelled rows; a bank of rows and keys and values, finished, and stopped behind a checkpoint."""

    def settings(name: str, rows: str, *own: str) -> list[str]:
        data = (f"data.train={place / rows}.jsonl", f"data.eval={place / rows}-held.jsonl")
        return [f"model.name={place / 'base'}", *COMMON, *data, f"train.out={place / name}", *own]

    labelled = ("prompt.text=Yes 或 no?", "prompt.length=4", "train.steps=4", "train.eval_every=2", "data.max_length=40")
    list(train(load_config(None, settings("finished", "labelled", *labelled))))
    list(train(load_config(None, settings("bank", "turns", *BANK))))
    tiny.stop_after(load_config(None, settings("stopped", "turns", *BANK)), 5)


def _answers(place: Path) -> None:
    """Answers to a file, all of them, and the same as a kill leaves them."""
    folder = place / "answers"
    folder.mkdir()
    (folder / "questions.txt").write_text("bring tea\nbring 水\nplease bring milk\n", encoding="utf-8")
    asked = ("--in", folder / "questions.txt", "--max-new-tokens", 4)
    verb("generate", place / "finished", *asked, "--out", folder / "whole.jsonl")
    whole = (folder / "whole.jsonl").read_bytes()
    (folder / "half.jsonl").write_bytes(whole[: whole.index(b"\n") + 8])
    shutil.copy(folder / "whole.jsonl.settings.json", folder / "half.jsonl.settings.json")


def _exports(place: Path, base: FrozenBase) -> None:
    """The same prompt for every other engine."""
    for kind in ("vocab", "vllm", "npy", "torch"):
        verb("export", place / "finished", "--to", kind, "--out", place / "exports" / kind)
    file = tiny_gguf(place / "base.gguf", base)
    verb("export", place / "finished", "--to", "gguf", "--gguf", file, "--out", place / "exports" / "gguf")


def verb(*words: object) -> None:
    """A command of ours, in this process."""
    sys.argv = ["softprompt", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    shutil.rmtree(PLACE, ignore_errors=True)
    make(PLACE)
    assert not [file for file in PLACE.rglob("*.json") if str(HERE.parents[1]) in file.read_text(encoding="utf-8")]
    shutil.copytree(PLACE, KEPT)
    shutil.rmtree(PLACE)
    sizes = {file: file.stat().st_size for file in KEPT.rglob("*") if file.is_file()}
    print(json.dumps({str(file.relative_to(KEPT)): number for file, number in sizes.items()}, indent=1), sum(sizes.values()))
