"""The page that a server shows: what it serves, and how it behaves in a real browser."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
from page_server import Server, running

from softprompt.config import load_config
from softprompt.data import load_examples
from softprompt.evaluation import Contest, evaluate
from softprompt.artifact import load_prompt
from softprompt.serve.asking import Model
from softprompt.serve.samples import Sample, samples_of
from softprompt.training import train

MARKUP = "<img src=x onerror=alert(1)>"
WISH = "Repeat the drink."


@pytest.fixture(scope="module")
def run(bases, tmp_path_factory):
    """A run with an evaluation with answers."""
    place, base = tmp_path_factory.mktemp("page"), bases()
    rows = tiny.write_rows(place / "rows.jsonl", tiny.some_rows(24))
    held = tiny.write_rows(place / "held.jsonl", tiny.some_rows(8, lambda n: {"prompt": f"{MARKUP} 水 {n}", "completion": f"水 {n}"}))
    settings = [f"model.name={base.name}", "model.device=cpu", f"data.train={rows}", f"data.eval={held}", f"prompt.text={WISH}"]
    config = load_config(None, [*settings, "train.steps=3", f"train.out={place / 'polite'}"])
    list(train(config, base=base))
    prompt = load_prompt(place / "polite", base)
    evaluate(base, prompt, load_examples(str(held)), Contest(answers=True, max_new_tokens=3), out=place / "polite" / "evaluations")
    return place / "polite"


@pytest.fixture(scope="module")
def models(run):
    card = json.loads((run / "prompt" / "card.json").read_text(encoding="utf-8"))
    polite = Model("polite", "prompt", 0, card["num_virtual_tokens"], card, run / "prompt", run)
    other = replace(polite, name=MARKUP, card={**card, "text": MARKUP, "system": "Be brief."}, report=None)
    return [Model("tiny-base", "base", 0), polite, other, Model("both", "ensemble", 0, members=("polite", MARKUP))]
