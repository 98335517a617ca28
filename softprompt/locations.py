"""Where what a configuration names lies: its base moved, its paths made whole. Does not import torch."""

import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from softprompt.config import RANGE, Config, ModelConfig, load_config

PLACE = ("name", "gguf_file", "revision")  # where a base lies


def relocated(model: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """A stored base with a command's overrides: where `model.name` or `model.gguf_file` says that it lies, its old place and revision
    are forgotten, and all else stays. A GGUF file keeps its name in a folder that holds it."""
    said = load_config(None, overrides).model
    kept = model.model_dump(exclude_none=True)
    if "gguf_file" in said.model_fields_set and said.gguf_file is not None and Path(said.gguf_file).is_file():
        kept = {key: value for key, value in kept.items() if key not in PLACE}
    elif "name" in said.model_fields_set and said.name is not None:
        gguf_file, folder = kept.get("gguf_file"), Path(said.name)
        stays = gguf_file is not None and not said.name.endswith(".gguf") and ((folder / gguf_file).is_file() or not folder.exists())
        kept = {key: value for key, value in kept.items() if key not in PLACE or (key == "gguf_file" and stays)}
    return load_config({"model": kept}, overrides).model


def with_absolute_paths(config: Config) -> Config:
    """Local paths made absolute, so that the run can be resumed and the prompt used from any folder."""

    def absolute(source: str | None) -> str | None:
        if not source:
            return source
        match = RANGE.match(source)
        path = match["source"] if match else source
        names = [path[: colon.start()] for colon in re.finditer(":|$", path)]  # rows.jsonl:train, C:\rows.jsonl:train
        here = "://" not in path and (any(Path(name).exists() for name in names) or glob(path))
        return f"{Path(path).absolute()}{source[len(path) :]}" if here else source

    def each(sources: str | tuple[str, ...] | None) -> str | tuple[str | None, ...] | None:
        return tuple(absolute(one) for one in sources) if isinstance(sources, tuple) else absolute(sources)

    def moved(prompt: dict[str, Any]) -> dict[str, Any]:
        return {**prompt, "file": absolute(prompt["file"])} if prompt.get("file") else prompt

    name, gguf_file = config.model.location
    bank = tuple(member.model_copy(update={"prompt": moved(member.prompt)}) for member in config.prompt.bank)
    prompt = config.prompt.model_copy(update={"bank": bank, "file": absolute(config.prompt.file)})
    model = config.model.model_copy(update={"name": absolute(name), "gguf_file": gguf_file})
    template = absolute(config.data.template) if config.data.template.endswith(".jinja") else config.data.template
    data = config.data.model_copy(update={"train": each(config.data.train), "eval": each(config.data.eval), "template": template})
    own = config.distil
    distil = own.model_copy(update={"file": absolute(own.file), "questions": absolute(own.questions)})
    return config.model_copy(update={"model": model, "data": data, "prompt": prompt, "distil": distil})
