"""The frozen base: load, check, embed, prefill, continue. The only door to transformers models.

A soft prompt stands before the text and a causal model never looks ahead, so the keys and values of the prompt's
positions are the same for every example. `prefill` computes them once; everything else continues from that Prefix.

Shapes: B rows, T text tokens, K prefixes, S prefix positions (BOS included), H hidden size, V vocabulary.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from softprompt.config import ModelConfig
from softprompt.errors import ConfigError, MissingPackage, ModelError
from softprompt.head import Head
from softprompt.hub import endpoint
from softprompt.offload import from_files, values_of
from softprompt.prefix import Continued, Prefix, continue_plain, continue_shared, layers_of, prefill, run
from softprompt.unpack import keep_unpacked, unpacked_folder

SAMPLE = 4096  # embedding rows looked at for their mean, spread and RMS


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model that is only looked at, with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    shares_prefix: bool
    row_mean_H: Tensor
    row_std_H: Tensor
    rms: float
    stop_ids: frozenset[int]
    fingerprint: str
    tokenizer_fingerprint: str
    head: Head = field(repr=False)

    @property
    def hidden_size(self) -> int:
        """Size of one row of the embedding module's output (not always the model's hidden size: OPT)."""
        return self.row_mean_H.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters()

    @property
    def context_length(self) -> int | None:
        return context_length(self.model.config)

    def embed(self, ids: Tensor) -> Tensor:
        """Output of the embedding module, scaling included; its weight is never indexed directly."""
        return self.model.get_input_embeddings()(ids)

    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), H], float32, without gradient: the rows that a text would have."""
        with torch.no_grad():
            return self.embed(torch.tensor(list(ids), dtype=torch.long, device=self.device)).float()

    def drawn_rows(self, count: int, seed: int) -> Tensor:
        """[count, H], float32: the rows of any tokens of the vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return self.embed_ids(torch.randint(len(self.tokenizer), (count,), generator=generator).tolist())

    def prefill(self, embeds: Sequence[Tensor]) -> Prefix:
        """The prefixes of K sequences of embeddings, each [S, H]."""
        return prefill(self.model.base_model, embeds) if self.shares_prefix else Prefix((), tuple(embeds))

    def continue_from(self, prefix: Prefix, which_B: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, keep: bool = False) -> Continued:
        """Hidden states of texts that continue from prefixes; row b continues from prefix number `which_B[b]`.

        `mask_BT` is 1 on real tokens. Position ids follow the mask, so a row gives the same result alone or in a batch.
        `keep` keeps keys and values, for decoding.
        """
        if self.shares_prefix:
            return continue_shared(self.model.base_model, self.embed(ids_BT), prefix, which_B, mask_BT, keep)
        return continue_plain(self.model.base_model, self.embed(ids_BT), prefix, which_B, mask_BT)

    def next_hidden(self, ids_B: Tensor, past: Continued) -> Continued:
        """One more token for every row of a shared-prefix batch; holes in the cache must stand on the left."""
        mask_BS = torch.cat([past.mask_BS, past.mask_BS.new_ones(len(ids_B), 1)], dim=1)
        cache = DynamicCache(ddp_cache_data=past.layers)
        positions_B1 = past.mask_BS.sum(dim=1, keepdim=True)
        hidden = run(self.model.base_model, self.embed(ids_B[:, None]), mask_BS, positions_B1, cache)
        return Continued(hidden, layers_of(cache), mask_BS)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], with whatever the family does to its logits (soft capping, scaling)."""
        return self.head.logits(hidden)


# ---- loading and checking ------------------------------------------------------------------------------------------


def load_base(config: ModelConfig, *, layers_in_files: Path | None = None) -> FrozenBase:
    """Loads, freezes and checks a base. Raises ModelError when it cannot be found, loaded or used with a soft prompt.

    `layers_in_files`: a folder to spare; the layers are then read from the base's files at every forward (softprompt/offload.py). A
    quantised base is loaded whole, and so is a GGUF file for the first time.
    """
    name, gguf_file = config.location
    settings = load_settings(config)
    refuse_unsupported(settings)
    tokenizer = load_tokenizer(config)
    how = {"config": settings, "dtype": load_dtype(config), **_quantization(config)}
    if layers_in_files and config.quantization is None and (gguf_file is None or _unpacked(config).is_dir()):
        how |= from_files(settings, device_of(config.device), layers_in_files, trust_remote_code=config.trust_remote_code)
    model, info = _from_pretrained(AutoModelForCausalLM, config, output_loading_info=True, **how)
    if info["missing_keys"]:
        raise ModelError(
            f"{name}: the files lack weights ({', '.join(sorted(info['missing_keys'])[:3])} ...): the base would be partly random"
        )
    if getattr(model, "hf_quantizer", None) is not None and gguf_file is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain numbers by now
        keep_unpacked(model, tokenizer, _unpacked(config))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' way for inference repacks 4-bit weights and has no gradient
            module.support_avx512bf16_for_cpu = False
    if model.device != device_of(config.device):  # a quantised one is where it belongs and may not be moved
        model = model.to(device_of(config.device))
    return freeze(model, tokenizer, name if gguf_file is None else f"{name}/{gguf_file}")


