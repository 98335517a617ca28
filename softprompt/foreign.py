"""Prompts that other programs wrote, read, checked and put on a base with a card.

Taken are PEFT's adapter folders, rows alone in .safetensors or .npy, and TGIS's folders of either. Nothing is ever unpickled.

Shapes: P virtual tokens, H hidden size, D = all keys and values of one position.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from softprompt.artifact import TENSOR, WEIGHTS, load_prompt, make_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.card import Card, DataCard
from softprompt.config import Config, load_config
from softprompt.encode import Encoder, check_position, make_encoder
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import DeepPrompt, Prompt, SoftPrompt, shapes_of
from softprompt.errors import ArtifactError, ConfigError, first_line
from softprompt.locations import with_absolute_paths

KINDS = {
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "PREFIX_TUNING": "prefix tuning",
}
TASK = ("prefix_task_cols", "prefix_task_rows")  # what multitask prompt tuning stores beside its shared rows
PLAIN = (".safetensors", ".npy")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
AS_IT_IS = "{{ messages[-1].content }}"  # nobody says how the texts of a foreign prompt were rendered


@dataclass(frozen=True)
class Foreign:
    """`rows`: float32 [P, H], or [P, D] where it is `deep`; `kind`: what wrote them; `base`, `revision`: what they name as their base."""

    kind: str
    rows: Tensor
    deep: bool = False
    base: str | None = None
    revision: str | None = None


def read_foreign(path: str | Path, task_id: int | None = None) -> Foreign:
    """The rows at a path; `task_id` chooses those of one task where a multitask adapter has several.

    Raises ArtifactError for what is no soft prompt of a decoder-only base, for numbers that are not finite, and for pickles, with the
    command that converts them.
    """
    file = _found(Path(path))
    if file.name == "adapter_config.json":
        foreign = _adapter(file, task_id)
    else:
        foreign = Foreign("rows alone", _only(file, _tensors(file)))
        _refuse_task(path, task_id)
    rows = foreign.rows
    if rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape:
        raise ArtifactError(f"{path} holds {list(rows.shape)} {rows.dtype}, a soft prompt is [virtual tokens, hidden size] of real numbers")
    if not torch.isfinite(rows.float()).all():
        raise ArtifactError(f"{path} holds numbers that are not finite: the run that wrote it had diverged")
    return replace(foreign, rows=rows.float())


def import_prompt(path: str | Path, out: Path, overrides: Sequence[str] = (), task_id: int | None = None) -> tuple[Card, str]:
    """Writes the prompt folder `out`; returns its card, and what kind of file it was.

    `overrides` are settings of [model], [data] and [prompt] that go into the card: the base where the file names none, data.template,
    data.label_words, prompt.text. Raises an Error of errors.py before anything is written when file and base do not fit.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists: choose another folder")
    foreign = read_foreign(path, task_id)
    config = _config(path, foreign, overrides)
    base = load_base(config.model)
    encoder = make_encoder(base.tokenizer, config.data.template, date=config.data.date, num_tokens=base.num_tokens)
    soft = _on_base(path, foreign, config, base, encoder)
    words = config.data.label_words
    data = DataCard(
        train="",
        num_train=0,
        train_fingerprint="",
        num_eval=0,
        eval_fingerprint=None,
        labels=tuple(dict.fromkeys(words.values())),
        label_words=words,
    )
    card = make_card(config, base, soft, encoder, data, f"imported from {Path(path).name} ({foreign.kind})", {})
    with new_folder(out) as draft:
        write_prompt(draft, soft, card, base)
        load_prompt(draft, base)
    return card, foreign.kind


def _config(path: str | Path, foreign: Foreign, overrides: Sequence[str]) -> Config:
    method = "prefix" if foreign.deep else "prompt"
    tree: dict[str, Any] = {"data": {"template": AS_IT_IS}, "prompt": {"method": method}}
    if not any(override.startswith(("model.name=", "model.gguf_file=")) for override in overrides):
        if not foreign.base:
            raise ConfigError(f"{path} does not say which base it was trained for: give model.name=FOLDER or a hub id")
        named = {"name": foreign.base, "revision": foreign.revision}
        tree["model"] = {key: value for key, value in named.items() if value is not None}
    config = load_config(tree, overrides)
    if config.prompt.method != method:
        raise ConfigError(f"{path} is {foreign.kind}: leave out prompt.method")
    return with_absolute_paths(config)


def _on_base(path: str | Path, foreign: Foreign, config: Config, base: FrozenBase, encoder: Encoder) -> Prompt:
    rows = foreign.rows.to(base.device)
    if not foreign.deep:
        if rows.shape[1] != base.hidden_size:
            raise ArtifactError(f"{path} has rows of {rows.shape[1]} numbers, {base.name} needs {base.hidden_size}: it is for another base")
        check_position(config.prompt.position, encoder)
        return SoftPrompt(rows, config.prompt.position, encoder.bos_id)
    shapes = shapes_of(base.prefill([base.embed_ids([0])]).layers)
    if sum(heads * size for heads, size in shapes) != rows.shape[1]:
        raise ArtifactError(f"{path} holds keys and values of other shapes than those of {base.name}: it is for another base")
    if config.prompt.position != "start":
        raise ConfigError(f"{path} is {foreign.kind}, which stands at the start: leave out prompt.position")
    return DeepPrompt(rows, "start", encoder.bos_id, torch.ones_like(rows[0]), shapes)


# ---- what lies there -----------------------------------------------------------------------------------------------


