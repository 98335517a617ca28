"""Our sides of the comparison; each runs in a process of its own and writes one file.

ours and separate measure speed and memory; gradient computes loss and gradient of the first step's rows.
"""

import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice

from jobs import Job, Spec, save
from meters import StepClock, watch_peak
from scene import POSITION, Scene, measured, run_config, set_scene, start_of, write_arrays
from torch import Tensor

from softprompt.encode import Encoder
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.step import step_gradients
from softprompt.events import Step
from softprompt.job import make_engine
from softprompt.plan import make_plan
from softprompt.training import train


def measure_ours(spec: Spec) -> None:
    """One run of ours, of one prompt or of a whole bank."""
    scene = set_scene(spec.job, spec.job.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    seconds = _seconds_of_run(spec.job, scene, spec.job.seed, spec.job.num_prompts)
    result = measured(spec.job, scene, seconds, peak())
    plan = make_plan(run_config(spec.job, scene.base, "unused", spec.job.seed, spec.job.num_prompts)).memory
    save(replace(result, planned_bytes=plan.total - plan.weights), spec.result)


def measure_separate(spec: Spec) -> None:
    """As many runs of ours as the bank has prompts, one after another over one loaded base."""
    scene = set_scene(spec.job, spec.job.dtype)
    peak = watch_peak(scene.base.model, scene.base.device)
    seconds = sum(_seconds_of_run(spec.job, scene, spec.job.seed + number, 1) for number in range(spec.job.num_prompts))
    save(measured(spec.job, scene, seconds, peak()), spec.result)


def _seconds_of_run(job: Job, scene: Scene, seed: int, num_prompts: int) -> float:
    clock = StepClock(scene.base.device, job.steps)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(job, scene.base, f"{folder}/run", seed, num_prompts)
        with closing(train(config, base=scene.base)) as events:  # type: ignore[type-var]
            steps = (event for event in events if isinstance(event, Step))
            for _ in islice(steps, job.steps + 1):  # what a run writes at its end is not measured; the Trainer writes nothing
                clock.tick()
    return clock.seconds


def write_gradient(spec: Spec) -> None:
    """Loss and gradient of the first step by ours, for every prompt of the job; also the rows they start from."""
    job = spec.job
    scene = set_scene(job, job.dtype)
    engine = make_engine(run_config(job, scene.base, "unused", job.seed, 1), scene.base)
    prompts = [_trainable(start_of(job, scene, job.seed + number), scene.encoder) for number in range(job.num_prompts)]
    rows = [scene.rows_of(job.examples_per_step, job.seed + number) for number in range(job.num_prompts)]
    loss_K = step_gradients(scene.base, prompts, rows, engine)
    grads = [prompt.rows_PH.grad for prompt in prompts]
    write_arrays(spec.result, loss_K, [prompt.rows_PH.detach() for prompt in prompts], grads)  # type: ignore[arg-type]


def _trainable(rows_PH: Tensor, encoder: Encoder) -> SoftPrompt:
    return SoftPrompt(rows_PH.clone().requires_grad_(), POSITION, encoder.bos_id)


SIDES: dict[str, Callable[[Spec], None]] = {"ours": measure_ours, "separate": measure_separate, "gradient": write_gradient}
