"""One typed tree: what is refused and how it is said, and who wins over whom."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from softprompt.config import Config, ModelConfig, load_config
from softprompt.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"stpes": 1}}, r"unknown key train\.stpes: did you mean train\.steps\?"),
        ({"optim": {"learning_rate": 1.0}}, r"unknown key optim\.learning_rate: "),
        ({"trian": {"steps": 1}}, r"unknown key trian: did you mean train\?"),
        ({"xyzzy": {}}, "unknown key xyzzy: sections are model, data, prompt, optim, train"),
        ({"train": {"steps": "5"}}, r"train\.steps: input should be a valid integer \(got '5'\)"),
        ({"train": {"steps": True}}, r"train\.steps: input should be a valid integer \(got True\)"),
        ({"train": {"steps": 0}}, r"train\.steps: .*greater than or equal to 1 \(got 0\)"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr: input should be a valid number"),
        ({"prompt": {"init": "zeros"}}, r"prompt\.init\.0: input should be 'text', 'labels', .* \(got 'zeros'\)"),
        ({"data": {"train": 5}}, r"data\.train: input should be a valid string"),
        ({"data": {"label_words": {"0": 1}}}, r"data\.label_words\.0: input should be a valid string"),
        ({"train": {"trackers": ["comet"]}}, r"train\.trackers\.0: input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio'"),
        ({"train": 5}, "train: "),
        ({"data": {"eval": "a.jsonl", "eval_fraction": 0.1}}, r"data: set data\.eval or data\.eval_fraction, not both"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(tree, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tree)


def test_all_mistakes_are_told_at_once_with_the_file(tmp_path):
    path = write(tmp_path, "[train]\nsteps = 'a'\nepochs = 0\n")
    with pytest.raises(ConfigError, match=r"run\.toml: train\.epochs: .*; .*run\.toml: train\.steps: "):
        load_config(path)


@pytest.mark.parametrize(("text", "place"), [("[train]\nsteps = \n", "line 2, column 9"), ("[train\n", "line 1, column 7")])
def test_bad_toml_is_refused_with_its_position(tmp_path, text, place):
    with pytest.raises(ConfigError, match=rf"run\.toml: not valid TOML: .*{place}"):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "run.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ConfigError, match=r"run\.toml: not valid TOML"):
        load_config(tmp_path / "run.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*gone\.toml: No such file"):
        load_config(tmp_path / "gone.toml")


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = load_config(write(tmp_path, "[train]\nsteps = 5\nseed = 7\n"), ["train.steps=6", "train.steps=8"])
    assert (config.train.steps, config.train.seed, config.train.epochs) == (8, 7, None)


def test_overrides_leave_the_given_mapping_alone():
    tree = {"train": {"steps": 5}}
    assert load_config(tree, ["train.steps=6"]).train.steps == 6
    assert tree == {"train": {"steps": 5}}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train=123", "123"),
        ("data.train=2024-01-01", "2024-01-01"),
        ("data.train='123'", "123"),
        ("data.train=a b.jsonl[2:5]", "a b.jsonl[2:5]"),
        ("model.name=true", "true"),
        ('prompt.text="two words"', "two words"),
        ("prompt.text=x = 1, y = 2 # both", "x = 1, y = 2 # both"),
        ("prompt.text={a = 1}", "{a = 1}"),
        ("prompt.text=", ""),
        ("prompt.text=说中文", "说中文"),
        ('prompt.text="a\\nb"', "a\nb"),
        ('prompt.text="a"\nb = 1', '"a"\nb = 1'),
        ("data.template={{ prompt }} = ", "{{ prompt }} = "),
        ("prompt.init=random", ("random",)),
        ('prompt.init=["labels", "text"]', ("labels", "text")),
        ("train.steps=100", 100),
        ("optim.lr=1", 1.0),
        ("optim.lr=3e-2", 0.03),
        ("model.trust_remote_code=true", True),
        ('train.trackers=["wandb"]', ("wandb",)),
        ('data.label_words={0 = "bad", 1 = "good"}', {"0": "bad", "1": "good"}),
    ],
)
def test_an_override_has_the_type_of_its_key(override, value):
    section, key = override.partition("=")[0].split(".")
    got = getattr(getattr(load_config(None, [override]), section), key)
    assert (got, type(got)) == (value, type(value))


def test_single_label_words_can_be_overridden():
    config = load_config({"data": {"label_words": {"0": "bad"}}}, ["data.label_words.0=awful", "data.label_words.1=1"])
    assert config.data.label_words == {"0": "awful", "1": "1"}


@pytest.mark.parametrize("override", ["train.steps", "steps=5", "=5", ""])
def test_an_override_without_section_key_and_value_is_refused(override):
    with pytest.raises(ConfigError, match=r"is not an override: write section\.key=value"):
        load_config(None, [override])


def test_an_override_below_a_value_is_refused():
    with pytest.raises(ConfigError, match="name is a value, not a table"):
        load_config({"model": {"name": "a"}}, ["model.name.x=1"])


def test_an_unknown_override_is_refused_like_an_unknown_key():
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr\?"):
        load_config(None, ["optim.rl=0.1"])


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.steps = 3


@pytest.mark.parametrize("text", ['多行\n"quotes" \\ and\ttabs ', "windows\r\nlines", '"""', "\n leading", ""])
def test_to_toml_round_trips(tmp_path, text):
    overrides = ["train.steps=3", "optim.lr=1e-3", 'data.label_words={"a b" = "c"}', 'train.trackers=["wandb"]']
    config = load_config({"prompt": {"text": text}, "data": {"template": text}}, overrides)
    assert load_config(write(tmp_path, config.to_toml())) == config


@pytest.mark.parametrize(
    ("model", "location"),
    [
        ({"name": "org/base"}, ("org/base", None)),
        ({"name": "org/base", "gguf_file": "q4.gguf"}, ("org/base", "q4.gguf")),
        ({"name": "models/q4.gguf"}, ("models", "q4.gguf")),
        ({"gguf_file": "models/q4.gguf"}, ("models", "q4.gguf")),
        ({"gguf_file": "q4.gguf"}, (".", "q4.gguf")),
    ],
)
def test_a_base_is_named_in_several_ways(model, location):
    assert ModelConfig(**model).location == location


def test_a_base_must_be_named():
    with pytest.raises(ConfigError, match=r"model\.name is not set: give a hub id, a local folder, or a GGUF file"):
        _ = ModelConfig().location


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path):
    config = load_config(path)
    assert config.data.train
    assert config.model.location


def test_an_examples_folder_with_files_has_a_configuration():
    folder = Path(__file__).parent.parent / "examples"
    assert EXAMPLES or not any(folder.glob("*"))


def test_a_rate_that_is_left_out_is_that_of_the_method():
    bank = [{"name": "rows"}, {"name": "deep", "prompt": {"method": "prefix"}}, {"name": "own", "optim": {"relative_lr": 0.03}}]
    members = load_config({"prompt": {"bank": bank}}).members()
    assert {name: member.optim.relative_lr for name, member in members.items()} == {"rows": 0.2, "deep": 0.05, "own": 0.03}
    (alone,) = load_config({"prompt": {"method": "prefix"}}).members().values()
    assert alone.optim.relative_lr == 0.05
