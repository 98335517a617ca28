"""The configuration: one typed tree, read once, never changed afterwards.

Precedence, last wins: the defaults below, then the TOML file, then ``section.key=value`` overrides.
An unknown key is an error that names the nearest known one. This module does not import torch.
"""

import datetime
import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from softprompt.errors import ConfigError

RANGE = re.compile(r"^(?P<source>.*?)\[(?P<start>\d*):(?P<stop>\d*)\]$")  # behind the name of a data source
Source = Literal["text", "labels", "vocab", "examples", "random", "file", "context", "spread", "states"]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen, strict table of settings; a field's description stands below it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The frozen base."""

    name: str | None = None
    """Hub id or local folder of the base. May be left out when `gguf_file` is a path."""
    gguf_file: str | None = None
    """A GGUF file: a name inside `name`, or a path of its own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base; a prompt is float32. auto: bfloat16 where GPU or CPU multiply in it, else float32; a run remembers it."""
    quantization: Literal["int8", "nf4"] | None = None
    """Hold the base's linear layers in 8 or 4 bits, through bitsandbytes. The head and the embeddings stay as they are. Left out for a
    base that was saved in few bits."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps ... auto takes a GPU where there is one, and all of them where the base does not fit on one."""
    trust_remote_code: bool = False
    """Run model code that comes with the base. Never taken from a prompt or run folder: given anew on every command line."""

    @property
    def location(self) -> tuple[str, str | None]:
        """(folder or hub id, GGUF file name inside it). Raises ConfigError when neither key is set."""
        name, gguf_file = self.name, self.gguf_file
        if name is not None and name.endswith(".gguf") and gguf_file is None:
            name, gguf_file = None, name
        if name is None:
            if gguf_file is None:
                raise ConfigError("model.name is not set: give a hub id, a local folder, or a GGUF file in model.gguf_file")
            path = Path(gguf_file)
            return str(path.parent), path.name
        return name, gguf_file


Sources = str | tuple[str, ...]
SEVERAL = (["data", "train"], ["data", "eval"])  # settings that are text or a list
COLUMNS = ("messages", "instruction", "input", "output", "prompt", "completion", "text", "label", "system", "history")


