"""PEFT's sides of the comparison; each runs in a process of its own and writes one file.

peft measures speed and memory of prompt tuning with transformers' Trainer; reference computes loss and gradient of the
first step's rows by PEFT in float32, row by row without padding.

Shapes: P virtual tokens, H hidden size, T text tokens, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft
import torch
from jobs import Job, Spec, save
from meters import StepClock, watch_peak
from scene import Scene, measured, set_scene, start_of, write_arrays
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from softprompt.engine.tokens import Encoded

IGNORED = -100


def measure_peft(spec: Spec) -> None:
    """PEFT prompt tuning with transformers' Trainer, on the same rows from the same start."""
    job, setting = spec.job, spec.peft
    assert setting is not None
    scene = set_scene(job, setting.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    clock = StepClock(scene.base.device, job.steps)
    features = [_feature(row, scene.encoder.bos_id) for row in scene.rows_of((job.steps + 1) * job.examples_per_step, job.seed)]
    with tempfile.TemporaryDirectory() as folder:
        OrderedTrainer(
            model=peft_model(job, scene, start_of(job, scene, job.seed)),
            args=_arguments(spec, scene, folder),
            train_dataset=features,  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(_padding_tokenizer(scene), padding=True),
            callbacks=[TickCallback(clock)],
        ).train()
    save(measured(job, scene, clock.seconds, peak()), spec.result)


def peft_model(job: Job, scene: Scene, start_PH: Tensor) -> Any:
    """The base behind PEFT's prompt tuning, which starts from the given rows."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=job.virtual_tokens)
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
        gradient_accumulation_steps=spec.job.examples_per_step // spec.peft.batch_size,
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


class OrderedTrainer(Trainer):
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


class TickCallback(TrainerCallback):
    """Tells the clock that a step has ended."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # transformers' signature
        self.clock.tick()


# ---- the same function? --------------------------------------------------------------------------------------------


def write_reference(spec: Spec) -> None:
    """The same by PEFT in float32, from the start rows that the gradient side wrote."""
    job = spec.job
    assert spec.start is not None
    scene = set_scene(job, "float32")
    starts = [torch.from_numpy(start_PH) for start_PH in np.load(spec.start)["start"]]
    model = peft_model(job, scene, starts[0]).eval()
    losses, grads = [], []
    for number, start_PH in enumerate(starts):
        peft_rows(model).data.copy_(start_PH)
        loss, grad_PH = _loss_and_gradient(model, scene, scene.rows_of(job.examples_per_step, job.seed + number))
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


SIDES: dict[str, Callable[[Spec], None]] = {"peft": measure_peft, "reference": write_reference}
