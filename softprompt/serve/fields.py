"""The fields of a request: each is honoured, or the request is refused. What they ask becomes `Ask`s.

Three kinds of fields: those of the models below; those of REFUSED, which may only say what happens anyway; and unknown ones, which are
refused. `tests/test_serve_fields.py` holds that every field of OpenAI's own types is of one kind.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from softprompt.sampling import MOST_BIAS, MOST_PENALTY, Sampling
from softprompt.serve.asking import Ask, Conversation, Text
from softprompt.serve.messages import read_messages
from softprompt.serve.refusals import Refused

MOST_STOPS, MOST_STOP_LENGTH, MOST_LOGPROBS, MOST_N = 4, 1_000, 20, 128
SEEDS = 2**63

Fraction = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Short = Annotated[str, Field(max_length=512)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """`include_obfuscation` pads chunks against somebody who counts bytes on the wire: only its absence can be had."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Fields):
    """`strict` is the case either way: the answer always keeps to the schema."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_to_keep(self) -> Mapping[str, Any] | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Refused("response_format: json_schema goes with the type json_schema", param="response_format", code="invalid_value")
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class Common(Fields):
    """What both routes have. `user` and `safety_identifier` go into the log."""

    model: Short
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_N)] | None = None
    stop: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], Field(max_length=1_000)] | None = None
    max_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    return_tokens_as_token_ids: bool | None = None
    user: Short | None = None


class ChatFields(Common):
    messages: list[Any]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    safety_identifier: Short | None = None


class CompletionFields(Common):
    prompt: Any
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


REFUSED: dict[str, tuple[Any, ...]] = {  # what each may say beside null: what happens anyway
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
OF_ONE_ROUTE = {"suffix": CompletionFields}  # the others are fields of chats
OWN = {"top_k": 0, "min_p": 0.0, "return_tokens_as_token_ids": False}  # fields that OpenAI does not have
Model = TypeVar("Model", bound=Common)


@dataclass(frozen=True)
class Wish:
    """A request that can be asked: `num_texts` texts, each to be answered `n` times, text by text. `place`: the field that they stood in;
    `logprobs`: as in `Ask`; `as_ids`: tokens are named by their numbers, as vLLM names them, so that none look alike."""

    place: Literal["messages", "prompt"]
    asks: tuple[Ask, ...]
    num_texts: int
    stream: bool
    usage: bool
    logprobs: int | None
    echo: bool
    user: str | None
    as_ids: bool = False

    @property
    def model(self) -> str:
        return self.asks[0].model

    @property
    def n(self) -> int:
        return len(self.asks) // self.num_texts


# ---- bytes to fields ---------------------------------------------------------------------------------------------------


def read_tree(body: bytes) -> dict[str, Any]:
    """The object that a body holds. NaN, halves of surrogate pairs, bytes that are no UTF-8 and NUL are refused."""
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise Refused("the body must be a JSON object", code="invalid_json")
    if b"\\u0000" in body and _has_nul(tree):
        raise Refused("a text holds the character NUL", code="invalid_text")
    return tree


def _has_nul(tree: Any) -> bool:
    if isinstance(tree, str):
        return "\0" in tree
    if isinstance(tree, dict):
        return any(_has_nul(part) for pair in tree.items() for part in pair)
    return isinstance(tree, list) and any(map(_has_nul, tree))


def _read_fields(tree: Mapping[str, Any], kind: type[Model]) -> Model:
    known = set(kind.model_fields)
    for name in tree:
        values = REFUSED.get(name)
        if name in known or (values is not None and OF_ONE_ROUTE.get(name, ChatFields) is kind and _says(tree[name], values)):
            continue
        if values is None or OF_ONE_ROUTE.get(name, ChatFields) is not kind:
            raise Refused(f"unknown field: {name[:100]}", param=name[:100], code="unknown_parameter")
        raise Refused(f"{name} is not supported", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate({name: value for name, value in tree.items() if name in known})
    except ValidationError as error:
        raise _refusal(error) from None


def _says(value: Any, values: tuple[Any, ...]) -> bool:
    return value is None or any(type(value) is type(one) and value == one for one in values)


def _refusal(error: ValidationError) -> Refused:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part)[:100] for part in first["loc"] if part != "[key]")
    if first["type"] == "missing":
        return Refused(f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return Refused(f"unknown field: {param}", param=param, code="unknown_parameter")
    return Refused(f"{param}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=param, code="invalid_value")


# ---- fields to asks ----------------------------------------------------------------------------------------------------


def chat_wish(tree: Mapping[str, Any], most_answers: int) -> Wish:
    """What a chat asks. Raises Refused."""
    fields = _read_fields(tree, ChatFields)
    limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise Refused("max_tokens and max_completion_tokens differ: give one", param="max_tokens", code="invalid_value")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise Refused("top_logprobs needs logprobs", param="top_logprobs", code="invalid_value")
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = _sampling(fields, next(iter(limits), None), least=1)
    texts: list[Text | Conversation] = [read_messages(fields.messages)]
    return _wish(fields, texts, sampling, logprobs, most_answers, user=fields.user or fields.safety_identifier)


def completion_wish(tree: Mapping[str, Any], most_answers: int) -> Wish:
    """What a completion asks. Raises Refused."""
    fields = _read_fields(tree, CompletionFields)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise Refused("best_of must be n: all answers are given back", param="best_of", code="unsupported_value")
    echo = bool(fields.echo)
    sampling = _sampling(fields, fields.max_tokens, least=0 if echo else 1)
    return _wish(fields, read_prompt(fields.prompt), sampling, fields.logprobs, most_answers, echo=echo, user=fields.user)


def read_prompt(prompt: Any) -> list[Text | Conversation]:
    """The texts of a completion: a text, token ids, or a list of either."""
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt if isinstance(prompt, str) else tuple(prompt)]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if all(map(_is_ids, prompt)):
            return [tuple(one) for one in prompt]
    raise Refused("prompt must be a text, a list of texts, token ids, or a list of lists of token ids", param="prompt", code="invalid_type")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def _sampling(fields: Common, max_tokens: int | None, least: int) -> Sampling:
    if max_tokens is not None and max_tokens < least:
        raise Refused(f"max_tokens must be at least {least}", param="max_tokens", code="invalid_value")
    given: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": fields.top_k,
        "min_p": fields.min_p,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "seed": secrets.randbelow(SEEDS) if fields.seed is None else fields.seed % SEEDS,
        "logit_bias": {int(token): bias for token, bias in (fields.logit_bias or {}).items()},
    }
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def _wish(
    fields: Common,
    texts: Sequence[Text | Conversation],
    sampling: Sampling,
    logprobs: int | None,
    most_answers: int,
    *,
    echo: bool = False,
    user: str | None,
) -> Wish:
    n = fields.n or 1
    if n * len(texts) > most_answers:
        message = f"{n * len(texts)} answers in one request: at most {most_answers} are given"
        raise Refused(message, param="n" if n > 1 else "prompt", code="too_many_answers")
    if fields.stream_options is not None and not fields.stream:
        raise Refused("stream_options needs stream", param="stream_options", code="invalid_value")
    schema = None if fields.response_format is None else fields.response_format.schema_to_keep
    seeded = [replace(sampling, seed=(sampling.seed + number) % SEEDS) for number in range(n)]
    asks = [Ask(fields.model, text, one, tuple(fields.stop or ()), logprobs, echo, schema) for text in texts for one in seeded]
    usage = fields.stream_options is not None and bool(fields.stream_options.include_usage)
    place: Literal["messages", "prompt"] = "messages" if isinstance(fields, ChatFields) else "prompt"
    as_ids = bool(fields.return_tokens_as_token_ids)
    return Wish(place, tuple(asks), len(texts), bool(fields.stream), usage, logprobs, echo, user, as_ids)
