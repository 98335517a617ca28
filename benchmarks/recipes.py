"""What quality.py trains: recipes of ours and of PEFT, from the same rows in the same order, and how each is scored.

PEFT's prompt tuning is trained by our engine with PEFT's layout, start, optimizer and schedule, and without approximation: the
function and its gradient are the same (tests/test_invariants.py holds ours equal to PEFT's forward), the waiting is not. P-tuning
and LoRA are PEFT's own modules in a plain loop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from tasks import Task
from torch import Tensor
from torch.nn.functional import cross_entropy

from softprompt import init
from softprompt.artifact import load_prompt
from softprompt.batch import Batch, batches, order_of_rows
from softprompt.config import Config, load_config
from softprompt.encode import Encoded, load_rows, make_encoder
from softprompt.evaluation import held_out_loss, label_accuracy
from softprompt.events import Evaluated, Finished, Step
from softprompt.job import with_absolute_paths
from softprompt.model import FrozenBase, freeze
from softprompt.prompt import SoftPrompt, no_prompt
from softprompt.training import train

EVALUATIONS = 8
AS_PEFT = ("prompt.position=start", "optim.warmup_fraction=0", "train.head_tolerance=0")


@dataclass(frozen=True)
class Recipe:
    """`settings`: of ours. `kind`: how it is trained. `rates`: peak learning rates to search, on one seed; without, the default."""

    settings: tuple[str, ...] = ()
    kind: str = "prompt"
    rates: tuple[float, ...] = ()
    start: Callable[[init.Material, int], init.Start] | None = None


@dataclass(frozen=True)
class Outcome:
    """`curve`: (step, seconds of training, held-out loss); accuracy only for labelled tasks."""

    curve: list[tuple[int, float, float]]
    test_loss: float
    accuracy: float | None
    num_trainable: int


def peft_noise(material: init.Material, room: int) -> init.Start:
    """PEFT's random init: N(0, 1), whatever the scale of the base's embeddings."""
    noise = torch.randn(room, material.base.hidden_size, generator=torch.Generator().manual_seed(material.seed))
    return init.Start(noise.to(material.base.device), "N(0, 1)")


def peft_vocabulary(material: init.Material, room: int) -> init.Start:
    """PEFT's SAMPLE_VOCAB: any tokens of the vocabulary."""
    return init.Start(material.base.drawn_rows(room, material.seed), "any tokens of the vocabulary")


GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RECIPES = {
    "softprompt": Recipe(),
    "softprompt, random init": Recipe(("prompt.init=random",)),
    "softprompt, vocab init": Recipe(("prompt.init=vocab",)),
    "softprompt, labels then text": Recipe(('prompt.init=["labels", "text", "vocab"]',)),
    "softprompt, before BOS": Recipe(("prompt.position=start",)),
    "softprompt, residual MLP": Recipe(("prompt.reparam=residual-mlp",)),
    "softprompt, low rank": Recipe(("prompt.reparam=low-rank",)),
    "softprompt, superposition": Recipe(("prompt.reparam=superpos",)),
    "softprompt, prefix": Recipe(("prompt.method=prefix",)),
    "softprompt, moving average": Recipe(("optim.ema=0.9",)),
    "softprompt, Adafactor": Recipe(("optim.name=adafactor",)),
    "softprompt, Lion": Recipe(("optim.name=lion",)),
    "softprompt, row-normalized": Recipe(("optim.name=row-normalized",)),
    "softprompt, rate 0.05": Recipe(("optim.relative_lr=0.05",)),
    "softprompt, rate 0.1": Recipe(("optim.relative_lr=0.1",)),
    "softprompt, rate 0.4": Recipe(("optim.relative_lr=0.4",)),
    "PEFT as in the tutorial": Recipe((*AS_PEFT, "optim.lr=5e-5")),
    "PEFT's defaults": Recipe((*AS_PEFT, "optim.lr=5e-5", "prompt.init=random"), start=peft_noise),
    "PEFT, text init, best rate": Recipe(AS_PEFT, rates=GRID),
    "PEFT, vocabulary init, best rate": Recipe((*AS_PEFT, "prompt.init=random"), rates=GRID, start=peft_vocabulary),
    "PEFT P-tuning, best rate": Recipe(kind="p-tuning", rates=(3e-4, 1e-3, 3e-3)),
    "LoRA r = 8, best rate": Recipe(kind="lora", rates=(3e-4, 1e-3, 3e-3)),
}


def run_recipe(
    recipe: Recipe, task: Task, base: FrozenBase, load: Callable[[], FrozenBase], rate: float | None, seed: int, out: str
) -> Outcome:
    """Trains and scores. `load` loads the base afresh, for what changes its weights."""
    config = make_config(recipe, task, base, rate, seed, out)
    if recipe.kind == "prompt":
        return _ours(recipe, task, config, base)
    return _peft(recipe.kind, task, config, load(), rate or 1e-3)


