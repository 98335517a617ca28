"""The frozen base: load, check, embed, prefill, continue. The only door to transformers models.

A soft prompt stands before the text and a causal model never looks ahead, so the keys and values of the prompt's
positions are the same for every example. `prefill` computes them once; everything else continues from that Prefix.

Shapes: B rows, T text tokens, P virtual tokens, K prefixes, S prefix positions (BOS included), H hidden size,
N scored tokens, V vocabulary. Text is always padded on the right; shorter prefixes of a mixed batch are padded on the
left, so that real tokens stay next to each other also for bases that measure distance by index (sliding windows, ALiBi).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from softprompt.config import ModelConfig
from softprompt.errors import ConfigError, ModelError
from softprompt.hub import endpoint
from softprompt.unpack import keep_unpacked, unpacked_folder

SAMPLE = 4096  # embedding rows looked at for their mean, spread and RMS


@dataclass(frozen=True)
class Prefix:
    """What a text continues from: BOS and the prompt's rows.

    `layers`: keys and values per layer, each [1, heads, S, head size]; empty where the base cannot share a prefix.
    `embeds_SH`: the embeddings of the same positions, which the plain path puts before every row instead.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    embeds_SH: Tensor

    @property
    def length(self) -> int:
        return self.embeds_SH.shape[0]

    def leaf(self) -> "Prefix":
        """The same prefix, cut off from the graph behind it, collecting gradients of its own."""
        if self.layers:
            layers = tuple((k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self.layers)
            return Prefix(layers, self.embeds_SH.detach())
        return Prefix((), self.embeds_SH.detach().requires_grad_())

    def backward_from(self, leaf: "Prefix") -> None:
        """Sends the gradients that `leaf` collected through the prompt's own positions."""
        mine = [tensor for layer in self.layers for tensor in layer] or [self.embeds_SH]
        leaves = [tensor for layer in leaf.layers for tensor in layer] or [leaf.embeds_SH]
        pairs = [(tensor, other.grad) for tensor, other in zip(mine, leaves, strict=True) if other.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True)
class Continued:
    """Hidden states of a text that continued from a prefix, and what decoding needs to go on."""

    hidden_BTH: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    mask_BS: Tensor


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
    _head: Any = field(repr=False)

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

    def prefill(self, rows_PH: Tensor, position: str, bos_id: int | None) -> Prefix:
        """The prefix of a prompt: [BOS][rows] for position "after_bos", [rows][BOS] for "start"; no BOS where it is None."""
        rows_PH = rows_PH.to(self.device, self.dtype)
        bos = self.embed_ids([] if bos_id is None else [bos_id]).to(self.dtype)
        embeds_SH = torch.cat([bos, rows_PH] if position == "after_bos" else [rows_PH, bos])
        if not self.shares_prefix or embeds_SH.shape[0] == 0:
            return Prefix((), embeds_SH)
        return Prefix(_prefill(self.model.base_model, embeds_SH), embeds_SH)

    def continue_from(self, prefixes: Sequence[Prefix], prefix_B: Sequence[int], ids_BT: Tensor, mask_BT: Tensor) -> Continued:
        """Hidden states of texts that continue from prefixes; row b continues from `prefixes[prefix_B[b]]`.

        `mask_BT` is 1 on real tokens. Position ids follow the mask, so a row gives the same result alone or in a batch.
        """
        if self.shares_prefix:
            return _continue_shared(self.model.base_model, self.embed(ids_BT), prefixes, prefix_B, mask_BT)
        return _continue_plain(self.model.base_model, self.embed(ids_BT), prefixes, prefix_B, mask_BT)

    def next_hidden(self, ids_B: Tensor, past: Continued) -> Continued:
        """One more token for every row of a shared-prefix batch; holes in the cache must stand on the left."""
        mask_BS = torch.cat([past.mask_BS, past.mask_BS.new_ones(len(ids_B), 1)], dim=1)
        cache = DynamicCache(ddp_cache_data=past.layers)
        positions_B1 = past.mask_BS.sum(dim=1, keepdim=True)
        hidden = _run(self.model.base_model, self.embed(ids_B[:, None]), mask_BS, positions_B1, cache)
        return Continued(hidden, _layers(cache), mask_BS)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], with whatever the family does to its logits (soft capping, scaling)."""
        return self._head(hidden)


# ---- the two ways to continue from a prefix ------------------------------------------------------------------------


def _run(backbone: Any, embeds_BTH: Tensor, mask_BS: Tensor, positions_BT: Tensor, cache: DynamicCache) -> Tensor:
    return backbone(
        inputs_embeds=embeds_BTH, attention_mask=mask_BS, position_ids=positions_BT, past_key_values=cache, use_cache=True
    ).last_hidden_state


def _layers(cache: DynamicCache) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def _prefill(backbone: Any, embeds_SH: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    # A cache without a config keeps every position in every layer; sliding windows are then applied by the mask alone.
    cache = DynamicCache()
    positions = torch.arange(embeds_SH.shape[0], device=embeds_SH.device)[None]
    _run(backbone, embeds_SH[None], torch.ones_like(positions), positions, cache)
    return _layers(cache)


def _continue_shared(backbone: Any, embeds_BTH: Tensor, prefixes: Sequence[Prefix], prefix_B: Sequence[int], mask_BT: Tensor) -> Continued:
    which_B = torch.tensor(list(prefix_B), device=mask_BT.device)
    length_K = torch.tensor([prefix.length for prefix in prefixes], device=mask_BT.device)
    longest = int(length_K.max())
    mask_KS = (torch.arange(longest, device=mask_BT.device) >= longest - length_K[:, None]).to(mask_BT.dtype)
    mask_BS = torch.cat([mask_KS[which_B], mask_BT], dim=1)
    positions_BT = (length_K[which_B, None] + mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(ddp_cache_data=_spread(prefixes, which_B, longest)) if longest else DynamicCache()
    hidden = _run(backbone, embeds_BTH, mask_BS, positions_BT, cache)
    return Continued(hidden, _layers(cache), mask_BS)


def _spread(prefixes: Sequence[Prefix], which_B: Tensor, longest: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values for every row of a batch, [B, heads, longest, head size]; a view where all rows share one prefix."""
    if len(prefixes) == 1:
        return [(k.expand(len(which_B), -1, -1, -1), v.expand(len(which_B), -1, -1, -1)) for k, v in prefixes[0].layers]
    shapes = next(prefix.layers for prefix in prefixes if prefix.length)

    def padded(prefix: Prefix, layer: int, part: int) -> Tensor:
        if prefix.length == 0:
            like = shapes[layer][part]
            return like.new_zeros(1, like.shape[1], longest, like.shape[3])
        return torch.nn.functional.pad(prefix.layers[layer][part], (0, 0, longest - prefix.length, 0))

    def bank(layer: int, part: int) -> Tensor:
        return torch.cat([padded(prefix, layer, part) for prefix in prefixes])[which_B]

    return [(bank(layer, 0), bank(layer, 1)) for layer in range(len(shapes))]


