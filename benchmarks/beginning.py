"""How much faster a step is when what all its rows begin with is read once: the same step both ways, in turns, in one process.

    python benchmarks/beginning.py --model FOLDER [--words 0 --words 25 --words 100] [--examples 16] [--pairs 5] [--dtype float32]

Rows are made up: `words` words that all rows begin with, as a system turn or a template has them, 30 words of a question, a word
as the answer. Seconds are CPU seconds of the process, since other processes may use the cores.
"""

import argparse
import random
import time
from statistics import median

import torch
from rows import WORDS

from softprompt.config import ModelConfig
from softprompt.data import Example, Message
from softprompt.encode import make_encoder
from softprompt.engine import prompt
from softprompt.engine.memory import token_budget
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.engine.step import Engine, step_gradients
from softprompt.engine.tokens import Encoded, shared_beginning

NEVER = 10**9  # no step has so many rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--words", type=int, action="append", help="repeatable; 0, 25 and 100 where left out")
    parser.add_argument("--examples", type=int, default=16, help="rows of a step")
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    base = load_base(ModelConfig(name=given.model, dtype=given.dtype))
    for words in given.words or (0, 25, 100):
        steps = [make_rows(base, words, given.examples, seed) for seed in range(given.pairs)]
        shared, tokens = len(shared_beginning(steps[0])), sum(map(len, steps[0])) / given.examples
        pairs = [both_ways(base, rows, number % 2 == 1) for number, rows in enumerate(steps)]
        cosine = min(torch.cosine_similarity(whole[1], once[1], dim=0).item() for whole, once in pairs)
        ratios = [whole[0] / once[0] for whole, once in pairs]
        print(
            f"{shared} of {tokens:.0f} tokens of a row shared: {median(ratios):.2f}x as fast "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); gradient cosine at least {cosine:.7f}",
            flush=True,
        )


def make_rows(base: FrozenBase, words: int, count: int, seed: int) -> list[Encoded]:
    draw, known = random.Random(seed), WORDS.split()
    opening = " ".join(random.Random(0).choices(known, k=words))
    encoder = make_encoder(base.tokenizer, f"{opening} Human: {{{{ instruction }}}}\n\nAssistant: ")
    pairs = [(" ".join(draw.choices(known, k=30)), draw.choice(("yes", "no"))) for _ in range(count)]
    turns = [((Message("user", text), Message("assistant", word)), {"instruction": text}) for text, word in pairs]
    return [encoder.encode(Example(messages, "made up", fields=fields)) for messages, fields in turns]


def both_ways(base: FrozenBase, rows: list[Encoded], once_first: bool) -> tuple[tuple[float, torch.Tensor], tuple[float, torch.Tensor]]:
    """(seconds, gradient) with every row read whole, and with what they begin with read once."""
    enough = prompt.ENOUGH
    order = (enough, NEVER) if once_first else (NEVER, enough)
    found = {}
    for prompt.ENOUGH in order:
        soft = prompt.SoftPrompt(base.drawn_rows(16, 0).requires_grad_(), "start", make_encoder(base.tokenizer, "human-assistant").bos_id)
        began = time.process_time()
        step_gradients(base, [soft], [rows], Engine(base.budget(None)))
        assert soft.rows_PH.grad is not None
        found[prompt.ENOUGH] = (time.process_time() - began, soft.rows_PH.grad.flatten())
    prompt.ENOUGH = enough
    return found[NEVER], found[enough]


if __name__ == "__main__":
    main()
