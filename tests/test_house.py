"""The house: import order, public names, a map that is true, examples that load, settings that do something."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

import softprompt
from softprompt.artifact import load_prompt, read_card
from softprompt.config import Config, load_config
from softprompt.training import train

ROOT = Path(__file__).parent.parent
HERE = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
PACKAGE = ROOT / "softprompt"

# A module imports only from layers below its own; a folder is one module.
LAYERS = [
    {"errors"},
    {"config", "extras", "hub", "atomic", "formats", "scripts", "thinking", "literal", "events", "sampling", "spellings"} | {"stopping"},
    {"engine", "metrics"},
    {"data", "predictions", "trackers", "peft_here", "locations"},
    {"results"},
    {"templates"},
    {"runlog", "encode", "flat"},
    {"prepared", "card"},
    {"artifact"},
    {"rows"},
    {"show", "checkpoint", "init", "generation", "inspection", "export"},
    {"answering", "contestants", "conversation", "llama"},
    {"answers"},
    {"distil"},
    {"evaluation", "harness"},
    {"draft", "job", "doctor", "arguments", "foreign", "sharing"},
    {"training", "plan", "recycle", "report"},
    {"sweep"},
    {"screen"},
    {"demo", "serve"},
    {"cli"},
]
ENGINE_MAY_IMPORT = {"errors", "config", "extras", "hub", "atomic", "sampling", "spellings"}
ENGINE = [
    {"tokens", "launched", "watch", "world", "precise", "head", "memory", "unpack", "gguf_reader", "family", "quantized", "optim"}
    | {"layers", "tried"},
    {"processes", "offload", "places", "slots", "divergence"},
    {"prefix", "batch"},
    {"trial", "shelf"},
    {"model"},
    {"loss", "prompt", "loading", "likelihood", "choose", "recited"},
    {"rows"},
    {"reading", "step"},
    {"decode", "dryrun", "teacher"},
    {"matching"},
]


def folders() -> list[Path]:
    """The package's folders that hold code."""
    return sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def modules() -> dict[str, list[Path]]:
    """The files of every module."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")}
    return {**found, **{folder.name: sorted(folder.glob("*.py")) for folder in folders()}}


def imported(file: Path) -> set[str]:
    """What of ours a file imports, as "module" or "engine.module": `from softprompt.x import y` as well as `from softprompt import x`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    of_ours = {name.removeprefix("softprompt.") for name in found if name.startswith("softprompt.")}
    public = {name: home for name, home in softprompt._HOMES.items()}
    of_ours = {public.get(name, name) for name in of_ours}
    in_engine = {f"engine.{path.stem}" for path in (PACKAGE / "engine").glob("*.py")}
    return {".".join(name.split(".")[:2]) if name.startswith("engine.") else name.split(".")[0] for name in of_ours} & (
        in_engine | set(modules())
    )


