"""Labels, collators and averages in transformers' Trainer with PEFT prompt tuning, as docs/labels.md describes them.

The rows are those of the bloom-1b4-zh tutorial: `Human: ...\\n\\nAssistant: ` masked with -100, the answer and EOS not.
The tests of the libraries pin what they do today; when one fails after an upgrade, the page needs a new look.
"""

import gc
import logging
from collections.abc import Iterator

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from test_invariants import loss_and_gradient, some_prompt
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from softprompt.data import Example, Message
from softprompt.encode import make_encoder
from softprompt.engine.batch import batches, collate
from softprompt.errors import DataError

PAIRS = (
    ("bring tea", "tea"),
    ("please bring coffee", "coffee"),
    ("水", "水 please"),
    ("a", "a longer answer"),
    ("ab", "x"),
    ("abc", "yy"),
    ("bring me milk", "milk"),
    ("juice!", "o"),
)
NO_TENSOR = "Unable to create tensor"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, since threads only wait for each other here; and the Trainer's gc.collect() passes the imported modules over."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(num_threads)


def tokenizer_for(side: str = "right", *, pad_is_eos: bool = False):
    tokenizer = tiny.tiny_tokenizer(adds_bos=False)
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.eos_token if pad_is_eos else tokenizer.pad_token
    return tokenizer


def tutorial_rows(tokenizer, name: str = "labels") -> list[dict[str, list[int]]]:
    """The tutorial's rows, with the labels in a column called `name`."""
    rows = []
    for question, answer in PAIRS:
        asked = tokenizer(f"Human: {question}\n\nAssistant: ")["input_ids"]
        answered = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids = asked + answered
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), name: [-100] * len(asked) + answered})
    return rows


def without_labels(rows) -> list[dict[str, list[int]]]:
    return [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]


def tiny_model(family: str, *, tuned: bool):
    """A random model without dropout, bare or behind PEFT prompt tuning; the same weights at every call."""
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**tiny.FAMILIES[family], **no_dropout))
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)) if tuned else model


def weight_of(model):
    """What is looked at: the soft prompt, or the bare model's embedding."""
    return model.prompt_encoder["default"].embedding.weight if isinstance(model, peft.PeftModel) else model.get_input_embeddings().weight


