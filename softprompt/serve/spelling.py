"""Tokens as a client is shown them: their text and their bytes."""

from collections.abc import Mapping
from functools import lru_cache

from transformers.convert_slow_tokenizer import bytes_to_unicode

from softprompt.literal import Tokenizer
from softprompt.serve.asking import Scored

BYTES = {shown: byte for byte, shown in bytes_to_unicode().items()}


class Spelling:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.added_tokens_decoder)
        self._by_bytes = "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._shown = lru_cache(1 << 16)(self._look_up)

    def scored(self, token: int, logprob: float | None, top: Mapping[int, float] | None = None, most: int = 0) -> Scored:
        """`top`: likely tokens of its place, of which the likeliest `most` are reported."""
        text, data = self._shown(token)
        likeliest = sorted((top or {}).items(), key=lambda pair: -pair[1])[:most]
        return Scored(token, text, data, logprob, tuple(self.scored(other, value) for other, value in likeliest))

    def _look_up(self, token: int) -> tuple[str, bytes]:
        text: str = self.tokenizer.decode([token])
        spelled = self.tokenizer.convert_ids_to_tokens(token)
        if spelled is None or token in self._special:
            return text, text.encode()
        if self._by_bytes and all(one in BYTES for one in spelled):
            return text, bytes(BYTES[one] for one in spelled)
        if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            return text, bytes([int(spelled[3:5], 16)])
        return text, spelled.replace("\u2581", " ").encode()
