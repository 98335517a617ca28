"""Answers that keep to a JSON schema: llguidance says which tokens may come next."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from softprompt.errors import ConfigError


class Schema:
    """What one answer may say (engine.choose.Guide), without free blanks: small bases go on with them until their tokens run out. `broken`:
    why it can no longer be kept to; then the answer is of no use, and others beside it are.

    Raises ConfigError for a schema that cannot be kept to.
    """

    def __init__(self, vocabulary: LLTokenizer, schema: Mapping[str, Any]) -> None:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})
        wrong = LLMatcher.validate_grammar(grammar, vocabulary)
        if wrong:
            raise ConfigError(f"response_format: this JSON schema cannot be kept to: {wrong.strip().splitlines()[0]}")
        self._matcher = LLMatcher(vocabulary, grammar)
        self.broken: str | None = None

    def allowed(self) -> Tensor:
        """[V] bool; at the end of what the schema describes, only tokens that end the answer."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._look()
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        return allowed if self.broken is None and bool(allowed.any()) else torch.ones_like(allowed)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        if self._matcher.is_error() and self.broken is None:
            self.broken = self._matcher.get_error().strip().splitlines()[0]
