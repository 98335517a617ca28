"""The sides of a comparison. Each runs in a process of its own, `python -m benchmarks.sides SPEC`, and writes one file.

ours and separate measure speed and memory of our runs, peft those of PEFT's prompt tuning with transformers' Trainer. gradient
and reference compute loss and gradient of the first step's rows: by ours, and by PEFT in float32, row by row without padding.

Shapes: K prompts, P virtual tokens, H hidden size, T text tokens, V vocabulary.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.measuring import Job, Measured, Spec, StepClock, die_first, load, save, watch_peak
from benchmarks.workloads import PROMPT_TEXT, Dtype, read_rows
from softprompt.config import Config, ModelConfig, load_config
from softprompt.encode import Encoder, make_encoder
from softprompt.engine.batch import Order
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.tokens import Encoded
from softprompt.events import Step
from softprompt.init import SOURCES, Material, initial_rows
from softprompt.plan import make_plan
from softprompt.training import train

IGNORED = -100
POSITION = "start"  # PEFT's own layout: soft prompt, BOS, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", help="JSON file of a measuring.Spec")
    die_first()
    spec = load(Spec, parser.parse_args().spec)
    SIDES[spec.side](spec)


@dataclass(frozen=True)
class Scene:
    """The loaded base with the job's rows."""

    base: FrozenBase
    encoder: Encoder
    rows: tuple[Encoded, ...]

    def rows_of(self, count: int, seed: int) -> list[Encoded]:
        """The first rows of a run with this seed, in the order in which ours takes them."""
        return [self.rows[number] for number in Order(np.zeros(len(self.rows))).rows(0, count, seed)]


def set_scene(job: Job, dtype: Dtype) -> Scene:
    base = load_base(ModelConfig(name=job.model, dtype=dtype))
    encoder = make_encoder(base.tokenizer, Config().data.template)
    return Scene(base, encoder, read_rows(job.rows, encoder, job.workload.profile.longest))


def start_of(job: Job, scene: Scene, seed: int) -> Tensor:
    prompt = run_config(job, scene.base, "unused", seed, 1).prompt
    return initial_rows(Material(prompt, scene.base, scene.rows, (), seed, SOURCES)).rows_PH


def write_measured(spec: Spec, scene: Scene, seconds: float, peak_bytes: int, planned_bytes: int | None = None) -> None:
    samples = spec.job.steps * spec.job.workload.examples_per_step * spec.job.workload.num_prompts
    dtype, device = str(scene.base.dtype).removeprefix("torch."), scene.base.device.type
    save(Measured(samples, seconds, samples / seconds, peak_bytes, device, dtype, planned_bytes), spec.result)


