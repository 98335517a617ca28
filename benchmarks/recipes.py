"""What quality.py trains: recipes of ours and of PEFT, from the same rows in the same order, and how each is scored.

All are trained through our engine, without approximation: the function and its gradient are those of PEFT's forward
(tests/test_invariants.py, tests/test_deep.py), the waiting is not. PEFT's prompt tuning has PEFT's layout, start, optimizer and
schedule; P-tuning, prefix tuning and LoRA are PEFT's own modules in a plain loop.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor

from benchmarks.tasks import Task
from softprompt import init
from softprompt.answers import answer, limit_of, stops_of
from softprompt.artifact import load_prompt
from softprompt.config import USUAL_RATE, Config, load_config
from softprompt.contestants import Reading
from softprompt.doctor import diagnose
from softprompt.encode import make_encoder
from softprompt.engine.batch import Order, batches
from softprompt.engine.likelihood import candidate_losses, row_losses
from softprompt.engine.loss import batch_losses
from softprompt.engine.model import FrozenBase, head_of
from softprompt.engine.prompt import DeepPrompt, Prompt, SoftPrompt, no_prompt, shapes_of
from softprompt.engine.tokens import Encoded
from softprompt.errors import Error
from softprompt.events import Evaluated, Finished, Started, Step, Warned
from softprompt.locations import with_absolute_paths
from softprompt.rows import Rows, load_rows
from softprompt.training import train

EVALUATIONS = 4
TOKENS = {"cpu": 512, "cuda": 8192}  # of a micro-batch of a peer, and of test rows
AS_PEFT = ("prompt.position=start", "optim.warmup_fraction=0", "train.head_tolerance=0")


@dataclass(frozen=True)
class Recipe:
    """`settings`: of ours. `kind`: how it is trained; "peft" is PEFT's prompt tuning, whose rows come in any order of their labels.
    `rates`: peak learning rates to search, on one seed; without, the default. `random`: what prompt.init = "random" means. `until`: a
    share of the steps; training is broken off there, after an evaluation. `finding`: of a set-up for the doctor, what it must say of
    its one fault, or nothing of a sound run."""

    settings: tuple[str, ...] = ()
    kind: str = "prompt"
    rates: tuple[float, ...] = ()
    random: init.Source = init.from_noise
    until: float = 1.0
    finding: str | None = None


@dataclass(frozen=True)
class Outcome:
    """`curve`: (step, seconds of training, held-out loss). `accuracy`: of a labelled task the share of test rows whose own label is the
    likeliest, of one with one right answer (`Task.exact`) the share of greedy answers that are it. `findings`: the doctor's."""

    curve: list[tuple[int, float, float]]
    test_loss: float
    accuracy: float | None
    num_trainable: int
    findings: tuple[str, ...] = ()


def peft_noise(material: init.Material, room: int) -> init.Initial:
    """PEFT's random init: N(0, 1), whatever the scale of the base's embeddings."""
    noise = torch.randn(room, material.base.hidden_size, generator=torch.Generator().manual_seed(material.seed))
    return init.Initial(noise.to(material.base.device), "N(0, 1)")


def peft_vocabulary(material: init.Material, room: int) -> init.Initial:
    """PEFT's SAMPLE_VOCAB: any tokens of the vocabulary."""
    return init.Initial(material.base.drawn_rows(room, material.seed), "any tokens of the vocabulary")