def _found(path: Path) -> Path:
    """The file to read: adapter_config.json of an adapter folder, or the one file with rows."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder")
    folder = path.parent if path.name == WEIGHTS else path
    if (folder / "card.json").is_file():
        raise ArtifactError(f"{folder} is a prompt of softprompt already: it needs no import")
    if (folder / "adapter_config.json").is_file():
        return folder / "adapter_config.json"
    if path.is_file():
        _refuse_pickle(path)
        if path.suffix not in PLAIN:
            raise ArtifactError(f"{path}: not something to import: give a PEFT adapter folder, or rows in a .safetensors or .npy file")
        return path
    return _in_folder(path)


def _in_folder(folder: Path) -> Path:
    """The one file with rows of a folder, TGIS's for one."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if (folder / "encoder.pt").is_file():
        raise ArtifactError(_for_encoder_decoder(folder))
    plain = [file for file in files if file.suffix in PLAIN]
    if len(plain) == 1:
        return plain[0]
    for file in files if not plain else ():
        _refuse_pickle(file)
    several = plain or sorted(below for below in folder.iterdir() if below.is_dir() and _holds_rows(below))
    if several:
        raise ArtifactError(f"{folder} holds {len(several)} prompts: name one, e.g. {several[0]}")
    raise ArtifactError(f"{folder}: nothing to import: no adapter_config.json, no .safetensors and no .npy file")


def _holds_rows(folder: Path) -> bool:
    return any(file.suffix in (*PLAIN, *PICKLES) for file in folder.rglob("*"))


def _refuse_pickle(file: Path) -> None:
    """Raises ArtifactError for a pickle, with the command that reads nothing of it but tensors."""
    if file.suffix not in PICKLES:
        return
    converted = file.with_suffix(".safetensors")
    code = (
        f"import torch; from safetensors.torch import save_file; rows = torch.load({json.dumps(str(file))}, weights_only=True, "
        'map_location="cpu"); rows = rows if isinstance(rows, dict) else {"prompt_embeddings": rows}; '
        f"save_file({{name: one.detach().contiguous() for name, one in rows.items()}}, {json.dumps(str(converted))})"
    )
    raise ArtifactError(
        f"{file} is a pickle, which can run code when it is opened; convert it, reading nothing but tensors, and import again: "
        f"python -c {shlex.quote(code)}"
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file) if file.suffix == ".safetensors" else {"the array": torch.from_numpy(np.load(file, allow_pickle=False))}
    except (SafetensorError, OSError, EOFError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {first_line(error)}") from None


def _only(file: Path, tensors: dict[str, Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise ArtifactError(f"{file} must hold one tensor, the rows, it holds {', '.join(sorted(tensors)) or 'none'}")
    return next(iter(tensors.values()))


# ---- PEFT's adapters -----------------------------------------------------------------------------------------------


def _adapter(file: Path, task_id: int | None) -> Foreign:
    folder, config = file.parent, _adapter_config(file)
    kind = config["peft_type"]
    if kind not in KINDS:
        raise ArtifactError(
            f"{folder} is a {kind} adapter, no soft prompt; softprompt eval --with compares with adapters of the base's layers"
        )
    if config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") == 2:
        raise ArtifactError(_for_encoder_decoder(folder))
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ArtifactError(f"{folder} was trained for {config['task_type']}, not for CAUSAL_LM: its answers come from a head of its own")
    weights = folder / WEIGHTS
    if not weights.is_file():
        _refuse_pickle(next((file for file in sorted(folder.iterdir()) if file.suffix in PICKLES), weights))
        raise ArtifactError(f"{weights} is missing")
    tensors = _tensors(weights)
    if kind == "MULTITASK_PROMPT_TUNING":
        rows = _of_task(weights, tensors, task_id)
    else:
        rows = _only(weights, tensors)
        _refuse_task(folder, task_id)
    stored = config.get("num_virtual_tokens")
    if stored is not None and rows.shape[0] != stored:
        raise ArtifactError(f"{weights} holds {rows.shape[0]} rows, its adapter_config.json says {stored}")
    named = config.get("base_model_name_or_path"), config.get("revision")
    return Foreign(f"PEFT {KINDS[kind]}", rows, kind == "PREFIX_TUNING", *named)


def _adapter_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(config["peft_type"], str)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ArtifactError(f"{file} is damaged: no adapter settings with a peft_type") from None
    return config


def _of_task(file: Path, tensors: dict[str, Tensor], task_id: int | None) -> Tensor:
    """The shared rows times one task's low-rank matrix, element by element (Wang et al. 2023), as PEFT multiplies them."""
    if set(tensors) != {TENSOR, *TASK}:
        raise ArtifactError(f"{file} must hold {TENSOR}, {TASK[0]} and {TASK[1]}, it holds {', '.join(sorted(tensors)) or 'none'}")
    cols, rows = (tensors[name] for name in TASK)
    if cols.ndim != 3 or rows.ndim != 3 or (*cols.shape[:2], rows.shape[2]) != (len(rows), *tensors[TENSOR].shape):
        raise ArtifactError(f"{file} is damaged: the shapes of its three tensors do not fit each other")
    if task_id is None and len(rows) > 1:
        raise ArtifactError(f"{file} holds the prompts of {len(rows)} tasks: choose one with --task-id 0 to {len(rows) - 1}")
    if not 0 <= (task_id or 0) < len(rows):
        raise ArtifactError(f"--task-id {task_id}: {file} holds tasks 0 to {len(rows) - 1}")
    return tensors[TENSOR] * (cols[task_id or 0] @ rows[task_id or 0])


def _refuse_task(path: str | Path, task_id: int | None) -> None:
    if task_id is not None:
        raise ArtifactError(f"{path} is one prompt: leave out --task-id")


def _for_encoder_decoder(folder: Path) -> str:
    return f"{folder} belongs to an encoder-decoder model: softprompt works with decoder-only language models"
