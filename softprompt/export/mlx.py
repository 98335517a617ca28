"""Prompts for MLX: keys and values as a prompt cache of mlx-lm, written without it; rows as a folder whose vocabulary holds them.

Source: mlx-lm 0.32, mlx_lm/models/cache.py (save_prompt_cache, KVCache, RotatingKVCache) and mlx_lm/generate.py.
"""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from softprompt.engine.loading import folder_of
from softprompt.engine.prompt import SoftPrompt
from softprompt.engine.unpack import spell_for_others
from softprompt.errors import ArtifactError, ConfigError
from softprompt.export import vocab
from softprompt.export.carried import QUESTIONS, Carried, Exported, Goal, states_behind
from softprompt.export.chat import chat_ids, without_opening
from softprompt.export.kv_folder import keys_and_values
from softprompt.extras import has
from softprompt.spellings import settings_in_both

OLDEST = Version("0.32")  # that keeps prompts in this form
TOLERANCE = {"float32": 0.01, "float16": 0.02}  # relative error of logits; of coarser weights COARSE
COARSE = 0.05
UNTRIED = "not tried with MLX: where mlx-lm is installed, an export compares its logits with ours"


def export(goal: Goal) -> Exported:
    """Rows: the folder of `vocab`. Keys and values: NAME.safetensors for each, to be used with the base's own folder.

    Raises ConfigError for both at once and for an mlx-lm that is too old, ArtifactError where MLX computes something else.
    """
    rows = [prompt for prompt in goal.prompts if isinstance(prompt.soft, SoftPrompt)]
    if rows and len(rows) < len(goal.prompts):
        raise ConfigError(f"--to mlx: rows ({rows[0].name}) become a folder, keys and values files for the base's own: export them apart")
    if has("mlx_lm") and Version(version("mlx-lm")) < OLDEST:
        raise ConfigError(f"mlx-lm {version('mlx-lm')} keeps prompts in another form: pip install 'mlx-lm>={OLDEST}'")
    exported = replace(vocab.export(goal), format="mlx") if rows else _caches(goal)
    if not has("mlx_lm"):
        return replace(exported, notes=(*exported.notes, UNTRIED))
    error = _error_in_mlx(goal, exported, goal.draft if rows else folder_of(goal.model))
    return replace(exported, checked=exported.checked | {"mlx_logits_relative_error": error})


def _caches(goal: Goal) -> Exported:
    source, facts = folder_of(goal.model), {}
    if goal.model.location[1] is not None:
        spell_for_others(source)  # a GGUF file that we have unpacked, an earlier version perhaps
    settings = _settings(source)
    for prompt in goal.prompts:
        tensors, metadata = _cache(goal, prompt, source, settings)
        save_file(tensors, goal.draft / f"{prompt.name}.safetensors", metadata)
        own = {"positions": prompt.soft.num_positions, "end_ids": prompt.end_ids, "model": str(source)}
        facts[prompt.name] = {"file": f"{prompt.name}.safetensors", **own}
    ends = goal.base.tokenizer.convert_ids_to_tokens(goal.new_end_ids)
    notes = (f"answers of these prompts also end with: mlx_lm.generate --extra-eos-token {' '.join(ends)}",) if ends else ()
    return Exported("mlx", goal.base.name, facts, [f"{name}.safetensors" for name in facts], {}, (*_missing(source, settings), *notes))


def _settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _cache(goal: Goal, prompt: Carried, source: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a prompt cache, by layer and part, and its metadata: what is known of it, classes, which parts are plain numbers."""
    with torch.no_grad():
        parts = keys_and_values(goal.base, prompt.soft.prefix(goal.base))
    text, length = goal.base.model.config.get_text_config(decoder=True), prompt.soft.num_positions
    kinds, dtype = getattr(text, "layer_types", None) or (), getattr(torch, _dtype(settings))
    tensors: dict[str, Tensor] = {}
    metadata = {"0.model": str(source), "0.tokenizer_config": json.dumps({"chat_template": _template(prompt)}), "2.0": ""}
    for number in range(len(parts) // 2):
        slides = number < len(kinds) and kinds[number] == "sliding_attention"
        kept = min(length, text.sliding_window) if slides else length
        for index, part in enumerate(("keys", "values")):
            tensors[f"{number}.{index}"] = parts[f"{part}.{number}"].transpose(0, 1)[None, :, -kept:].to(dtype).contiguous()
        own = (length, 0, text.sliding_window, kept) if slides else (length,)  # offset; kept for ever, window, next place
        for index, value in enumerate(own, 2):
            tensors[f"{number}.{index}"] = torch.tensor(value, dtype=torch.int32)
        metadata[f"1.{number}"] = "RotatingKVCache" if slides else "KVCache"
    numbers = [name for name, tensor in tensors.items() if tensor.dim() == 0]
    for index, name in enumerate(numbers, 1):
        metadata |= {f"2.{index}.0": name, f"2.{index}.1": "scalar"}
    return tensors, metadata


def _dtype(settings: dict[str, Any]) -> str:
    """What the folder's weights are in."""
    return str(settings.get("dtype") or settings.get("torch_dtype") or "float32")


def _template(prompt: Carried) -> str:
    """For `mlx_lm.generate`, which leaves out all that its chat template writes before a question: it takes that for cached."""
    return f"{{%- if messages[-1]['content'] == '<query>' -%}}<query>{{%- else %}}{without_opening(prompt)}{{% endif %}}"


def _missing(source: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """What mlx-lm would take for granted, wrongly, where transformers 5 has saved the base's folder."""
    lines = {name: value for name, value in settings_in_both(settings).items() if name not in settings and name != "torch_dtype"}
    if not lines:
        return ()
    return (f"{source / 'config.json'} says things under names that mlx-lm does not read: add {json.dumps(lines)[1:-1]}",)


# ---- tried -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _error_in_mlx(goal: Goal, exported: Exported, folder: Path) -> float:
    """The largest relative error of MLX's logits behind the prompts. Raises ArtifactError where they are others."""
    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    worst, new = 0.0, [token for facts in exported.prompts.values() for token in facts.get("ids", ())]
    tokenizer = AutoTokenizer.from_pretrained(folder) if new else None
    for prompt in goal.prompts:
        states = states_behind(goal.base, [prompt.soft], [(0, prompt.asked(question)) for question in QUESTIONS])
        for question, states_TH in zip(QUESTIONS, states, strict=True):
            if tokenizer:
                ids, cache = chat_ids(tokenizer, prompt, question), None
            else:
                ids, cache = list(prompt.asked(question)), load_prompt_cache(str(goal.draft / f"{prompt.name}.safetensors"))
            theirs_1V = torch.tensor(model(mx.array([ids]), cache=cache)[:, -1].astype(mx.float32).tolist())
            ours_1V = goal.base.logits(states_TH[-1:]).float().cpu()
            worst = max(worst, vocab.relative_error(theirs_1V, ours_1V, new))
    if not worst <= TOLERANCE.get(_dtype(_settings(folder)), COARSE):
        why = "; ".join(_missing(folder, _settings(folder))) or f"mlx-lm {version('mlx-lm')} does not compute what the base does"
        raise ArtifactError(f"in MLX the logits behind the prompts differ from ours by {worst:.1e}: {why}")
    return worst