class DataConfig(Section):
    """The rows, and how they become text."""

    train: Sources | None = None
    """JSON, JSONL, CSV, TSV or Parquet file, plain, .gz or .zst, a pattern of names (`data/*.jsonl`), an address (`s3://`, `hf://`),
    a folder of such files or one that `save_to_disk` wrote, or a hub id; may end in `:split` or `:configuration:split`, and in
    `[from:to]`. Several of them: a list."""
    eval: Sources | None = None
    """Held-out rows, named like `train`."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the different training rows to hold out (seeded by `train.seed`) when `eval` is not set; copies stay on one side."""
    template: str = "human-assistant"
    """human-assistant, chat (the tokenizer's own), inline Jinja, or a `.jinja` file. Jinja that uses `messages` and
    `add_generation_prompt` is a chat template, in the dialect of transformers; any other renders all but the response, from the row's
    fields and the `messages` before it."""
    date: str | None = None
    """The day, e.g. 2026-11-26, that a chat template is told where it asks for the date (Llama 3). Left out: the day on which the run
    begins, which its prompt keeps."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a row at most, BOS included, virtual tokens not; the rest is cut and counted."""
    weights: Annotated[tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...], Field(strict=False)] = ()
    """How much of each source of `train` a step is drawn from, e.g. [3, 1], whatever their sizes. Left out: all rows alike."""
    limit: Positive | None = None
    """Only the first N rows of `train`."""
    stream: bool = False
    """Read hub data sets as they come, instead of downloading them whole: for sets larger than the disk, or the first rows of one."""
    cache: bool = True
    """Whether tokenized rows are kept for the next time, from 2,000 rows on, in $SOFTPROMPT_CACHE or ~/.cache/softprompt: 20 GB at most,
    what was not used for longest goes first."""
    label_words: dict[str, str] = {}
    """For text/label rows: the word that stands for each label, e.g. {0 = "negative", 1 = "positive"}."""
    columns: dict[str, str] = {}
    """Where a row's parts are in files with other names: a column or a Jinja expression for each, e.g. {prompt = "question",
    completion = "answer"}."""
    max_rejected: Annotated[int, Field(ge=0)] = 0
    """Rows that may be rejected before the run is stopped; each is listed with its reason."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value if isinstance(value, list | tuple) and value else [value]
        if value is not None and not all(isinstance(name, str) for name in names):
            raise ValueError("input should be a valid string, or a list of them")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("date", mode="before")
    @classmethod
    def _a_day(cls, value: Any) -> Any:
        if isinstance(value, datetime.date):  # TOML knows days
            return value.isoformat()
        try:
            return value if value is None else datetime.date.fromisoformat(value).isoformat()
        except (ValueError, TypeError):
            raise ValueError("must be a day, e.g. 2026-11-26") from None

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in COLUMNS:
                near = get_close_matches(name, COLUMNS, n=1)
                raise ValueError(f"no part {name}: " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(COLUMNS)}"))
        return value

    @model_validator(mode="after")
    def _one_split(self) -> "DataConfig":
        if self.eval is not None and self.eval_fraction:
            raise ValueError("set data.eval or data.eval_fraction, not both")
        if self.weights and (not isinstance(self.train, tuple) or len(self.train) != len(self.weights) or not sum(self.weights)):
            raise ValueError("data.weights needs a list of sources in data.train, as many as there are weights, not all of them 0")
        return self


USUAL_RATE = {"prompt": 0.2, "prefix": 0.05}  # optim.relative_lr by prompt.method: measured (LOG.md)


class Member(Section):
    """One prompt of a bank: what it has different from the rest of the configuration."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Its folder below `prompts` in the run folder."""
    prompt: dict[str, Any] = {}
    """Its own settings of [prompt]."""
    optim: dict[str, Any] = {}
    """Its own settings of [optim]."""
    seed: int | None = None
    """Its own `train.seed`: order of rows and random init."""


class PromptConfig(Section):
    """The soft prompt."""

    count: Positive = 1
    """Prompts to train at once over one base; they differ by seed: `train.seed`, and the numbers after it."""
    bank: Annotated[tuple[Member, ...], Field(strict=False)] = ()
    """A list of prompts to train at once instead, `[[prompt.bank]]`: each has a `name`, and what it has different."""
    method: Literal["prompt", "prefix"] = "prompt"
    """What is learned: rows before the text (prompt tuning), or keys and values of every layer (prefix tuning), which start from
    those of the same rows."""
    length: Positive | None = None
    """Virtual tokens. Left out: as many rows as text, labels and file of `init` have, else 16."""
    init: Annotated[tuple[Source, ...], Field(strict=False)] = ()
    """Rows to start from, one source or several that fill the prompt in turn, e.g. ["labels", "text", "vocab"]. text: the
    embeddings of `text`; labels: of the label words; vocab: of frequent tokens of the data; examples: of training rows; random:
    noise of the embedding table's mean and spread; file: another prompt; context, spread: first or evenly picked tokens of a teacher's
    text ([distil]); states, alone: their keys and values in it. Left out: file or text where there is one, else vocab."""
    file: str | None = None
    """A prompt, checkpoint or run folder to start from."""
    text: str | None = None
    """The text of init = "text"; in evaluation also the hard prompt that the soft prompt must beat."""
    position: Literal["start", "after_bos"] = "start"
    """Where the prompt stands: before BOS, as PEFT has it, or behind."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """What `init` means."""
        return self.init or (("file",) if self.file is not None else ("text",) if self.text is not None else ("vocab",))

    @field_validator("init", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_bank(self) -> "PromptConfig":
        if self.bank and self.count > 1:
            raise ValueError("set prompt.count or prompt.bank, not both")
        return self


class OptimConfig(Section):
    """AdamW on the prompt's rows, without weight decay."""

    relative_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["find"] | None = None
    """Peak learning rate as a share of the RMS of the base's embedding rows (of the start's keys and values for method = "prefix"):
    one value fits every base. Left out: 0.2, and 0.05 for "prefix". "find": five rates are tried for 20 steps, all at once, and the
    best is taken."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak learning rate as a plain number, in place of `relative_lr`."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to zero after the warm-up, or none."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises from zero."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Gradient norm above which the gradient is scaled down."""
    values: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """For method = "prefix": the rate of values as a multiple of that of keys."""
    frozen: Annotated[int, Field(ge=0)] = 0
    """Positions at the beginning that stay as they started; 1: what attention rests on."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Evaluate and save a moving average of the rows that keeps this share of itself at every step, e.g. 0.9."""


