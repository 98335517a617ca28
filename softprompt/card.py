"""What a prompt is, as its folder says it: for softprompt and for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import within_reach
from softprompt.engine.model import FrozenBase, same_weights
from softprompt.formats import PROMPT
from softprompt.locations import relocated

LICENCE_NOTE = (
    "The rows were trained against the base named above and are of no use without it. "
    "Its licence, and that of the training data, say how they may be used and passed on."
)


class CardModel(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BaseCard(CardModel):
    """The base a prompt was trained for. `dtype`: the precision it was trained in; "auto" where nobody has noted it."""

    name: str
    gguf_file: str | None
    revision: str | None
    quantization: Literal["int8", "nf4"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model_type: str
    hidden_size: int
    fingerprint: str
    sample: str = ""
    tokenizer_fingerprint: str
    chat_template_sha256: str | None

    def is_of(self, base: FrozenBase) -> bool:
        """Whether a base has the weights that the prompt was trained on, whatever precision either of them is in."""
        in_float16 = self.dtype == "float16" or base.dtype == torch.float16
        return same_weights((self.fingerprint, self.sample), (base.fingerprint, base.sample), in_float16=in_float16)


class DataCard(CardModel):
    """The rows a prompt was trained on; files by name alone, no rows."""

    train: str
    num_train: int
    train_fingerprint: str
    num_eval: int
    eval_fingerprint: str | None
    labels: tuple[str, ...]
    label_words: dict[str, str]


class DistilledCard(CardModel):
    """Of what a prompt was distilled: "text", "file" or "examples", how many tokens the base reads of it, its sha256, and the text itself
    where that was asked for."""

    kind: Literal["text", "file", "examples"]
    tokens: int
    sha256: str
    text: str | None = None


class Card(CardModel):
    """What a prompt is, and what it may be loaded onto. `date`: the day that its template is told, where it asks for one; `system`: the
    system turn that all its rows had; `end_ids`: the tokens that end its answers."""

    format: Literal[1] = PROMPT
    base: BaseCard
    method: Literal["prompt", "prefix"] = "prompt"
    num_virtual_tokens: int
    shapes: tuple[tuple[int, int], ...] = ()
    position: Literal["after_bos", "start"]
    bos_id: int | None
    template: str
    date: str | None = None
    system: str | None = None
    end_ids: tuple[int, ...] = ()
    max_length: int
    init: str
    text: str | None
    data: DataCard
    seed: int
    metrics: dict[str, float | int | None]
    versions: dict[str, str]
    licence_note: str = LICENCE_NOTE
    distilled: DistilledCard | None = None

    @property
    def model_config_of_base(self) -> ModelConfig:
        """Where to load the base from. Remote code stays off, whatever the folder says."""
        return ModelConfig(**self.base.model_dump(include={"name", "gguf_file", "revision", "quantization", "dtype"}))

    def base_here(self, overrides: Sequence[str] = ()) -> ModelConfig:
        """The same for a command with these overrides, on this machine."""
        return as_trained(relocated(self.model_config_of_base, overrides), overrides)


def as_trained(stored: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """A base that a run or prompt remembers, in the precision of then where the device multiplies in it, or where the overrides of a
    command name one; elsewhere the machine decides."""
    return stored if "dtype" in load_config(None, overrides).model.model_fields_set else within_reach(stored)


def _around(card: Card) -> str:
    """What else the texts of a prompt had, in sentences."""
    said = [f" Its clock showed {card.date}."] if card.date else []
    said += [f" All began with the system turn {json.dumps(card.system, ensure_ascii=False)}."] if card.system else []
    return "".join(said) + (f" Answers end with token {' or '.join(map(str, card.end_ids))}." if card.end_ids else "")


def _origin(card: Card) -> tuple[str, str]:
    """What a prompt was trained on, and what was held out."""
    made_by = f"softprompt {card.versions['softprompt']}"
    if not card.data.num_train:
        return f"Written by {made_by}: {card.init}.", "What it was trained on is not known."
    if card.distilled is None:
        origin = f"Trained with {made_by} on {card.data.num_train} rows of {card.data.train};"
        return origin, f"{card.data.num_eval} rows were held out. Losses are per supervised token, natural logarithm."
    what = "examples" if card.distilled.kind == "examples" else "a text"
    origin = f"Distilled with {made_by} from {what} of {card.distilled.tokens:,} tokens (sha256 {card.distilled.sha256[:12]})"
    held = f"{card.data.num_eval} questions were held out. Losses are KL divergences per answer token, in nats."
    return f"{origin} on {card.data.num_train} questions, which the base answered with it in its context;", held


def model_card(card: Card, repo_id: str | None = None) -> str:
    """The card for people; `repo_id`: where on the hub it lies."""
    place, pulled = ("THIS_FOLDER", "") if repo_id is None else (repo_id, f"softprompt pull {repo_id} --out my-prompt\n")
    on_hub = not Path(card.base.name).is_absolute()
    front = ["library_name: peft", "tags: [prompt-tuning, soft-prompt, softprompt]", "pipeline_tag: text-generation"]
    if on_hub:
        front.insert(0, f"base_model: {card.base.name}")
    shown = card.base.name if on_hub else Path(card.base.name).name
    bos = "\nThe first stored row is the BOS token: with PEFT, tokenize without BOS.\n" if card.position == "after_bos" else ""
    origin, held = _origin(card)
    known = card.base.dtype != "auto"
    precision, asked = (f"| precision of the base | {card.base.dtype} |\n", f', "model.dtype={card.base.dtype}"') if known else ("", "")
    losses = "".join(f"| {name} | {value:.4f} |\n" for name, value in card.metrics.items() if isinstance(value, float))
    return f"""---
{chr(10).join(front)}
---
# A soft prompt of {card.num_virtual_tokens} virtual tokens for {shown}

{origin}
{held}

| | |
|---|---|
{losses}{precision}| position | {card.position} |
| start | {card.init} |
| seed | {card.seed} |

## Use

```
{pulled}softprompt generate {"my-prompt" if pulled else place} "your text"
```

```python
import softprompt
base = softprompt.load_base(softprompt.load_config(None, ["model.name=BASE"{asked}]).model)
answers = softprompt.generate(base, softprompt.load_prompt("{place}", base), ["your text"])

from peft import PeftModel  # PEFT 0.21's generate loses the prompt under transformers 5.24; its forward is right
model = PeftModel.from_pretrained(base_model, "{place}")
```
{bos}
Texts were rendered with the template `{card.template if "{" not in card.template else "given in card.json"}`.{_around(card)}

## Licence

{card.licence_note}
"""