def test_every_module_has_a_layer():
    assert set().union(*LAYERS) == set(modules())
    assert set().union(*ENGINE) == {path.stem for path in (PACKAGE / "engine").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    layer = next(index for index, names in enumerate(LAYERS) if name in names)
    below = set().union(*LAYERS[:layer])
    found = {one.split(".")[0] for file in modules()[name] for one in imported(file)}
    assert found <= below | {name}, f"{name} imports {found - below}"


@pytest.mark.parametrize("name", sorted(set().union(*ENGINE)))
def test_the_engine_imports_nothing_else(name):
    layer = next(index for index, names in enumerate(ENGINE) if name in names)
    below = {f"engine.{one}" for names in ENGINE[:layer] for one in names}
    found = imported(PACKAGE / "engine" / f"{name}.py") - {"engine"}
    assert found <= ENGINE_MAY_IMPORT | below, f"engine/{name} imports {found - below - ENGINE_MAY_IMPORT}"
    assert not (PACKAGE / "engine" / "__init__.py").read_text(encoding="utf-8")


def test_both_ways_to_import_are_seen(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("from softprompt import training, load_base\nfrom softprompt.engine import head\nfrom softprompt.data import Example\n")
    assert imported(file) == {"training", "engine.loading", "engine.head", "data", "engine"}


def test_files_and_functions_stay_readable():
    found = {}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        found[path.name] = text.count("\n") / 400
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        found |= {f"{path.name}: {node.name}": (node.end_lineno - node.lineno + 1) / 50 for node in functions}
    assert len(found) > 500
    assert not {name for name, share in found.items() if share > 1}


def test_the_version_to_cite_is_that_of_the_package():
    assert f"version: {softprompt.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_types_are_there_for_others():
    assert (PACKAGE / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_public_names_are_pinned():
    names = [
        "Config",
        "Contest",
        "Ensemble",
        "Error",
        "Evaluated",
        "Event",
        "Finished",
        "Found",
        "Message",
        "Preparing",
        "Sampled",
        "Sampling",
        "Saved",
        "Searching",
        "Started",
        "Step",
        "Studying",
        "Warned",
        "encode_file",
        "evaluate",
        "generate",
        "load_base",
        "load_config",
        "load_examples",
        "load_prompt",
        "show_progress",
        "train",
    ]
    assert names == softprompt.__all__
    assert all(callable(getattr(softprompt, name)) for name in names if name != "Event")


def test_nothing_heavy_is_imported_for_help_config_or_data():
    code = (
        "import sys, softprompt, softprompt.cli, softprompt.config, softprompt.data, softprompt.errors; softprompt.load_config;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'huggingface_hub') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_file_map_is_true_and_in_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^( {2,4})(\w+(?:\.py|/)) {2,}\S", text[text.index("softprompt/\n") :], flags=re.MULTILINE)
    mapped, in_engine = ([name for indent, name in lines if len(indent) == wide] for wide in (2, 4))
    assert set(mapped) == {path.name for path in PACKAGE.glob("*.py")} | {f"{folder.name}/" for folder in folders()}
    assert set(in_engine) == {path.name for path in (PACKAGE / "engine").glob("*.py")} - {"__init__.py"}
    for names, layers, kinds in ((mapped, LAYERS, modules()), (in_engine, ENGINE, set().union(*ENGINE))):
        order = [name.removesuffix(".py").removesuffix("/") for name in names]
        heights = [next(index for index, layer in enumerate(layers) if name in layer) for name in order if name in kinds]
        assert heights == sorted(heights), order


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


def test_the_readme_commands_run_and_say_nothing_on_standard_error(tmp_path):
    """Each in a process of its own, with whatever is installed beside; the last is tried for every format that needs no GGUF file."""
    (block,) = [block for block in blocks("") if "softprompt init" in block]
    lines = [line.split("#")[0].split() for line in block.splitlines()]
    lines += [[*lines[-1][:-3], form, "--out", f"served-{form}"] for form in ("vllm", "npy", "torch")]
    tiny.tiny_folder(tmp_path / "my-model")
    for name, number in (("rows", 12), ("questions", 3)):
        tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.some_rows(number))
    (tmp_path / "handbook.md").write_text("# Tea\n\nAnswer in one word.\n", encoding="utf-8")
    settings = blocks("toml")[0] + "\ntrain.steps = 2\n"
    said = {}
    for line in lines:
        if "serve" in line:  # which ends when it is told to: tests/test_serve_verb.py
            continue
        done = subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, input="Hello\n", cwd=tmp_path, env=HERE)
        progress = re.compile(r"\d+ of \d+ answered.*\n")  # now and then, where it takes long
        said[" ".join(line)] = (done.returncode, progress.sub("", done.stderr))
        (tmp_path / "my.toml").write_text(settings, encoding="utf-8")
    assert len(said) == 12
    assert set(said.values()) == {(0, "")}, said


# ---- every setting has an effect that can be seen ------------------------------------------------------------------

Effect = tuple[str, Callable[[Config], object]]


def rows_after(config: Config) -> object:
    list(train(config))
    from softprompt import load_base

    prompt = load_prompt(config.train.out, load_base(config.model), allow_other_base=True)
    return prompt.soft.learned_PD.tolist(), prompt.soft.position


def distilled_card(config: Config) -> object:
    list(train(config))
    return read_card(config.train.out).distilled


def events_after(config: Config) -> object:
    return [(type(event).__name__, getattr(event, "step", 0)) for event in train(config)]


def rows_loaded(config: Config) -> object:
    from softprompt.show import show

    shown = show(config)
    held = shown.held.encoded if shown.held else None
    return [row.ids for row in shown.train.encoded], held and [row.ids for row in held]


def rows_of_steps(config: Config) -> object:
    from softprompt.events import returned
    from softprompt.job import prepare

    setup = returned(prepare(config, None))
    return [row.source for step in range(3) for row in setup.rows_of(step)[0]]


def how_a_hub_is_read(config: Config) -> object:
    import datasets

    asked: list[bool] = []

    def load_dataset(*names: object, split: str, streaming: bool) -> object:
        asked.append(streaming)
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        rows_loaded(config)
    return asked


def what_is_kept(config: Config) -> object:
    """The folders of rows in a fresh cache."""
    from softprompt import prepared

    home = Path(config.train.out).parent / f"cache-{config.data.cache}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SMALL", 1)
        patch.setenv("SOFTPROMPT_CACHE", str(home))
        rows_loaded(config)
    return len(list(home.glob("rows/*/ids.npy")))