def _continue_plain(backbone: Any, embeds_BTH: Tensor, prefixes: Sequence[Prefix], prefix_B: Sequence[int], mask_BT: Tensor) -> Continued:
    """Row by row [prefix][text] without a cache. No padding stands before a real token, so no mask is needed."""
    hidden = []
    for row, which in enumerate(prefix_B):
        prefix = prefixes[which]
        real = mask_BT[row].bool()
        joined_SH = torch.cat([prefix.embeds_SH, embeds_BTH[row, real]])
        states_SH = backbone(inputs_embeds=joined_SH[None], use_cache=False).last_hidden_state[0, prefix.length :]
        hidden.append(embeds_BTH.new_zeros(len(real), states_SH.shape[-1]).masked_scatter(real[:, None], states_SH))
    return Continued(torch.stack(hidden), (), mask_BT)


# ---- loading and checking ------------------------------------------------------------------------------------------


def load_base(config: ModelConfig) -> FrozenBase:
    """Loads, freezes and checks a base. Raises ModelError when it cannot be found, loaded or used with a soft prompt."""
    name, gguf_file = config.location
    settings = load_settings(config)
    refuse_unsupported(settings)
    tokenizer = load_tokenizer(config)
    model, info = _from_pretrained(AutoModelForCausalLM, config, config=settings, dtype=load_dtype(config), output_loading_info=True)
    if info["missing_keys"]:
        raise ModelError(
            f"{name}: the files lack weights ({', '.join(sorted(info['missing_keys'])[:3])} ...): the base would be partly random"
        )
    if getattr(model, "hf_quantizer", None) is not None and gguf_file is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain numbers by now
        keep_unpacked(model, tokenizer, _unpacked(config))
    return freeze(model.to(_device(config.device)), tokenizer, name if gguf_file is None else f"{name}/{gguf_file}")


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
    head = _head(model)
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
        _head=head,
    )


def load_dtype(config: ModelConfig) -> torch.dtype:
    """The precision that a base is loaded in. auto: bfloat16 on a GPU that computes in it, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if _device(config.device).type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


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


def _device(name: str) -> torch.device:
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


def _head(model: Any) -> Any:
    """The language-model head with the family's own treatment of logits, as one function of the hidden states."""
    matrix, text = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    cap = getattr(text, "final_logit_softcapping", None)
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits = matrix(hidden.to(matrix.weight.dtype))
        logits = logits * scale if scale != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


@torch.no_grad()
def _check(model: Any, head: Any, name: str) -> bool:
    """Runs a few tokens in every way that matters. Returns whether a prefix can be shared.

    Raises ModelError when the base treats embeddings from outside differently from its own, or its logits are not
    understood: better no prompt than one that trains a different function.
    """
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 7), generator=generator).to(model.device)
    embeds_BTH = model.get_input_embeddings()(ids_BT)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        own = model(input_ids=ids_BT, use_cache=False).logits
        given = head(model.base_model(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{name} does not take embeddings from outside, so a soft prompt cannot be used with it: {error}") from None
    if not _close(given, own, tolerance):
        raise ModelError(f"{name}: the same text gives other logits when its embeddings come from outside: this family is not supported")
    return _prefix_is_exact(model.base_model, embeds_BTH, tolerance)


def _prefix_is_exact(backbone: Any, embeds_BTH: Tensor, tolerance: float) -> bool:
    """Whether continuing from cached keys and values equals the plain path, padded row and shorter prefix included."""
    mask_BT = torch.ones(embeds_BTH.shape[:2], dtype=torch.long, device=embeds_BTH.device)
    mask_BT[1, 5:] = 0
    starts = [embeds_BTH[0, :4], embeds_BTH[1, :2]]
    plain = _continue_plain(backbone, embeds_BTH, [Prefix((), start) for start in starts], [0, 1], mask_BT)
    try:
        prefixes = [Prefix(_prefill(backbone, start), start) for start in starts]
        shared = _continue_shared(backbone, embeds_BTH, prefixes, [0, 1], mask_BT)
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
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + picked.tobytes())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary and the special tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest = hashlib.sha256(repr(entries).encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()
