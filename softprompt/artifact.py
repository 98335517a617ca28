"""A prompt on disk: a PEFT adapter folder with a card.

    adapter_config.json        what PEFT reads
    adapter_model.safetensors  one tensor, prompt_embeddings [P, H] float32; for position "after_bos" the BOS row comes first; of a
                               deep prompt [P, D], keys and values of every layer (PEFT's PREFIX_TUNING)
    card.json                  what softprompt checks: base, tokenizer, template, position, data, metrics, versions
    README.md                  the same for people; a model card on the Hugging Face hub

Only safetensors and JSON are read. Nothing in the folder can make code run: templates are sandboxed and
`trust_remote_code` is not stored.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from softprompt.card import BaseCard, Card, DataCard, model_card
from softprompt.config import Config, ModelConfig
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.loading import multiplies_in
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import DeepPrompt, Prompt, SoftPrompt, shapes_of
from softprompt.engine.quantized import unadvised
from softprompt.engine.rows import Held
from softprompt.errors import ArtifactError
from softprompt.formats import PROMPT, newer
from softprompt.runlog import package_versions

TENSOR, WEIGHTS = "prompt_embeddings", "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS, "card.json", "README.md")
ANYWAY = "pass --allow-other-base (allow_other_base=True) to use it all the same"


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt with the card that came with it and the encoder that its texts need."""

    soft: Prompt
    card: Card
    encoder: Encoder

    def told(self, system: str | None) -> "StoredPrompt":
        """The same with another system turn than that of its rows; none where it is empty."""
        return replace(self, encoder=self.encoder.told(system))


