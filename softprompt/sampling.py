"""How the tokens of an answer are chosen: plain values, checked. Without torch, so that whoever asks for answers need not have it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from softprompt.errors import ConfigError

MOST_PENALTY, MOST_BIAS = 2.0, 100.0  # OpenAI's bounds


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those cuts off.

    `min_p`: tokens at least this share as likely as the likeliest. `presence_penalty`, `frequency_penalty`: taken from the logit of a
    token that the answer has already, once, and for every time. `logit_bias`: added to the logits of these tokens.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """As files of answers have it: what came later stands in it only where it changes something, so that older files stay the same."""
        later = {"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def check(self) -> None:
        """Raises ConfigError for a value that makes no sense."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, this is {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or a positive number, this is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, this is {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative, this is {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 to 1, this is {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MOST_PENALTY <= getattr(self, name) <= MOST_PENALTY:
                raise ConfigError(f"{name} must be from -{MOST_PENALTY:g} to {MOST_PENALTY:g}, this is {getattr(self, name)}")
        for token, bias in self.logit_bias.items():
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise ConfigError(f"logit_bias of token {token} must be from -{MOST_BIAS:g} to {MOST_BIAS:g}, this is {bias}")
