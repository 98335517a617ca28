"""A soft prompt as a model of the lm-evaluation-harness: `softprompt lm-eval run --model softprompt --model_args prompt=PROMPT`.

The rows stand in the prefix, so the logits of a request are those of its own tokens: there is no slice to get wrong.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from softprompt.answers import cut_at, until
from softprompt.artifact import load_prompt, read_card
from softprompt.data import Example, Message
from softprompt.engine.batch import batches
from softprompt.engine.decode import Question, decode_whole
from softprompt.engine.loading import load_base
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.reading import shelved
from softprompt.engine.tokens import Encoded
from softprompt.errors import ConfigError
from softprompt.sampling import Sampling
from softprompt.templates import Chat
from softprompt.thinking import Thinking, spoken


@register_model("softprompt")
class SoftPromptLM(TemplateLM):  # type: ignore[misc]
    """`prompt`: a prompt, checkpoint or run folder. `device`, `dtype`: of the base, as in the configuration; every `model.key` can be
    given too, `model.name=FOLDER` for a base that was moved. `template`: put every context into the template that the prompt was trained
    with; otherwise the text stands behind the prompt as the task writes it."""

    def __init__(
        self,
        prompt: str,
        device: str | None = None,
        dtype: str | None = None,
        template: bool = False,
        allow_other_base: bool = False,
        max_gen_toks: int = 256,
        **given: Any,
    ) -> None:
        super().__init__()
        of_base = {key: value for key, value in given.items() if key.startswith("model.")}
        unknown = sorted(set(given) - set(of_base) - {"batch_size", "max_batch_size"})  # the harness passes these two to every model
        if unknown:
            raise ConfigError(
                f"--model_args {unknown[0]}: softprompt knows prompt, device, dtype, template, allow_other_base, max_gen_toks, "
                "model.name and its kin"
            )
        named = {"model.device": device, "model.dtype": dtype, **of_base}
        overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in named.items() if value is not None]
        self.base = load_base(read_card(prompt).base_here(overrides))
        self.stored = load_prompt(Path(prompt), self.base, allow_other_base=bool(allow_other_base))
        self.tokenizer, self.template, self.max_gen_toks = self.base.tokenizer, bool(template), int(max_gen_toks)
        self.context = (self.stored.soft, ())
        self.budget = self.base.budget(None)

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
        return (self.base.context_length or 2048) - self.stored.soft.num_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids without BOS, which stands in the prefix."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        self.stored.encoder.check_ids(ids, "a request")
        return ids[1:] if ids and ids[0] == self.stored.soft.bos_id else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.template:
            encoder = self.stored.encoder
            return list(encoder.question(context)), self.tok_encode(encoder.template.before_answer + continuation.strip())
        return super()._encode_pair(context, continuation)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        encoder = self.stored.encoder
        given = [Message(turn["role"], turn["content"]) for turn in chat_history]
        turns = encoder.completed(Example(tuple(given), "a request")).messages
        template = encoder.template if isinstance(encoder.template, Chat) else Chat(self.tokenizer)
        return self.tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            chat_template=template.text(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
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
        prefix = shelved(self.base, self.context)
        for batch in batches(some, [0] * len(some), self.budget, self.base.device):
            continued = self.base.continue_from(prefix, batch.which_B, batch.ids_BT, batch.mask_BT)
            states_NH = continued.hidden_BTH.flatten(0, 1)[batch.scored_N]
            every_N = torch.arange(len(states_NH), device=states_NH.device)
            losses_N, likeliest_N = self.base.head.losses_after(states_NH[None], every_N, batch.targets_N)
            for row, loss, same in zip(batch.row_N.tolist(), losses_N.tolist(), likeliest_N.tolist(), strict=True):
                number = longer[batch.rows[row]]
                scores[number] -= loss
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
        if not isinstance(self.stored.soft, SoftPrompt):
            raise ConfigError("keys and values alone predict no first token: a task without a context needs a prompt of rows")
        start_SH = self.stored.soft.embeds(self.base).to(self.base.dtype)
        hidden_H = self.base.backbone(inputs_embeds=start_SH[None], use_cache=False).last_hidden_state[0, -1]
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
        answers, stops, blocks, questions = [""] * len(requests), [], [], []
        stop_ids = self.stored.encoder.end_ids
        for context, how in (request.args for request in requests):
            stops.append(self._stops(how))
            blocks.append(self._thinking(context))
            ends = until(self.tokenizer, stops[-1], blocks[-1])
            questions.append(Question((self.context,), (self._question(context),), self._sampling(how), ends, stop_ids=stop_ids))
        for number, ids, _ in decode_whole(self.base, questions):
            said = spoken(self.tokenizer.decode(ids, skip_special_tokens=True), blocks[number])
            answers[number] = cut_at(said, stops[number])
        return answers

    def _thinking(self, context: str) -> Thinking | None:
        """The block in front of the answer to a request, whoever has put it into a template."""
        found = self.stored.encoder.thinking
        if found is None or self.template:
            return found
        return replace(found, opened=context.rstrip().endswith(found.begin))

    def _question(self, context: str) -> tuple[int, ...]:
        ids = self.stored.encoder.question(context) if self.template else tuple(self.tok_encode(context))
        return ids[-(self.max_length - self.max_gen_toks) :]

    def _sampling(self, how: dict[str, Any]) -> Sampling:
        limit = int(how.get("max_gen_toks", self.max_gen_toks))
        if not how.get("do_sample") or not how.get("temperature", 1.0):
            return Sampling(max_new_tokens=limit)
        return Sampling(limit, float(how.get("temperature", 1.0)), float(how.get("top_p", 1.0)), int(how.get("top_k", 0)))

    def _stops(self, how: dict[str, Any]) -> tuple[str, ...]:
        stops = how.get("until") or ()
        return (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)
