"""softprompt and vLLM in one environment (`make test-engines`): a prompt is trained, exported and served there."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from other_engines import our_answers, vllm_offline
from transformers import AutoTokenizer

from softprompt.demo import demo_config
from softprompt.engine.loading import load_base

pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM has an environment of its own")]
QUESTIONS = ["Where is my parcel?", "The kettle leaks.", "我的包裹到哪里了？"]
TOKENS = 16


def test_a_prompt_is_trained_and_served_in_one_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    short = ["prompt.method=prompt", "prompt.init=text", "train.steps=2", "model.dtype=float32", f"train.out={tmp_path / 'run'}"]
    config = demo_config(short)
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    served = tmp_path / "served"
    for line in (["train", "run.toml"], ["export", "run", "--to", "vocab", "--out", "served"]):
        subprocess.run([sys.executable, "-m", "softprompt", *line], check=True, cwd=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(served)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    requests = [{"prompt_token_ids": tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False)} for one in asked]
    said = vllm_offline(served, requests, TOKENS, tmp_path)
    assert said == our_answers(load_base(config.model), tmp_path / "run" / "prompt", QUESTIONS, TOKENS)
    assert list(json.loads((served / "softprompt.json").read_text(encoding="utf-8"))["prompts"]) == ["run"]
