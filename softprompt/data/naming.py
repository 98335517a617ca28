"""What the columns of a file are likely to be, by their names."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ANSWERS = (
    "completion", "answer", "response", "output", "target", "summary", "highlights", "translation", "solution", "reply", "答案",
    "回答", "输出", "回复", "摘要", "译文",
)  # fmt: skip
LABELS = (
    "label", "class", "category", "sentiment", "intent", "topic", "tag", "标签", "类别", "分类", "情感", "意图",
)  # fmt: skip
QUESTIONS = (
    "prompt", "question", "query", "instruction", "input", "text", "sentence", "content", "review", "comment", "message", "title",
    "document", "article", "dialogue", "source", "problem", "问题", "提问", "指令", "输入", "文本", "内容", "句子", "评论", "原文",
)  # fmt: skip
PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("passage", "question"), ("context", "question"),
    ("question", "sentence"),
)  # fmt: skip


def suggest_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """`data.columns` for rows of no known shape, by the names of their columns; None where no name says anything."""
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    texts = [name for name in names if all(isinstance(row.get(name), str | None) for row in rows)]
    short = [name for name in names if all(isinstance(row.get(name), str | int | None) for row in rows)]
    answer = _named(texts, ANSWERS)
    said = answer or _named(short, LABELS)
    asked = _asked([name for name in texts if name != said], rows)
    if said is None or asked is None:
        return None
    return {"prompt": asked, "completion": said} if answer else {"text": asked, "label": said}


def as_setting(columns: Mapping[str, str]) -> str:
    """`data.columns` as a line of TOML."""
    pairs = ", ".join(f"{name} = {json.dumps(wanted, ensure_ascii=False)}" for name, wanted in columns.items())
    return f"data.columns = {{{pairs}}}"


def _named(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of the names that is a known word, or else one that has it as a part, e.g. answer_text."""
    parts = {name: re.split(r"[\W_]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()) for name in names}
    whole = [name for word in known for name in names if name.lower() in (word, f"{word}s")]
    return next(iter([*whole, *(name for word in known for name in names if word in parts[name])]), None)


def _asked(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that asks, a pair of columns as one text, or else the one with the longest texts."""
    lower = {name.lower(): name for name in names}
    for pair in PAIRS:
        if all(name in lower for name in pair):
            return "\n".join(f"{{{{ {lower[name]} }}}}" for name in pair)
    by_length = sorted(names, key=lambda name: -sum(len(row.get(name) or "") for row in rows))
    return _named(names, QUESTIONS) or next(iter(by_length), None)
