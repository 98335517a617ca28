"""What the installed PEFT does with a prompt under the installed transformers: tried once, on a model of a few thousand numbers."""

import warnings
from functools import lru_cache
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt.engine.quantized import unadvised

NUM_NEW = 6


@lru_cache
def fault_of_generate() -> str | None:
    """A sentence where PEFT's `generate` gives other tokens than its own `forward`, as PEFT 0.21.2 does under transformers 5.24
    (docs/peft.md); else None."""
    with unadvised(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls transformers by old names
        generated, by_hand = _two_ways()
    if generated == by_hand:
        return None
    names = f"PEFT {version('peft')}'s generate loses a prompt under transformers {version('transformers')}"
    return f"{names}: answer with softprompt generate, or with PEFT's forward"


@torch.no_grad()
def _two_ways() -> tuple[list[int], list[int]]:
    """What a prompt of four rows answers: by `generate`, and token by token by `forward`."""
    import peft

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, initializer_range=0.3))
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    asked = torch.tensor([[5, 6, 7, 8, 9]])
    how = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(input_ids=asked, attention_mask=torch.ones_like(asked), **how)
    by_hand = asked
    for _ in range(NUM_NEW):
        logits = model(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits[0, -1]
        by_hand = torch.cat([by_hand, logits.argmax().view(1, 1)], dim=1)
    return generated[0, asked.shape[1] :].tolist(), by_hand[0, asked.shape[1] :].tolist()
