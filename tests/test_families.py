"""Every causal language model of the installed transformers shares its prefix, or is read whole in batches, or is refused in a sentence.

`python tests/test_families.py` writes docs/families.md. Under another transformers than the page's, what becomes of a family
may differ, and families that this one lacks or cannot build, or that the page does not know, are skipped.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import NAMES, small_model, small_settings
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from softprompt.engine.family import shorten_chunks
from softprompt.engine.loading import refuse_unsupported
from softprompt.engine.model import head_of
from softprompt.engine.trial import Sharing, check
from softprompt.errors import ModelError

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SHARED, WHOLE = "shares its prefix", "read whole, in batches"
SAID = re.compile(
    "encoder-decoder|looks up embeddings again|does not take embeddings from outside|other logits when its embeddings|looks ahead|"
    "its logits are more than|nothing can be learned|other states beside"
)
UNBUILT = ("cohere_compass_text", "dbrx", "dots3_note", "gemma4_assistant", "gemma4_unified_assistant", "qwen4_exp", "qwen4_exp_text")
PEOPLE_USE = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "gemma2", "gemma3_text", "mistral",
    "mixtral", "phi3", "gpt_oss", "bloom", "gpt2", "opt", "granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "lfm2", "lfm2_moe",
    "lfm3", "kimi_linear", "olmo_hybrid", "mamba2", "bailing_hybrid", "glm_moe_dsa", "deepseek_v3", "deepseek_v32", "llama4_text",
]  # fmt: skip


KNOWN = set(re.findall(r"^\| (\S+) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
THAT_OF_THE_PAGE = f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def there(family: str) -> None:
    if family not in NAMES and not THAT_OF_THE_PAGE:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    if family not in KNOWN and not THAT_OF_THE_PAGE:
        pytest.skip(f"{family}: docs/families.md, of another transformers, does not know it")
    if family not in UNBUILT and not THAT_OF_THE_PAGE:
        try:
            CONFIG_MAPPING[family]()
        except StrictDataclassError as error:  # of defaults that its own types forbid
            pytest.skip(f"transformers {transformers.__version__} cannot build {family}: {str(error).splitlines()[-1].strip()[:80]}")


def verdict(family: str, dtype: torch.dtype = torch.float32) -> str:
    """What becomes of it, as the table says it."""
    if family in UNBUILT:
        return "not tried: its configuration cannot be made small"
    try:
        settings = small_settings(family)
        refuse_unsupported(settings)
        model = small_model(settings).requires_grad_(False).to(dtype)
        return SHARED if check(model, head_of(model), family).prefix else WHOLE
    except ModelError as error:
        said = re.split(r", so |: this family|[:;] softprompt|If you", str(error).removeprefix(f"{family}: ").removeprefix(f"{family} "))[0]
        return f"refused: {said.strip(' :')}"


@pytest.mark.parametrize("family", [name for name in NAMES if name not in UNBUILT])
def test_every_family_is_shared_or_read_whole_or_refused_in_a_sentence(family):
    found = verdict(family)
    assert found in (SHARED, WHOLE) or SAID.search(found), found
    if THAT_OF_THE_PAGE:
        assert f"| {family} | {found.replace('|', '/')} |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", PEOPLE_USE)
def test_those_that_people_use_share(family):
    assert verdict(family) == SHARED


@pytest.mark.parametrize("family", ["bloom", "gpt2", "opt", "qwen3_5_text", "granitemoehybrid", "mamba2", "lfm2", "nemotron_h"])
def test_half_precision_shares_too(family):
    assert verdict(family, torch.bfloat16) == SHARED


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma", "jamba"])
def test_a_state_that_is_lost_is_seen_in_half_precision(family):
    assert verdict(family, torch.bfloat16) == WHOLE


@pytest.mark.parametrize(("family", "key"), [("falcon_h1", "embedding_multiplier"), ("hyperclovax", "logits_scaling")])
def test_what_a_family_multiplies_by_is_known(family, key):
    settings = small_settings(family)
    setattr(settings, key, 3.0)
    model = small_model(settings).requires_grad_(False)
    assert check(model, head_of(model), family) == Sharing()


@pytest.mark.parametrize("family", ["mamba2", "granitemoehybrid", "bamba", "nemotron_h", "falcon_h1", "zamba2"])
def test_shorter_chunks_read_the_same(family):
    """150 tokens: less than one chunk of the family's own, and more than two of ours."""
    model = small_model(small_settings(family)).requires_grad_(False)
    layers = [module for module in model.modules() if hasattr(module, "A_log")]
    for layer in layers:
        layer.chunk_size = 256
    ids = torch.randint(3, 60, (2, 150), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    shorten_chunks(model)
    assert {layer.chunk_size for layer in layers} == {64}
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


def page() -> str:
    """docs/families.md."""
    found = {family: verdict(family) for family in NAMES}
    count = {kind: sum(value == kind for value in found.values()) for kind in (SHARED, WHOLE)}
    rows = "\n".join(f"| {family} | {value.replace('|', '/')} |" for family, value in found.items())
    return f"""# Which bases work

Every causal language model of transformers {transformers.__version__}, tried with small random weights
(`python tests/test_families.py` writes this page; `tests/test_families.py` holds it).

{count[SHARED]} of {len(found)} families share their prefix: a prompt is run once and every text continues from what the layers keep
of it, keys and values or recurrent states. {count[WHOLE]} are read whole: [prompt][text], in batches padded on the right.
The rest is refused when it is loaded, for the reason given. Whatever the table says, every base is tried with a few tokens
when it is loaded.

| family | what becomes of it |
|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE}\n")
    PAGE.write_text(page(), encoding="utf-8")
