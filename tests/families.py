"""Every causal language model of the installed transformers, with random weights and as small as its configuration lets it be."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

VALUES: list[tuple[Any, str]] = [  # a small value, and the keys of configurations that get it
    (320, "vocab_size vocab_size_per_layer_input"),
    (
        64,
        "hidden_size d_model n_embd emb_dim dim_model embedding_size word_embed_proj_dim input_embedding_size output_embedding_size "
        "intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner mlp_hidden_size ffn_hidden_size "
        "dense_intermediate_size intermediate_size_mlp lru_width hc_lowrank ple_embed_dim",
    ),
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads attention_heads "
        "encoder_attention_heads decoder_attention_heads swa_num_attention_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts linear_num_value_heads linear_num_heads mamba_dt_rank time_step_rank heads_per_ngram",
    ),
    (
        2,
        "decoder_layers num_decoder_layers num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k "
        "moe_topk top_k_experts num_experts_per_topk zero_expert_num index_n_heads linear_num_key_heads n_mamba_heads o_groups",
    ),
    (
        1,
        "encoder_layers num_encoder_layers n_shared_experts moe_num_shared_experts num_shared_experts n_group topk_group "
        "num_expert_group first_k_dense_replace mamba_n_groups n_groups mamba_ngroups decoder_start_token_id",
    ),
    (1, "bos_token_id"),
    (
        16,
        "head_dim swa_head_dim kv_channels dim_head attention_head_dim qk_nope_head_dim v_head_dim o_lora_rank index_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_d_state mamba_head_dim ssm_state_size state_size "
        "mamba_headdim adapter_rank router_hidden_size rel_extent laurel_rank",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank",
    ),
    (8, "qk_rope_head_dim mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size video_token_id"),
    (12, "sliding_window window_size attention_window_size sliding_window_size"),
    (24, "qk_head_dim"),
    (128, "mamba_d_ssm attention_hidden_size encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    (
        512,
        "index_topk max_position_embeddings n_positions max_seq_len n_ctx seq_length max_sequence_length max_target_positions "
        "attention_chunk_size",
    ),
    (0, "pad_token_id"),
    (7, "image_token_id image_token_index"),
    (9, "audio_token_id"),
    (0.2, "initializer_range"),
    (0.5, "logit_scale lm_head_multiplier"),
    (2.0, "logits_scaling logits_mup_width_multiplier embedding_multiplier"),
    (True, "is_decoder"),
    (None, "layer_types layers_block_type mlp_layer_types"),
    (2, "eos_token_id"),
]
SMALL = {key: value for value, keys in VALUES for key in keys.split()}
_latent = {"num_key_value_heads": 4, "head_dim": 8}
_layers = ["linear_attention", "full_attention"] * 2
SPECIAL: dict[str, dict[str, Any]] = {  # where keys depend on each other
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _latent),
    **dict.fromkeys(("dots3_note_text", "longcat_flash", "minicpm3", "youtu"), _latent),
    "bailing_hybrid": {**_latent, "num_experts": 8, "n_group": 2, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "falcon_h1": {"embedding_multiplier": 1.0},  # PEFT embeds texts without it
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_latent, "layer_types": _layers},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mpt": {"logit_scale": None},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32), "attn_layers": ["local", "local"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "n_mamba_heads": 8, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_settings(family: str) -> Any:
    """Its configuration. Raises whatever the family's code raises where it cannot be so small."""
    return _shrunk(CONFIG_MAPPING[family](), SPECIAL.get(family, {}))


def small_model(settings: Any) -> Any:
    """A model with weights that are the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings).eval()


def _shrunk(default: Any, changes: dict[str, Any]) -> Any:
    known = default.to_dict()
    values = {key: value for key, value in SMALL.items() if key in known}
    parts = {key: getattr(default, key) for key in known if key.endswith("config")}
    values |= {key: _shrunk(part, {}).to_dict() for key, part in parts.items() if hasattr(part, "to_dict")}
    return type(default)(**{**values, **changes})
