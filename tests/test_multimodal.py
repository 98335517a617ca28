"""Bases that also see: their language model is used alone, and is what it is in the whole model."""

from pathlib import Path

import pytest
import tiny
import torch
from test_invariants import encoded_rows, loss_and_gradient, some_prompt
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from softprompt.artifact import load_prompt
from softprompt.config import ModelConfig, load_config
from softprompt.engine.dryrun import step_peak
from softprompt.engine.loading import load_base
from softprompt.engine.prompt import prefix_of
from softprompt.export import Wanted, export
from softprompt.export.chat import chat_ids
from softprompt.generation import generate
from softprompt.plan import make_plan
from softprompt.sampling import Sampling
from softprompt.training import train

TEXT = {**tiny._grouped, "head_dim": 8}
TURNED = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN_EYES = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
SEEING = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": EYES,
        "mm_tokens_per_image": 1,
    },
    "gemma4": {
        "text_config": {**TEXT, "sliding_window": 12, "final_logit_softcapping": 5.0, "hidden_size_per_layer_input": 0},
        "vision_config": {**EYES, "head_dim": 16, "num_key_value_heads": 2},
        "audio_config": None,
        **{f"{kind}_token_id": 4 + index for index, kind in enumerate(("image", "video", "audio"))},
    },
    "qwen2_5_vl": {"text_config": TURNED, "vision_config": QWEN_EYES},
    "qwen3_vl": {"text_config": TURNED, "vision_config": {**QWEN_EYES, "deepstack_visual_indexes": [0]}},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {**EYES, "model_type": "pixtral"}},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**EYES, "model_type": "clip_vision_model"}},
    "internvl": {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": {**EYES, "image_size": [28, 28], "patch_size": [14, 14]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(family): where the whole model lies, with the names of weights that the hub's files have."""
    made = {}

    def get(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp(family)
            settings = CONFIG_MAPPING[family](**SEEING[family])
            for name, token in (("bos", tiny.BOS), ("eos", tiny.EOS), ("pad", tiny.PAD)):
                setattr(settings.get_text_config(), f"{name}_token_id", token)
            kinds = (mapping.get(type(settings), None) for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING))
            next(kind for kind in kinds if kind)(settings).save_pretrained(made[family])
            tiny.tiny_tokenizer(chat=True).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture(params=sorted(SEEING))
def folder(request, folders) -> Path:
    return folders(request.param)


def loaded(folder, **how):
    return load_base(ModelConfig(name=str(folder), device="cpu", dtype="float32"), **how)


def whole_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_it_is_the_language_model_of_the_whole_and_nothing_else_is_held(folder):
    base, whole = loaded(folder), whole_model(folder)
    assert base.shares_prefix
    alone = {parameter.data_ptr(): parameter.numel() for part in (whole.get_decoder(), whole.lm_head) for parameter in part.parameters()}
    assert base.num_parameters == sum(alone.values()) < whole.num_parameters()
    ids_BT = torch.randint(3, 200, (2, 9))
    assert torch.equal(base.model(input_ids=ids_BT).logits, whole(input_ids=ids_BT).logits)


@torch.no_grad()
def test_a_prompt_before_texts_of_uneven_lengths_is_what_the_whole_says_behind_its_rows(folder):
    """Position ids of ours have two dimensions; those of Qwen's have three or four."""
    base, whole = loaded(folder), whole_model(folder)
    soft, texts = some_prompt(base), [[9, 8, 7, 6, 5], [30, 31]]
    ids_BT, mask_BT = (torch.tensor([[*row, *[0] * (5 - len(row))] for row in rows]) for rows in (texts, [[1] * len(row) for row in texts]))
    hidden_BTH = base.continue_from(prefix_of(base, [(soft, ())]), torch.zeros(2, dtype=torch.long), ids_BT, mask_BT).hidden_BTH
    for row, ids in enumerate(texts):
        joined = torch.cat([soft.embeds(base), base.embed_ids(ids)])[None]
        if hasattr(whole.model, "rope_deltas"):
            whole.model.rope_deltas = None
        theirs = whole(inputs_embeds=joined, attention_mask=torch.ones(joined.shape[:2], dtype=torch.long)).logits[0, -len(ids) :]
        assert torch.allclose(base.logits(hidden_BTH[row, : len(ids)]), theirs, atol=1e-4, rtol=1e-4)


def test_loss_and_gradient_do_not_depend_on_the_cut(folder):
    base = loaded(folder)
    soft, rows = some_prompt(base), encoded_rows()
    (loss, grad), (other, other_grad) = (loss_and_gradient(base, soft, rows, tokens) for tokens in (16, 4096))
    assert loss == pytest.approx(other, rel=1e-5)
    assert torch.allclose(grad, other_grad, atol=1e-5)


def test_it_is_the_same_however_it_is_loaded(folder, tmp_path):
    base = loaded(folder)
    assert loaded(folder, layers_in_files=tmp_path / "spare").fingerprint == base.fingerprint
    half = load_base(ModelConfig(name=str(folder), device="cpu", dtype="bfloat16"))
    assert half.fingerprint == base.fingerprint


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "mistral3", "llava", "internvl"])
def test_the_language_model_saved_alone_is_the_same_base(folders, tmp_path, family):
    whole = whole_model(folders(family))
    alone = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    alone.base_model.load_state_dict(whole.get_decoder().state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    alone.save_pretrained(tmp_path)
    tiny.tiny_tokenizer(chat=True).save_pretrained(tmp_path)
    assert loaded(tmp_path).fingerprint == loaded(folders(family)).fingerprint


def settings(folder, tmp_path, *more):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.some_rows(12))
    return load_config(None, [
        f"model.name={folder}", "model.device=cpu", "model.dtype=float32", f"data.train={rows}", f"data.eval={rows}", "prompt.text=Repeat.",
        "data.template=chat", "train.steps=10", "train.eval_every=10", f"train.out={tmp_path / 'run'}", *more,
    ])  # fmt: skip


def test_it_is_planned_trained_asked_and_carried(folder, tmp_path):
    config = settings(folder, tmp_path)
    planned, base = make_plan(config), loaded(folder)
    assert (planned.num_base, planned.memory.weights) == (base.num_parameters, 4 * base.num_parameters)
    assert step_peak(base.model.config, base.dtype, [8], (4, 20), False) > 0
    *_, finished = train(config)
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    stored = load_prompt(tmp_path / "run", base)
    answers = generate(base, stored, ["bring tea", "bring some coffee"], Sampling(6))
    assert answers == [generate(base, stored, [text], Sampling(6))[0] for text in ("bring tea", "bring some coffee")]
    for kind in ("npy", "torch", "vllm", "vocab"):
        export(Wanted([tmp_path / "run"], kind, tmp_path / kind), ModelConfig(name=str(folder), device="cpu", dtype="float32"))
    exported, tokenizer = whole_model(tmp_path / "vocab"), base.tokenizer.from_pretrained(tmp_path / "vocab")
    assert exported.num_parameters() > base.num_parameters, "images can still be asked about"
    from softprompt.export.carried import Carried

    asked = torch.tensor([chat_ids(tokenizer, Carried("run", stored.soft, stored.encoder), "bring tea")])
    said = exported.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
    assert base.tokenizer.decode(said, skip_special_tokens=True) == answers[0]


def test_keys_and_values_of_every_layer_are_learned_too(folders, tmp_path):
    *_, finished = train(settings(folders("qwen2_5_vl"), tmp_path, "prompt.method=prefix"))
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
