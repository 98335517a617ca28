"""Prompts in the slots of a llama.cpp server: one that runs (`softprompt attach`), or files for one (`--to slots`).

The server writes a file of plain tokens, we replace these and the numbers in it, the server reads it again. From then on the tokens are a
prompt's name, and a text behind them continues from its keys and values. Whether that is so, answers tell: how many positions the server
took up from the slot, and the likeliest first tokens, against ours. What it is made to compute of plain tokens is never of those that are
a name: it keeps such things (--cache-ram) and would take them up again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.atomic import new_file
from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix
from softprompt.errors import ArtifactError, ConfigError, Error
from softprompt.export.carried import QUESTION, QUESTIONS, Carried
from softprompt.export.chat import frame
from softprompt.export.kv_folder import drawn_ids, keys_and_values, named_by_ids, ordinary_ids
from softprompt.export.llama_server import OPTION, LlamaServer
from softprompt.export.slots import Slot, read_slot

LIKELIEST = 20  # tokens whose logprobs are compared
ROUNDED = 0.1  # nats by which they may differ for the engine's rounding, however little plain tokens differ
TIMES = 3  # as much as plain tokens


@dataclass(frozen=True)
class Attached:
    """A prompt in a slot. `facts`: what a user needs of it. `checked`: the relative error of the keys and values of plain tokens, and mean
    errors of logprobs, in nats, behind plain tokens and behind the prompt. `cache_types`: what its options were."""

    facts: dict[str, Any]
    checked: dict[str, float]
    cache_types: dict[str, str]


@dataclass(frozen=True)
class _Start:
    """What a text stands behind: keys and values, and the ids that it is called by."""

    prefix: Prefix
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A slot of a server, the folder that it keeps slots in, and the base of the prompts."""

    server: LlamaServer
    folder: Path
    slot: int
    base: FrozenBase

    @torch.no_grad()
    def put(self, prompt: Carried) -> Attached:
        """Writes NAME.bin into the folder, and leaves the prompt in the slot.

        Raises ConfigError for a server whose settings would answer wrongly, ArtifactError for one of another base or of a build that is
        not known, ModelError for one that does not answer; then no file is left, and the slot is empty.
        """
        prefix = prompt.soft.prefix(self.base)
        tensors = keys_and_values(self.base, prefix)
        ordinary, length = ordinary_ids(self.base), prefix.lengths[0]
        named = named_by_ids(tensors, length, ordinary)
        others = drawn_ids(f"others than {named.key}", length, ordinary)
        ours, plain = _Start(prefix, named.ids), _Start(self.base.prefill([self.base.embed_ids(others)]), others)
        draft = self.folder / f"{prompt.name}.draft.bin"
        with self._nothing_left_if_it_fails(draft):
            found = self._slot_of_tokens(draft, plain)
            control = self._error(prompt, plain, in_slot=0)
            with new_file(draft) as file:
                file.write(found.holding(tensors, ours.ids))
            self._restore(draft, ours)
            error = self._error(prompt, ours, in_slot=length)
            if not error <= max(ROUNDED, TIMES * control):
                raise ArtifactError(
                    f"{self._named}: behind {prompt.name} its first tokens differ from ours by {error:.2f} nats, behind plain tokens by "
                    f"{control:.2f}: it does not compute what the prompt's base does"
                )
            facts = self._facts(prompt, ours.ids)
            draft.replace(self.folder / f"{prompt.name}.bin")
        checked = {"keys_and_values_of_tokens": found.error, "logprobs_behind_tokens": control, "logprobs_behind_prompt": error}
        return Attached(facts, checked, found.cache_types)

    # ---- the slot ----------------------------------------------------------------------------------------------------

    def _slot_of_tokens(self, draft: Path, plain: _Start) -> Slot:
        """What the server writes of the ids as plain tokens."""
        self.server.read(self.slot, plain.ids, keep=False)
        saved = self.server.save(self.slot, draft.name)
        if saved != len(plain.ids):
            raise ArtifactError(f"{self._named}: it saved {saved} of {len(plain.ids)} tokens: a build whose slots are not known")
        try:
            return read_slot(draft.read_bytes(), plain.ids, keys_and_values(self.base, plain.prefix))
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder} is not where the server keeps its slots, it has put {draft.name} elsewhere: give the folder of its {OPTION}"
            ) from None
        except ArtifactError as error:
            raise ArtifactError(f"{self._named}: of the slot that it wrote: {error}") from None

    def _restore(self, draft: Path, ours: _Start) -> None:
        restored = self.server.restore(self.slot, draft.name)
        if restored != len(ours.ids):
            raise ArtifactError(f"{self._named}: it restored {restored} of {len(ours.ids)} tokens: a build whose slots are not known")

    def _error(self, prompt: Carried, start: _Start, in_slot: int) -> float:
        """The mean error of the logprobs of likeliest first tokens behind a start, of which the slot holds so many positions."""
        errors: list[float] = []
        letter = self.base.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        for question in QUESTIONS:
            asked = prompt.asked(question)
            said = self.server.first_token(self.slot, (*start.ids, *asked), keep=in_slot > 0, most=LIKELIEST, say=letter)
            if said.kept < in_slot:
                raise ConfigError(
                    f"{self._named}: it took up {said.kept} of the prompt's {in_slot} positions and computed the rest from ids that are "
                    f"only a name: {self._remedy}"
                )
            ours_V = self._logprobs(start.prefix, asked)
            errors += [abs(logprob - ours_V[token].item()) for token, logprob in said.likeliest.items()]
        if not errors:
            raise ArtifactError(f"{self._named}: it gives no logprobs of its first token (n_probs): a build that is not known")
        return sum(errors) / len(errors)

    def _logprobs(self, prefix: Prefix, ids: Sequence[int]) -> Tensor:
        """[V]: ours, of the first token behind a text."""
        ids_1T = torch.tensor([list(ids)], device=self.base.device)
        hidden_1TH = self.base.continue_from(prefix, torch.zeros_like(ids_1T[:, 0]), ids_1T, torch.ones_like(ids_1T)).hidden_BTH
        return self.base.logits(hidden_1TH[0, -1]).float().log_softmax(dim=0).cpu()

    @contextmanager
    def _nothing_left_if_it_fails(self, draft: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.folder}: {draft.name} cannot be read or written: {error.strerror or error}") from None
        except Error:
            with suppress(Error):
                self.server.erase(self.slot)
            raise
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)

    # ---- what is said ------------------------------------------------------------------------------------------------

    @property
    def _named(self) -> str:
        return f"{self.server.address} ({self.server.model()}, build {self.server.build()})"

    @property
    def _remedy(self) -> str:
        """What to do where a slot is not taken up."""
        settings = self.base.model.config.get_text_config(decoder=True)
        if "sliding_attention" not in (getattr(settings, "layer_types", None) or ()):
            return "no slot can be restored in this build"
        window = settings.sliding_window
        return f"layers of this base slide: it must be started with --swa-full, and a prompt be shorter than their window of {window}"

    def _facts(self, prompt: Carried, ids: Sequence[int]) -> dict[str, Any]:
        """`restore` and `request`: bodies of the requests that bring the prompt back into a slot and that ask it."""
        try:
            before, behind = frame(prompt)
            text: list[Any] = [f"{before}{QUESTION}{behind}"]
            text = text if self.server.tokenize(text[0]) == list(prompt.asked(QUESTION)) else [*prompt.asked(QUESTION)]
        except ArtifactError:  # a template that is more than text around a question
            text = [*prompt.asked(QUESTION)]
        stops = self.base.tokenizer.convert_ids_to_tokens(sorted({*prompt.end_ids} - self.base.stop_ids))
        request = {"id_slot": self.slot, "prompt": [*ids, *text], "cache_prompt": True, "n_predict": 256, "temperature": 0}
        return {
            "file": f"{prompt.name}.bin",
            "positions": len(ids),
            "ids": list(ids),
            "end_ids": prompt.end_ids,
            "restore": {"filename": f"{prompt.name}.bin"},
            "request": {**request, "stop": stops} if stops else request,
        }