def chat_template_hash(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's chat template, or of all where it has several; None without."""
    known = tokenizer.chat_template
    text = json.dumps(known, sort_keys=True) if isinstance(known, dict) else known
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def write_prompt(folder: Path, soft: Prompt, card: Card, base: FrozenBase, rows: torch.Tensor | None = None) -> None:
    """Writes the four files into a folder, which is made where it is missing. `rows`: its `stored`, where that is at hand."""
    folder.mkdir(exist_ok=True)
    rows = (soft.stored(base) if rows is None else rows).float().cpu()
    peft = _peft_config(soft, card, base, rows)
    if peft is not None:
        peft.save_pretrained(str(folder))
    save_file({TENSOR: rows.contiguous()}, folder / WEIGHTS)
    (folder / "card.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(model_card(card), encoding="utf-8", newline="\n")


def _peft_config(soft: Prompt, card: Card, base: FrozenBase, rows: torch.Tensor) -> Any:
    """What makes the folder a PEFT adapter, or None for a deep prompt whose layers differ in shape: PEFT has no such format."""
    with unadvised():
        from peft import PrefixTuningConfig, PromptTuningConfig

    text = base.model.config.get_text_config(decoder=True)
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.base.name,
        "num_virtual_tokens": rows.shape[0],
        "num_transformer_submodules": 1,
        "num_layers": text.num_hidden_layers,
        "inference_mode": True,
    }
    if soft.shapes:
        if len(set(soft.shapes)) > 1:
            return None
        heads, size = soft.shapes[0]
        return PrefixTuningConfig(**common, token_dim=heads * size, num_attention_heads=heads, encoder_hidden_size=heads * size)
    heads = getattr(text, "num_attention_heads", 1)  # recurrent bases have none, PEFT asks anyway
    return PromptTuningConfig(**common, token_dim=rows.shape[1], num_attention_heads=heads, prompt_tuning_init="RANDOM")


def find_prompt(path: str | Path) -> Path:
    """The prompt folder meant by a path: itself, or the finished prompt of a run folder. Raises ArtifactError."""
    folder = Path(path)
    for candidate in (folder, folder / "prompt"):
        if (candidate / WEIGHTS).is_file():
            if not (candidate / "card.json").is_file():
                raise ArtifactError(
                    f"{candidate} has no card.json: it was not written by softprompt; softprompt import {candidate} takes it in"
                )
            return candidate
    several = _several(folder)
    if several:
        raise ArtifactError(f"{folder} holds {len(several)} prompts: name one, e.g. {several[0]}")
    if (folder / "config.toml").is_file():
        raise ArtifactError(f"{folder} is a run that has not finished: name one of its checkpoints, or softprompt train --resume {folder}")
    if folder.parent.name == "checkpoints" and not folder.exists():
        raise ArtifactError(f"{folder}: there is no such checkpoint: train.keep says which of them stay")
    raise ArtifactError(f"{folder}: no prompt here ({WEIGHTS} is missing)")


def find_prompts(path: str | Path) -> list[Path]:
    """The prompt folders meant by a path: all of a bank, else the one of `find_prompt`. Raises ArtifactError."""
    return _several(Path(path)) or [find_prompt(path)]


def _several(folder: Path) -> list[Path]:
    if (folder / "prompt").is_dir():
        return []
    return sorted(card.parent for card in (*folder.glob("*/card.json"), *folder.glob("prompts/*/card.json")))


def read_card(path: str | Path) -> Card:
    """The card of a prompt or run folder. Raises ArtifactError when it is missing, damaged or of a newer softprompt."""
    folder = find_prompt(path)
    try:
        values = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if refusal := newer(folder / "card.json", values, PROMPT):
            raise ArtifactError(refusal)
        card = Card.model_validate(values)
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise ArtifactError(f"{folder / 'card.json'} is damaged: {'.'.join(map(str, first['loc']))} {first['msg']}") from None
    if card.template.endswith(".jinja") and "{" not in card.template:
        raise ArtifactError(f"{folder / 'card.json'} names a template file; a card must hold the template itself")
    return card


def check_prompt(path: str | Path) -> Card:
    """The card of a prompt whose rows are what it says, whatever base they belong to. Raises ArtifactError."""
    folder, card = find_prompt(path), read_card(path)
    _read_rows(folder, card)
    if (folder / "adapter_config.json").is_file():
        _check_adapter_config(folder / "adapter_config.json")
    return card


def _check_adapter_config(file: Path) -> None:
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["peft_type"]
    except (ValueError, TypeError, KeyError):
        raise ArtifactError(f"{file} is damaged") from None
    if kind not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise ArtifactError(f"{file} is that of another kind of adapter: {kind}")


def load_prompt(path: str | Path, base: FrozenBase | Held, *, allow_other_base: bool = False) -> StoredPrompt:
    """Reads a prompt and checks that it fits the base.

    `allow_other_base` lets a prompt onto a base or tokenizer with another fingerprint (a fine-tuned or quantised
    variant, say), never onto one of another width. A base in another precision than that of the training is said, once in a process.
    Raises ArtifactError with what does not fit.
    """
    folder = find_prompt(path)
    card = read_card(folder)
    rows = _read_rows(folder, card)
    _check_width(folder, card, rows, base)
    if not allow_other_base:
        _check_fingerprints(folder, card, base, rows)
    encoder = make_encoder(base.tokenizer, card.template, date=card.date, system=card.system, num_tokens=base.num_tokens)
    if encoder.bos_id != card.bos_id and not allow_other_base:
        raise ArtifactError(f"{folder} was trained with another use of the BOS token than that of {base.name}'s tokenizer: {ANYWAY}")
    if isinstance(base, FrozenBase) and card.base.dtype not in ("auto", base.precision):
        say_precision(card.base.dtype, base.precision, multiplies_in(card.base.dtype, str(base.device)))
    own = _without_bos(rows, card).to(base.device)
    if card.method == "prefix":
        return StoredPrompt(DeepPrompt(own, card.position, encoder.bos_id, torch.ones_like(own[0]), card.shapes), card, encoder)
    return StoredPrompt(SoftPrompt(own, card.position, encoder.bos_id), card, encoder)


@lru_cache
def say_precision(trained_in: str, used_in: str, either: bool) -> None:
    """Says once in a process that prompts are used in another precision. `either`: whether the machine multiplies in that of the
    training too."""
    why = "would compute as in training" if either else f"would be slow, for this machine does not multiply in {trained_in}"
    logging.getLogger(__name__).warning(
        "a prompt trained in %s is used in %s and may answer otherwise: model.dtype=%s %s", trained_in, used_in, trained_in, why
    )


def _check_width(folder: Path, card: Card, rows: torch.Tensor, base: FrozenBase | Held) -> None:
    if card.method == "prefix":
        if card.shapes != (shapes_of(base.prefill([base.embed_ids([0])]).layers) if isinstance(base, FrozenBase) else base.shapes):
            raise ArtifactError(f"{folder} holds keys and values of other shapes than those of {base.name}: it belongs to {card.base.name}")
    elif rows.shape[1] != base.hidden_size:
        raise ArtifactError(
            f"{folder} has rows of {rows.shape[1]} numbers, {base.name} needs {base.hidden_size}: it belongs to {card.base.name}"
        )


def stored_rows(path: str | Path) -> torch.Tensor:
    """The rows [P, H] of a prompt or run folder, float32, BOS left out, whatever base they belong to. Raises ArtifactError."""
    folder, card = find_prompt(path), read_card(path)
    if card.method == "prefix":
        raise ArtifactError(f"{folder} holds keys and values of every layer, no rows for another prompt to start from")
    return _without_bos(_read_rows(folder, card), card)


def _without_bos(rows: torch.Tensor, card: Card) -> torch.Tensor:
    return rows[1:] if card.position == "after_bos" and card.bos_id is not None else rows


def _check_fingerprints(folder: Path, card: Card, base: FrozenBase | Held, rows: torch.Tensor) -> None:
    if isinstance(base, FrozenBase):
        other = not card.base.is_of(base)
    else:
        bos = rows[0] if len(rows) > card.num_virtual_tokens else None
        known = "" if card.base.dtype == "float16" else card.base.fingerprint  # which rounds the weights otherwise
        other = base.other_than(known, card.base.model_type, bos, card.bos_id)
    if other:
        raise ArtifactError(f"{folder} was trained on {card.base.name}, whose weights differ from those of {base.name}: {ANYWAY}")
    if card.base.tokenizer_fingerprint != base.tokenizer_fingerprint:
        raise ArtifactError(f"{folder} was trained with another tokenizer than that of {base.name}: {ANYWAY}")
    if card.template == "chat" and card.base.chat_template_sha256 != chat_template_hash(base.tokenizer):
        raise ArtifactError(f"{folder} was trained with another chat template than that of {base.name}: {ANYWAY}")


def _read_rows(folder: Path, card: Card) -> torch.Tensor:
    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from None
    if list(tensors) != [TENSOR]:
        raise ArtifactError(f"{file} must hold one tensor {TENSOR}, it holds {', '.join(sorted(tensors)) or 'none'}")
    rows = tensors[TENSOR]
    stored = card.num_virtual_tokens + (card.position == "after_bos" and card.bos_id is not None)
    width = sum(heads * size for heads, size in card.shapes) or card.base.hidden_size
    if rows.shape != (stored, width) or not rows.is_floating_point():
        raise ArtifactError(f"{file} holds {list(rows.shape)} {rows.dtype}, its card says [{stored}, {width}] float32")
    if not torch.isfinite(rows).all():
        raise ArtifactError(f"{file} holds numbers that are not finite: the run that wrote it had diverged")
    return rows.float()


def base_card(model: ModelConfig, base: FrozenBase) -> BaseCard:
    """What a card says of a base that was loaded with these settings."""
    name, gguf_file = model.location
    return BaseCard(
        name=name,
        gguf_file=gguf_file,
        revision=model.revision,
        quantization=model.quantization,
        dtype=model.dtype,
        model_type=base.model.config.model_type,
        hidden_size=base.hidden_size,
        fingerprint=base.fingerprint,
        sample=base.sample,
        tokenizer_fingerprint=base.tokenizer_fingerprint,
        chat_template_sha256=chat_template_hash(base.tokenizer),
    )


def end_ids(encoder: Encoder) -> tuple[int, ...]:
    """The tokens that answers in this template end with."""
    return tuple(sorted(encoder.end_ids or {encoder.tokenizer.eos_token_id}))


def make_card(config: Config, base: FrozenBase, soft: Prompt, encoder: Encoder, data: DataCard, note: str, metrics: dict[str, Any]) -> Card:
    """The card of a prompt as it is now."""
    return Card(
        base=base_card(config.model, base),
        method=config.prompt.method,
        num_virtual_tokens=soft.length,
        shapes=soft.shapes,
        position=soft.position,  # type: ignore[arg-type]
        bos_id=soft.bos_id,
        template=encoder.template.name,
        date=encoder.template.date,
        system=encoder.system,
        end_ids=end_ids(encoder),
        max_length=config.data.max_length,
        init=note,
        text=config.prompt.text,
        data=data,
        seed=config.train.seed,
        metrics=metrics,
        versions=package_versions(),
    )