def _quantization(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told to load a base in 8 or 4 bits. Raises ConfigError for a GGUF file, and MissingPackage."""
    if config.quantization is None:
        return {}
    if config.location[1] is not None:
        raise ConfigError(
            "model.quantization: a GGUF file is unpacked to full precision: name the base's Hugging Face folder or id instead"
        )
    if find_spec("bitsandbytes") is None:
        raise MissingPackage("bitsandbytes", "quantization")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every product that 8-bit inputs are float16
    four_bit = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": load_dtype(config)}
    kinds: dict[str, dict[str, Any]] = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, **four_bit}}
    return {"quantization_config": BitsAndBytesConfig(**kinds[config.quantization]), "device_map": {"": device_of(config.device)}}


def load_settings(config: ModelConfig) -> Any:
    """The base's transformers configuration alone, without weights. Raises ModelError when it cannot be had."""
    return _from_pretrained(AutoConfig, config)


def load_tokenizer(config: ModelConfig) -> Any:
    """The base's tokenizer alone. Raises ModelError when it cannot be had."""
    return _from_pretrained(AutoTokenizer, config)


def _from_pretrained(kind: Any, wanted: ModelConfig, **how: Any) -> Any:
    name, gguf_file = wanted.location
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    address = "" if Path(name).exists() else endpoint()  # a local folder needs no hub
    try:
        places = {"revision": wanted.revision, "gguf_file": gguf_file}
        if gguf_file is not None and _unpacked(wanted).is_dir():
            name, places = str(_unpacked(wanted)), {}
        given = {key: value for key, value in places.items() if value is not None}
        return kind.from_pretrained(name, trust_remote_code=wanted.trust_remote_code, **given, **how)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(_cannot_load(name, gguf_file, address, error)) from None


def folder_of(config: ModelConfig) -> Path:
    """Where a base's files lie in Hugging Face's form: the folder itself, the hub's copy in the cache, or a GGUF file unpacked.

    Raises ModelError when there is no such folder.
    """
    name, gguf_file = config.location
    if gguf_file is not None:
        if not _unpacked(config).is_dir():
            raise ModelError(f"{name}/{gguf_file} could not be kept unpacked in the cache, whose disk is too full: make room and try again")
        return _unpacked(config)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=config.revision))
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(name, None, endpoint(), error)) from None


def _unpacked(config: ModelConfig) -> Path:
    name, gguf_file = config.location
    file = cached_file(name, gguf_file, revision=config.revision)
    return unpacked_folder(Path(file), str(load_dtype(config)).removeprefix("torch."))


def refuse_unsupported(settings: Any) -> None:
    """Raises ModelError for bases that a soft prompt cannot stand before."""
    text = settings.get_text_config(decoder=True)
    if settings.is_encoder_decoder:
        raise ModelError(f"{settings.model_type} is an encoder-decoder model: softprompt works with decoder-only language models")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{settings.model_type} looks up embeddings again in every layer, by token id: "
            "a soft prompt has no ids, so it cannot be used here"
        )


def freeze(model: Any, tokenizer: Any, name: str) -> FrozenBase:
    """A loaded model and its tokenizer as a base: frozen, in eval mode (no dropout), checked with a few tokens."""
    model.eval().requires_grad_(False)
    sample_VH = _sample_rows(model)
    head = head_of(model)
    stop = [tokenizer.eos_token_id, model.generation_config.eos_token_id if model.generation_config else None]
    return FrozenBase(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=model.device,
        shares_prefix=_check(model, head, name),
        row_mean_H=sample_VH.mean(dim=0),
        row_std_H=sample_VH.std(dim=0),
        rms=sample_VH.square().mean().sqrt().item(),
        stop_ids=frozenset(token for item in stop for token in (item if isinstance(item, list) else [item]) if token is not None),
        fingerprint=_fingerprint(model),
        tokenizer_fingerprint=_tokenizer_fingerprint(tokenizer),
        head=head,
    )


