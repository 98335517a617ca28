"""What is asked as vLLM's completions take it, field by field, and what they say as pieces of an answer."""

from collections.abc import Sequence
from typing import Any

from softprompt.serve.asking import Ask, Said, Scored
from softprompt.serve.choices import ID
from softprompt.serve.spelling import Spelling
from softprompt.thinking import Thinking, Told


def fields_of(ask: Ask, model: str, ids: Sequence[int], stop_ids: frozenset[int], room: int) -> dict[str, Any]:
    """The fields of a completion that continues from `ids`; `room`: tokens that its answer may have. All of them are said, so that no
    default of the server's decides."""
    sampling = ask.sampling
    theirs: dict[str, Any] = {
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(stop_ids),
        "skip_special_tokens": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if ask.schema is not None:
        theirs["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(ask.schema)}}
    if scores_text(ask):
        theirs["prompt_logprobs"] = ask.logprobs
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": min(max(1, sampling.max_new_tokens), room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()},
        "seed": sampling.seed,
        "stop": list(ask.stops),
        "logprobs": ask.logprobs,
        "extra_body": theirs,
    }


def scores_text(ask: Ask) -> bool:
    """Whether the text's own tokens are to be scored; vLLM then gives the whole answer at once."""
    return ask.echo and ask.logprobs is not None


class Answer:
    """One answer as it comes from vLLM. `stop_ids` end it and are no part of it."""

    def __init__(self, ask: Ask, spelling: Spelling, stop_ids: frozenset[int], thinking: Thinking | None) -> None:
        self.ask, self.spelling, self.stop_ids = ask, spelling, stop_ids
        self._told = Told(thinking)

    def said(self, choice: Any) -> Said:
        """What a piece of vLLM's stream says, or its whole answer."""
        ids, finish = list(choice.token_ids or ()), choice.finish_reason
        if finish == "stop" and not isinstance(choice.stop_reason, str) and ids and ids[-1] in self.stop_ids:
            ids.pop()
        if self.ask.sampling.max_new_tokens < 1:  # the text alone was to be scored, and vLLM says one token at least
            return Said("", 0, finish="length")
        thought, text = self._told.add(choice.text, last=finish is not None)
        scores = () if self.ask.logprobs is None else self._scores(ids, choice.logprobs, self.ask.logprobs)
        return Said(text, len(ids), scores, thought, finish)

    def _scores(self, ids: Sequence[int], found: Any, most: int) -> tuple[Scored, ...]:
        tops = found.top_logprobs or [None] * len(ids)
        numbered = [{int(name.removeprefix(ID)): value for name, value in (top or {}).items()} for top in tops]
        pieces = zip(ids, found.token_logprobs, numbered, strict=False)
        return tuple(self.spelling.scored(token, logprob, top, most) for token, logprob, top in pieces)

    def echoed(self, choice: Any, ids: Sequence[int], before: int) -> tuple[Scored, ...]:
        """The scores of the text `ids`, which `before` positions stand before; None for one that only a prompt stands before, whose
        last position vLLM has never computed."""
        assert self.ask.logprobs is not None
        scores = []
        for token, found in zip(ids, choice.prompt_logprobs[before:], strict=True):
            top = {int(name): one["logprob"] for name, one in (found or {}).items()}
            scores.append(self.spelling.scored(token, top.get(token), top, self.ask.logprobs))
        return tuple(scores)