def write_arrays(path: str, loss_K: Tensor, starts: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    loss, start, gradient = (tensor.float().cpu().numpy() for tensor in (loss_K, torch.stack(list(starts)), torch.stack(list(grads))))
    np.savez(path, loss=loss, start=start, gradient=gradient)


# ---- ours ----------------------------------------------------------------------------------------------------------


def measure_ours(spec: Spec) -> None:
    """One run of ours, of one prompt or of a whole bank."""
    job, scene = spec.job, set_scene(spec.job, spec.job.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    seconds, highest = _seconds_of_run(job, scene, job.seed, job.workload.num_prompts), peak()
    plan = make_plan(run_config(job, scene.base, "unused", job.seed, job.workload.num_prompts)).memory
    write_measured(spec, scene, seconds, highest, plan.total - plan.weights)


def measure_separate(spec: Spec) -> None:
    """As many runs of ours as the bank has prompts, one after another over one loaded base."""
    scene = set_scene(spec.job, spec.job.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    seconds = sum(_seconds_of_run(spec.job, scene, seed, 1) for seed in spec.job.seeds)
    write_measured(spec, scene, seconds, peak())


def write_gradient(spec: Spec) -> None:
    """Loss and gradient of the first step by ours, for every prompt of the job; also the rows they start from."""
    job, scene = spec.job, set_scene(spec.job, spec.job.dtype)
    how = run_config(job, scene.base, "unused", job.seed, 1).train
    starts = [start_of(job, scene, seed).requires_grad_() for seed in job.seeds]
    prompts = [SoftPrompt(rows_PH, POSITION, scene.encoder.bos_id) for rows_PH in starts]
    rows = [scene.rows_of(job.workload.examples_per_step, seed) for seed in job.seeds]
    loss_K, _ = step_gradients(scene.base, prompts, rows, StepSettings(scene.base.budget(how.tokens_per_batch), how.head_tolerance))
    grads = [rows_PH.grad for rows_PH in starts if rows_PH.grad is not None]
    write_arrays(spec.result, loss_K, [rows_PH.detach() for rows_PH in starts], grads)


def run_config(job: Job, base: FrozenBase, out: str, seed: int, num_prompts: int) -> Config:
    """A run of ours: no evaluation, no checkpoint before its end. The prompts of a bank start from noise, not all from the same text."""
    work = job.workload
    start = {"length": work.virtual_tokens, "text": PROMPT_TEXT, "init": "random" if work.num_prompts > 1 else "text", "position": POSITION}
    how = {"steps": job.steps + 1, "examples_per_step": work.examples_per_step, "save_every": job.steps + 2, "seed": seed, "out": out}
    sections = {
        "model": {"name": job.model, "dtype": job.dtype},
        "data": {"train": job.rows, "max_length": work.profile.longest},
        "prompt": start,
        "optim": {"lr": base.rms / 10},
        "train": how,
    }
    count = [f"prompt.count={num_prompts}"] if num_prompts > 1 else []
    tolerance = [f"train.head_tolerance={job.head_tolerance}"] if job.head_tolerance is not None else []
    return load_config(sections, count + tolerance)


def _seconds_of_run(job: Job, scene: Scene, seed: int, num_prompts: int) -> float:
    clock = StepClock(scene.base.device, job.steps)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(job, scene.base, f"{folder}/run", seed, num_prompts)
        with closing(train(config, base=scene.base)) as events:  # type: ignore[type-var]
            steps = (event for event in events if isinstance(event, Step))
            for _ in islice(steps, job.steps + 1):  # what a run writes at its end is not measured; the Trainer writes nothing
                clock.tick()
    return clock.seconds


# ---- PEFT's --------------------------------------------------------------------------------------------------------


def measure_peft(spec: Spec) -> None:
    """PEFT prompt tuning with transformers' Trainer, on the same rows from the same start."""
    job, setting = spec.job, spec.peft
    assert setting is not None
    scene = set_scene(job, setting.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    clock = StepClock(scene.base.device, job.steps)
    features = [_feature(row, scene.encoder.bos_id) for row in scene.rows_of((job.steps + 1) * job.workload.examples_per_step, job.seed)]
    with tempfile.TemporaryDirectory() as folder:
        OrderedTrainer(
            model=peft_model(job, scene, start_of(job, scene, job.seed)),
            args=_arguments(spec, scene, folder),
            train_dataset=features,
            data_collator=DataCollatorForSeq2Seq(_padding_tokenizer(scene), padding=True),
            callbacks=[TickCallback(clock)],
        ).train()
    write_measured(spec, scene, clock.seconds, peak())


def peft_model(job: Job, scene: Scene, start_PH: Tensor) -> Any:
    """The base behind PEFT's prompt tuning, which starts from the given rows."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=job.workload.virtual_tokens)
    model = peft.get_peft_model(scene.base.model, config)
    peft_rows(model).data.copy_(start_PH)
    return model


def peft_rows(model: Any) -> torch.nn.Parameter:
    return model.prompt_encoder["default"].embedding.weight


def _arguments(spec: Spec, scene: Scene, folder: str) -> TrainingArguments:
    assert spec.peft is not None
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=spec.peft.batch_size,
        gradient_accumulation_steps=spec.job.workload.examples_per_step // spec.peft.batch_size,
        num_train_epochs=1,
        learning_rate=scene.base.rms / 10,
        train_sampling_strategy="group_by_length" if spec.peft.grouped else "sequential",
        use_cpu=scene.base.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _padding_tokenizer(scene: Scene) -> Any:
    """Pads on the right, between text and nothing: a hole behind the soft prompt would be another function."""
    tokenizer = scene.base.tokenizer
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _feature(row: Encoded, bos_id: int | None) -> dict[str, list[int]]:
    bos = [] if bos_id is None else [bos_id]
    labels = [token if scored else IGNORED for token, scored in zip(row.ids, row.supervised, strict=True)]
    return {"input_ids": [*bos, *row.ids], "attention_mask": [1] * (len(bos) + len(row)), "labels": [IGNORED] * len(bos) + labels}


class OrderedTrainer(Trainer):  # type: ignore[misc]
    """Takes rows in the order of the data set, which is ours; grouped by length, it does so for the first step alone.

    transformers' own grouping begins with the longest rows of the set. They would fall into the first step, which is not
    timed; with the first step kept apart, both sides are timed on the very same rows.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return range(len(dataset))
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = [len(feature["input_ids"]) for feature in dataset]
        return [*range(size), *(size + index for index in LengthGroupedSampler(size, lengths=lengths[size:]))]


class TickCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the clock that a step has ended."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # transformers' signature
        self.clock.tick()


def write_reference(spec: Spec) -> None:
    """The same by PEFT in float32, from the start rows that the gradient side wrote."""
    job = spec.job
    assert spec.start is not None
    scene = set_scene(job, "float32")
    starts = [torch.from_numpy(start_PH) for start_PH in np.load(spec.start)["start"]]
    model = peft_model(job, scene, starts[0]).eval()
    losses, grads = [], []
    for seed, start_PH in zip(job.seeds, starts, strict=True):
        peft_rows(model).data.copy_(start_PH)
        loss, grad_PH = _loss_and_gradient(model, scene, scene.rows_of(job.workload.examples_per_step, seed))
        losses.append(loss)
        grads.append(grad_PH)
    write_arrays(spec.result, torch.stack(losses), starts, grads)


def _loss_and_gradient(model: Any, scene: Scene, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Mean loss per supervised token of the rows, and its gradient [P, H]; one row at a time, so that nothing is padded."""
    rows_PH = peft_rows(model)
    rows_PH.grad = None
    total = rows_PH.new_zeros(())
    for row in rows:
        feature = {name: torch.tensor([value], device=scene.base.device) for name, value in _feature(row, scene.encoder.bos_id).items()}
        labels_T = feature.pop("labels")[0]
        logits_TV = model(**feature).logits[0, len(rows_PH) - 1 : -1]  # position t - 1 predicts token t
        loss = cross_entropy(logits_TV, labels_T, ignore_index=IGNORED, reduction="sum") / sum(row.num_supervised for row in rows)
        loss.backward()
        total += loss.detach()
    assert rows_PH.grad is not None
    return total, rows_PH.grad


SIDES: dict[str, Callable[[Spec], None]] = {
    "ours": measure_ours,
    "separate": measure_separate,
    "gradient": write_gradient,
    "peft": measure_peft,
    "reference": write_reference,
}

if __name__ == "__main__":
    main()
