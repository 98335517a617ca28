"""Tiny random models and byte-level tokenizers, made offline in a moment: real architectures, real code paths."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from families import small_settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from softprompt.config import Config, ModelConfig
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.events import Step
from softprompt.training import train

transformers_logging.disable_progress_bar()  # saving a base draws one, also where a test looks at standard error
PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_modern = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
}
_grouped = {**_modern, "num_key_value_heads": 2}
_gpt = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": BOS, "eos_token_id": EOS}
_bloom = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "bos_token_id": BOS, "eos_token_id": EOS}

FAMILIES: dict[str, Mapping[str, Any]] = {
    "bloom": {**_bloom, "initializer_range": 0.2, "pad_token_id": PAD},
    "llama": _grouped,
    "qwen2": _grouped,
    "qwen3": {**_grouped, "head_dim": 8},
    "mistral": {**_grouped, "sliding_window": 12},
    "gemma3_text": {**_grouped, "head_dim": 8, "sliding_window": 12},
    "gpt2": {**_gpt, "initializer_range": 0.2},
    "gpt_neox": _modern,
    "phi3": _grouped,
    "olmo2": _grouped,
    "gemma2": {**_grouped, "head_dim": 8, "final_logit_softcapping": 5.0},
    "granite": {**_grouped, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
}
RECURRENT: dict[str, Mapping[str, Any]] = {  # which share states beside keys and values
    name: {**small_settings(name).to_dict(), "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    for name in ("qwen3_5_text", "granitemoehybrid", "falcon_h1", "nemotron_h", "lfm2", "olmo_hybrid", "mamba2", "deepseek_v32")
}
WHOLE: dict[str, Mapping[str, Any]] = {  # whose rows are read whole
    name: {**small_settings(name).to_dict(), "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    for name in ("falcon_mamba", "jamba", "minimax", "recurrent_gemma")
}


def tiny_tokenizer(*, adds_bos: bool = True, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens; adds BOS or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{character: index + 3 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tiny_folder(path: Path, family: str = "llama", *, seed: int = 0, adds_bos: bool = True, chat: bool = False, **changes: Any) -> Path:
    """A model folder as `save_pretrained` writes it."""
    torch.manual_seed(seed)
    settings = CONFIG_MAPPING[family](**{**(FAMILIES | RECURRENT | WHOLE)[family], **changes})
    AutoModelForCausalLM.from_config(settings).save_pretrained(path)
    tiny_tokenizer(adds_bos=adds_bos, chat=chat).save_pretrained(path)
    return path


def tiny_base(path: Path, family: str = "llama", **how: Any) -> FrozenBase:
    """The same, loaded."""
    return load_base(ModelConfig(name=str(tiny_folder(path, family, **how)), device="cpu"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(number: int, make: Callable[[int], dict[str, str]] | None = None) -> list[dict[str, str]]:
    """Rows of uneven lengths that a prompt can learn: the answer repeats the question's last word."""
    words = ("tea", "coffee", "水", "milk", "juice", "咖啡")
    build = make or (lambda n: {"prompt": f"{'please ' * (n % 4)}bring {words[n % 6]}", "completion": words[n % 6]})
    return [build(index) for index in range(number)]


def numbers_kept(run: Callable[[], object]) -> int:
    """How many numbers autograd keeps for backward while `run` runs."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run()
    return kept


def stop_after(config: Config, step: int) -> None:
    """Runs until this step and no further, as abruptly as it gets inside one process: nothing after the step is written."""
    events = train(config)
    for event in events:
        if isinstance(event, Step) and event.step == step:
            break
    events.close()  # type: ignore[attr-defined]


# ---- chat templates in the manner of families that people use ------------------------------------------------------

TURN, TURN_END = "<|turn|>", "<|end|>"
TURNS = (  # the end of a turn is not EOS
    "{%- for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{%- endif %}"
)
EMPTY_THOUGHT = (  # an empty thinking block in front of the last answer alone; thoughts that the answer has are written there
    "{%- for m in messages %}{%- set said = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}{{ '<|turn|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{ said + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{%- endif %}"
)
OPENED_THOUGHT = (  # the question ends inside a block that a rendered answer does not have
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{ '<|turn|>' + m.content.split('</think>')[-1] + eos_token }}{%- else %}{{ '[' + m.content + ']' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|turn|><think>\n' }}{%- endif %}"
)
CLOCK = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ bos_token + '<|turn|>system\nToday: ' + date_string + '<|end|>' }}"
    "{%- for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content | trim + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{%- endif %}"
)


def chat_tokenizer(template: Any, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two more control tokens, TURN and TURN_END, and this chat template."""
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in (TURN, TURN_END)], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def chat_folder(path: Path, template: Any, family: str = "llama", **how: Any) -> Path:
    """A model folder with that tokenizer."""
    tiny_folder(path, family, **how)
    chat_tokenizer(template).save_pretrained(path)
    return path
