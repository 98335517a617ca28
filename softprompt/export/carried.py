"""What an export is made of: prompts with the names of their tokens, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softprompt.artifact import end_ids
from softprompt.config import ModelConfig
from softprompt.data import Message
from softprompt.encode import Encoder
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import Prompt, SoftPrompt, prefix_of
from softprompt.errors import ArtifactError

QUESTION = "Where is my parcel?"  # of requests that are shown
QUESTIONS = ("What can I do for you today?", "你好，请问有什么可以帮您？", "  1 + 1 = 2; naïve café\n\tx")


@dataclass(frozen=True)
class Carried:
    """A prompt under its name."""

    name: str
    soft: Prompt
    encoder: Encoder

    @property
    def rows_PH(self) -> Tensor:
        """Of a prompt of rows: these, float32."""
        assert isinstance(self.soft, SoftPrompt)
        return self.soft.rows_PH.float().cpu()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of its rows as tokens: hard to type by accident, one each."""
        return tuple(f"<|sp:{self.name}:{index}|>" for index in range(self.soft.length))

    @property
    def bos(self) -> str:
        """The BOS token's text, empty where texts have none."""
        bos_id = self.soft.bos_id
        return "" if bos_id is None else self.encoder.tokenizer.convert_ids_to_tokens(bos_id)

    @property
    def opening(self) -> str:
        """What a text for this prompt begins with: BOS before or behind the rows, as in training."""
        rows = "".join(self.tokens)
        return self.bos + rows if self.soft.position == "after_bos" else rows + self.bos

    @property
    def end_ids(self) -> list[int]:
        """The tokens that its answers end with."""
        return list(end_ids(self.encoder))

    def asked(self, question: str) -> tuple[int, ...]:
        """Ids of a question in the prompt's template, without BOS."""
        return self.encoder.question((Message("user", question),))


@dataclass(frozen=True)
class Goal:
    """`draft`: the folder to fill. `spare`: one that is thrown away. `default`: the prompt of a chat that names none. `model`: where
    the base came from. `cache_type`: of the slots of llama.cpp."""

    base: FrozenBase
    prompts: tuple[Carried, ...]
    draft: Path
    spare: Path
    default: str | None
    model: ModelConfig
    gguf_file: Path | None
    cache_type: str | None = None

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All new tokens, prompt after prompt. Raises ArtifactError when the vocabulary has one already."""
        tokens = tuple(token for prompt in self.prompts for token in prompt.tokens)
        taken = self.base.tokenizer.get_vocab()
        for token in tokens:
            if token in taken:
                raise ArtifactError(f"{self.base.name} has a token {token} already: rename the prompt's folder")
        return tokens

    def facts(self, ids: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The facts of each prompt whose tokens got these ids, in the order of `tokens`."""
        found, left = {}, list(ids)
        for prompt in self.prompts:
            own, left = left[: len(prompt.tokens)], left[len(prompt.tokens) :]
            found[prompt.name] = {"tokens": list(prompt.tokens), "ids": own, "opening": prompt.opening, "end_ids": prompt.end_ids}
        return found

    @property
    def new_end_ids(self) -> list[int]:
        """Tokens that answers of the prompts end with and that the base does not stop at by itself."""
        return sorted({token for prompt in self.prompts for token in prompt.end_ids} - self.base.stop_ids)

    def rounded_to(self, dtype: torch.dtype) -> "Goal":
        """The same prompts, their rows as a table of this precision holds them."""
        scale = embedding_scale(self.base)

        def rounded(prompt: Carried) -> Carried:
            return replace(prompt, soft=prompt.soft.with_learned((prompt.rows_PH / scale).to(dtype).float() * scale))

        return replace(self, prompts=tuple(map(rounded, self.prompts)))

    @cached_property
    def rows_NH(self) -> Tensor:
        """Their entries in the embedding table, float32: what the embedding module multiplies by is divided out."""
        return torch.cat([prompt.rows_PH for prompt in self.prompts]) / embedding_scale(self.base)


@dataclass(frozen=True)
class Exported:
    """`prompts`: each one's facts. `checked`: what was read back and compared, with the largest deviation. `notes`: what to know. `engine`:
    what was written for."""

    format: str
    base: str
    prompts: dict[str, dict[str, Any]]
    files: Sequence[str] = ()
    checked: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The documented JSON of `softprompt export`."""
        return {
            "format": self.format,
            "base": self.base,
            "prompts": self.prompts,
            "files": list(self.files),
            "checked": self.checked,
            "notes": list(self.notes),
            **self.engine,
        }


@torch.no_grad()
def embedding_scale(base: FrozenBase) -> float:
    """What the embedding module multiplies its table's rows by: 1, or sqrt(H) in the Gemma family. Measured, not looked up."""
    ids = torch.arange(min(64, base.model.get_input_embeddings().weight.shape[0]), device=base.device)
    given, held = base.embed(ids).cpu().double(), base.model.get_input_embeddings().weight[ids].cpu().double()
    scale = ((given * held).sum() / held.square().sum()).item()
    if not torch.allclose(given, held * scale, rtol=1e-2, atol=1e-6):
        raise ArtifactError(f"{base.name} does more to its embeddings than scaling them: a prompt cannot be an entry of its vocabulary")
    return scale


@torch.no_grad()
def states_behind(base: FrozenBase, starts: Sequence[Prompt], rows: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
    """[T, H] of each text, row (start, ids) behind its start, read in one batch."""
    width = max(len(ids) for _, ids in rows)
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in rows], device=base.device)
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for _, ids in rows], device=base.device)
    which_B = torch.tensor([start for start, _ in rows], device=base.device)
    hidden_BTH = base.continue_from(prefix_of(base, [(start, ()) for start in starts]), which_B, ids_BT, mask_BT).hidden_BTH
    return [hidden_TH[: len(ids)] for hidden_TH, (_, ids) in zip(hidden_BTH, rows, strict=True)]
