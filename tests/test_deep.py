"""Deep prompts, keys and values of every layer: the same function as their rows before training, PEFT's function afterwards."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import torch
from test_invariants import FAMILIES, encoded_rows, loss_and_gradient, rows_alike, some_prompt, whole_batch
from test_run import rows_of
from transformers import AutoModelForCausalLM

from softprompt.artifact import load_prompt, read_card
from softprompt.engine.prompt import deepened
from softprompt.errors import ArtifactError, ModelError
from softprompt.generation import generate
from softprompt.plan import make_plan
from softprompt.runlog import RunFolder
from softprompt.sampling import Sampling
from softprompt.training import train

PREFIX = "prompt.method=prefix"


def hidden(base, soft, rows):
    batch = whole_batch(base, rows)
    with torch.no_grad():
        states = base.continue_from(soft.prefix(base), batch.which_B, batch.ids_BT, batch.mask_BT).hidden_BTH
    return states[batch.mask_BT.bool()]


PLACES = [("after_bos", None), ("after_bos", tiny.BOS), ("start", tiny.BOS)]


@pytest.mark.parametrize(("position", "bos"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_it_is_the_function_of_its_rows(bases, family, position, bos):
    base, rows = bases(family), encoded_rows()
    soft = replace(some_prompt(base), position=position, bos_id=bos)
    deep = deepened(base, soft.rows_PH, position, bos)
    torch.testing.assert_close(hidden(base, deep, rows), hidden(base, soft, rows), rtol=1e-4, atol=1e-5)


def test_no_part_is_led_by_longer_steps_than_the_usual_one(bases):
    base = bases()
    deep = deepened(base, some_prompt(base).rows_PH, "start", None)
    widths = [heads * size for heads, size in deep.shapes]
    rms = [part.square().mean().sqrt().item() for part in (deep.scaled_PD * deep.scale_D).split(widths, dim=1)]
    usual = sorted(rms)[(len(rms) - 1) // 2]
    assert max(rms) > 1.05 * usual > 1.1 * min(rms), "the parts are alike: nothing is tested"
    scales = [part[0].item() for part in deep.scale_D.split(widths)]
    assert scales == pytest.approx([min(one, usual) for one in rms])


def moved(base, position="after_bos", bos=None, length=6):
    """A deep prompt that is no longer what any rows give."""
    deep = deepened(base, some_prompt(base, length).rows_PH, position, bos)
    noise = torch.randn(deep.scaled_PD.shape, generator=torch.Generator().manual_seed(2))
    return deep.with_learned(deep.scaled_PD + 0.3 * noise)


@pytest.mark.parametrize("make_rows", [encoded_rows, rows_alike])
@pytest.mark.parametrize(("position", "bos"), PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_peft(bases, family, position, bos, make_rows):
    base, rows = bases(family), make_rows()
    deep = moved(base, position, bos)
    loss, gradient = loss_and_gradient(base, deep, rows, tokens_per_batch=20)
    if position == "start":  # in PEFT it is a token of the text
        rows = [replace(row, ids=(bos, *row.ids), supervised=(False, *row.supervised)) for row in rows]

    stored = deep.stored(base)
    heads, size = deep.shapes[0]
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(stored), token_dim=heads * size, num_attention_heads=heads,
        num_layers=len(deep.shapes) // 2, num_transformer_submodules=1, encoder_hidden_size=heads * size,
    )  # fmt: skip
    model = peft.get_peft_model(base.model, config).eval()
    model.prompt_encoder["default"].embedding.weight.data = stored.clone()
    total = torch.zeros(())
    for row in rows:  # row by row: nothing is padded
        ids = torch.tensor([row.ids])
        labels = torch.tensor([[token if on else -100 for token, on in zip(row.ids, row.supervised, strict=True)]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        (losses / sum(row.num_supervised for row in rows)).backward()
        total += losses.detach() / sum(row.num_supervised for row in rows)
    expected = model.prompt_encoder["default"].embedding.weight.grad[-deep.length :] * deep.scale_D
    assert loss == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-8)


@pytest.mark.parametrize("position", ["start", "after_bos"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt2"])
def test_a_trained_one_loads_in_peft_with_the_same_logits(bases, make_config, family, position):
    base = bases(family, **({"sliding_window": 512} if family == "gemma3_text" else {}))  # else no answer looks back to the prompt
    config = make_config(f"model.name={base.name}", PREFIX, "train.steps=6", f"prompt.position={position}")
    *_, finished = train(config, base=base)
    assert finished.result["eval_loss_after"] < finished.result["eval_loss_before"]
    prompt = load_prompt(config.train.out, base)
    ids = list(prompt.encoder.question("bring tea"))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), Path(config.train.out) / "prompt").eval()
    with torch.no_grad():
        prefix = prompt.soft.prefix(base)
        states = base.continue_from(
            prefix, torch.zeros(1, dtype=torch.long), torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
        )
        given = torch.tensor([[tiny.BOS, *ids] if position == "start" else ids])
        ours, theirs = base.logits(states.hidden_BTH), model(input_ids=given, attention_mask=torch.ones_like(given)).logits
    torch.testing.assert_close(ours, theirs[:, -len(ids) :], rtol=1e-3, atol=1e-4)


def test_only_its_own_numbers_move_and_all_of_them_do(bases, make_config, fresh):
    base = bases()
    config = make_config(PREFIX, "train.steps=3", fresh)
    *_, finished = train(config, base=base)
    after = load_prompt(config.train.out, base).soft
    start = deepened(base, base.embed_ids(base.tokenizer("Repeat the drink.", add_special_tokens=False)["input_ids"]), "start", tiny.BOS)
    assert ((after.learned_like(start) - start.learned_PD).abs() > 1e-6).float().mean() > 0.99
    assert finished.result["findings"] == []


@pytest.mark.parametrize("stop_after", [1, 4])
def test_it_resumes_to_the_same_bits_beside_plain_rows(make_config, tmp_path, stop_after):
    bank = 'prompt.bank=[{name = "deep", prompt = {method = "prefix"}}, {name = "rows"}]'
    settings = (bank, "train.steps=6", "train.save_every=2")
    list(train(make_config(*settings, f"train.out={tmp_path / 'straight'}")))
    config = make_config(*settings)
    tiny.stop_after(config, stop_after)
    list(train(RunFolder.reopen(Path(config.train.out)).config(), resume=True))
    for name in ("deep", "rows"):
        one, other = (rows_of_member(run, name) for run in (Path(config.train.out), tmp_path / "straight"))
        assert torch.equal(one, other)


def rows_of_member(run, name):
    from safetensors.torch import load_file

    return load_file(run / "prompts" / name / "adapter_model.safetensors")["prompt_embeddings"]


def test_it_ends_beside_plain_rows_as_it_does_alone(make_config, tmp_path):
    bank = 'prompt.bank=[{name = "deep", prompt = {method = "prefix"}}, {name = "rows", prompt = {length = 5}}]'
    together = make_config(bank, "train.steps=4")
    list(train(together))
    alone = make_config(PREFIX, "train.steps=4", f"train.out={tmp_path / 'alone'}")
    list(train(alone))
    torch.testing.assert_close(rows_of_member(Path(together.train.out), "deep"), rows_of(tmp_path / "alone"), rtol=5e-3, atol=1e-4)


def test_answers_are_the_same_alone_and_beside_plain_rows(bases, make_config, tmp_path):
    base = bases()
    prompts = []
    for name, how in (("deep", [PREFIX, "prompt.length=9"]), ("rows", [])):
        config = make_config(*how, "train.steps=2", f"train.out={tmp_path / name}")
        list(train(config))
        prompts.append(load_prompt(config.train.out, base))
    texts = ["bring tea", "please bring 咖啡 now"]
    greedy = Sampling(max_new_tokens=10)
    mixed = generate(base, [*prompts, *prompts], [texts[0], texts[0], texts[1], texts[1]], greedy)
    assert mixed == [generate(base, prompt, [text], greedy)[0] for text in texts for prompt in prompts]


def test_the_card_says_what_it_is(make_config):
    config = make_config(PREFIX, "train.steps=1")
    list(train(config))
    card = read_card(config.train.out)
    assert (card.method, card.position, card.shapes) == ("prefix", "start", ((2, 8),) * 4)
    assert "as keys and values of every layer" in card.init


def test_the_plan_counts_its_numbers(make_config):
    assert make_plan(make_config(PREFIX, "prompt.length=7")).num_trainable == 7 * 4 * 2 * 8


def test_a_deep_prompt_is_no_start_for_another(make_config, tmp_path):
    deep = tmp_path / "deep"
    list(train(make_config(PREFIX, "train.steps=1", f"train.out={deep}")))
    with pytest.raises(ArtifactError, match="no rows for another prompt"):
        list(train(make_config(PREFIX, f"prompt.file={deep}")))


def test_a_recurrent_base_has_no_keys_and_values(bases, make_config):
    with pytest.raises(ModelError, match="keep keys and values and nothing else"):
        list(train(make_config(PREFIX, f"model.name={bases('falcon_mamba').name}")))


def test_a_base_of_other_shapes_is_refused(bases, make_config, tmp_path):
    config = make_config(PREFIX, "train.steps=1")
    list(train(config))
    other = tiny.tiny_base(tmp_path / "other", "llama", num_key_value_heads=4)
    with pytest.raises(ArtifactError, match="keys and values of other shapes"):
        load_prompt(config.train.out, other, allow_other_base=True)
