"""The frozen base: embed, prefill, continue. The only door to transformers models.

A soft prompt stands before the text and a causal model never looks ahead, so the keys and values of the prompt's
positions are the same for every example. `prefill` computes them once; everything else continues from that Prefix.

Shapes: B rows, T text tokens, K prefixes, S prefix positions (BOS included), H hidden size, V vocabulary.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softprompt.engine.family import backbone_of, shorten_chunks, weights_of
from softprompt.engine.head import Head
from softprompt.engine.layers import layers_of
from softprompt.engine.memory import token_budget
from softprompt.engine.offload import values_of
from softprompt.engine.prefix import Continued, Prefix, continue_plain, continue_shared, embedded, prefill, run
from softprompt.engine.shelf import Shelf
from softprompt.engine.slots import Slots
from softprompt.engine.trial import WELL, Sharing, check, embed_scale
from softprompt.errors import ConfigError

MULTIPLIED, DIVIDED = ("logit_scale", "lm_head_multiplier"), ("logits_scaling", "logits_mup_width_multiplier")  # what families call it
SAMPLE = 4096  # embedding rows looked at for their mean, spread and RMS
SAMPLED = 64  # weights kept as they are beside the fingerprint


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model that is only looked at, with its tokenizer.

    `fingerprint` and `sample`: of its weights; see `same_weights`.
    `shelf`: prefixes that answers continue from.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    head: Head = field(repr=False)
    row_mean_H: Tensor
    row_std_H: Tensor
    rms: float = 0.0
    sharing: Sharing = WELL
    stop_ids: frozenset[int] = frozenset()
    fingerprint: str = ""
    sample: str = ""
    tokenizer_fingerprint: str = ""
    shelf: Shelf = field(default_factory=Shelf, init=False, repr=False)

    @property
    def shares_prefix(self) -> bool:
        return self.sharing.prefix

    @property
    def backbone(self) -> Any:
        """The layers, without the head."""
        return backbone_of(self.model)

    def budget(self, wanted: int | None, processes: int = 1) -> int:
        """Tokens (padding included) of one micro-batch: `wanted`, or what fits into the free memory and computes fastest. `processes`: so
        many share the memory of this machine."""
        return token_budget(self.backbone, self.device, wanted, processes)

    @property
    def hidden_size(self) -> int:
        """Size of one row of the embedding module's output (not always the model's hidden size: OPT)."""
        return self.row_mean_H.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def precision(self) -> str:
        """Its `dtype` as a configuration names it."""
        return str(self.dtype).removeprefix("torch.")

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
        rows, scale = self.model.get_input_embeddings()(ids), embed_scale(self.model)
        return rows if scale == 1.0 else rows * scale

    def embed_ids(self, ids: Sequence[int]) -> Tensor:
        """[len(ids), H], float32, without gradient: the rows that a text would have."""
        with torch.no_grad():
            return self.embed(torch.tensor(list(ids), dtype=torch.long, device=self.device)).float()

    def drawn_rows(self, count: int, seed: int) -> Tensor:
        """[count, H], float32: the rows of any tokens of the vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return self.embed_ids(torch.randint(self.num_tokens, (count,), generator=generator).tolist())

    def prefill(self, embeds: Sequence[Tensor], first: int = 0) -> Prefix:
        """The prefixes of K sequences of embeddings, each [S, H]; `first`: see prefix.prefill."""
        return prefill(self.backbone, embeds, self.sharing.exact, first) if self.shares_prefix else embedded(embeds)

    def continue_from(self, prefix: Prefix, which_B: Tensor, ids_BT: Tensor, mask_BT: Tensor, *, keep: bool = False) -> Continued:
        """Hidden states of texts that continue from prefixes; row b continues from prefix number `which_B[b]`.

        `mask_BT` is 1 on real tokens. Position ids follow the mask, so a row gives the same result alone or in a batch.
        `keep` keeps what the layers know of them, for decoding.
        """
        go_on = continue_shared if self.shares_prefix else continue_plain
        return go_on(self.backbone, self.embed(ids_BT), prefix, which_B, mask_BT, keep)

    def next_hidden(self, ids_B: Tensor, read: Slots) -> Tensor:
        """[B, H]: the hidden states of one more token for every row; `read` has it then."""
        mask_BS, positions_B1 = read.begin()
        if self.shares_prefix:
            cache = read.cache()
            hidden_B1H = run(self.backbone, self.embed(ids_B[:, None]), mask_BS, positions_B1, cache)
            read.end(layers_of(cache))
            return hidden_B1H[:, -1]
        so_far, every_B = Prefix(read.layers, tuple(read.lengths)), torch.arange(len(ids_B), device=self.device)
        whole = self.continue_from(so_far, every_B, ids_B[:, None], torch.ones_like(ids_B)[:, None], keep=True)
        read.write("embeds", whole.layers[0].parts["embeds"][..., -1:, :])
        read.end(())
        return whole.hidden_BTH[:, -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], with whatever the family does to its logits (soft capping, scaling)."""
        return self.head.logits(hidden)


# ---- freezing ----------------------------------------------------------------------------------------------------------


def freeze(model: Any, tokenizer: Any, name: str) -> FrozenBase:
    """A loaded model and its tokenizer as a base: frozen, in eval mode (no dropout), checked with a few tokens."""
    model.eval().requires_grad_(False)
    if model.device.type == "cpu":
        shorten_chunks(model)
    sample_VH = _sample_rows(model)
    head = head_of(model)
    fingerprint, sample = _fingerprint(model)
    return FrozenBase(
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=model.device,
        head=head,
        row_mean_H=sample_VH.mean(dim=0),
        row_std_H=sample_VH.std(dim=0),
        rms=sample_VH.square().mean().sqrt().item(),
        sharing=check(model, head, name),
        stop_ids=stop_ids(tokenizer, model.generation_config),
        fingerprint=fingerprint,
        sample=sample,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )


def stop_ids(tokenizer: Any, generation: Any) -> frozenset[int]:
    """Tokens that end a text: of the tokenizer, and of the base's settings for generation, if it has any."""
    ends = [tokenizer.eos_token_id, generation.eos_token_id if generation else None]
    return frozenset(token for item in ends for token in (item if isinstance(item, list) else [item]) if token is not None)


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
        return embedding(ids).float() * embed_scale(model)