def files_after(config: Config) -> object:
    list(train(config))
    return sorted(path.name.split(".")[0] for path in Path(config.train.out).rglob("*"))


def finished_runs(config: Config) -> object:
    list(train(config))
    return sorted(path.parent.name for path in Path(config.train.out).parent.glob("*/result.json"))


def location(config: Config) -> object:
    return config.model.location


def base_of(config: Config) -> object:
    """What is loaded, or why nothing is."""
    from softprompt import load_base

    try:
        base = load_base(config.model)
    except softprompt.Error as error:
        return str(error)
    return type(base.model).__name__, base.dtype, [type(module).__name__ for module in base.model.modules()]


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


def batches_read(config: Config) -> object:
    """The shapes of all that the base reads in training."""
    from softprompt.engine.model import FrozenBase

    shapes, read = [], FrozenBase.continue_from

    def watched(self, prefix, which_B, ids_BT, *more, **how):
        shapes.append(tuple(ids_BT.shape))
        return read(self, prefix, which_B, ids_BT, *more, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrozenBase, "continue_from", watched)
        list(train(config))
    return shapes


def numbers_kept(config: Config) -> object:
    return tiny.numbers_kept(lambda: list(train(config)))


def prompts_after(config: Config) -> object:
    *_, finished = train(config)
    return list(finished.result["prompts"])


EFFECTS: dict[str, Effect] = {
    "model.name": ("other-folder", location),
    "model.gguf_file": ("a.gguf", location),
    "model.dtype": ("bfloat16", base_of),
    "model.quantization": ("nf4", base_of),
    "model.device": ("no-such-device", error_of),
    "model.trust_remote_code": ("true", base_of),
    "data.train": ("{other}", rows_loaded),
    "data.eval": ("{other}", rows_loaded),
    "data.eval_fraction": ("0.25", rows_loaded),
    "data.template": ("{{{{ prompt }}}}:", rows_loaded),
    "data.date": ("2001-02-03", rows_loaded),
    "data.max_length": ("40", rows_loaded),
    "data.limit": ("3", rows_loaded),
    "data.weights": ("[3, 1]", rows_of_steps),
    "data.stream": ("true", how_a_hub_is_read),
    "data.cache": ("false", what_is_kept),
    "data.label_words": ('{{"0" = "no", "1" = "yes"}}', rows_loaded),
    "data.columns": ('{{prompt = "completion"}}', rows_loaded),
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
    "optim.frozen": ("1", rows_after),
    "optim.values": ("4.0", rows_after),
    "train.examples_per_step": ("2", rows_after),
    "train.epochs": ("2", events_after),
    "train.steps": ("5", events_after),
    "train.seed": ("7", rows_after),
    "train.tokens_per_batch": ("10", batches_read),
    "train.head_tolerance": ("0.9", rows_after),
    "train.checkpoint_activations": ("true", numbers_kept),
    "train.log_every": ("1", log_lines),
    "train.eval_every": ("1", events_after),
    "train.minutes": ("1e-9", events_after),
    "train.patience": ("1", events_after),
    "train.save_every": ("1", events_after),
    "train.keep": ("1", files_after),
    "train.out": ("{out}", finished_runs),
    "train.trackers": ("['tensorboard']", files_after),
    "distil.text": ("Be short.", rows_after),
    "distil.file": ("{other}", rows_after),
    "distil.examples": ("3", rows_after),
    "distil.questions": ("{other}", rows_after),
    "distil.count": ("3", rows_after),
    "distil.max_new_tokens": ("3", rows_after),
    "distil.on_policy": ("0.7", rows_after),
    "distil.keep_text": ("true", distilled_card),
    "distil.teacher": ("http://127.0.0.1:9", error_of),
}
ELSEWHERE = {
    "model.revision",  # a hub has revisions, a local folder none: test_hub.py, test_a_revision_is_asked_for
    "distil.teacher_model",  # which a server must have: test_distil.py, test_a_server_that_does_not_answer_or_serves_another_model
}


