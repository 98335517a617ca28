"""A first configuration for rows that somebody has: what is in them, and about ten lines of TOML that say so.

torch is imported only where a base is named, for its tokenizer.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from rich.cells import cell_len

from softprompt.config import Config, load_config
from softprompt.data import Example, Loaded, first_rows, load_examples, suggest_columns
from softprompt.encode import make_encoder
from softprompt.errors import ConfigError, DataError
from softprompt.rows import encode_rows
from softprompt.scripts import NO_LETTERS, scripts

PLAIN, CHAT = "human-assistant", "chat"  # templates
BASE = "Qwen/Qwen3-0.6B-Base"  # stands in the draft where no base is named: small, and reads many languages
NUM_MEASURED = 2000  # rows that are tokenized: the longest ones by characters
LONGEST = 2048  # tokens; where a row has more, the longest hundredth of the rows may be cut
HELD_OUT = 500  # rows at most: more only make evaluations slow
WORDS_LISTED = 50  # labels that get a line of their words
USUAL_CONTEXT = 64  # positions of a base's context that are left to the prompt
TEXTS = {  # whether rows have labels -> in Chinese, in English
    True: ("判断文本属于哪一类，只回答类别。", "Say which label fits the text, and nothing else."),
    False: ("按照要求回答。", "Answer what is asked."),
}


@dataclass(frozen=True)
class Setting:
    """A line of the draft: `section.key = value  # comment`."""

    section: str
    key: str
    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Draft:
    """The configuration as text, and what was found of the rows, in a sentence."""

    text: str
    found: str
    has_base: bool


def draft(source: str, overrides: Sequence[str] = ()) -> Draft:
    """Looks at the rows of `source` (see `data.train`); settings in `overrides` stand as they are given.

    Raises DataError where no row can be used, ConfigError for a wrong override, ModelError for a base whose tokenizer cannot be had.
    """
    given = load_config(None, overrides).model_dump(exclude_unset=True)
    if "train" in given.get("data", {}):
        raise ConfigError(f"data.train is what is looked at, {source}: leave out data.train")
    columns = given.get("data", {}).get("columns")
    loaded = _rows(source, given)
    if not loaded.examples and columns is None:
        columns = suggest_columns(first_rows(source, 100))
        if columns:
            given.setdefault("data", {})["columns"] = columns
            loaded = _rows(source, given)
    if not loaded.examples:
        raise DataError(f"none of the {len(loaded.rejected)} rows can be used: {loaded.rejected[0].reason}", loaded.rejected[0].source)
    has_base = bool(given.get("model", {}).keys() & {"name", "gguf_file"})
    measured = _with_tokenizer(loaded, given) if has_base else _by_characters(loaded)
    settings = _overridden([*_found(source, loaded, measured, columns)], given)
    text = _as_toml(f"# {_described(loaded, measured)}", settings)
    return Draft(text, f"{source}: {_described(loaded, measured)}", has_base)


def _rows(source: str, given: Mapping[str, Mapping[str, Any]]) -> Loaded:
    own = {key: value for key, value in given.get("data", {}).items() if key not in ("eval", "eval_fraction")}
    data = load_config({**given, "data": {**own, "train": source}}).data
    return load_examples(source, limit=data.limit, label_words=data.label_words, columns=data.columns, stream=data.stream)


# ---- what is found -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Tokens of the longest row and of one that a hundredth of the rows are longer than; `template`: the one that suits the base, and
    `why`. `room`: tokens that the base's context leaves to a row. `estimated`: from characters."""

    longest: int
    usual: int
    template: str
    why: str
    room: int | None = None
    estimated: bool = False

    @property
    def max_length(self) -> int:
        """What `data.max_length` should be."""
        wanted = self.longest if self.longest <= LONGEST else self.usual
        wanted = 3 * wanted // 2 if self.estimated else wanted
        rounded = max(64, -(-wanted // 32) * 32)
        return rounded if self.room is None else max(2, min(rounded, self.room))


def _by_characters(loaded: Loaded) -> Measured:
    """A guess for a tokenizer that is not known: a token for every character of Han and the like, and for three of any other."""
    counts = sorted(sum(_guessed(message.content) + 6 for message in example.messages) for example in loaded.examples)
    return Measured(counts[-1], _usual(counts), PLAIN, 'for a chat model, "chat": its own template', estimated=True)


def _guessed(text: str) -> int:
    wide = len(re.findall(r"[\u2e80-\ud7ff\uf900-\uffef\U00010000-\U0010ffff]", text))
    return wide + -(-(len(text) - wide) // 3)


def _usual(counts: Sequence[int]) -> int:
    return counts[(len(counts) * 99 - 1) // 100]


def _with_tokenizer(loaded: Loaded, given: Mapping[str, Mapping[str, Any]]) -> Measured:
    from softprompt.engine.loading import load_settings, load_tokenizer

    config = load_config(given)
    tokenizer = load_tokenizer(config.model)
    told = given.get("data", {}).get("template")
    names = [told] if told else [CHAT, PLAIN] if tokenizer.chat_template else [PLAIN]
    longest_first = sorted(loaded.examples, key=lambda row: -sum(len(message.content) for message in row.messages))[:NUM_MEASURED]
    refused = ""
    for name in names:
        encoder = make_encoder(tokenizer, name)
        rows = encode_rows(encoder, Loaded(tuple(longest_first), ()), max_length=10**9)
        if not rows.rejected or name == names[-1]:
            break
        refused = f"the base's chat template refuses rows: {rows.rejected[0].reason}"
    counts = sorted(len(row) + (encoder.bos_id is not None) for row in rows.encoded)
    if not counts:
        raise DataError(rows.rejected[0].reason, rows.rejected[0].source)
    place = max(0, len(counts) - 1 - len(loaded.examples) // 100)
    why = refused or ("the base's own" if name == CHAT else "the base's tokenizer has no chat template")
    context = getattr(load_settings(config.model).get_text_config(decoder=True), "max_position_embeddings", None)
    return Measured(counts[-1], counts[place], name, why, None if context is None else context - USUAL_CONTEXT)


def _described(loaded: Loaded, measured: Measured) -> str:
    first = loaded.examples[0]
    kind = "texts with labels" if first.label is not None else "conversations" if len(first.messages) > 2 else "questions with answers"
    script = next(iter(scripts(example.messages[-2].content for example in loaded.examples)))
    written = "" if script == NO_LETTERS else f", mostly in {script} script"
    length = f"about {measured.longest} tokens, estimated from characters" if measured.estimated else f"{measured.longest} tokens"
    labels = f", {len(loaded.labels)} labels" if loaded.labels else ""
    rejected = f", {len(loaded.rejected)} more cannot be used" if loaded.rejected else ""
    return f"{len(loaded.examples):,} {kind}{labels}{written}; the longest has {length}{rejected}"


def _found(source: str, loaded: Loaded, measured: Measured, columns: Mapping[str, str] | None) -> Iterator[Setting]:
    yield Setting("model", "name", BASE, "any causal language model: hub id, local folder or GGUF file")
    names = list(dict.fromkeys(str(name) for row in first_rows(source, 10) for name in row))
    yield Setting("data", "train", source, f"columns: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
    if columns:
        yield Setting("data", "columns", dict(columns), "guessed from the names: what is asked, and what is to be learned")
    if loaded.rejected:
        first = loaded.rejected[0]
        yield Setting("data", "max_rejected", 0, f"{len(loaded.rejected)} rows cannot be used; {first.source}: {first.reason}")
    different = len({example.turns for example in loaded.examples})
    if different > 1:
        share = float(f"{min(0.1 if different >= 200 else 0.2, HELD_OUT / different):.1g}")
        held = max(1, round(share * different))
        yield Setting("data", "eval_fraction", share, f"{held:,} of {different:,} different rows, to see whether the prompt helps")
    words = {label: label for label in sorted(loaded.labels, key=float)} if _are_numbers(loaded.labels) else {}
    if words and len(words) <= WORDS_LISTED:
        yield Setting("data", "label_words", words, "write the word that stands for each label")
    yield Setting("data", "template", measured.template, measured.why)
    yield Setting("data", "max_length", measured.max_length, _length_comment(measured))
    yield Setting("prompt", "text", _text(loaded.examples, bool(loaded.labels)), "what to do, in your words: the prompt starts from it")
    name = re.sub(r"[^\w.-]+", "-", Path(source.partition("[")[0]).stem).strip("-.")
    yield Setting("train", "out", f"runs/{name or 'prompt'}")


def _length_comment(measured: Measured) -> str:
    if measured.estimated:
        return f"tokens; a guess from characters (the longest row about {measured.longest}): softprompt show counts them"
    if measured.longest <= measured.max_length:
        return f"tokens; the longest row has {measured.longest}"
    return f"tokens; the longest row has {measured.longest} and is cut, 99 of 100 have no more than {measured.usual}"


def _are_numbers(labels: Sequence[str]) -> bool:
    return bool(labels) and all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in labels)


def _text(examples: Sequence[Example], labelled: bool) -> str:
    script = next(iter(scripts(example.messages[-2].content for example in examples)))
    return TEXTS[labelled][0 if script == "Han" else 1]


# ---- as TOML -------------------------------------------------------------------------------------------------------


def _overridden(settings: Sequence[Setting], given: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """The settings with those given in place of those found, each section's together, in the order of the configuration."""
    told = {(section, key): value for section, values in given.items() for key, value in values.items()}
    dropped = {("data", "eval_fraction")} if ("data", "eval") in told else set()
    dropped |= {("model", "name")} if ("model", "gguf_file") in told else set()
    own = {(one.section, one.key): one for one in settings if (one.section, one.key) not in dropped - set(told)}
    for place, value in told.items():
        comment = own[place].comment if place in own and own[place].value == value else ""
        own[place] = Setting(*place, value, comment)
    order = list(Config.model_fields)
    return sorted(own.values(), key=lambda one: order.index(one.section))


def _as_toml(heading: str, settings: Sequence[Setting]) -> str:
    lines = [(f"{_inline_key(one.key)} = {_inline(one.value)}", one) for one in settings]
    wide = min(48, max(cell_len(line) for line, _ in lines))
    text, section = f"{heading}. Every setting: docs/config.md\n", ""
    for line, one in lines:
        text += f"\n[{one.section}]\n" if one.section != section else ""
        text += f"{line}{' ' * (wide - cell_len(line))}  # {' '.join(one.comment.split())}\n" if one.comment else f"{line}\n"
        section = one.section
    return text


def _inline(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_inline_key(str(key))} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").removesuffix("\n")


def _inline_key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