def load_dtype(config: ModelConfig) -> torch.dtype:
    """The precision that a base is loaded in. auto: bfloat16 where the hardware multiplies in it, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    device = device_of(config.device).type
    if device == "cpu":  # without such instructions a CPU takes a hundred times longer than in float32
        found = torch.cpu.get_capabilities()
        fast = any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def context_length(settings: Any) -> int | None:
    """Positions that the base was made for, or None where its configuration does not say."""
    text = settings.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    return None


def _cannot_load(name: str, gguf_file: str | None, address: str, error: Exception) -> str:
    path, reason = Path(name), (str(error).strip().splitlines() or [type(error).__name__])[0]
    if gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        return f"{path / gguf_file}: no such GGUF file"
    if path.exists():
        return f"{name}: cannot be loaded as a model: {reason}"
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        return f"{name}: no such model folder"
    return f"{name}: no such folder here, and as a hub id it cannot be loaded from {address} (HF_ENDPOINT sets a mirror): {reason}"


def device_of(name: str) -> torch.device:
    """The device that `model.device` means. Raises ConfigError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device = {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _sample_rows(model: Any) -> Tensor:
    """Up to SAMPLE rows of the embedding module's output, evenly over the vocabulary, [SAMPLE, H], float32."""
    embedding = model.get_input_embeddings()
    num_rows = embedding.weight.shape[0]
    ids = torch.linspace(0, num_rows - 1, min(SAMPLE, num_rows), device=model.device).long()
    with torch.no_grad():
        return embedding(ids).float()


def head_of(model: Any) -> Head:
    """The language-model head with the family's own treatment of logits."""
    matrix, text = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    return Head(matrix.weight, getattr(matrix, "bias", None), scale, getattr(text, "final_logit_softcapping", None) or None)


@torch.no_grad()
def _check(model: Any, head: Head, name: str) -> bool:
    """Runs a few tokens in every way that matters. Returns whether a prefix can be shared.

    Raises ModelError when the base treats embeddings from outside differently from its own, or its logits are not
    understood: better no prompt than one that trains a different function.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 7), generator=generator).to(model.device)
    embeds_BTH = model.get_input_embeddings()(ids_BT)
    rounded = getattr(model, "is_quantized", False) or (model.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    tolerance = 1e-3 if model.dtype == torch.float32 and not rounded else 0.1
    try:
        own = model(input_ids=ids_BT, use_cache=False).logits
        given = head.logits(model.base_model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{name} does not take embeddings from outside, so a soft prompt cannot be used with it: {error}") from None
    if not _close(given, own, tolerance):
        raise ModelError(f"{name}: the same text gives other logits when its embeddings come from outside: this family is not supported")
    return _prefix_is_exact(model.base_model, embeds_BTH, tolerance)


def _prefix_is_exact(backbone: Any, embeds_BTH: Tensor, tolerance: float) -> bool:
    """Whether continuing from cached keys and values equals the plain path, padded row and shorter prefix included."""
    mask_BT = torch.ones(embeds_BTH.shape[:2], dtype=torch.long, device=embeds_BTH.device)
    mask_BT[1, 5:] = 0
    starts, which_B = [embeds_BTH[0, :4], embeds_BTH[1, :2]], torch.arange(2, device=mask_BT.device)
    plain = continue_plain(backbone, embeds_BTH, Prefix((), tuple(starts)), which_B, mask_BT)
    try:
        shared = continue_shared(backbone, embeds_BTH, prefill(backbone, starts), which_B, mask_BT, keep=False)
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False  # a recurrent state, for one, is no DynamicCache of keys and values
    real = mask_BT.bool()
    return _close(shared.hidden_BTH[real], plain.hidden_BTH[real], tolerance)


def _close(value: Tensor, reference: Tensor, tolerance: float) -> bool:
    return bool((value - reference).float().norm() <= tolerance * reference.float().norm())


@torch.no_grad()
def _fingerprint(model: Any) -> str:
    """sha256 over names, shapes and evenly sampled values of all weights, rounded to bfloat16: the same in any precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = values_of(model, name, tensor).reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + picked.tobytes())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary and the special tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest = hashlib.sha256(repr(entries).encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()
