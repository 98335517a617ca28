"""A model folder whose vocabulary holds the prompts: any engine that reads Hugging Face folders serves it, with ordinary tokens.

Only the embedding table, the head and the configuration are rewritten, tensor by tensor; the other weights are copied as they are,
shard by shard. Everything is read back before the folder is put in its place.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from softprompt.engine.family import class_of
from softprompt.engine.loading import folder_of
from softprompt.engine.model import FrozenBase
from softprompt.engine.offload import EVERYTHING
from softprompt.engine.quantized import bits_of, computed_in, method_of, settle
from softprompt.engine.unpack import spell_for_others
from softprompt.errors import ArtifactError, ModelError
from softprompt.export.carried import QUESTIONS, Carried, Exported, Goal, states_behind
from softprompt.export.chat import chat_ids, check_ids, extended_tokenizer
from softprompt.export.silence import Silence, silence

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SKIPPED = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".index.json")
SAMPLE = 16  # rows by which a table is known
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@dataclass(frozen=True)
class Table:
    """Where a matrix of the vocabulary lies: its tensor's name and its file."""

    name: str
    file: str


def export(goal: Goal) -> Exported:
    """Fills the draft with the whole model. Raises ArtifactError or ModelError for a base that cannot carry the prompts."""
    source = folder_of(goal.model)
    tokenizer = extended_tokenizer(goal)
    embeddings, head = _tables(goal, source)
    ids = tokenizer.convert_tokens_to_ids(list(goal.tokens))
    mute = silence(goal.base, goal.prompts)
    size = max(goal.base.model.get_input_embeddings().weight.shape[0], max(ids) + 1)
    _copy_rest(source, goal.draft)
    _write_weights(source, goal, embeddings, head, ids, size, mute)
    tokenizer.save_pretrained(goal.draft)
    _write_settings(goal, size, ids)
    checked = _read_back(goal, ids, goal.rounded_to(_dtype(source, embeddings)))
    files = sorted(file.name for file in goal.draft.iterdir())
    return Exported("vocab", goal.base.name, goal.facts(ids), files, checked, (mute.note,))


# ---- where the tables lie ------------------------------------------------------------------------------------------


