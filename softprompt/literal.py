"""Text that spells control tokens and stays text.

A row may hold `</s>` or `<|im_end|>` as words. Such words are marked before a template is filled in, so that the control tokens which
the template itself writes are the only ones. The fast tokenizers can read all control tokens as text, or none: so all are read as text,
and those of the template go by a second name, which a copy of the tokenizer knows. What stands around marked words is tokenized as any
plain text is, merges over their borders included.
"""

import copy
import re
from functools import cached_property
from typing import Any

Tokenizer = Any  # a transformers PreTrainedTokenizerBase; transformers is not imported here
BEGIN, END = MARKS = "\ufdd0", "\ufdd1"  # Unicode keeps these two from ever being characters
MARKED = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}")


def control_tokens(tokenizer: Tokenizer, *, also_plain: bool = False) -> dict[int, str]:
    """The special tokens by id, those of white space alone left out; `also_plain`: and all others that were added to the vocabulary."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {token: one.content for token, one in tokenizer.added_tokens_decoder.items() if one.special or also_plain}
    return {token: text for token, text in (added | named).items() if text.strip()}


class Literal:
    """The marks of one tokenizer's control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tokens = {text: token for token, text in control_tokens(tokenizer).items()}
        self._names: dict[str, str] = {}  # the second name of every control token that was needed so far
        self._known: dict[int, int] = {}  # tokens by the copy's

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self._tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def spelled(self, text: str) -> list[str]:
        """The control tokens that a text spells."""
        return self._control.findall(text)

    def spells(self, text: str) -> bool:
        """Whether a text spells one."""
        return self._control.search(text) is not None

    def marked(self, text: str) -> str:
        """The text with marks around them."""
        return self._control.sub(rf"{BEGIN}\g<0>{END}", text)

    def ids(self, text: str) -> list[int]:
        """Ids of a text with marks: what stands between them is text, all else as ever."""
        pieces = MARKED.split(text)  # every second one is marked
        if not self.tokenizer.is_fast:  # one that is written in Python splits at every token that it knows, or at none
            return [token for number, piece in enumerate(pieces) if piece for token in self._plain(_bare(piece), bool(number % 2))]
        renamed = [_bare(piece) if number % 2 else self._control.sub(self._renamed, _bare(piece)) for number, piece in enumerate(pieces)]
        found = self._copy("".join(renamed), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [self._known.get(token, token) for token in found]

    @cached_property
    def stubborn(self) -> frozenset[str]:
        """The control tokens that this tokenizer makes even of plain text."""
        return frozenset(text for text, token in self._tokens.items() if token in self._plain(text, True))

    @cached_property
    def _copy(self) -> Tokenizer:
        return copy.deepcopy(self.tokenizer)

    def _renamed(self, found: re.Match[str]) -> str:
        text = found.group()
        if text not in self._names:
            from tokenizers import AddedToken

            token = self._tokens[text]
            self._names[text] = f"{BEGIN}{token}{END}"
            own = self.tokenizer.added_tokens_decoder.get(token)
            strips = {"lstrip": own.lstrip, "rstrip": own.rstrip} if own else {}
            self._copy.add_tokens([AddedToken(self._names[text], normalized=False, **strips)])
            self._known[self._copy.convert_tokens_to_ids(self._names[text])] = token
        return self._names[text]

    def _plain(self, text: str, split: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]
        return ids


def _bare(text: str) -> str:
    """Without marks that a template has torn apart."""
    return text.replace(BEGIN, "").replace(END, "")
