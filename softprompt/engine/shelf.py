"""Prefixes of prompts that answer: each is computed once, and kept for as long as its prompt is in use."""

from collections.abc import Sequence

import torch

from softprompt.engine.model import FrozenBase
from softprompt.engine.prefix import Prefix, assemble
from softprompt.engine.prompt import Prompt

Context = tuple[Prompt, tuple[int, ...]]  # what a text continues from: a prompt, and the ids behind it


def shelved(base: FrozenBase, contexts: Sequence[Context]) -> Prefix:
    """The prefixes of `contexts`, in their order. Each is computed by itself, so that it is the same in any company."""
    kept = [_kept(base, *context) for context in contexts]
    if len(kept) == 1:
        return kept[0]
    if not base.shares_prefix:
        return Prefix((), tuple(embeds for one in kept for embeds in one.embeds))
    full = next((one for one in kept if one.layers), None)
    if full is None:  # nothing stands before any of the texts
        return kept[0]
    nothing = tuple((k[0, :, :0], v[0, :, :0]) for k, v in full.layers)
    return assemble([layers for one in kept for layers in (one.separate() if one.layers else [nothing])])


def _kept(base: FrozenBase, prompt: Prompt, ids: tuple[int, ...]) -> Prefix:
    own = base.shelf.setdefault(prompt, {})
    if ids not in own:
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, of use outside of decoding too
            own[ids] = prompt.prefix(base, ids)
    return own[ids]
