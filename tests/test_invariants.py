"""What must always hold, on every supported family. PEFT and transformers' generate are the oracles."""

import hashlib
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import torch

from softprompt.artifact import load_prompt
from softprompt.engine.batch import batches, collate
from softprompt.engine.decode import Question, decode
from softprompt.engine.prompt import Prompt, SoftPrompt, deepened, prefix_of, read_together
from softprompt.engine.step import StepSettings, step_gradients
from softprompt.engine.tokens import Encoded, shared_beginning
from softprompt.sampling import Sampling
from softprompt.training import train

FAMILIES = sorted(tiny.FAMILIES)
SHARING = FAMILIES + sorted(tiny.RECURRENT)
ALL = SHARING + sorted(tiny.WHOLE)
LENGTHS = (9, 5, 14, 3)
WIDE = {family: {"sliding_window": 64} for family, settings in tiny.FAMILIES.items() if "sliding_window" in settings}


def encoded_rows(seed: int = 0) -> list[Encoded]:
    """Rows of uneven lengths whose second half is supervised, and one with a gap in its supervision."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()
        supervised = [position > length // 2 for position in range(length)]
        supervised[1] = length == max(LENGTHS)
        rows.append(Encoded(tuple(ids), tuple(supervised)))
    assert any(row.num_supervised for row in rows)
    return rows


BEGINNING = (5, 9, 7, 11)


def rows_alike() -> list[Encoded]:
    """Eight rows that begin with the same tokens, which are read once."""
    rows = [replace(row, ids=BEGINNING + row.ids, supervised=(False,) * 4 + row.supervised) for row in encoded_rows() + encoded_rows(1)]
    assert shared_beginning(rows) == BEGINNING
    return rows


def some_prompt(base, length: int = 6, position: str = "start", seed: int = 1) -> SoftPrompt:
    noise = torch.randn(length, base.hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(base.row_mean_H + noise * base.row_std_H, position, tiny.BOS if position == "after_bos" else None)


def loss_and_gradient(base, soft: Prompt, rows, tokens_per_batch: int, **how) -> tuple[float, torch.Tensor]:
    """As a training step does it: one prefix, micro-batches on its leaf, one backward through the prompt."""
    learned_PD = soft.learned_PD.clone().requires_grad_()
    losses, _ = step_gradients(base, [soft.with_learned(learned_PD)], [rows], StepSettings(tokens_per_batch, **how))
    assert learned_PD.grad is not None
    return losses.item(), learned_PD.grad


def whole_batch(base, rows, which=None):
    """One micro-batch that reads all tokens of the rows; a row's last one is not read, so each gets one more."""
    longer = [replace(row, ids=(*row.ids, 0), supervised=(*row.supervised, False)) for row in rows]
    return collate(longer, range(len(rows)), which or [0] * len(rows), base.device)


def peft_model(base, soft: SoftPrompt):
    """The same rows in PEFT's own prompt tuning; for after_bos the BOS row is its first row."""
    text = base.model.config
    bos = base.embed_ids([] if soft.bos_id is None else [soft.bos_id])
    rows = torch.cat([bos, soft.rows_PH])
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(rows), token_dim=rows.shape[1], num_transformer_submodules=1,
        num_attention_heads=getattr(text, "num_attention_heads", 1), num_layers=text.num_hidden_layers,
    )  # fmt: skip
    model = peft.get_peft_model(base.model, config).eval()
    model.prompt_encoder["default"].embedding.weight.data = rows.clone()
    return model


@pytest.mark.parametrize("make_rows", [encoded_rows, rows_alike])
@pytest.mark.parametrize("position", ["start", "after_bos"])
@pytest.mark.parametrize("family", ALL)
def test_loss_and_gradient_equal_peft(bases, family, position, make_rows):
    base, rows = bases(family), make_rows()
    soft = some_prompt(base, position=position)
    loss, gradient = loss_and_gradient(base, soft, rows, tokens_per_batch=20)

    batch = whole_batch(base, rows)
    labels = torch.full_like(batch.ids_BT, -100)
    for index, row in enumerate(rows):
        labels[index, : len(row)] = torch.tensor([token if on else -100 for token, on in zip(row.ids, row.supervised, strict=True)])
    model = peft_model(base, soft)
    oracle = model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, labels=labels).loss
    oracle.backward()
    expected = model.prompt_encoder["default"].embedding.weight.grad[-soft.length :]
    assert loss == pytest.approx(oracle.item(), rel=1e-5)
    assert gradient.norm() > 1e-4
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-8)


