"""llama.cpp on tiny models: the tiny llama as a GGUF file, and a server in this process."""

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, TokenType
from torch import Tensor

from softprompt.model import FrozenBase

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_gguf(path: Path, base: FrozenBase, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """The base (tiny llama) in llama.cpp's form, its table in this quantisation, all else in float32."""
    settings, weights = base.model.config, base.model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(settings.hidden_size // settings.num_attention_heads)
    writer.add_vocab_size(settings.vocab_size)
    _add_vocabulary(writer, base.tokenizer, settings.vocab_size)
    for name, own in (("embed_tokens", "token_embd"), ("norm", "output_norm")):
        _add(writer, f"{own}.weight", weights[f"model.{name}.weight"], kind if name == "embed_tokens" else gguf.GGMLQuantizationType.F32)
    if not settings.tie_word_embeddings:
        _add(writer, "output.weight", weights["lm_head.weight"], kind)
    for layer in range(settings.num_hidden_layers):
        for name, own in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": settings.num_attention_heads, "attn_k": settings.num_key_value_heads}.get(own)
            _add(
                writer, f"blk.{layer}.{own}.weight", weight if heads is None else _interleaved(weight, heads), gguf.GGMLQuantizationType.F32
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, name: str, weight: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp turns neighbouring numbers of a head, transformers its two halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    listed = {token: text for text, token in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    kinds = [TokenType.UNUSED if n not in listed else TokenType.CONTROL if n in special else TokenType.NORMAL for n in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([listed.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ā Ā"])  # an empty list cannot be written; this one makes no token
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


class LlamaServer:
    """llama.cpp's server on a file, one thread, without its network part."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.use_jinja, settings.warmup, settings.verbosity = True, False, 0
        self.server = xllamacpp.Server(settings)

    def chat(self, question: str, tokens: int, **how: Any) -> str:
        turns = [{"role": "user", "content": question}]
        return self._ask(self.server.handle_chat_completions, messages=turns, max_tokens=tokens, **how)["choices"][0]["message"]["content"]

    def complete(self, prompt: str | list[int], tokens: int, **how: Any) -> str:
        return self._ask(self.server.handle_completions, prompt=prompt, max_tokens=tokens, n_predict=tokens, **how)["choices"][0]["text"]

    @staticmethod
    def _ask(handle: Any, **request: Any) -> dict[str, Any]:
        answer = handle({"temperature": 0, **request})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        assert "error" not in answer, answer
        return answer
