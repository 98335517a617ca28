"""A prompt carried to other engines: as entries of a vocabulary, as plain rows, or as keys and values in the form of their caches.

P rows are P tokens. Written into the embedding table as new vocabulary entries, a prompt is served by any engine with ordinary
tokens and its ordinary prefix cache, many prompts in one file.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softprompt.artifact import find_prompt, load_prompt, read_card
from softprompt.atomic import new_folder
from softprompt.config import ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import SoftPrompt
from softprompt.errors import ArtifactError, ConfigError
from softprompt.export import gguf, llama_here, mlx, rows, vllm, vocab
from softprompt.export.attaching import Place
from softprompt.export.carried import Carried, Exported, Goal
from softprompt.export.llama_server import OPTION, LlamaServer, folder_of
from softprompt.peft_here import fault_of_generate

FORMATS: dict[str, Callable[[Goal], Exported]] = {
    "vocab": vocab.export,
    "gguf": gguf.export,
    "vllm": vllm.export,
    "npy": rows.export_npy,
    "torch": rows.export_torch,
    "slots": llama_here.export,
    "mlx": mlx.export,
}
DEEP = ("slots", "vllm", "mlx")  # take keys and values of every layer
FROM_GGUF = ("gguf", "slots")


@dataclass(frozen=True)
class Wanted:
    """What is to be made. `default`: which prompt answers a chat that names none. `gguf_file`: the base as GGUF, where the prompts
    were trained on its Hugging Face form. `cache_type`: of llama.cpp's slots."""

    prompts: Sequence[Path]
    format: str
    out: Path
    default: str | None = None
    gguf_file: Path | None = None
    cache_type: str | None = None


def export(wanted: Wanted, model: ModelConfig | None = None, *, allow_other_base: bool = False) -> dict[str, Any]:
    """Writes `wanted.out`, reads it back, and returns the documented JSON of `softprompt export`.

    Raises ConfigError for what cannot be asked, ArtifactError for prompts that cannot be carried, ModelError for a base that cannot.
    """
    _check(wanted)
    names = named(wanted.prompts)
    if wanted.default is not None and wanted.default not in names:
        raise ConfigError(f"--default {wanted.default}: there is no such prompt among {', '.join(names)}")
    first = wanted.prompts[0]
    config = model or read_card(first).base_here()
    move = f"move it there first, softprompt recycle {first} --out DIR model.name={config.name if config.quantization else 'FOLDER'}"
    if config.quantization is not None and wanted.format in ("vocab", "gguf", "mlx"):
        raise ArtifactError(f"{first} was trained on its base in {config.quantization}, and an exported model has the full weights: {move}")
    default = wanted.default or (next(iter(names)) if len(names) == 1 else None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as spare:  # Windows removes no file that is still mapped
        base = load_base(config, layers_in_files=Path(spare))
        if wanted.format == "gguf" and getattr(base.model, "is_quantized", False):
            raise ArtifactError(f"{first} was trained on a base in few bits, and a GGUF file has other weights: {move}")
        carried = tuple(_carried(name, path, base, allow_other_base) for name, path in names.items())
        deep = [prompt for prompt in carried if not isinstance(prompt.soft, SoftPrompt)]
        if deep and wanted.format not in DEEP:
            raise ArtifactError(
                f"{names[deep[0].name]} holds keys and values of every layer: softprompt and PEFT take those, and --to {', '.join(DEEP)}"
            )
        given = (default, config, wanted.gguf_file, wanted.cache_type)
        written = _write(wanted, lambda draft: Goal(base, carried, draft, Path(spare), *given))
    return {"out": str(wanted.out), **written}


def _carried(name: str, path: Path, base: FrozenBase, allow_other_base: bool) -> Carried:
    stored = load_prompt(path, base, allow_other_base=allow_other_base)
    return Carried(name, stored.soft, stored.encoder)


def _write(wanted: Wanted, goal: Callable[[Path], Goal]) -> dict[str, Any]:
    """The whole folder or nothing of it."""
    try:
        with new_folder(wanted.out) as draft:
            exported = FORMATS[wanted.format](goal(draft))
            fault = fault_of_generate()  # the prompt's own folder is read by PEFT
            written = replace(exported, notes=(*exported.notes, *([fault] if fault else []))).as_dict()
            text = json.dumps({"softprompt": version("softprompt"), **written}, indent=2, ensure_ascii=False)
            (draft / "softprompt.json").write_text(text + "\n", encoding="utf-8", newline="\n")
    except OSError as error:
        raise ConfigError(f"--out {wanted.out}: cannot be written: {error.strerror or error}") from None
    return written


def _check(wanted: Wanted) -> None:
    if wanted.format == "peft":
        fault = fault_of_generate()
        already = "a prompt's folder is a PEFT adapter already: PeftModel.from_pretrained(model, FOLDER)"
        raise ConfigError(f"{already}; but {fault}" if fault else already)
    if wanted.format not in FORMATS:
        raise ConfigError(f"--to {wanted.format}: known are {', '.join(FORMATS)}")
    if wanted.gguf_file is not None and wanted.format not in FROM_GGUF:
        raise ConfigError(f"--gguf belongs to --to {' and --to '.join(FROM_GGUF)}, not to --to {wanted.format}")
    if wanted.cache_type is not None and wanted.format != "slots":
        raise ConfigError(f"--cache-type belongs to --to slots, not to --to {wanted.format}")
    if wanted.out.exists():
        raise ConfigError(f"--out {wanted.out} exists: choose another folder")


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """The prompts by name: that of the run or of the prompt's folder. Raises ConfigError for a name that no token can carry, or twice."""
    found: dict[str, Path] = {}
    for path in paths:
        folder = find_prompt(path).resolve()
        name = folder.parent.name if folder.name == "prompt" else folder.name
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"{path}: {name!r} cannot be part of a token's name: rename the folder to letters, digits, _ . -")
        if name in found:
            raise ConfigError(f"{found[name]} and {path} would both be called {name}: rename a folder")
        found[name] = path
    return found


@dataclass(frozen=True)
class Target:
    """A llama.cpp server that runs. `slots`: the folder that it keeps them in, where it is not to be seen in the server's command line."""

    address: str
    slots: Path | None = None
    key: str | None = None


def attach(target: Target, prompts: Sequence[Path], model: ModelConfig | None = None, *, allow_other_base: bool = False) -> dict[str, Any]:
    """Puts prompts, rows and deep ones alike, into the server, one after the other, and returns the documented JSON of `softprompt attach`.

    Raises ConfigError for what cannot be asked of this server, ArtifactError for one of another base or build, ModelError where none
    answers.
    """
    server, names = LlamaServer(target.address, target.key), named(prompts)
    build, num_slots = server.build(), server.num_slots()
    folder = target.slots or folder_of(target.address)
    if folder is None:
        raise ConfigError(f"where does {target.address} keep its slots? give --slots DIR, the folder of its {OPTION}")
    if not folder.is_dir():
        raise ConfigError(f"--slots {folder}: no such folder")
    base = load_base(model or read_card(prompts[0]).base_here())
    carried = [_carried(name, path, base, allow_other_base) for name, path in names.items()]
    put = {prompt.name: Place(server, folder, n % num_slots, base).put(prompt) for n, prompt in enumerate(carried)}
    facts = {name: one.facts | {"checked": one.checked} for name, one in put.items()}
    told = {"build": build, **next(iter(put.values())).cache_types}
    return {"server": target.address, "slots": str(folder), "base": base.name, **told, "prompts": facts}