@pytest.mark.parametrize("deep", [False, True])
def test_what_enough_rows_begin_with_is_read_once(bases, deep):
    base, rows = bases(), rows_alike()
    soft = some_prompt(base)
    prompts = [deepened(base, soft.rows_PH, soft.position, None) if deep else soft]
    prefix, rests = read_together(base, prompts, rows)
    assert prefix.lengths == (soft.length + len(BEGINNING),)
    assert [BEGINNING + rest.ids for rest in rests] == [row.ids for row in rows]
    prefix, _ = read_together(base, prompts * 2, rows * 2, room=6)
    assert prefix.lengths == (soft.length + 3,) * 2
    for own, prefixes in ((rows[1:], prompts), (rows, prompts * 2)):
        prefix, whole = read_together(base, prefixes, own)
        assert (prefix.lengths[0], whole) == (soft.length, own)


@pytest.mark.parametrize("family", SHARING)
def test_shared_prefix_equals_concatenation(bases, family):
    base, rows = bases(family), encoded_rows()
    assert base.shares_prefix
    soft = some_prompt(base)
    batch = whole_batch(base, rows)
    with torch.no_grad():
        shared = base.continue_from(soft.prefix(base), batch.which_B, batch.ids_BT, batch.mask_BT).hidden_BTH
        for index, row in enumerate(rows):
            joined = torch.cat([soft.rows_PH, base.embed_ids(row.ids)])
            alone = base.backbone(inputs_embeds=joined[None]).last_hidden_state[0, soft.length :]
            torch.testing.assert_close(shared[index, : len(row)], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", sorted(tiny.WHOLE))
def test_what_keeps_its_own_states_is_read_whole(bases, family):
    assert not bases(family).shares_prefix


@pytest.mark.parametrize("family", ALL)
def test_any_cut_into_micro_batches_gives_the_same_gradient(bases, family):
    base, rows = bases(family), encoded_rows()
    soft = some_prompt(base, position="after_bos")
    whole = loss_and_gradient(base, soft, rows, tokens_per_batch=1000)
    for budget in (1, 15, 28):
        assert len(list(batches(rows, [0] * len(rows), budget, base.device))) > 1
        loss, gradient = loss_and_gradient(base, soft, rows, budget)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(gradient, whole[1], rtol=1e-3, atol=1e-4 * whole[1].abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_equals_right_padded_equals_alone(bases, family):
    # A window that both ends of a padded row fit into: index distance is what sliding windows measure.
    base, rows = bases(family, **WIDE.get(family, {})), encoded_rows()
    prefix = some_prompt(base).prefix(base)
    width = max(LENGTHS)
    with torch.no_grad():
        for row in rows:
            outcomes = []
            for before, after in ((0, 0), (0, width - len(row)), (width - len(row), 0)):
                ids = torch.tensor([[0] * before + list(row.ids) + [0] * after])
                mask = torch.tensor([[0] * before + [1] * len(row) + [0] * after])
                hidden = base.continue_from(prefix, torch.tensor([0]), ids, mask).hidden_BTH
                outcomes.append(base.logits(hidden[0, before : before + len(row)]))
            torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(outcomes[2], outcomes[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_a_mixed_batch_of_prompts_equals_one_by_one(bases, family):
    base, rows = bases(family), encoded_rows()
    prompts = [some_prompt(base, 6), some_prompt(base, 3, "after_bos", seed=2), some_prompt(base, 11, seed=3)]
    with torch.no_grad():
        which = [2, 0, 1, 0]
        batch = whole_batch(base, rows, which)
        mixed = base.continue_from(prefix_of(base, [(one, ()) for one in prompts]), batch.which_B, batch.ids_BT, batch.mask_BT).hidden_BTH
        for index, row in enumerate(rows):
            alone = whole_batch(base, [row])
            prefix = prompts[which[index]].prefix(base)
            hidden = base.continue_from(prefix, alone.which_B, alone.ids_BT, alone.mask_BT).hidden_BTH[0]
            torch.testing.assert_close(mixed[index, : len(row)], hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in ALL if family not in ("falcon_h1", "nemotron_h")])  # which take ids alone there
def test_greedy_generation_equals_transformers(bases, family):
    base, rows = bases(family), encoded_rows()
    prompts = [some_prompt(base, 5), some_prompt(base, 9, "after_bos", seed=2)]
    which = [0, 1, 1, 0]
    questions = [Question(((prompts[number], ()),), (row.ids,), Sampling(20)) for number, row in zip(which, rows, strict=True)]
    said: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    for token in decode(base, questions):
        assert not ended[token.row]
        ended[token.row] = token.last
        if token.id is not None:
            said[token.row].append(token.id)
    assert all(ended)
    for index, row in enumerate(rows):
        embeds = torch.cat([prompts[which[index]].embeds(base), base.embed_ids(row.ids)])[None]
        expected = base.model.generate(
            inputs_embeds=embeds, max_new_tokens=20, do_sample=False, eos_token_id=tiny.EOS, pad_token_id=tiny.PAD
        )
        assert said[index] == [token for token in expected[0].tolist() if token != tiny.EOS]
    assert len({tuple(tokens) for tokens in said}) > 1, "all rows say the same: nothing was compared"


@pytest.mark.parametrize("family", ALL)
def test_training_moves_the_prompt_and_nothing_else(bases, make_config, family):
    # A row further away than the layers' windows reach moves nowhere, rightly: give the windows room.
    base = bases(family, **WIDE.get(family, {}))

    def weights() -> str:
        digest = hashlib.sha256()
        for _, tensor in sorted(base.model.state_dict().items()):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    before = weights()
    config = make_config(f"model.name={base.name}", "train.steps=3", "prompt.position=start")
    events = list(train(config, base=base))
    prompt = load_prompt(Path(config.train.out) / "prompt", base)
    start = base.embed_ids(base.tokenizer("Repeat the drink.", add_special_tokens=False)["input_ids"])
    assert weights() == before
    assert (prompt.soft.rows_PH - start).abs().amax(dim=1).min() > 1e-3, "every row moves"
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert events[-1].result["eval_loss_after"] < events[-1].result["eval_loss_before"]


@pytest.mark.parametrize("position", ["start", "after_bos"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_the_artifact_with_the_same_logits(bases, make_config, family, position):
    base = bases(family)
    config = make_config(f"model.name={base.name}", "train.steps=2", f"prompt.position={position}")
    list(train(config, base=base))
    folder = Path(config.train.out) / "prompt"
    prompt = load_prompt(folder, base)
    ids = torch.tensor([prompt.encoder.question("bring tea")])
    with torch.no_grad():
        ours = base.logits(base.continue_from(prompt.soft.prefix(base), torch.tensor([0]), ids, torch.ones_like(ids)).hidden_BTH)
        theirs = peft.PeftModel.from_pretrained(base.model, folder).eval()
        bos = torch.tensor([[tiny.BOS]]) if position == "start" else torch.zeros(1, 0, dtype=torch.long)
        logits = theirs(input_ids=torch.cat([bos, ids], dim=1)).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert theirs.prompt_encoder["default"].embedding.weight.shape[0] == prompt.soft.length + (position == "after_bos")


def test_dropout_is_off(bases):
    base = bases("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    rows, soft = encoded_rows(), some_prompt(base)
    assert loss_and_gradient(base, soft, rows, 100)[0] == loss_and_gradient(base, soft, rows, 100)[0]


def test_the_prompt_is_float32_on_a_half_precision_base(tmp_path, make_config):
    from softprompt.config import ModelConfig
    from softprompt.engine.loading import load_base

    folder = tiny.tiny_folder(tmp_path / "base")
    base = load_base(ModelConfig(name=str(folder), dtype="bfloat16", device="cpu"))
    assert base.dtype == torch.bfloat16
    config = make_config(f"model.name={folder}", "model.dtype=bfloat16", "train.steps=2", "optim.lr=1e-6")
    list(train(config, base=base))
    rows = load_prompt(Path(config.train.out) / "prompt", base).soft.rows_PH
    start = base.embed_ids(base.tokenizer("Repeat the drink.", add_special_tokens=False)["input_ids"])
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, start), "updates of 1e-6 are lost below float32"


def test_one_fingerprint_in_any_precision(tmp_path):
    from softprompt.config import ModelConfig
    from softprompt.engine.loading import load_base

    folder = tiny.tiny_folder(tmp_path / "base")
    full, half = (load_base(ModelConfig(name=str(folder), dtype=dtype, device="cpu")) for dtype in ("float32", "bfloat16"))
    other = tiny.tiny_base(tmp_path / "other", seed=1)
    assert full.fingerprint == half.fingerprint != other.fingerprint