def make_config(recipe: Recipe, task: Task, base: FrozenBase, rate: float | None, seed: int, out: str) -> Config:
    tree = {
        "model": {"name": base.name},
        "data": {"train": str(task.train), "eval": str(task.held), "max_length": task.max_length},
        "prompt": {"text": task.text, "length": task.virtual_tokens},
        "train": {
            "steps": task.steps,
            "examples_per_step": task.examples_per_step,
            "eval_every": -(-task.steps // EVALUATIONS),
            "save_every": task.steps,
            "seed": seed,
            "out": out,
        },
    }
    return load_config(tree, [*recipe.settings, *([f"optim.lr={rate}"] if rate else [])])


def _ours(recipe: Recipe, task: Task, config: Config, base: FrozenBase) -> Outcome:
    before = dict(init.SOURCES)
    if recipe.start is not None:
        init.SOURCES["random"] = recipe.start
    curve, seconds = [], 0.0
    try:
        for event in train(config, base=base):
            match event:
                case Step():
                    seconds += event.seconds
                case Evaluated():
                    curve.append((event.step, seconds, event.loss))
                case Finished():
                    result = event.result
    finally:
        init.SOURCES.update(before)
    return _scored(task, config, base, load_prompt(result["prompt"], base).soft, curve, base.hidden_size * task.virtual_tokens)


def _scored(
    task: Task, config: Config, base: FrozenBase, soft: SoftPrompt, curve: list[tuple[int, float, float]], num_trainable: int
) -> Outcome:
    encoder = make_encoder(base.tokenizer, config.data.template)
    test = config.model_copy(update={"data": config.data.model_copy(update={"train": str(task.test), "eval": None})})
    rows, _ = load_rows(test, encoder)
    loss = held_out_loss(base, soft, rows, TOKENS)
    accuracy = label_accuracy(base, soft, encoder, rows, rows.labels, TOKENS) if task.labelled else None
    return Outcome(curve, loss, accuracy, num_trainable)


TOKENS = 512


# ---- PEFT's own modules --------------------------------------------------------------------------------------------


def _peft(kind: str, task: Task, config: Config, base: FrozenBase, rate: float) -> Outcome:
    torch.manual_seed(config.train.seed)
    encoder = make_encoder(base.tokenizer, config.data.template)
    rows, held = load_rows(with_absolute_paths(config), encoder)
    assert held is not None
    settings: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=task.virtual_tokens, encoder_hidden_size=base.hidden_size
        ),
    }
    model = peft.get_peft_model(base.model, settings[kind]())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    curve, seconds = [], 0.0
    for step in range(task.steps + 1):
        if step % (config.train.eval_every or 1) == 0 or step == task.steps:
            curve.append((step, seconds, _peft_loss(model, held.encoded, encoder.bos_id)))
        if step == task.steps:
            break
        began = time.perf_counter()
        numbers = order_of_rows(len(rows.encoded), step * task.examples_per_step, task.examples_per_step, config.train.seed)
        _peft_step(model, optimizer, [rows.encoded[number] for number in numbers], encoder.bos_id, rate * (1 - step / task.steps))
        seconds += time.perf_counter() - began
    num_trainable = sum(parameter.numel() for parameter in trained)
    if kind == "lora":
        merged = freeze(model.merge_and_unload(), base.tokenizer, base.name)
        return _scored(task, config, merged, no_prompt(merged, encoder.bos_id), curve, num_trainable)
    with torch.no_grad():
        rows_PH = model.get_prompt(1)[0].float()
    return _scored(task, config, base, SoftPrompt(rows_PH, "start", encoder.bos_id), curve, num_trainable)


def _peft_step(model: Any, optimizer: torch.optim.Optimizer, rows: Sequence[Encoded], bos_id: int | None, rate: float) -> None:
    count = sum(row.num_supervised for row in rows)
    for batch in batches(rows, [0] * len(rows), TOKENS, model.device):
        (_peft_losses(model, batch, bos_id).sum() / count).backward()
    torch.nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _peft_loss(model: Any, rows: Sequence[Encoded], bos_id: int | None) -> float:
    total = sum(_peft_losses(model, batch, bos_id).sum().item() for batch in batches(rows, [0] * len(rows), TOKENS, model.device))
    return total / sum(row.num_supervised for row in rows)


def _peft_losses(model: Any, batch: Batch, bos_id: int | None) -> Tensor:
    """[N] loss of every supervised token of a micro-batch, padded on the right, by PEFT's forward."""
    ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
    if bos_id is not None:
        ids_BT = torch.cat([ids_BT.new_full((len(ids_BT), 1), bos_id), ids_BT], dim=1)
        mask_BT = torch.cat([mask_BT[:, :1], mask_BT], dim=1)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, -batch.ids_BT.shape[1] :]
    return cross_entropy(logits_BTV.flatten(0, 1)[batch.scored_N].float(), batch.targets_N, reduction="none")
