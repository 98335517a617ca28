"""A soft prompt as a model of the lm-evaluation-harness: `softprompt lm-eval run --model softprompt --model_args prompt=PROMPT`.

The rows stand in the prefix, so the logits of a request are those of its own tokens: there is no slice to get wrong.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from softprompt.artifact import load_prompt, read_card
from softprompt.batch import batches
from softprompt.decode import Question, Sampling, decode_whole
from softprompt.encode import Encoded
from softprompt.errors import ConfigError
from softprompt.memory import token_budget
from softprompt.model import load_base
from softprompt.prompt import DeepPrompt, prefix_of

QUESTIONS = 32  # answered at once


@register_model("softprompt")
class SoftPromptLM(TemplateLM):  # type: ignore[misc]
    """`prompt`: a prompt, checkpoint or run folder. `device`, `dtype`: of the base, as in the configuration. `template`: put every
    context into the template that the prompt was trained with; otherwise the text stands behind the prompt as the task writes it."""

    def __init__(
        self,
        prompt: str,
        device: str | None = None,
        dtype: str = "auto",
        template: bool = False,
        allow_other_base: bool = False,
        max_gen_toks: int = 256,
        **given: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(given) - {"batch_size", "max_batch_size"})  # the harness passes these two to every model
        if unknown:
            raise ConfigError(
                f"--model_args {unknown[0]}: softprompt knows prompt, device, dtype, template, allow_other_base, max_gen_toks"
            )
        settings = read_card(prompt).model_config_of_base.model_copy(update={"device": device or "auto", "dtype": dtype})
        self.base = load_base(settings)
        self.stored = load_prompt(Path(prompt), self.base, allow_other_base=bool(allow_other_base))
        self.tokenizer, self.template, self.max_gen_toks = self.base.tokenizer, bool(template), int(max_gen_toks)
        with torch.no_grad():
            self.prefix = prefix_of(self.base, [self.stored.soft])
        self.budget = token_budget(self.base.model.base_model, self.base.device, None)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.stored.soft.bos_id is None else self.stored.soft.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.base.name.replace("/", "__")

    @property
    def max_length(self) -> int:
        """Tokens that a request may have beside the prompt."""
        return (self.base.context_length or 2048) - self.prefix.lengths[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids without BOS, which stands in the prefix."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids[1:] if ids and ids[0] == self.stored.soft.bos_id else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.template:
            return list(self.stored.encoder.question(context)), self.tok_encode(continuation.strip())
        return super()._encode_pair(context, continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        first = [self._first(row) if row.supervised[0] else (0.0, True) for row in rows]
        scores = [loss for loss, _ in first]
        greedy = [same for _, same in first]
        longer = [number for number, row in enumerate(rows) if len(row) > 1]
        some = [rows[number] for number in longer]
        for batch in batches(some, [0] * len(some), self.budget, self.base.device):
            continued = self.base.continue_from(self.prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
            logits_NV = self.base.logits(continued.hidden_BTH.flatten(0, 1)[batch.scored_N]).float()
            said_N = logits_NV.log_softmax(dim=-1).gather(1, batch.targets_N[:, None])[:, 0].tolist()
            same_N = (logits_NV.argmax(dim=-1) == batch.targets_N).tolist()
            for row, said, same in zip(batch.row_N.tolist(), said_N, same_N, strict=True):
                number = longer[batch.rows[row]]
                scores[number] += said
                greedy[number] = greedy[number] and same
        return list(zip(scores, greedy, strict=True))

    def _row(self, context: list[int], continuation: list[int]) -> Encoded:
        """The request's tokens, the oldest of the context left out where there are too many; BOS stands in the prefix."""
        if context[:1] == [self.stored.soft.bos_id]:
            context = context[1:]
        ids = [*context, *continuation][-self.max_length :]
        return Encoded(tuple(ids), tuple(index >= len(ids) - len(continuation) for index in range(len(ids))))

    def _first(self, row: Encoded) -> tuple[float, bool]:
        """Log-likelihood of a first token that nothing but the prompt stands before, and whether it is the likeliest."""
        if isinstance(self.stored.soft, DeepPrompt):
            raise ConfigError("keys and values alone predict no first token: a task without a context needs a prompt of rows")
        start_SH = self.stored.soft.embeds(self.base).to(self.base.dtype)
        hidden_H = self.base.model.base_model(inputs_embeds=start_SH[None], use_cache=False).last_hidden_state[0, -1]
        said_V = self.base.logits(hidden_H).float().log_softmax(dim=-1)
        return said_V[row.ids[0]].item(), said_V.argmax().item() == row.ids[0]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the base's context where they are longer."""
        scores = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [((None, None), *make_disjoint_window(window)) for window in windows]
            scores.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return scores

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled answers, ended by their stop texts."""
        answers = [""] * len(requests)
        asked = [(self._question(context), self._sampling(how), self._stops(how)) for context, how in (one.args for one in requests)]
        for sampling in dict.fromkeys(sampling for _, sampling, _ in asked):
            numbers = sorted((n for n, one in enumerate(asked) if one[1] == sampling), key=lambda n: -len(asked[n][0]))
            for first in range(0, len(numbers), QUESTIONS):
                some = numbers[first : first + QUESTIONS]
                questions = [Question((0,), (asked[n][0],)) for n in some]
                for index, ids, _ in decode_whole(self.base, self.prefix, questions, sampling):
                    answers[some[index]] = _cut(self.tokenizer.decode(ids, skip_special_tokens=True), asked[some[index]][2])
        return answers

    def _question(self, context: str) -> tuple[int, ...]:
        ids = self.stored.encoder.question(context) if self.template else tuple(self.tok_encode(context))
        return ids[-(self.max_length - self.max_gen_toks) :]

    def _sampling(self, how: dict[str, Any]) -> Sampling:
        limit = int(how.get("max_gen_toks", self.max_gen_toks))
        if not how.get("do_sample") or not how.get("temperature", 1.0):
            return Sampling(max_new_tokens=limit)
        return Sampling(limit, float(how.get("temperature", 1.0)), float(how.get("top_p", 1.0)), int(how.get("top_k", 0)))

    def _stops(self, how: dict[str, Any]) -> tuple[str, ...]:
        until = how.get("until") or ()
        return (until,) if isinstance(until, str) else tuple(until)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
