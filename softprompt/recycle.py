"""The same prompt on another variant of its base: what it has lost there, and a short training that starts from it.

A prompt is often worth something on a fine-tuned, quantised or newer base (Lester et al. 2022, "Reducing retraining by recycling
parameter-efficient prompts"); how much is measured, on the base it was trained on and on the other, one after the other.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from softprompt.arguments import Arguments, read_arguments
from softprompt.artifact import StoredPrompt, base_card, end_ids, find_prompt, load_prompt, read_card, write_prompt
from softprompt.atomic import new_folder
from softprompt.card import as_trained
from softprompt.config import Config, ModelConfig, load_config
from softprompt.data import Loaded
from softprompt.engine.loading import MOVED, load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import no_prompt
from softprompt.errors import ConfigError, DataError, Error
from softprompt.evaluation import held_out_loss
from softprompt.job import count_steps
from softprompt.locations import with_absolute_paths
from softprompt.rows import Rows, encode_rows
from softprompt.runlog import package_versions

SHARE, FEWEST = 0.25, 20  # of the old run's steps
OF_ONE = ("name", "gguf_file", "revision", "quantization", "trust_remote_code")  # settings that belong to one base


@dataclass(frozen=True)
class Moved:
    """A prompt on another base. Losses are means per supervised token of the same held-out rows: `loss_old_base` on the base it was
    trained on, None where that is unknown, with the reason in `unknown`; `loss_new_base`; `bare_loss` of the new base alone."""

    path: Path
    given: Arguments
    overrides: tuple[str, ...]
    model: ModelConfig
    base: FrozenBase
    prompt: StoredPrompt
    held: Rows
    loss_old_base: float | None
    unknown: str | None
    loss_new_base: float
    bare_loss: float

    def has_lost(self, tolerance: float) -> bool:
        """Whether it has lost more than `tolerance` nats per supervised token, or nobody knows."""
        return self.loss_old_base is None or self.loss_new_base - self.loss_old_base > tolerance

    def as_dict(self) -> dict[str, Any]:
        """The measured part of the documented JSON of `softprompt recycle`."""
        return {
            "trained_on": self.prompt.card.base.name,
            "base": self.base.name,
            "loss_old_base": self.loss_old_base,
            "loss_new_base": self.loss_new_base,
            "bare_loss": self.bare_loss,
            "held_out_rows": len(self.held.encoded),
        }

    def write(self, out: Path) -> None:
        """The prompt as it is, with a card that binds it to the new base."""
        card, soft, own = self.prompt.card, self.prompt.soft, base_card(self.model, self.base)
        now = {
            "base": own if own.dtype != "auto" else own.model_copy(update={"dtype": card.base.dtype}),
            "bos_id": soft.bos_id,
            "end_ids": end_ids(self.prompt.encoder),
            "init": f"the rows of a prompt for {Path(card.base.name).name}, which was started with: {card.init}",
            "metrics": {**card.metrics, "eval_loss_before": self.loss_old_base, "eval_loss": self.loss_new_base},
            "versions": package_versions(),
        }
        with new_folder(out) as draft:
            write_prompt(draft, soft, card.model_copy(update=now), self.base)

    def training(self, out: Path) -> Config:
        """The settings of a short run that starts from the prompt's rows: those of its own run, with fewer steps.

        Raises ConfigError where there are no rows to train on.
        """
        card, soft = self.prompt.card, self.prompt.soft
        tree = self._settings_of_run()
        tree["model"] = self.model.model_dump(exclude_none=True)
        tree["prompt"] = {
            **tree["prompt"],
            "init": ["file"],
            "file": str(self.path.absolute()),
            "position": "start" if soft.bos_id is None else soft.position,  # the new base may have no BOS
            "method": card.method,
        }
        tree["train"] = {**tree["train"], "out": str(out)}
        if self.given.config.data.eval is not None:
            tree["data"] = {**tree["data"], "eval": self.given.config.data.eval, "eval_fraction": 0.0}
        config = load_config(tree, [override for override in self.overrides if not override.startswith("model.")])
        if config.data.train is None:
            raise ConfigError("the prompt needs training on this base, and its run is not at hand: give data.train=FILE")
        return config

    def _settings_of_run(self) -> dict[str, Any]:
        card, run = self.prompt.card, self.given.of_run
        if run is None:
            data = {"template": card.template, "max_length": card.max_length, "label_words": card.data.label_words}
            data |= {"date": card.date} if card.date else {}
            return {"data": data, "prompt": {"text": card.text} if card.text else {}, "train": {"seed": card.seed}}
        members = run.members()
        own = members.get(self.path.name) or next(iter(members.values()))
        tree = own.model_dump(exclude_none=True)
        tree["prompt"].pop("length", None)
        tree["train"].pop("tokens_per_batch", None)  # found for another base
        tree["train"]["steps"] = max(FEWEST, int(SHARE * count_steps(own, card.data.num_train)))
        return tree


def move(path: str | Path, overrides: Sequence[str], data: str | None = None) -> Moved:
    """Measures a prompt on its own base and on the one that `overrides` name (model.name, model.quantization, model.dtype ...).

    `data`: held-out rows; None: those of the prompt's run. Raises ConfigError where no other base is named, ArtifactError for one of
    another width.
    """
    path = find_prompt(path)
    given = read_arguments(path, (), data, None, overrides)
    card = read_card(path)
    old = as_trained(given.of_run.model if given.of_run else card.model_config_of_base, overrides)
    model = _other(old, overrides)
    old = old.model_copy(update={"trust_remote_code": model.trust_remote_code})
    loaded = given.rows()[0]
    loss, unknown = (None, "its weights have changed") if model == old else _on_old_base(path, old, given, loaded)
    base = load_base(model)
    if model == old and card.base.is_of(base):
        raise ConfigError(
            f"{base.name} is the base that {path} was trained on: name another, e.g. model.name=FOLDER or model.quantization=int8"
        )
    prompt = load_prompt(path, base, allow_other_base=True)
    held = encode_rows(prompt.encoder, loaded, card.max_length)
    if not held.encoded:
        raise DataError(f"{given.source}: no usable row is left ({len(held.rejected)} rejected)")
    if loss is None and card.data.eval_fingerprint == held.fingerprint:
        loss = card.metrics.get("eval_loss")
    if card.base.tokenizer_fingerprint != base.tokenizer_fingerprint:
        loss, unknown = None, "another tokenizer makes other tokens, whose losses cannot be compared"
    budget = base.budget(given.config.train.tokens_per_batch)
    now, bare = (held_out_loss(base, soft, held, budget) for soft in (prompt.soft, no_prompt(base, prompt.encoder.bos_id)))
    if loss is None and card.base.is_of(base) and card.base.tokenizer_fingerprint == base.tokenizer_fingerprint:
        loss = now  # its own base, only moved
    return Moved(path, given, tuple(overrides), model, base, prompt, held, loss, None if loss is not None else unknown, now, bare)


def _other(old: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """The base that the overrides mean; a base named anew keeps nothing of the old one but device and precision."""
    kept = old.model_dump(exclude_none=True)
    if any(override.startswith(("model.name=", "model.gguf_file=")) for override in overrides):
        kept = {key: value for key, value in kept.items() if key not in OF_ONE}
    named = load_config({"model": kept}, [override for override in overrides if override.startswith("model.")])
    return with_absolute_paths(named).model


def _on_old_base(path: Path, old: ModelConfig, given: Arguments, loaded: Loaded) -> tuple[float | None, str | None]:
    """(the loss on the base it was trained on, None), or (None, why it cannot be had). The base is gone from memory afterwards."""
    try:
        base = load_base(old)
        prompt = load_prompt(path, base)
    except Error as error:
        return None, str(error).removesuffix(f"; {MOVED}")
    held = encode_rows(prompt.encoder, loaded, prompt.card.max_length)
    loss = held_out_loss(base, prompt.soft, held, base.budget(given.config.train.tokens_per_batch))
    del base, prompt
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return loss, None