class TrainConfig(Section):
    """The run."""

    examples_per_step: Positive = 16
    """Examples that make one optimizer step. How they are cut into micro-batches never changes the gradient."""
    epochs: Positive | None = None
    """Passes over the rows; not used when `steps` is set. Left out: one, or as many as make about 200 steps, ten at most."""
    steps: Positive | None = None
    """Optimizer steps."""
    seed: int = 0
    """Seed of the order of rows, the held-out split and random init."""
    tokens_per_batch: Positive | None = None
    """Tokens (padding included) of one micro-batch at most. Left out: what fits into the free memory and computes fastest."""
    head_tolerance: Annotated[float, Field(ge=0, lt=1)] = 2**-8
    """Probability per token that the head's backward may leave out on a CPU; 2**-8 is below bfloat16's own error, 0 is exact."""
    checkpoint_activations: bool = False
    """Keep only the input of each layer and compute the rest again in backward: less memory, a third more time."""
    log_every: Positive = 10
    """Steps between log lines."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Stop after the step in which so many minutes of training are over."""
    patience: Positive | None = None
    """Stop after so many evaluations in a row without a lower held-out loss."""
    eval_every: Positive | None = None
    """Steps between evaluations on the held-out rows; always before the first step and after the last. The rows of the best
    one are the run's result. Left out: four times over the run, but not within 10 steps."""
    save_every: Positive = 50
    """Steps between checkpoints. Always after the last step."""
    keep: Literal["some", "all"] | Positive = "some"
    """Which checkpoints stay once a newer one is written. "some": the last two, the first one of every tenth of the run, and the first
    one from the best evaluation on (of each prompt of a bank); "all"; or a number: only so many of the last."""
    out: str = "runs/prompt"
    """The run folder. Must not exist yet, unless the run is resumed."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)] = ()
    """Experiment trackers to report to, through accelerate; `softprompt eval` of the run reports to them too."""


class DistilConfig(Section):
    """What a prompt learns to stand for, where `softprompt distil` trains it: a text, or examples, in the context of the same base."""

    text: str | None = None
    """The text that the teacher reads where the template has its system turn: a system prompt, instructions."""
    file: str | None = None
    """A text or Markdown file with it. One that is longer than the base's context is read in chunks."""
    examples: Positive | None = None
    """Instead of a text: so many rows of `data.train`, with their answers; the rest are questions."""
    questions: str | None = None
    """What is asked: a .txt file of lines, or rows without their answers. Left out: `data.train`; else the base asks itself about it."""
    count: Positive | None = None
    """Questions at most. Left out: 256 of self-study, else all."""
    max_new_tokens: Positive = 128
    """Tokens of an answer of the teacher at most; one that has not ended by then is learned without an end."""
    on_policy: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the steps, the last ones, in which the prompt answers itself and is held to what the teacher says of that."""
    teacher: str | None = None
    """Address of a server that teaches instead of the base: vLLM or `softprompt serve` over a model with the base's tokenizer, also a
    larger one, whose 20 likeliest tokens at every place are learned. $OPENAI_API_KEY is its key."""
    teacher_model: str | None = None
    """Its model there. Left out: the first one."""
    keep_text: bool = False
    """Whether the prompt's card holds the text, not only its hash and length."""

    @property
    def wanted(self) -> bool:
        return bool(self.text or self.file or self.examples)

    @model_validator(mode="after")
    def _one_text(self) -> "DistilConfig":
        if sum(one is not None for one in (self.text, self.file, self.examples)) > 1:
            raise ValueError("set one of distil.text, distil.file and distil.examples")
        if self.teacher is not None and self.on_policy:
            raise ValueError("distil.on_policy asks the base itself: leave out distil.teacher")
        return self