def trainer_for(folder, model, rows, collator, *, micro: int = 8, **settings) -> Trainer:
    """One step of plain SGD with learning rate 1 over all rows: the weight moves by its gradient."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=micro, gradient_accumulation_steps=len(rows) // micro, max_steps=1,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, disable_tqdm=True,
        report_to="none", save_strategy="no", logging_strategy="no", per_device_eval_batch_size=micro, **settings,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


def trained(folder, model, rows, collator, *, micro: int = 8, **settings) -> tuple[float, torch.Tensor]:
    """(reported loss, gradient) of that step."""
    before = weight_of(model).detach().clone()
    loss = trainer_for(folder, model, rows, collator, micro=micro, **settings).train().training_loss
    return loss, before - weight_of(model).detach()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ---- 1. the collator that makes its own labels ---------------------------------------------------------------------


def test_language_modeling_collator_supervises_the_question_again():
    tokenizer = tokenizer_for()
    rows = tutorial_rows(tokenizer)
    alone = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows[:1])
    assert alone["labels"][0].tolist() == rows[0]["input_ids"] != rows[0]["labels"]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(without_labels(rows))
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())


def test_language_modeling_collator_masks_eos_when_pad_is_eos():
    for pad_is_eos in (False, True):
        tokenizer = tokenizer_for(pad_is_eos=pad_is_eos)
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(without_labels(tutorial_rows(tokenizer)))
        last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
        assert (batch["input_ids"].gather(1, last) == tokenizer.eos_token_id).all()
        assert (batch["labels"].gather(1, last) == (-100 if pad_is_eos else tokenizer.eos_token_id)).all()


# ---- 2. a labels column in a batch ---------------------------------------------------------------------------------


def test_language_modeling_collator_cannot_stack_a_labels_column():
    tokenizer = tokenizer_for()
    rows = tutorial_rows(tokenizer)
    padded = tokenizer.pad(rows[:2], return_tensors=None)
    assert len({len(ids) for ids in padded["input_ids"]}) == 1
    assert [len(labels) for labels in padded["labels"]] == [len(row["labels"]) for row in rows[:2]]
    with pytest.raises(ValueError, match=NO_TENSOR):
        DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows[:2])


def test_a_batch_of_one_or_of_equal_lengths_hides_it(tmp_path):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert (collator([rows[0], rows[0]])["labels"] != -100).all()
    _, gradient = trained(tmp_path, tiny_model("bloom", tuned=True), rows, collator, micro=1)
    _, of_whole_texts = trained(tmp_path, tiny_model("bloom", tuned=True), without_labels(rows), collator, micro=1)
    _, of_answers = trained(tmp_path, tiny_model("bloom", tuned=True), rows, DataCollatorForSeq2Seq(tokenizer), micro=1)
    assert torch.equal(gradient, of_whole_texts)
    assert apart(gradient, of_answers) > 0.1


# ---- 3. renaming the column ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "label_ids", "my_labels"])
def test_a_renamed_column_cannot_be_stacked_either(name):
    tokenizer = tokenizer_for()
    with pytest.raises(ValueError, match=NO_TENSOR):
        DataCollatorForLanguageModeling(tokenizer, mlm=False)(tutorial_rows(tokenizer, name)[:2])


@pytest.mark.parametrize("tuned", [False, True])
def test_the_trainer_drops_a_renamed_column_and_supervises_the_question(tmp_path, caplog, monkeypatch, tuned):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer, "my_labels"), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    logger = logging.getLogger("transformers.trainer")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with caplog.at_level(logging.INFO, logger=logger.name):
        _, gradient = trained(tmp_path, tiny_model("bloom", tuned=tuned), rows, collator)
    named = f"`{'PeftModelForCausalLM' if tuned else 'BloomForCausalLM'}.forward`"
    told = {(record.levelname, named in record.message) for record in caplog.records if "my_labels" in record.message}
    assert told == {("INFO", True)}
    _, of_whole_texts = trained(tmp_path, tiny_model("bloom", tuned=tuned), without_labels(rows), collator)
    assert torch.equal(gradient, of_whole_texts)
    with pytest.raises(ValueError, match=NO_TENSOR):
        trained(tmp_path, tiny_model("bloom", tuned=tuned), rows, collator, remove_unused_columns=False)


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_the_trainer_keeps_the_names_label_and_label_ids(tmp_path, name):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer, name), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(ValueError, match=NO_TENSOR):
        trained(tmp_path, tiny_model("bloom", tuned=True), rows, collator)
    _, gradient = trained(tmp_path, tiny_model("bloom", tuned=True), rows, collator, micro=1)
    _, of_whole_texts = trained(tmp_path, tiny_model("bloom", tuned=True), without_labels(rows), collator, micro=1)
    assert torch.equal(gradient, of_whole_texts)


def test_the_columns_of_a_peft_model_are_those_of_its_base(tmp_path):
    rows = [{**row, "task_ids": 0} for row in tutorial_rows(tokenizer_for(), "my_labels")]
    trainer = trainer_for(tmp_path, tiny_model("bloom", tuned=True), rows, None)
    assert trainer._remove_unused_columns(trainer.train_dataset).column_names == ["input_ids", "attention_mask"]


def test_seq2seq_collator_knows_label_and_labels_only(tmp_path):
    tokenizer = tokenizer_for()
    collator = DataCollatorForSeq2Seq(tokenizer)
    assert torch.equal(collator(tutorial_rows(tokenizer, "label"))["labels"], collator(tutorial_rows(tokenizer))["labels"])
    for name, message in (("my_labels", "did not return a loss"), ("label_ids", NO_TENSOR)):
        with pytest.raises(ValueError, match=message):
            trained(tmp_path, tiny_model("bloom", tuned=True), tutorial_rows(tokenizer, name), collator)


# ---- 4. the collator that keeps labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("side", ["right", "left"])
def test_seq2seq_collator_keeps_labels_and_pads_them_on_the_tokenizers_side(side, multiple):
    tokenizer = tokenizer_for(side, pad_is_eos=True)
    rows = tutorial_rows(tokenizer)
    batch = DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=multiple)(rows)
    width = max(len(row["input_ids"]) for row in rows)
    width = width if multiple is None else -(-width // multiple) * multiple
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (len(rows), width)
    for labels, row in zip(batch["labels"].tolist(), rows, strict=True):
        padding = [-100] * (width - len(row["labels"]))
        assert labels == (row["labels"] + padding if side == "right" else padding + row["labels"])
        assert labels.count(tokenizer.eos_token_id) == 1


def test_seq2seq_collator_does_not_compare_labels_with_ids():
    for side in ("right", "left"):
        tokenizer = tokenizer_for(side)
        long, short = tutorial_rows(tokenizer)[1::-1]
        cut = {**short, "input_ids": short["input_ids"][:-3], "attention_mask": short["attention_mask"][:-3]}
        batch = DataCollatorForSeq2Seq(tokenizer)([long, cut])
        supervised = batch["labels"][1] != -100
        wrong = batch["labels"][1][supervised] != batch["input_ids"][1][supervised]
        assert batch["input_ids"].shape == batch["labels"].shape
        assert wrong.any()


@pytest.mark.parametrize(("family", "shifts"), [("llama", True), ("gpt2", True), ("bloom", False)])
def test_left_padding_moves_the_soft_prompt_away_from_the_text(family, shifts):
    model = tiny_model(family, tuned=True).eval()
    with torch.no_grad():
        for side in ("right", "left"):
            tokenizer = tokenizer_for(side)
            rows = tutorial_rows(tokenizer)
            batch = DataCollatorForSeq2Seq(tokenizer)(rows)
            logits = model(**batch).logits[:, 5:]
            for index, row in enumerate(rows):
                alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 5:]
                padded = logits[index][batch["attention_mask"][index].bool()]
                moved = side == "left" and shifts and len(alone) < logits.shape[1]
                assert (apart(padded, alone) > 0.05) if moved else (apart(padded, alone) < 1e-4)
        position_ids = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        with pytest.warns(UserWarning, match="Position ids are not supported"):
            assert torch.equal(model(**batch, position_ids=position_ids).logits[:, 5:], logits)


# ---- 5. what is averaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_one_by_eight_equals_eight_by_one_when_padded_on_the_right(tmp_path, family, tuned):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    loss, gradient = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=8)
    for micro in (1, 2):
        cut_loss, cut_gradient = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=micro)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert apart(cut_gradient, gradient) < 1e-4


@pytest.mark.parametrize(
    ("family", "tuned", "equal"),
    [
        ("llama", False, True),
        ("gpt2", False, False),
        ("bloom", False, True),
        ("llama", True, False),
        ("gpt2", True, False),
        ("bloom", True, True),
    ],
)
def test_one_by_eight_and_eight_by_one_when_padded_on_the_left(tmp_path, family, tuned, equal):
    tokenizer = tokenizer_for("left")
    rows, collator = tutorial_rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    whole = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=8)[1]
    cut = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=1)[1]
    assert (apart(cut, whole) < 1e-4) if equal else (apart(cut, whole) > 0.05)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_whole_texts_padded_on_the_left_score_the_first_token_after_a_pad(tmp_path, family, tuned):
    tokenizer = tokenizer_for("left")
    rows, collator = without_labels(tutorial_rows(tokenizer)), DataCollatorForLanguageModeling(tokenizer, mlm=False)
    num_alone = sum(int((collator([row])["labels"][:, 1:] != -100).sum()) for row in rows)
    num_padded = sum(len(row["input_ids"]) < max(len(row["input_ids"]) for row in rows) for row in rows)
    assert int((collator(rows)["labels"][:, 1:] != -100).sum()) == num_alone + num_padded > num_alone
    whole = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=8)[1]
    cut = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=1)[1]
    assert apart(cut, whole) > 0.01


@pytest.mark.parametrize("tuned", [False, True])
def test_a_loop_that_averages_averages_computes_another_gradient(tuned):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    whole, cut = tiny_model("bloom", tuned=tuned), tiny_model("bloom", tuned=tuned)
    whole(**collator(rows)).loss.backward()
    for row in rows:
        (cut(**collator([row])).loss / len(rows)).backward()
    assert apart(weight_of(cut).grad, weight_of(whole).grad) > 0.05


@pytest.mark.parametrize("micro", [8, 1])
@pytest.mark.parametrize(
    ("family", "tuned", "num_scored", "num_counted"),
    # per row of n labels: what the model scores, what the Trainer counts, as differences from n
    [("llama", False, -1, -1), ("llama", True, 0, -1), ("bloom", True, 0, -1), ("gpt2", False, -1, 0), ("gpt2", True, 0, 0)],
)
def test_the_trainer_counts_one_label_per_row_amiss_when_the_first_is_real(tmp_path, family, tuned, num_scored, num_counted, micro):
    tokenizer = tokenizer_for()
    rows = without_labels(tutorial_rows(tokenizer))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with torch.no_grad():
        mean = tiny_model(family, tuned=tuned)(**collator(rows)).loss.item()
    reported, _ = trained(tmp_path, tiny_model(family, tuned=tuned), rows, collator, micro=micro)
    num_labels = sum(len(row["input_ids"]) for row in rows)
    scale = (num_labels + num_scored * len(rows)) / (num_labels + num_counted * len(rows))
    assert reported == pytest.approx(mean * scale, rel=1e-5)


def test_the_eval_loss_depends_on_the_batch_size(tmp_path):
    tokenizer = tokenizer_for()
    rows, collator = tutorial_rows(tokenizer), DataCollatorForSeq2Seq(tokenizer)
    model = tiny_model("bloom", tuned=True)
    losses = {micro: trainer_for(tmp_path, model, rows, collator, micro=micro).evaluate()["eval_loss"] for micro in (8, 1)}
    with torch.no_grad():
        by_row = [model(**collator([row])).loss.item() for row in rows]
        by_token = model(**collator(rows)).loss.item()
    assert losses[8] == pytest.approx(by_token, rel=1e-5)
    assert losses[1] == pytest.approx(sum(by_row) / len(rows), rel=1e-5)
    assert abs(losses[8] - losses[1]) > 1e-3


# ---- softprompt on the same rows -----------------------------------------------------------------------------------


def example_of(question: str, answer: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), "row")


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_softprompt_keeps_the_labels_of_any_mix_of_lengths(pad_is_eos):
    tokenizer = tokenizer_for(pad_is_eos=pad_is_eos)
    encoder = make_encoder(tokenizer, "human-assistant")
    encoded = [encoder.encode(example_of(*pair)) for pair in PAIRS]
    rows = tutorial_rows(tokenizer)
    assert [list(row.ids) for row in encoded] == [row["input_ids"] for row in rows]
    for numbers in ([0], [1, 2], list(range(len(rows))), [7, 3, 5]):
        batch = collate(encoded, numbers, [0] * len(numbers), torch.device("cpu"))
        wanted = [[token for token in rows[number]["labels"] if token != -100] for number in numbers]
        assert batch.targets_N.tolist() == [token for answer in wanted for token in answer]
        assert batch.row_N.tolist() == [index for index, answer in enumerate(wanted) for _ in answer]
        assert (batch.targets_N == tokenizer.eos_token_id).sum() == len(numbers)
        places = zip(batch.row_N.tolist(), (batch.scored_N % batch.ids_BT.shape[1]).tolist(), strict=True)
        assert [encoded[numbers[row]].ids[column + 1] for row, column in places] == batch.targets_N.tolist()
    with pytest.raises(DataError, match="the question is empty"):
        make_encoder(tokenizer, "{{ prompt }}").encode(Example(example_of("", "tea").messages, "row", fields={"prompt": ""}))


def test_softprompt_gives_one_gradient_for_every_cut(bases):
    base = bases("llama", adds_bos=False)
    encoder = make_encoder(base.tokenizer, "human-assistant")
    encoded = [encoder.encode(example_of(*pair)) for pair in PAIRS]
    soft = some_prompt(base)
    loss, gradient = loss_and_gradient(base, soft, encoded, 10_000)
    for budget, num_batches in ((1, 8), (100, 4)):
        assert len(list(batches(encoded, [0] * len(encoded), budget, base.device))) == num_batches
        cut_loss, cut_gradient = loss_and_gradient(base, soft, encoded, budget)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert apart(cut_gradient, gradient) < 1e-4
