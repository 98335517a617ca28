"""The settings of a model folder as transformers 4 and 5 spell them, for engines that read one of the two.

transformers 5 writes how positions are turned into `rope_parameters` alone; mlx-lm and transformers 4 read `rope_theta` and `rope_scaling`,
and take 10,000 without a word where these are missing. Its tokenizers have a class and a field that transformers 4 stumbles over.
"""

from collections.abc import Mapping
from typing import Any

PARTS = ("text_config", "llm_config", "language_config")  # where a base that also sees keeps those of its language model
SPECIAL = "extra_special_tokens"
KNOWN_TO_4 = (
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
)  # newer kinds have one spelling: 5 takes their `rope_scaling` for all layers
LONGROPE = ("short_factor", "long_factor")  # beside its type, transformers 4 takes these and nothing else


def settings_in_both(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of config.json; what is said already stays."""
    both = dict(settings)
    for part in PARTS:
        if isinstance(both.get(part), Mapping):
            both[part] = settings_in_both(both[part])
    if isinstance(both.get("dtype"), str):
        both.setdefault("torch_dtype", both["dtype"])
    if isinstance(both.get("_sliding_window_pattern"), int):
        both.setdefault("sliding_window_pattern", both["_sliding_window_pattern"])
    rope = both.get("rope_parameters")
    if isinstance(rope, Mapping):
        of_layers = {name: one for name, one in rope.items() if isinstance(one, Mapping)}  # each kind of layer has its own
        if "sliding_attention" in of_layers and "rope_theta" in of_layers["sliding_attention"]:
            both.setdefault("rope_local_base_freq", of_layers["sliding_attention"]["rope_theta"])
        both = _rope_of_4(of_layers.get("full_attention", {}) if of_layers else rope) | both
    return both


def tokenizer_in_both(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of tokenizer_config.json, which transformers 5 reads as well."""
    both = dict(settings)
    if both.get("tokenizer_class") == "TokenizersBackend":
        both["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(both.get(SPECIAL), list):
        both["additional_special_tokens"] = both.pop(SPECIAL)
    return both


def _rope_of_4(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor` of these `rope_parameters`."""
    named = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind, rest = rope.get("rope_type", "default"), {name: value for name, value in rope.items() if name not in (*named, "rope_type")}
    if kind == "longrope":
        rest = {name: rest[name] for name in LONGROPE if name in rest}
        return {**named, "rope_scaling": {"type": kind, **rest}}
    return named if kind not in KNOWN_TO_4 else {**named, "rope_scaling": {"rope_type": kind, "type": kind, **rest}}
