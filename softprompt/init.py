"""Where a prompt starts: each strategy is a function to rows [P, H], looked up by name in INITS.

"text" is what PEFT and the tutorials call hard prompt tuning, "random" what they call soft prompt tuning.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.config import PromptConfig
from softprompt.errors import ConfigError
from softprompt.model import FrozenBase

LENGTH_WITHOUT_TEXT = 16


@dataclass(frozen=True)
class Start:
    """The rows to start from, and a sentence about where they come from."""

    rows_PH: Tensor
    note: str


def start_rows(config: PromptConfig, base: FrozenBase, seed: int) -> Start:
    """The start rows of a configuration, float32 on the base's device. Raises ConfigError for an init text without tokens."""
    return INITS[config.init](config, base, seed)


def prompt_length(config: PromptConfig, tokenizer: object) -> int:
    """Virtual tokens: `prompt.length`, else the text's token count, else 16."""
    if config.length is not None:
        return config.length
    if config.text is None and config.init == "random":
        return LENGTH_WITHOUT_TEXT
    return len(_text_ids(config, tokenizer))


def _text_ids(config: PromptConfig, tokenizer: object) -> list[int]:
    if config.text is None or not config.text.strip():
        raise ConfigError('prompt.text is empty: say in a sentence what the model should do, or set prompt.init = "random"')
    ids: list[int] = tokenizer(config.text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    if not ids:
        raise ConfigError(f"prompt.text {config.text!r} has no tokens in this tokenizer")
    return ids


def from_text(config: PromptConfig, base: FrozenBase, seed: int) -> Start:
    """Embeddings of the text's tokens, without special tokens; cut where the prompt is shorter, repeated where it is longer."""
    ids = _text_ids(config, base.tokenizer)
    length = config.length or len(ids)
    cycled = [ids[index % len(ids)] for index in range(length)]
    note = f"{length} virtual tokens from the {len(ids)} tokens of prompt.text"
    if length < len(ids):
        note += f"; the last {len(ids) - length} are cut: {base.tokenizer.decode(ids[length:])!r}"
    elif length > len(ids):
        note += f"; repeated in a cycle, {length / len(ids):.1f} times"
    return Start(base.embed_ids(cycled), note)


def random(config: PromptConfig, base: FrozenBase, seed: int) -> Start:
    """Normal noise with the mean and spread of the base's embedding rows in every dimension."""
    length = prompt_length(config, base.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    noise_PH = torch.randn(length, base.hidden_size, generator=generator).to(base.device)
    return Start(base.row_mean_H + noise_PH * base.row_std_H, f"{length} virtual tokens from noise like the embedding rows (seed {seed})")


INITS: dict[str, Callable[[PromptConfig, FrozenBase, int], Start]] = {"text": from_text, "random": random}
