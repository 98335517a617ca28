"""Which script a text is written in: Han, Kana, Latin, Hangul, Cyrillic ..."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import groupby

SCRIPTS = {
    "CJK": "Han",
    "IDEOGRAPHIC": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana",
}  # others by the first word of a letter's Unicode name
NO_LETTERS = "none"


def scripts(texts: Iterable[str]) -> dict[str, int]:
    """Texts by the script that most of their words are in, the most frequent script first. A character of Han or Kana counts as a
    word, as does a run of letters of any other script. Japanese has both: Han counts as Kana where there is a fifth as much Kana."""
    return dict(Counter(map(script_of, texts)).most_common())


def script_of(text: str) -> str:
    """Han, Kana, Latin, Hangul, Cyrillic, ...; "none" for a text without letters."""
    words: Counter[str] = Counter()
    for script, run in groupby(map(_script, unicodedata.normalize("NFKC", text))):
        words[script] += len(list(run)) if script in ("Han", "Kana") else 1
    del words[NO_LETTERS]
    if 5 * words["Kana"] > words["Han"]:
        words["Kana"] += words.pop("Han", 0)
    return words.most_common(1)[0][0] if words.total() else NO_LETTERS


@cache
def _script(character: str) -> str:
    if not character.isalpha():
        return NO_LETTERS
    word = unicodedata.name(character, "OTHER").partition(" ")[0]
    return SCRIPTS.get(word, word.capitalize())
