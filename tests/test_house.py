"""The house: import order, public names, a map that is true, examples that load, settings that do something."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

import softprompt
from softprompt.artifact import load_prompt
from softprompt.config import Config, load_config
from softprompt.training import train

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softprompt"

# A module imports only from floors below its own.
FLOORS = [
    {"errors"},
    {"config", "hub", "atomic", "precise", "head", "memory", "metrics"},
    {"data", "unpack", "offload", "prefix", "predictions", "trackers"},
    {"encode", "runlog"},
    {"batch", "model"},
    {"loss", "prompt", "optim", "decode"},
    {"step", "dryrun", "likelihood"},
    {"artifact", "show"},
    {"checkpoint", "init"},
    {"generation", "events", "inspection", "harness", "export"},
    {"contestants"},
    {"answers"},
    {"evaluation"},
    {"job"},
    {"doctor", "lineup", "foreign", "sharing"},
    {"training"},
    {"plan", "recycle", "report"},
    {"screen"},
    {"demo"},
    {"cli"},
]


def rooms() -> list[Path]:
    """The package's folders that hold code."""
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def modules() -> dict[str, list[Path]]:
    """The files of every module; a folder is one module."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return {**found, **{room.name: sorted(room.glob("*.py")) for room in rooms()}}


def test_every_module_has_a_floor():
    assert set().union(*FLOORS) == set(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    floor = next(index for index, names in enumerate(FLOORS) if name in names)
    below = set().union(*FLOORS[:floor]) if floor else set()
    imported = set()
    for node in (node for file in modules()[name] for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt."):
            imported.add(node.module.split(".")[1])
    assert imported <= below | {name}, f"{name} imports {imported - below}"


def test_files_stay_readable():
    long = {path.name: lines for path in PACKAGE.rglob("*.py") if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 430}
    assert not long


def test_public_names_are_pinned():
    names = [
        "Config",
        "Contest",
        "Error",
        "Sampling",
        "evaluate",
        "generate",
        "load_base",
        "load_config",
        "load_examples",
        "load_prompt",
        "train",
    ]
    assert names == softprompt.__all__
    assert all(callable(getattr(softprompt, name)) for name in names)


def test_nothing_heavy_is_imported_for_help_config_or_data():
    code = (
        "import sys, softprompt, softprompt.cli, softprompt.config, softprompt.data, softprompt.errors; softprompt.load_config;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_file_map_is_true():
    for readme in ("README.md", "README.zh.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        mapped = set(re.findall(r"^  ([\w/]+(?:\.py)?) {2,}\S", text[text.index("softprompt/\n") :], flags=re.MULTILINE))
        real = {path.name for path in PACKAGE.glob("*.py")} | {f"{room.name}/" for room in rooms()}
        assert mapped == real, f"{readme}: {mapped ^ real}"


def test_every_example_loads():
    examples = sorted((ROOT / "examples").glob("*.toml"))
    assert examples
    for example in [*examples, PACKAGE / "demo" / "demo.toml"]:
        assert load_config(example).prompt.text


def test_the_alpaca_example_makes_625_steps():
    from softprompt.job import count_steps

    config = load_config(ROOT / "examples" / "alpaca-zh.toml")
    assert config.data.limit == 10_000
    assert count_steps(config, config.data.limit) == 625


def test_the_config_page_is_generated_from_the_fields():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == config_page()


def config_page() -> str:
    lines = [
        "# Configuration",
        "",
        "Made from `softprompt/config.py` by `python tests/test_house.py`; last wins: default, TOML file, `section.key=value`.",
        "",
    ]
    for section, field in Config.model_fields.items():
        lines += [f"## {section}", "", str(field.annotation.__doc__), "", "| key | default | |", "|---|---|---|"]
        for key, item in field.annotation.model_fields.items():
            default = "" if item.default is None else f"`{item.default!r}`"
            description = (item.description or "").replace("\n", " ").replace("|", "\\|")
            assert description, f"{section}.{key} has no description"
            lines.append(f"| `{section}.{key}` | {default} | {description} |")
        lines.append("")
    return "\n".join(lines)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_toml_loads(tmp_path):
    found = blocks("toml")
    assert found
    for number, block in enumerate(found):
        file = tmp_path / f"{number}.toml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


def test_the_readme_python_runs(tmp_path, monkeypatch):
    found = blocks("python")
    assert found
    tiny.tiny_folder(tmp_path / "my-model")
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.some_rows(12))
    tiny.write_rows(tmp_path / "held_out.jsonl", tiny.some_rows(4))
    (tmp_path / "my.toml").write_text(blocks("toml")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for block in found:
        exec(compile(block, "README.md", "exec"), {})


# ---- every setting has an effect that can be seen ------------------------------------------------------------------

Effect = tuple[str, Callable[[Config], object]]


def rows_after(config: Config) -> object:
    list(train(config))
    from softprompt import load_base

    prompt = load_prompt(config.train.out, load_base(config.model), allow_other_base=True)
    return prompt.soft.rows_PH.tolist(), prompt.soft.position


def events_after(config: Config) -> object:
    return [(type(event).__name__, getattr(event, "step", 0)) for event in train(config)]


def rows_loaded(config: Config) -> object:
    from softprompt.show import show

    shown = show(config)
    held = shown.held.encoded if shown.held else None
    return [row.ids for row in shown.train.encoded], held and [row.ids for row in held]


def files_after(config: Config) -> object:
    list(train(config))
    return sorted(path.name.split(".")[0] for path in Path(config.train.out).rglob("*"))


def location(config: Config) -> object:
    return config.model.location


def base_dtype(config: Config) -> object:
    from softprompt import load_base

    return load_base(config.model).dtype


def linear_layers(config: Config) -> object:
    from softprompt import load_base

    return type(load_base(config.model).model.model.layers[0].mlp.up_proj).__name__


def error_of(config: Config) -> object:
    try:
        list(train(config))
    except softprompt.Error as error:
        return str(error)[:60]
    return "no error"


def log_lines(config: Config) -> object:
    from softprompt.screen.console import console
    from softprompt.screen.run import draw_run

    with console.capture() as captured:
        draw_run(train(config), config.train.log_every)
    return captured.get().count("tokens/s")


def batch_shapes(config: Config) -> object:
    from softprompt import load_base
    from softprompt.batch import CPU_BATCH_COST, cut_by_length
    from softprompt.memory import token_budget

    base = load_base(config.model)
    return cut_by_length([9, 8, 7], token_budget(base.model.base_model, base.device, config.train.tokens_per_batch), CPU_BATCH_COST)


def numbers_kept(config: Config) -> object:
    return tiny.numbers_kept(lambda: list(train(config)))


def gradient_left(config: Config) -> object:
    """The gradient of a head that is sure of its tokens: what it leaves out is a question of the tolerance alone."""
    from softprompt.head import Head

    weight = torch.linspace(0, 30, 600)[:, None]
    return Head(weight).losses(torch.ones(1, 1), torch.tensor([598]), config.train.head_tolerance)[1]


def prompts_after(config: Config) -> object:
    *_, finished = train(config)
    return list(finished.result["prompts"])


EFFECTS: dict[str, Effect] = {
    "model.name": ("other-folder", location),
    "model.gguf_file": ("a.gguf", location),
    "model.revision": ("no-such-branch", lambda config: config.model.revision),  # local folders have none; the hub test asks for it
    "model.dtype": ("bfloat16", base_dtype),
    "model.quantization": ("nf4", linear_layers),
    "model.device": ("no-such-device", error_of),
    "model.trust_remote_code": ("true", lambda config: config.model.trust_remote_code),  # handed to transformers as it is
    "data.train": ("{other}", rows_loaded),
    "data.eval": ("{other}", rows_loaded),
    "data.eval_fraction": ("0.25", rows_loaded),
    "data.template": ("{{{{ prompt }}}}:", rows_loaded),
    "data.max_length": ("40", rows_loaded),
    "data.limit": ("3", rows_loaded),
    "data.label_words": ('{{"0" = "no", "1" = "yes"}}', rows_loaded),
    "data.max_rejected": ("1", error_of),
    "prompt.count": ("2", prompts_after),
    "prompt.bank": ('[{{name = "a"}}, {{name = "b", seed = 3}}]', prompts_after),
    "prompt.method": ("prefix", rows_after),
    "prompt.length": ("3", rows_after),
    "prompt.init": ("random", rows_after),
    "prompt.file": ("{prompt}", rows_after),
    "prompt.text": ("Another text.", rows_after),
    "prompt.position": ("after_bos", rows_after),
    "optim.lr": ("0.01", rows_after),
    "optim.relative_lr": ("0.01", rows_after),
    "optim.ema": ("0.5", rows_after),
    "optim.schedule": ("constant", rows_after),
    "optim.warmup_fraction": ("0.9", rows_after),
    "optim.clip_norm": ("1e-9", rows_after),
    "train.examples_per_step": ("2", rows_after),
    "train.epochs": ("2", events_after),
    "train.steps": ("5", events_after),
    "train.seed": ("7", rows_after),
    "train.tokens_per_batch": ("10", batch_shapes),
    "train.head_tolerance": ("0.9", gradient_left),
    "train.checkpoint_activations": ("true", numbers_kept),
    "train.log_every": ("1", log_lines),
    "train.eval_every": ("1", events_after),
    "train.minutes": ("1e-9", events_after),
    "train.patience": ("1", events_after),
    "train.save_every": ("1", events_after),
    "train.out": ("{out}", lambda config: (list(train(config)), Path(config.train.out).name)[1]),
    "train.trackers": ("['tensorboard']", files_after),
}


def test_every_field_is_covered():
    assert set(EFFECTS) == {f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields}


@pytest.mark.parametrize("key", sorted(EFFECTS))
def test_every_field_has_an_effect(key, make_config, tmp_path):
    value, observe = EFFECTS[key]
    kind = {"prompt": "a", "completion": "b"}
    other = tiny.write_rows(tmp_path / "other.jsonl", [kind] * 3)
    common = {"train.steps": "3"} if key not in ("train.steps", "train.epochs") else {}
    if key == "data.eval_fraction":
        tree = make_config().model_dump(exclude_none=True)
        del tree["data"]["eval"]
        plain = load_config(tree)
    elif key == "data.label_words":
        labelled = tiny.write_rows(tmp_path / "labelled.jsonl", [{"text": "good", "label": number % 2} for number in range(6)])
        plain = make_config(f"data.train={labelled}")
    elif key == "prompt.file":
        list(train(make_config("train.steps=2", f"train.out={tmp_path / 'other'}")))
        plain = make_config("train.steps=3")
    elif key == "train.patience":  # rows that stand still never become better
        plain = make_config("train.steps=9", "optim.lr=1e-30", "train.eval_every=1")
    elif key == "data.max_rejected":
        bad = tiny.write_rows(tmp_path / "bad.jsonl", [*[kind] * 5, {"prompt": "a"}])
        plain = make_config(f"data.train={bad}", "train.steps=2")
    else:
        plain = make_config(*(f"{name}={setting}" for name, setting in common.items()))
    filled = value.format(other=other, prompt=tmp_path / "other", out=tmp_path / "elsewhere")
    changed = load_config(
        plain.model_dump(exclude_none=True), [f"{key}={filled}", *([] if key == "train.out" else [f"train.out={tmp_path / 'changed'}"])]
    )
    assert observe(plain) != observe(changed)


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(config_page(), encoding="utf-8")
