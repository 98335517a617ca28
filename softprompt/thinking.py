"""A chat template's thinking block: text in front of an answer that is no part of it, left out where answers are shown and scored."""

from dataclasses import dataclass

BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True)
class Thinking:
    """The marks of a block. `opened`: the question ends inside it, so that what is said begins there."""

    begin: str
    end: str
    opened: bool = False

    def split(self, text: str, *, whole: bool) -> tuple[str, str]:
        """(what belongs to the block, what is said outside of it) of a text that is `whole` or goes on. Both are empty where that
        cannot be known yet; a block that has no end takes the rest of the text."""
        bare = text.lstrip()
        if self.opened or bare.startswith(self.begin):
            thought, end, said = text.partition(self.end)
            return thought + end, said.lstrip()
        if not whole and self.begin.startswith(bare):
            return "", ""
        return "", text


def spoken(text: str, thinking: Thinking | None) -> str:
    """What a whole text says outside of its block."""
    return text if thinking is None else thinking.split(text, whole=True)[1]


class Told:
    """An answer that comes piece by piece: what is said, and what belongs to the block."""

    def __init__(self, thinking: Thinking | None) -> None:
        self.thinking = thinking
        self._text = ""
        self._given = (0, 0)  # characters of the block and of what is said
        self._speaks = thinking is None  # all that comes is said

    def add(self, piece: str, *, last: bool = False) -> tuple[str, str]:
        """(what the block grows by, what is said now)."""
        if self.thinking is None or self._speaks:
            return "", piece
        self._text += piece
        thought, said = self.thinking.split(self._text, whole=last)
        new = thought[self._given[0] :], said[self._given[1] :]
        self._given = len(thought), len(said)
        self._speaks = bool(said)
        return new


def find_block(text: str) -> Thinking | None:
    """The block in what a template writes in front of an answer, or None."""
    for begin, end in BLOCKS:
        if end in text:
            return Thinking(begin, end, begin not in text)
    return None
