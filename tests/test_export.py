"""Prompts as entries of a vocabulary and as plain rows: what was written gives what we give, and nothing is half there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import load_prompt
from softprompt.artifact import DataCard, make_card, write_prompt
from softprompt.config import load_config
from softprompt.encode import make_encoder
from softprompt.export import Wanted, export
from softprompt.generation import Sampling, generate
from softprompt.model import FrozenBase
from softprompt.prompt import SoftPrompt

LENGTH = 5
JINJA = "{% for turn in messages %}{{ turn.role }}> {{ turn.content }} {% endfor %}Q: {{ prompt }} A:"


def some_prompt(folder: Path, base: FrozenBase, seed: int = 0, *, template: str = "human-assistant", position: str | None = None) -> Path:
    """A prompt folder with rows like those of the base, as training writes it."""
    encoder = make_encoder(base.tokenizer, template)
    generator = torch.Generator().manual_seed(seed)
    rows = base.drawn_rows(LENGTH, seed) + base.rms * torch.randn(LENGTH, base.hidden_size, generator=generator)
    own = position or ("start" if encoder.bos_id is None else "after_bos")
    config = load_config(None, [f"model.name={base.name}", "model.device=cpu", "prompt.text=x", "data.train=x"])
    data = DataCard(train="x", num_train=1, train_fingerprint="", num_eval=0, eval_fingerprint=None, labels=(), label_words={})
    soft = SoftPrompt(rows, own, encoder.bos_id)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_prompt(folder, soft, make_card(config, base, soft, encoder, data, "random", {}), base)
    return folder


def our_answer(base: FrozenBase, folder: Path, question: str) -> str:
    return generate(base, load_prompt(folder, base), [question], Sampling(max_new_tokens=12))[0]


def chat(tokenizer: Any, question: str, **how: str) -> torch.Tensor:
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, **how)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_plain_model_answers_as_ours(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    base = bases(family)
    folder = some_prompt(tmp_path / "taste", base)
    written = export(Wanted([folder], "vocab", tmp_path / "out"))
    assert written["checked"]["logits_relative_error"] < 1e-4
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written["prompts"]["taste"]["tokens"] == [f"<|sp:taste:{index}|>" for index in range(LENGTH)]
    ids = chat(tokenizer, "bring 水")
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == our_answer(base, folder, "bring 水")


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_new_token_is_never_said(bases: Callable[..., FrozenBase], family: str, tmp_path: Path) -> None:
    base = bases(family)
    written = export(Wanted([some_prompt(tmp_path / "taste", base)], "vocab", tmp_path / "out"))
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = chat(tokenizer, "bring tea").expand(200, -1)
    torch.manual_seed(0)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 20}
    said = model.generate(ids, **how, eos_token_id=None)[:, ids.shape[1] :]
    assert said.numel() == 4000
    assert not torch.isin(said, torch.tensor(written["prompts"]["taste"]["ids"])).any()
    logits = model(ids[:1]).logits[0]
    assert not torch.isin(logits.argmax(dim=1), torch.tensor(written["prompts"]["taste"]["ids"])).any()