def _weight_map(source: Path) -> dict[str, str]:
    """The file of every tensor. Raises ModelError for a folder without safetensors."""
    if (source / INDEX).is_file():
        return json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    if not (source / SINGLE).is_file():
        raise ModelError(f"{source} has no {SINGLE}: save the base with save_pretrained, which writes it; pickles are not read")
    with safe_open(source / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _tables(goal: Goal, source: Path) -> tuple[Table, Table | None]:
    """The embedding table and the head; None where the head is tied and has no tensor of its own. They are known by their numbers:
    transformers renames the tensors of some families as it reads them.

    Raises ModelError where the files hold no such tensor.
    """
    files = _weight_map(source)
    embeddings, head = goal.base.model.get_input_embeddings().weight, goal.base.model.get_output_embeddings().weight
    tables, heads = _equal_to(embeddings, source, files), _equal_to(head, source, files)
    if not tables or not (heads or head is embeddings):
        raise ModelError(
            f"{source}: no tensor of its files is the base's embedding table and head: how this family stores them is not known"
        )
    first = min(tables, key=lambda table: "head" in table.name)  # of a tied pair that is stored twice
    return first, next((table for table in heads if table != first), None)


def _dtype(source: Path, table: Table) -> torch.dtype:
    with safe_open(source / table.file, "pt") as file:
        return file.get_slice(table.name)[:1].dtype


def _equal_to(matrix: Tensor, source: Path, files: dict[str, str]) -> list[Table]:
    some = torch.linspace(0, len(matrix) - 1, min(SAMPLE, len(matrix))).long().tolist()
    wanted = matrix[some].cpu()
    found = []
    for name, file in files.items():
        with safe_open(source / file, "pt") as shard:
            part = shard.get_slice(name)
            if part.get_shape() == list(matrix.shape) and all(
                torch.equal(part[row : row + 1][0].to(wanted.dtype), own) for row, own in zip(some, wanted, strict=True)
            ):
                found.append(Table(name, file))
    return found


# ---- writing -------------------------------------------------------------------------------------------------------


def _copy_rest(source: Path, draft: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(SKIPPED):
            shutil.copyfile(file, draft / file.name)


def _write_weights(source: Path, goal: Goal, embeddings: Table, head: Table | None, ids: list[int], size: int, mute: Silence) -> None:
    """Shard by shard; those that hold neither table are copied. A tied head gets a tensor of its own beside the table."""
    files = _weight_map(source)
    head_name = head.name if head else _head_name(goal)
    new: dict[str, Callable[[Tensor], Tensor]] = {
        embeddings.name: lambda table_VH: extended(table_VH, ids, goal.rows_NH, size),
        head_name: lambda table_VH: extended(table_VH, ids, mute.row_H.expand(len(ids), -1), size),
    }
    bias_name = head_name.removesuffix("weight") + "bias"
    if mute.bias is not None and bias_name in files:
        new[bias_name] = lambda bias_V: extended(bias_V[:, None], ids, torch.full((len(ids), 1), mute.bias or 0.0), size)[:, 0]
    for name in sorted(set(files.values())):
        if not any(files.get(tensor) == name for tensor in new):
            shutil.copyfile(source / name, goal.draft / name)
            continue
        with safe_open(source / name, "pt") as shard:
            tensors = {key: new[key](shard.get_tensor(key)) if key in new else shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
            if name == embeddings.file and head is None:
                tensors[head_name] = new[head_name](shard.get_tensor(embeddings.name))
            save_file(tensors, goal.draft / name, metadata=shard.metadata())
    if (source / INDEX).is_file():
        _write_index(source, goal.draft, files | {head_name: files.get(head_name, embeddings.file)})


def _head_name(goal: Goal) -> str:
    head = goal.base.model.get_output_embeddings()
    return next(name for name, module in goal.base.model.named_modules() if module is head) + ".weight"


def extended(table_VH: Tensor, ids: list[int], rows_NH: Tensor, size: int) -> Tensor:
    """The table with `size` rows, those of `ids` replaced; rows in between that no token has are zero."""
    grown = table_VH.new_zeros(size, table_VH.shape[1])
    grown[: len(table_VH)] = table_VH
    grown[ids] = rows_NH.to(table_VH.dtype)
    return grown


def _write_index(source: Path, draft: Path, files: dict[str, str]) -> None:
    index = json.loads((source / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = dict(sorted(files.items()))
    index.setdefault("metadata", {})["total_size"] = sum(_num_bytes(draft / name) for name in set(files.values()))
    (draft / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")


def _num_bytes(file: Path) -> int:
    with safe_open(file, "pt") as shard:
        return sum(tensor.numel() * tensor.element_size() for tensor in map(shard.get_tensor, shard.keys()))


def _write_settings(goal: Goal, size: int, ids: list[int]) -> None:
    """Sizes, and the head untied, wherever the configuration has them, at the top or in the part of the language model; the new tokens
    are never said, and generation ends where answers of the prompts end."""
    draft = goal.draft
    settings = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    parts = [settings, *(settings[key] for key in ("text_config", "llm_config", "language_config") if isinstance(settings.get(key), dict))]
    for part in parts:
        if "vocab_size" in part or part is parts[-1]:
            part["vocab_size"] = size
        part["tie_word_embeddings"] = False
    rope = getattr(goal.base.model.config.get_text_config(decoder=True), "rope_parameters", None)
    if rope:
        parts[-1].setdefault("rope_parameters", rope)
    _write_json(draft / "config.json", settings)
    spell_for_others(draft)
    file = draft / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    generation["suppress_tokens"] = sorted({*(generation.get("suppress_tokens") or ()), *ids})
    if goal.new_end_ids:
        generation["eos_token_id"] = sorted({*goal.base.stop_ids, *goal.new_end_ids})
    _write_json(file, generation)


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


# ---- reading back --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _read_back(goal: Goal, ids: list[int], rounded: Goal) -> dict[str, float]:
    """Loads what was written through the classes that any user loads it with and compares it with ours: ids of texts, logits of every
    position. `rounded`: the prompts as the table holds them.

    Returns the largest relative error of the logits, and the part of ours that comes from rounding; raises ArtifactError where they
    differ.
    """
    trusted = goal.model.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(goal.draft, trust_remote_code=trusted)
    for prompt in goal.prompts:
        check_ids(prompt, tokenizer)
    settings = AutoConfig.from_pretrained(goal.draft, trust_remote_code=trusted)
    computed_in(settings, goal.base.dtype)
    places = EVERYTHING if method_of(settings) is None else {"": goal.base.device}  # weights in few bits cannot lie in files
    how = {"config": settings, "dtype": goal.base.dtype, "device_map": places, "offload_folder": goal.spare, "trust_remote_code": trusted}
    model = class_of(settings).from_pretrained(goal.draft, **how).eval()
    settle(model, goal.base.dtype)
    in_8_bits = bits_of(settings) == 8  # which rounds states too, by what else is in their batch
    worst, rounding, tolerance = 0.0, 0.0, 0.05 if in_8_bits else TOLERANCE.get(goal.base.dtype, 0.05)
    for exact, prompt in zip(goal.prompts, rounded.prompts, strict=True):
        for question, exact_TV, ours_TV in _ours(goal.base, exact, prompt):
            given = torch.tensor([chat_ids(tokenizer, prompt, question)])
            theirs_TV = model(given).logits[0, -len(ours_TV) :].float().cpu()
            worst = max(worst, relative_error(theirs_TV, ours_TV, ids))
            rounding = max(rounding, relative_error(ours_TV, exact_TV, ids))
    if not worst <= tolerance:
        raise ArtifactError(
            f"read back, the model's logits differ from ours by {worst:.1e} (allowed {tolerance:.0e}): {goal.base.name} cannot carry "
            "a prompt in its vocabulary"
        )
    return {"logits_relative_error": worst, "rounding_relative_error": rounding}


def _ours(base: FrozenBase, exact: Carried, rounded: Carried) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every question: our logits [T, V] on its tokens behind the prompt as it is, and as the table holds it."""
    rows = [(start, exact.asked(question)) for question in QUESTIONS for start in (0, 1)]
    states = states_behind(base, [exact.soft, rounded.soft], rows)
    for index, question in enumerate(QUESTIONS):
        exact_TV, rounded_TV = (base.logits(states_TH).float().cpu() for states_TH in states[2 * index : 2 * index + 2])
        yield question, exact_TV, rounded_TV


def relative_error(logits_TV: Tensor, reference_TV: Tensor, ids: list[int]) -> float:
    """Over the tokens of the base: a spare row of its table that a prompt took had a logit of its own before."""
    kept = torch.ones(reference_TV.shape[1], dtype=torch.bool)
    kept[[token for token in ids if token < len(kept)]] = False
    difference = (logits_TV[:, : len(kept)] - reference_TV)[:, kept]
    return (difference.norm() / reference_TV[:, kept].norm()).item()