def head_of(model: Any) -> Head:
    """The language-model head with the family's own treatment of logits."""
    matrix, text = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    times, over = MULTIPLIED, DIVIDED
    if text.model_type == "hyperclovax":  # which multiplies by what the Granites divide by
        times, over = over, times
    cap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None) or None
    scale = math.prod(getattr(text, key, None) or 1.0 for key in times) / math.prod(getattr(text, key, None) or 1.0 for key in over)
    return Head(matrix.weight, getattr(matrix, "bias", None), scale, cap)


@torch.no_grad()
def _fingerprint(model: Any) -> tuple[str, str]:
    """(sha256 over names, shapes and evenly sampled values of all weights, rounded to bfloat16: the same in float32 and bfloat16;
    some of these values as they are, float32 in base64: what is left of them in float16 can be compared with it)."""
    digest, tensors = hashlib.sha256(), weights_of(model)
    floating = [name for _, name, tensor in tensors if tensor.is_floating_point()]
    looked_at = set(floating[:: max(1, len(floating) // SAMPLED)][:SAMPLED])
    some: list[float] = []
    for alone, name, tensor in tensors:
        flat = values_of(model, name, tensor).reshape(-1)
        picked = flat[:: max(1, flat.numel() // 256)]
        digest.update(f"{alone}{tuple(tensor.shape)}".encode() + picked.to(torch.bfloat16).float().cpu().numpy().tobytes())
        some += [picked[len(picked) // 3].item()] if name in looked_at else []
    return digest.hexdigest(), base64.b64encode(torch.tensor(some, dtype=torch.float32).numpy().tobytes()).decode()


def same_weights(first: tuple[str, str], second: tuple[str, str], *, in_float16: bool) -> bool:
    """Whether two (fingerprint, sample) are of the same weights. `in_float16`: one of them was in float16, which rounds otherwise than
    bfloat16 does, and small numbers more: then the sampled values decide, within the rounding of both."""
    if first[0] == second[0] or not in_float16:
        return first[0] == second[0]
    ours, theirs = (
        torch.frombuffer(bytearray(base64.b64decode(one[1])), dtype=torch.float32) if one[1] else None for one in (first, second)
    )
    return ours is not None and theirs is not None and len(ours) == len(theirs) and torch.allclose(ours, theirs, rtol=2**-8, atol=2**-23)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary and the special tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    digest = hashlib.sha256(repr(entries).encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    return digest.hexdigest()