class Config(Section):
    """Everything a run needs to know."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    distil: DistilConfig = DistilConfig()

    def members(self) -> dict[str, "Config"]:
        """The prompts of the run by name, each with the configuration that would train it alone, its rate filled in. Raises ConfigError."""
        bank = self.prompt.bank or [
            Member(name=f"seed-{self.train.seed + index}", seed=self.train.seed + index) for index in range(self.prompt.count)
        ]
        if len({member.name.casefold() for member in bank}) < len(bank):  # folders, which macOS and Windows tell apart by letters alone
            raise ConfigError("prompt.bank: two prompts have the same name")
        return {member.name: self._alone(member) for member in bank}

    def _alone(self, member: Member) -> "Config":
        tree = self.model_dump(exclude_none=True)
        tree["prompt"] = {key: value for key, value in tree["prompt"].items() if key not in ("bank", "count")} | member.prompt
        tree["optim"] |= member.optim
        tree["train"]["seed"] = self.train.seed if member.seed is None else member.seed
        if "bank" in member.prompt or "count" in member.prompt:
            raise ConfigError(f"prompt.bank, {member.name}: a prompt of a bank is one prompt: leave out count and bank")
        alone = load_config(tree, where=f"prompt.bank, {member.name}")
        if alone.optim.relative_lr is not None:
            return alone
        return alone.model_copy(update={"optim": alone.optim.model_copy(update={"relative_lr": USUAL_RATE[alone.prompt.method]})})

    def to_toml(self) -> str:
        """The resolved configuration; keys that are not set are left out."""
        readable = "\r" not in f"{self.data.template}{self.prompt.text}"  # multi-line strings would turn \r\n into \n
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True), multiline_strings=readable)


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """Reads a TOML file (or takes a mapping of sections), applies overrides and checks all of it.

    Raises ConfigError with the file (`where` for a mapping), the key and what to do.
    """
    where = str(source) if isinstance(source, str | Path) else where
    tree = _read_toml(Path(source)) if isinstance(source, str | Path) else _copy(source or {})
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item, where) for item in error.errors())) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _apply(tree: dict[str, Any], override: str) -> None:
    """Puts one ``section.key=value`` into the tree; the value is TOML, or a bare string where the key holds text."""
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2:
        raise ConfigError(f"{override!r} is not an override: write section.key=value, e.g. train.steps=100")
    try:
        read = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        read = {}
    value = read["value"] if len(read) == 1 else raw
    if not isinstance(value, str) and _holds_text(*parts) and not (isinstance(value, list) and parts in SEVERAL):
        value = raw
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {part} is a value, not a table")
    tree[parts[-1]] = value


def _holds_text(section: str, key: str, *below: str) -> bool:
    if section not in Config.model_fields:
        return False
    field = Config.model_fields[section].annotation.model_fields.get(key)  # type: ignore[union-attr]
    if field is None or (get_origin(field.annotation) is dict and not below):
        return False
    return field.annotation is str or str in get_args(field.annotation)


def _explain(item: Any, where: str) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = [f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields]  # type: ignore[union-attr]
        near = difflib.get_close_matches(key, known + list(Config.model_fields), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(Config.model_fields)}"
        return f"{where}: unknown key {key}: {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {key}: {message[0].lower()}{message[1:]} (got {item['input']!r})" if key.count(".") else f"{where}: {key}: {message}"
