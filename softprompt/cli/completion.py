"""What the shell offers for settings: the keys of the configuration, their values, files. The rest typer does by itself.

bash cuts words at "=": the key and the sign are then words of their own, and what is offered stands for the part behind them.
"""

import glob
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer


def settings(context: typer.Context, incomplete: str) -> list[str]:
    """For words that are settings, a configuration file among them."""
    return _offered(context, incomplete, _keys())


def base_settings(context: typer.Context, incomplete: str) -> list[str]:
    """For words that are settings of the base, or texts, or prompts."""
    return _offered(context, incomplete, {key: field for key, field in _keys().items() if key.startswith("model.")})


def _offered(context: typer.Context, incomplete: str, keys: dict[str, Any]) -> list[str]:
    before = [word for value in context.params.values() if isinstance(value, list | tuple) for word in map(str, value)]
    if before[-1:] == ["="]:
        before.pop()
        return list(_values(keys[before[-1]], incomplete)) if before and before[-1] in keys else []
    if before and before[-1] in keys:
        return list(_values(keys[before[-1]], incomplete))
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={found}" for found in _values(keys[key], value)] if key in keys else []
    if not incomplete:  # files at first, which the shell knows, then sections
        return [f"{section}." for section in dict.fromkeys(key.partition(".")[0] for key in keys)] if before else []
    found = [f"{key}=" for key in keys if key.startswith(incomplete)]
    if len(found) == 1:  # a second one to look at keeps the shell from closing the word with a blank
        found.append(found[0] + (_shown(keys[found[0][:-1]].default) or "…"))
    return [*found, *(f"{path}/" if Path(path).is_dir() else path for path in glob.glob(f"{glob.escape(incomplete)}*") if found)]


def _keys() -> dict[str, Any]:
    """The fields of the configuration by their keys."""
    from softprompt.config import Config

    sections = {name: section.annotation.model_fields for name, section in Config.model_fields.items()}  # type: ignore[union-attr]
    return {f"{name}.{key}": field for name, fields in sections.items() for key, field in fields.items()}


def _values(field: Any, incomplete: str) -> Iterator[str]:
    """The words that a setting may be, where these can be listed."""
    known = list(dict.fromkeys(_words(field.annotation)))
    yield from (word for word in known if word.startswith(incomplete))


def _words(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif kind is bool:
        yield from ("true", "false")
    elif get_origin(kind) in (Union, UnionType, tuple):
        for part in get_args(kind):
            yield from _words(part)


def _shown(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value if isinstance(value, str) else repr(value)