RATE = USUAL_RATE["prompt"]
LONG = ("prompt.length=32", 'prompt.init=["text", "vocab"]')
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RECIPES: dict[str, Recipe] = {
    "softprompt": Recipe(),
    "softprompt, its first 20th of the steps": Recipe(until=1 / 20),
    "softprompt, after BOS": Recipe(("prompt.position=after_bos",)),
    "softprompt, after BOS, random init": Recipe(("prompt.position=after_bos", "prompt.init=random")),
    "softprompt, random init": Recipe(("prompt.init=random",)),
    "softprompt, vocab init": Recipe(("prompt.init=vocab",)),
    "softprompt, labels then text": Recipe(('prompt.init=["labels", "text", "vocab"]',)),
    "softprompt, prefix": Recipe(("prompt.method=prefix",)),
    "softprompt, prefix, 32 rows": Recipe(("prompt.method=prefix", *LONG)),
    "softprompt, prefix, 32 rows, after BOS": Recipe(("prompt.method=prefix", *LONG, "prompt.position=after_bos")),
    "softprompt, 32 rows": Recipe(LONG),
    "softprompt, moving average": Recipe(("optim.ema=0.9",)),
    "softprompt, rate 0.05": Recipe(("optim.relative_lr=0.05",)),
    "softprompt, rate 0.1": Recipe(("optim.relative_lr=0.1",)),
    "softprompt, rate 0.4": Recipe(("optim.relative_lr=0.4",)),
    "PEFT as in the tutorial": Recipe((*AS_PEFT, "optim.lr=5e-5"), "peft"),
    "PEFT's defaults": Recipe((*AS_PEFT, "optim.lr=5e-5", "prompt.init=random"), "peft", random=peft_noise),
    "PEFT, text init, best rate": Recipe(AS_PEFT, "peft", GRID),
    "PEFT, vocabulary init, best rate": Recipe((*AS_PEFT, "prompt.init=random"), "peft", GRID, random=peft_vocabulary),
    "PEFT P-tuning, best rate": Recipe(kind="p-tuning", rates=(3e-4, 1e-3, 3e-3)),
    "PEFT P-tuning by LSTM, best rate": Recipe(kind="p-tuning-lstm", rates=(3e-4, 1e-3, 3e-3)),
    "PEFT prefix tuning, best rate": Recipe(kind="prefix-tuning", rates=(1e-3, 1e-2, 1e-1)),
    "LoRA r = 8, best rate": Recipe(kind="lora", rates=(3e-4, 1e-3, 3e-3)),
    "sound": Recipe(finding=""),
    "rate 100 times too low": Recipe((f"optim.relative_lr={RATE / 100}",), finding="is too low"),
    "rate 100 times too high": Recipe((f"optim.relative_lr={RATE * 100}",), finding="is too high"),
    "template without the question": Recipe(("data.template=Human: {{ '' }}\n\nAssistant: ",), finding="data.template leaves out"),
    "answers beyond max_length": Recipe(("data.max_length=4",), finding="data.max_length"),
}


def run_recipe(recipe: Recipe, task: Task, base: FrozenBase, rate: float | None, seed: int, out: str) -> Outcome:
    """Trains and scores; the base stays as it is."""
    config = make_config(recipe, task, base, rate, seed, out)
    if recipe.kind in ("prompt", "peft"):
        return _ours(recipe, task, config, base)
    model = copy.deepcopy(base.model)  # PEFT puts its layers into it
    return _peft(recipe.kind, task, config, replace(base, model=model, head=head_of(model)), rate or 1e-3)


