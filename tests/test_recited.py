"""Keys and values of picked positions: those of the whole text where nothing moves, and turned to their new places where they do."""

import pytest
import torch
from tiny import FAMILIES, tiny_base

from softprompt.engine.prefix import Prefix
from softprompt.engine.prompt import as_prompt
from softprompt.engine.recited import recited

IDS = (1, 40, 41, 42, 43, 44, 45, 46, 47, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_move_is_as_it_was(family, tmp_path):
    base = tiny_base(tmp_path / "base", family)
    wanted = base.prefill([base.embed_ids(IDS)]).layers
    for picked in (range(10), range(4)):
        for own, layer in zip(recited(base, IDS, picked), wanted, strict=True):
            for name, part in own.parts.items():
                torch.testing.assert_close(part, layer.parts[name][:, :, : len(picked)], rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in base.backbone.modules()), "no hook stays"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_values_are_those_of_the_text_wherever_they_stand(family, tmp_path):
    base = tiny_base(tmp_path / "base", family)
    picked = [0, 3, 7, 9]
    wanted = base.prefill([base.embed_ids(IDS)]).layers
    for own, layer in zip(recited(base, IDS, picked), wanted, strict=True):
        torch.testing.assert_close(own.parts["values"], layer.parts["values"][:, :, picked], rtol=1e-4, atol=1e-5)


def test_keys_are_turned_as_their_new_places_ask(tmp_path):
    """In the first layer a key depends on its token and its place alone."""
    base = tiny_base(tmp_path / "base", "llama")
    picked = [0, 3, 7, 9]
    own = recited(base, IDS, picked)[0].parts["keys"]
    torch.testing.assert_close(
        own, base.prefill([base.embed_ids([IDS[at] for at in picked])]).layers[0].parts["keys"], rtol=1e-4, atol=1e-5
    )
    whole = base.prefill([base.embed_ids(IDS)]).layers[0].parts["keys"][:, :, picked]
    assert not torch.allclose(own[:, :, 1:], whole[:, :, 1:], atol=1e-3)


def test_all_of_a_text_as_a_prompt_answers_as_the_text(tmp_path):
    base = tiny_base(tmp_path / "base", "llama")
    text = torch.tensor([[60, 61, 62]])
    prompt = as_prompt(recited(base, IDS, range(len(IDS))), "after_bos", 1)
    which, mask = torch.zeros(1, dtype=torch.long), torch.ones_like(text)
    ours = base.continue_from(prompt.prefix(base), which, text, mask).hidden_BTH
    plain = Prefix(base.prefill([base.embed_ids(IDS)]).layers, (len(IDS),))
    torch.testing.assert_close(ours, base.continue_from(plain, which, text, mask).hidden_BTH, rtol=1e-4, atol=1e-5)