def test_every_field_is_covered():
    fields = {f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields}
    assert set(EFFECTS) | ELSEWHERE == fields


@pytest.fixture(scope="module")
def observed() -> dict[Callable[[Config], object], object]:
    """What the plain run of three steps shows to each that looks at it: looked at once."""
    return {}


def strange_base(folder: Path) -> Path:
    """A base whose model code comes with it."""
    tiny.tiny_folder(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"}
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "strange", "auto_map": names}), encoding="utf-8")
    (folder / "strange.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n\n\n"
        "class Strange(LlamaForCausalLM):\n    config_class = StrangeConfig\n",
        encoding="utf-8",
    )
    return folder


def clock_base(folder: Path) -> Path:
    """A base whose chat template tells the date."""
    tokenizer = tiny.tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tiny.tiny_folder(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_config(key: str, make_config: Callable[..., Config], tmp_path: Path) -> Config:
    """What a setting is added to; another than three plain steps only where the setting needs something to show its effect on."""
    kind = {"prompt": "a", "completion": "b"}
    match key:
        case "train.steps" | "train.epochs":
            return make_config()
        case "data.eval_fraction":
            tree = make_config().model_dump(exclude_none=True)
            del tree["data"]["eval"]
            return load_config(tree)
        case "data.label_words":
            labelled = tiny.write_rows(tmp_path / "labelled.jsonl", [{"text": "good", "label": number % 2} for number in range(6)])
            return make_config(f"data.train={labelled}")
        case "prompt.file":
            list(train(make_config("train.steps=2", f"train.out={tmp_path / 'other'}")))
        case "train.patience":  # rows that stand still never become better
            return make_config("train.steps=9", "optim.lr=1e-30", "train.eval_every=1")
        case "data.weights":
            both = json.dumps([str(tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.some_rows(6))) for name in "ab"])
            return make_config(f"data.train={both}", "train.steps=3")
        case "data.stream":
            return make_config("data.train=team/rows", "train.steps=3")
        case "train.keep":
            return make_config("train.steps=3", "train.save_every=1")
        case "data.date":
            return make_config(f"model.name={clock_base(tmp_path / 'clock')}", "data.template=chat")
        case "data.max_rejected":
            bad = tiny.write_rows(tmp_path / "bad.jsonl", [*[kind] * 5, {"prompt": "a"}])
            return make_config(f"data.train={bad}", "train.steps=2")
        case "train.head_tolerance":  # with a base that is sure of its tokens, most others can be left out
            return make_config("train.steps=3", f"model.name={tiny.tiny_folder(tmp_path / 'sure', initializer_range=1.0)}")
        case "optim.values":
            return make_config("train.steps=3", "prompt.method=prefix")
        case "distil.questions" | "distil.count" | "distil.max_new_tokens" | "distil.on_policy" | "distil.keep_text" | "distil.teacher":
            return make_config("train.steps=3", "distil.text=Be kind.")
        case "model.trust_remote_code":
            return make_config(f"model.name={strange_base(tmp_path / 'strange')}")
    return make_config("train.steps=3")


SHARED = {rows_after, events_after, log_lines, batches_read, numbers_kept, prompts_after}


@pytest.mark.parametrize("key", sorted(EFFECTS))
def test_every_field_has_an_effect(key, make_config, tmp_path, observed):
    value, observe = EFFECTS[key]
    other = tiny.write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    plain = plain_config(key, make_config, tmp_path)
    filled = value.format(other=other, prompt=tmp_path / "other", out=tmp_path / "elsewhere")
    own = [] if key == "train.out" else [f"train.out={tmp_path / 'changed'}"]
    changed = load_config(plain.model_dump(exclude_none=True), [f"{key}={filled}", *own])
    if observe in SHARED and plain == make_config("train.steps=3"):
        if observe not in observed:
            observed[observe] = observe(plain)
        assert observed[observe] != observe(changed)
    else:
        assert observe(plain) != observe(changed)


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(config_page(), encoding="utf-8")