def make_config(recipe: Recipe, task: Task, base: FrozenBase, rate: float | None, seed: int, out: str) -> Config:
    train = task.pairs if recipe.kind == "peft" and task.pairs else task.train
    tree = {
        "model": {"name": base.name},
        "data": {"train": str(train), "eval": str(task.held), "max_length": task.max_length},
        "prompt": {"text": task.text, "length": task.virtual_tokens},
        "train": {
            "steps": task.steps,
            "examples_per_step": task.examples_per_step,
            "eval_every": -(-task.steps // EVALUATIONS) if recipe.until == 1 else int(recipe.until * task.steps),
            "save_every": task.steps,
            "seed": seed,
            "out": out,
        },
    }
    return load_config(tree, [*recipe.settings, *([f"optim.lr={rate}"] if rate else [])])


def _ours(recipe: Recipe, task: Task, config: Config, base: FrozenBase) -> Outcome:
    curve, seconds = [], 0.0
    for event in train(config, base=base, sources={**init.SOURCES, "random": recipe.random}):
        match event:
            case Step():
                seconds += event.seconds
            case Started():
                num_trainable = event.num_trainable
            case Evaluated():
                curve.append((event.step, seconds, event.loss))
                if event.step and recipe.until < 1:
                    return Outcome(curve, event.loss, None, num_trainable)
            case Finished():
                result = event.result
    outcome = _scored(task, config, base, load_prompt(result["prompt"], base).soft, list, curve, num_trainable)
    return replace(outcome, findings=tuple(result["findings"]))


def examined(recipe: Recipe, task: Task, base: FrozenBase) -> dict[str, Any]:
    """What the doctor says while a set-up trains, and of the finished run; a refusal counts as a finding before any step."""
    settings = (*recipe.settings, f"train.eval_every={task.steps // 2}")
    early: list[tuple[int, str]] = []
    with tempfile.TemporaryDirectory() as out:
        try:
            for event in train(make_config(Recipe(settings), task, base, None, 0, f"{out}/run"), base=base):
                if isinstance(event, Warned):
                    early.append((event.step, event.finding))
            (findings,) = diagnose(f"{out}/run", base).values()
        except Error as error:
            refused = str(error).replace(f"{task.train.parent}/", "")
            early, findings = [*early, (0, refused)], [refused]
    return {"steps": task.steps, "early": early, "findings": findings}


def _scored(
    task: Task,
    config: Config,
    base: FrozenBase,
    prompt: Prompt,
    read: Callable[[Sequence[Encoded]], list[Encoded]],
    curve: list[tuple[int, float, float]],
    num_trainable: int,
) -> Outcome:
    """Loss on the test rows, and the share of them that are right."""
    if task.held == task.test:
        return Outcome(curve, min(point[2] for point in curve), None, num_trainable)
    encoder = make_encoder(base.tokenizer, config.data.template)
    test = config.model_copy(update={"data": config.data.model_copy(update={"train": str(task.test), "eval": None})})
    encoder, rows, _ = load_rows(test, encoder)
    with torch.no_grad():
        prefix = prompt.prefix(base)
    if not task.labelled:
        encoded = read(rows.encoded)
        loss = row_losses(base, prefix, encoded, TOKENS[base.device.type]).sum().item() / rows.num_supervised
        right = _share_answered(base, prompt, encoded, rows, stops_of([encoder], rows.examples)) if task.exact else None
        return Outcome(curve, loss, right, num_trainable)
    candidates_RC = [read([encoder.encode(example.answered(label)) for label in rows.labels]) for example in rows.examples]
    losses_RC = candidate_losses(base, prefix, candidates_RC, TOKENS[base.device.type])
    own_R = torch.tensor([rows.labels.index(str(example.label)) for example in rows.examples])
    loss = losses_RC.gather(1, own_R[:, None]).sum().item() / rows.num_supervised
    return Outcome(curve, loss, (losses_RC.argmin(dim=1) == own_R).double().mean().item(), num_trainable)


def _share_answered(base: FrozenBase, prompt: Prompt, encoded: Sequence[Encoded], rows: Rows, stops: Sequence[str]) -> float:
    """Of the rows, those whose greedy answer is their response."""
    reading = Reading(prompt, [], (prompt, ()), [row.question for row in encoded], 0.0)
    wanted = [("", number) for number in range(len(encoded))]
    said = answer(base, {"": [reading]}, wanted, limit_of(encoded), stops)
    return mean(one.text == rows.examples[one.row].response.strip() for one in said)


# ---- PEFT's own modules --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A method of PEFT's: its own module and start; the base's forward, loss and batches are our engine's.

    `base` has LoRA's layers in it where there are any. `prompt`: what rows continue from, with gradient. `bos_id`: set where BOS
    stands in the text, behind the prefix.
    """

    base: FrozenBase
    trained: list[Tensor]
    prompt: Callable[[], Prompt]
    bos_id: int | None = None

    def rows(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """The rows as this peer reads them."""
        if self.bos_id is None:
            return list(rows)
        return [Encoded((self.bos_id, *row.ids), (False, *row.supervised)) for row in rows]

    def step(self, rows: Sequence[Encoded]) -> None:
        """Adds the gradient of the mean loss per supervised token."""
        count = sum(row.num_supervised for row in rows)
        prefix = self.prompt().prefix(self.base)
        leaf = prefix.leaf()
        for batch in batches(self.rows(rows), [0] * len(rows), TOKENS[self.base.device.type], self.base.device):
            continued = self.base.continue_from(leaf, batch.which_B, batch.ids_BT, batch.mask_BT)
            (batch_losses(self.base, continued, batch).sum() / count).backward()
        prefix.backward_from(leaf)


def _lora(base: FrozenBase, task: Task, bos_id: int | None) -> Peer:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base.model, config)  # puts its layers into base.model, in place
    return Peer(base, _trained(model), lambda: no_prompt(base, bos_id))


def _encoder(kind: str) -> Callable[[FrozenBase, Task, int | None], Peer]:
    def make(base: FrozenBase, task: Task, bos_id: int | None) -> Peer:
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=task.virtual_tokens,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=base.hidden_size,
        )
        model = peft.get_peft_model(base.model, config)
        return Peer(base, _trained(model), lambda: SoftPrompt(model.get_prompt(1)[0].float(), "start", bos_id))

    return make


def _prefix_tuning(base: FrozenBase, task: Task, bos_id: int | None) -> Peer:
    shapes = shapes_of(base.prefill([base.embed_ids([0])]).layers)
    heads, size = shapes[0]
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=task.virtual_tokens, token_dim=heads * size, num_attention_heads=heads
    )
    model = peft.get_peft_model(base.model, config)
    scale_D = torch.ones(len(shapes) * heads * size, device=base.device)

    def prompt() -> Prompt:
        rows_PD = model.prompt_encoder["default"](torch.arange(task.virtual_tokens, device=base.device))
        return DeepPrompt(rows_PD, "after_bos", None, scale_D, shapes)

    return Peer(base, _trained(model), prompt, bos_id)


PEERS = {"lora": _lora, "p-tuning": _encoder("MLP"), "p-tuning-lstm": _encoder("LSTM"), "prefix-tuning": _prefix_tuning}


def _trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _peft(kind: str, task: Task, config: Config, base: FrozenBase, rate: float) -> Outcome:
    """A plain loop: AdamW without weight decay, gradients clipped to 1, the rate falling linearly to zero. As with ours, the best
    of the evaluated states on the held-out rows is the one that is tested."""
    torch.manual_seed(config.train.seed)
    encoder = make_encoder(base.tokenizer, config.data.template)
    encoder, rows, held = load_rows(with_absolute_paths(config), encoder)
    assert held is not None
    peer = PEERS[kind](base, task, encoder.bos_id)
    optimizer = torch.optim.AdamW(peer.trained, lr=rate, weight_decay=0.0)
    curve: list[tuple[int, float, float]] = []
    seconds, best = 0.0, [tensor.detach().clone() for tensor in peer.trained]
    for step in range(task.steps + 1):
        if step % (config.train.eval_every or task.steps) == 0 or step == task.steps:
            with torch.no_grad():
                losses = row_losses(base, peer.prompt().prefix(base), peer.rows(held.encoded), TOKENS[base.device.type])
            loss = losses.sum().item() / held.num_supervised
            if loss < min((point[2] for point in curve), default=math.inf):
                best = [tensor.detach().clone() for tensor in peer.trained]
            curve.append((step, seconds, loss))
        if step < task.steps:
            seconds += _peft_step(peer, optimizer, rows, config, step, rate * (1 - step / task.steps))
    with torch.no_grad():
        for tensor, value in zip(peer.trained, best, strict=True):
            tensor.copy_(value)
        prompt = peer.prompt()
    return _scored(task, config, base, prompt, peer.rows, curve, sum(tensor.numel() for tensor in peer.trained))


def _peft_step(peer: Peer, optimizer: torch.optim.Optimizer, rows: Rows, config: Config, step: int, rate: float) -> float:
    """One step at this rate; returns its seconds."""
    began, size = time.perf_counter(), config.train.examples_per_step
    numbers = Order(np.zeros(len(rows.encoded))).rows(step * size, size, config.train.seed)
    peer.step([rows.encoded[number] for number in numbers])
    torch.nn.utils.clip_grad_norm_(peer.trained, 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    if peer.base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
