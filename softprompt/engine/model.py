"""The frozen base: embed, prefill, continue; what it is frozen and checked by. The only door to transformers models.

A soft prompt stands before the text and a causal model never looks ahead, so the keys and values of the prompt's
positions are the same for every example. `prefill` computes them once; everything else continues from that Prefix.

Shapes: B rows, T text tokens, K prefixes, S prefix positions (BOS included), H hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache

from softprompt.engine.head import Head
from softprompt.engine.memory import token_budget
from softprompt.engine.offload import values_of
from softprompt.engine.prefix import Continued, Prefix, continue_plain, continue_shared, layers_of, prefill, run
from softprompt.errors import ConfigError, ModelError

SAMPLE = 4096  # embedding rows looked at for their mean, spread and RMS


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model that is only looked at, with its tokenizer.

    `exact_prefill`: see prefix.prefill. `shelf`: prefixes that answers continue from, by prompt and the ids behind it (shelf.py).
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    head: Head = field(repr=False)
    row_mean_H: Tensor
    row_std_H: Tensor
    rms: float = 0.0
    shares_prefix: bool = True
    stop_ids: frozenset[int] = frozenset()
    fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    exact_prefill: bool = True
    shelf: WeakKeyDictionary[Any, dict[tuple[int, ...], Prefix]] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @property
    def backbone(self) -> Any:
        """The layers, without the head."""
        return self.model.base_model

    def budget(self, wanted: int | None) -> int:
        """Tokens (padding included) of one micro-batch: `wanted`, or what fits into the free memory and computes fastest."""
        return token_budget(self.backbone, self.device, wanted)

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
    def num_tokens(self) -> int:
        """Tokens that have an embedding: the tokenizer of some bases knows more (Gemma 3 1B), and most tables have spare rows."""
        return min(len(self.tokenizer), self.model.get_input_embeddings().weight.shape[0])

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
        return self.embed_ids(torch.randint(self.num_tokens, (count,), generator=generator).tolist())

    def prefill(self, embeds: Sequence[Tensor]) -> Prefix:
        """The prefixes of K sequences of embeddings, each [S, H]."""
        return prefill(self.backbone, embeds, self.exact_prefill) if self.shares_prefix else Prefix((), tuple(embeds))

    def continue_from(self, prefix: Prefix, which_B: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, keep: bool = False) -> Continued:
        """Hidden states of texts that continue from prefixes; row b continues from prefix number `which_B[b]`.

        `mask_BT` is 1 on real tokens. Position ids follow the mask, so a row gives the same result alone or in a batch.
        `keep` keeps keys and values, for decoding.
        """
        if self.shares_prefix:
            return continue_shared(self.backbone, self.embed(ids_BT), prefix, which_B, mask_BT, keep)
        return continue_plain(self.backbone, self.embed(ids_BT), prefix, which_B, mask_BT)

    def next_hidden(self, ids_B: Tensor, past: Continued) -> Continued:
        """One more token for every row of a shared-prefix batch; holes in the cache must stand on the left."""
        mask_BS = torch.cat([past.mask_BS, past.mask_BS.new_ones(len(ids_B), 1)], dim=1)
        cache = DynamicCache(ddp_cache_data=past.layers)
        positions_B1 = past.mask_BS.sum(dim=1, keepdim=True)
        hidden = run(self.backbone, self.embed(ids_B[:, None]), mask_BS, positions_B1, cache)
        return Continued(hidden, layers_of(cache), mask_BS)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], with whatever the family does to its logits (soft capping, scaling)."""
        return self.head.logits(hidden)


# ---- freezing and checking ---------------------------------------------------------------------------------------------


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
        head=head,
        row_mean_H=sample_VH.mean(dim=0),
        row_std_H=sample_VH.std(dim=0),
        rms=sample_VH.square().mean().sqrt().item(),
        shares_prefix=check(model, head, name),
        stop_ids=frozenset(token for item in stop for token in (item if isinstance(item, list) else [item]) if token is not None),
        fingerprint=_fingerprint(model),
        tokenizer_fingerprint=_tokenizer_fingerprint(tokenizer),
    )


def context_length(settings: Any) -> int | None:
    """Positions that the base was made for, or None where its configuration does not say."""
    text = settings.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    return None


def check_context(context_length: int | None, num_virtual_tokens: int, max_length: int) -> None:
    """Raises ConfigError when prompt and text together are longer than the base's context."""
    if context_length is not None and num_virtual_tokens + max_length > context_length:
        raise ConfigError(
            f"{num_virtual_tokens} virtual tokens and data.max_length = {max_length} exceed the base's context of {context_length} tokens: "
            "lower prompt.length (shorten prompt.text) or data.max_length"
        )


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
def check(model: Any, head: Head, name: str) -> bool:
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
