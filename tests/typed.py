"""Every public name, as a program uses it: read by mypy --strict beside an installed softprompt (test_package.py), never run."""

from collections.abc import Iterator
from pathlib import Path

import softprompt
from softprompt import (
    Config,
    Contest,
    Ensemble,
    Evaluated,
    Event,
    Finished,
    Found,
    Message,
    Preparing,
    Sampled,
    Sampling,
    Saved,
    Searching,
    Started,
    Step,
    Studying,
    Warned,
    encode_file,
    evaluate,
    generate,
    load_base,
    load_config,
    load_examples,
    load_prompt,
    show_progress,
    train,
)


def loss_of(event: Event) -> float | None:
    match event:
        case Step() | Evaluated():
            return event.loss
        case Started() | Preparing() | Studying() | Searching() | Found() | Sampled() | Saved() | Warned() | Finished():
            return None


def losses(config: Config) -> Iterator[float]:
    for event in show_progress(train(config)):
        loss = loss_of(event)
        if loss is not None:
            yield loss


def main() -> None:
    config: Config = load_config("my.toml", ["train.steps=3"])
    total: float = sum(losses(config))
    base = load_base(config.model)
    prompt = load_prompt(Path("runs/rows"), base)
    result = evaluate(base, prompt, load_examples("held_out.jsonl"), Contest(answers=True))
    outcomes: list[str] = [verdict.outcome for verdict in result.verdicts]
    texts: list[str] = generate(base, prompt, ["Where is my parcel?"], Sampling(max_new_tokens=8))
    talk: list[str] = generate(base, prompt, [[Message("user", "Where is my parcel?")]])
    together: list[str] = generate(base, Ensemble((prompt, prompt), by="vote"), ["Thank you!"])
    version: str = softprompt.__version__
    print(total, outcomes, texts, talk, together, version, encode_file)


if __name__ == "__main__":
    try:
        main()
    except softprompt.Error as error:
        print(error)
