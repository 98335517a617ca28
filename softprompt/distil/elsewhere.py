"""A teacher behind a server that speaks OpenAI's completions and names tokens by their numbers, as vLLM and `softprompt serve` do.

It gets the ids that the base itself would read with the text in its context, so its tokenizer must be the base's. Its answers come with the
20 likeliest tokens at every place.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from softprompt.config import DistilConfig
from softprompt.data import Example
from softprompt.encode import Encoder
from softprompt.engine.teacher import Listed
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError, DataError
from softprompt.extras import need

TOP = 20  # what servers give at most
MARK = "token_id:"  # before a token's number
NEVER = -9999.0  # the logarithm of no probability, as servers write it
PATIENCE = 600.0  # seconds for an answer


@dataclass(frozen=True)
class Told:
    """An answer's tokens, and at each place the likeliest ones: their ids and logarithms of probabilities, TOP of each. `ended`: it came to
    its end, which is then the last of them."""

    ids: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]
    ended: bool

    def as_dict(self) -> dict[str, Any]:
        """For a line of study.jsonl."""
        return {"ids": self.ids, "top_ids": self.top_ids, "top_logprobs": self.top_logprobs, "ended": self.ended}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Told":
        top_ids, top_logprobs = (tuple(map(tuple, line[name])) for name in ("top_ids", "top_logprobs"))
        return cls(tuple(line["ids"]), top_ids, top_logprobs, bool(line["ended"]))


class Server:
    """One model of a server."""

    def __init__(self, client: Any, model: str, address: str) -> None:
        self.client, self.model, self.address = client, model, address

    def answer(self, ids: Sequence[int], most: int, end_ids: frozenset[int]) -> Told:
        """No ids for an answer that ends at once. Raises ConfigError where the server refuses or does not name its tokens."""
        import openai

        how = {"temperature": 0, "max_tokens": most, "logprobs": TOP, "extra_body": {"return_tokens_as_token_ids": True}}
        try:
            said = self.client.completions.create(model=self.model, prompt=list(ids), **how).choices[0]
        except openai.OpenAIError as error:
            raise ConfigError(f"distil.teacher = {self.address}: {error}") from None
        found = said.logprobs
        if found is None or not found.tokens:
            return Told((), (), (), ended=True)
        if not all(token.startswith(MARK) for token in found.tokens):
            raise ConfigError(f"distil.teacher = {self.address}: it does not know return_tokens_as_token_ids: use vLLM or softprompt serve")
        return _ended(
            tuple(map(_number, found.tokens)), [_likeliest(top) for top in found.top_logprobs], said.finish_reason == "stop", end_ids
        )


@contextmanager
def server(config: DistilConfig) -> Iterator[Server]:
    """The server that [distil] names. Raises ConfigError where none answers, MissingPackage."""
    need("openai", "distil.teacher")
    import openai

    assert config.teacher is not None, "asked for where there is one"
    address = f"{config.teacher.rstrip('/').removesuffix('/v1')}/v1"
    with openai.OpenAI(base_url=address, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=PATIENCE) as client:
        try:
            known = [model.id for model in client.models.list()]
        except openai.OpenAIError as error:
            raise ConfigError(f"distil.teacher = {config.teacher}: no such server answers: {error}") from None
        model = config.teacher_model or next(iter(known), None)
        if model not in known:
            raise ConfigError(f"distil.teacher = {config.teacher} serves no model {model}: it serves {', '.join(known) or 'none'}")
        yield Server(client, str(model), config.teacher)


def listed(rows: Sequence[tuple[Encoded, Told]]) -> Listed:
    """The teacher of rows, each as `read` made it."""
    return Listed([(torch.tensor(told.top_ids), torch.tensor(told.top_logprobs).exp()) for _, told in rows])


def read(encoder: Encoder, example: Example, told: Told, max_length: int) -> tuple[Encoded, Told]:
    """The row as the student reads it, with the teacher's own tokens, and what the teacher has said at their places. Where the question
    ends with a blank, which the teacher never reads (contestants.py) and says itself with its first word, that word's own tokens are
    certain. Raises DataError for a row that is too long: its places must be those that the teacher has said something of."""
    question = encoder.encode(example).question
    first = encoder.tokenizer.decode(told.ids[:1])
    if first.startswith(" ") and encoder.tokenizer.decode(question).endswith(" "):
        sure = encoder.tokenizer(first.lstrip(" "), add_special_tokens=False)["input_ids"]
        certain = [_certain(token, told.top_ids[0]) for token in sure]
        top_ids, top_logprobs = zip(*certain, *zip(told.top_ids[1:], told.top_logprobs[1:], strict=True), strict=True)
        told = replace(told, ids=(*sure, *told.ids[1:]), top_ids=top_ids, top_logprobs=top_logprobs)
    row = Encoded((*question, *told.ids), (*(False,) * len(question), *(True,) * len(told.ids)), example.source)
    if len(row) + (encoder.bos_id is not None) > max_length:
        raise DataError(f"{len(row)} tokens are more than data.max_length = {max_length}", example.source)
    return row, told


def _certain(token: int, likely: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """This token, and as many as are `likely`, or one less, that are not said."""
    others = tuple(other for other in likely if other != token)[: len(likely) - 1]
    return (token, *others), (0.0, *(NEVER,) * len(others))


def _number(token: str) -> int:
    return int(token.removeprefix(MARK))


def _likeliest(top: Mapping[str, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The token that was said may stand behind the TOP likeliest."""
    pairs = sorted(((_number(token), value) for token, value in top.items()), key=lambda pair: -pair[1])[:TOP]
    return tuple(token for token, _ in pairs), tuple(value for _, value in pairs)


def _ended(ids: tuple[int, ...], tops: Sequence[tuple[tuple[int, ...], tuple[float, ...]]], stopped: bool, end_ids: frozenset[int]) -> Told:
    """With the end of an answer that has come to it: vLLM says that token, others leave it out, and then nothing but its place is known."""
    if stopped and ids[-1] not in end_ids:
        end = min(end_ids)
        ids, tops = (*ids, end), [*tops, _certain(end, tops[-1][0])]
    width = min(len(top) for top, _ in tops)
    return Told(ids, tuple(top[:width] for top, _ in tops), tuple(values[:width] for _, values in tops), stopped)
