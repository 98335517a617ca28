"""An evaluation: contestants on the same rows, scores with intervals, verdicts; against outside oracles and planted differences."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import tiny
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import softprompt
from softprompt import cli, contestants
from softprompt.answers import answer, first_answer, stops_of
from softprompt.artifact import load_prompt
from softprompt.config import ModelConfig
from softprompt.contestants import Contestant, all_contestants, choose_shots, read_rows
from softprompt.data import Example, Message, load_examples
from softprompt.encode import make_encoder
from softprompt.engine import likelihood
from softprompt.engine.decode import Question, decode_whole
from softprompt.engine.likelihood import candidate_losses, ensemble_losses, row_losses
from softprompt.engine.loading import load_base
from softprompt.engine.model import freeze
from softprompt.engine.prompt import no_prompt, read_together
from softprompt.errors import ArtifactError, ConfigError, DataError
from softprompt.evaluation import Contest, evaluate, evaluating
from softprompt.metrics import METRICS, Table, bootstrap_weights, confusion, estimate, verdict
from softprompt.rows import encode_rows
from softprompt.sampling import Sampling
from softprompt.training import train

FAMILIES = [family for family in tiny.FAMILIES if family != "mistral"]  # whose window of 12 reads nothing of long texts


@pytest.fixture
def stored(make_config, bases, tmp_path):
    list(train(make_config("train.steps=8")))
    return load_prompt(tmp_path / "run", bases())


@pytest.fixture
def held(tmp_path):
    return load_examples(str(tiny.write_rows(tmp_path / "held.jsonl", tiny.some_rows(25))))


def labelled(tmp_path, number=40):
    rows = [
        {"text": f"{'very ' * (n % 3)}{('nice', 'awful', 'so so')[n % 3]} {n}", "label": ("good", "bad", "goodish")[n % 3]}
        for n in range(number)
    ]
    return load_examples(str(tiny.write_rows(tmp_path / "labelled.jsonl", rows)))


# ---- likelihood ----------------------------------------------------------------------------------------------------


def loss_of(base, row):
    """By transformers' own forward and loss."""
    labels = torch.tensor([[-100] + [token if on else -100 for token, on in zip(row.ids, row.supervised, strict=True)]])
    with torch.no_grad():
        return base.model(input_ids=torch.tensor([[tiny.BOS, *row.ids]]), labels=labels).loss.item() * row.num_supervised


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.RECURRENT, *tiny.WHOLE])
def test_candidates_of_one_reading_score_as_whole_rows(bases, tmp_path, monkeypatch, family):
    """Labels that begin alike, one twice, one cut, rows of uneven lengths, one with an answer in its question; several groups."""
    monkeypatch.setattr(likelihood, "GROUP", 80)
    base = bases(family)
    encoder = make_encoder(base.tokenizer, "human-assistant")
    examples = labelled(tmp_path, 8).examples
    earlier = (Message("user", "nice"), Message("assistant", "good"))
    examples = (*examples, replace(examples[0], messages=(*earlier, *examples[0].messages)))
    words = ("good", "goodish", "bad", "b", "good")
    candidates = [[encoder.encode(one.answered(word)) for word in words] for one in examples]
    candidates[1][2] = encoder.encode(examples[1].answered("bad"), len(candidates[1][2]) - 1)
    alone = torch.tensor([[loss_of(base, row) for row in own] for own in candidates], dtype=torch.float64)
    together = candidate_losses(base, no_prompt(base, tiny.BOS).prefix(base), candidates, 64)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_candidates_read_their_text_once_and_take_what_they_share_to_the_head_once(bases, tmp_path, monkeypatch):
    base = bases()
    encoder = make_encoder(base.tokenizer, "human-assistant")
    examples = labelled(tmp_path, 6).examples
    candidates = [[encoder.encode(one.answered(word)) for word in ("xy", "z", "xy")] for one in examples]
    read, states = [], []
    whole, after = type(base).continue_from, type(base.head).losses_after
    monkeypatch.setattr(
        type(base), "continue_from", lambda self, *how, **more: read.append(how[3].sum().item()) or whole(self, *how, **more)
    )
    monkeypatch.setattr(type(base.head), "losses_after", lambda self, *how: states.append(how[0].shape[1]) or after(self, *how))
    candidate_losses(base, no_prompt(base, tiny.BOS).prefix(base), candidates, 10_000)
    assert sum(read) == sum(len(own[0].question) for own in candidates) + 6 * len("xyz")
    assert states == [6 * (1 + len("xyz"))], "the first letters come after one state; then y, and an end for each"


def test_an_ensemble_has_the_loss_of_what_its_members_agree_on(bases, stored, held):
    """The mean of their log-probabilities, renormalised; by transformers' own forward."""
    base = bases()
    other = replace(stored, soft=replace(stored.soft, rows_PH=base.drawn_rows(5, seed=3)))
    both = evaluate(base, [("one", stored), ("other", other)], held, Contest(ensemble=True))
    row = encode_rows(stored.encoder, held, 200).encoded[3]
    logs = []
    for prompt in (stored, other):
        embeds = torch.cat([prompt.soft.embeds(base), base.embed_ids(row.ids)])
        with torch.no_grad():
            logs.append(base.model(inputs_embeds=embeds[None]).logits[0, -len(row) - 1 : -1].log_softmax(dim=-1))
    agreed = torch.stack(logs).mean(dim=0).log_softmax(dim=-1)
    losses = [-agreed[index, token].item() for index, token in enumerate(row.ids) if row.supervised[index]]
    table = both.contestants["ensemble"].table
    assert table.losses[3] == pytest.approx(sum(losses), rel=1e-4)
    assert table.losses[3] != pytest.approx(
        (both.contestants["one"].table.losses[3] + both.contestants["other"].table.losses[3]) / 2, rel=1e-3
    )
    said = [[[stored.encoder.encode(held.examples[0].answered(word))]] for word in "ab"]
    members = [(stored.soft.prefix(base), rows) for rows in said]
    with pytest.raises(ConfigError, match="they must have the same template"):
        ensemble_losses(base, members, 64)


# ---- contestants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["human-assistant", "chat", "Q: {{ text }}\nA: "])
def test_shared_text_scores_as_if_every_row_held_it(bases, tmp_path, template):
    base = bases(chat=True)
    encoder = make_encoder(base.tokenizer, template)
    loaded = labelled(tmp_path, 12)
    rows = encode_rows(encoder, loaded, 400)
    shots = loaded.examples[:2]

    class Stored:
        soft = no_prompt(base, encoder.bos_id)

    Stored.encoder = encoder
    for contestant in (Contestant("text", (Stored,), wish="Judge."), Contestant("few-shot", (Stored,), shots=shots)):
        reading = read_rows(contestant, 0, [[one] for one in rows.examples], [[row] for row in rows.encoded])
        full = [contestant.full(encoder, one, row) for one, row in zip(rows.examples, rows.encoded, strict=True)]
        assert [row.num_supervised for row in full] == [row.num_supervised for row in rows.encoded]
        assert reading.tokens == pytest.approx(sum(map(len, full)) / 12 - sum(map(len, rows.encoded)) / 12)
        with torch.no_grad():
            whole = row_losses(base, Stored.soft.prefix(base), full, 10_000)
            prefix, rests = read_together(base, [reading.soft], [own[0] for own in reading.rows])
            assert prefix.lengths[0] > 5
            shared = row_losses(base, prefix, rests, 10_000)
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4)


def test_examples_fit_take_the_labels_in_turn_and_leave_out_held_rows(bases, tmp_path):
    encoder = make_encoder(bases().tokenizer, "human-assistant")
    examples = labelled(tmp_path).examples
    shots = choose_shots(encoder, examples, examples[:5], 300)
    assert sorted(one.label for one in shots[:3]) == ["bad", "good", "goodish"]
    assert not {one.source for one in shots} & {one.source for one in examples[:5]}
    assert sum(len(encoder.encode(one)) for one in shots) <= 300
    assert choose_shots(encoder, examples, (), 10) == ()


def test_examples_of_many_rows_are_taken_from_some_that_are_drawn(bases, monkeypatch):
    class Counted(list):
        asked = 0

        def __getitem__(self, number):
            Counted.asked += 1
            return super().__getitem__(number)

        def __iter__(self):
            raise AssertionError("all rows were asked for")

    monkeypatch.setattr(contestants, "POOL", 6)
    rows = Counted(Example((Message("user", str(n)), Message("assistant", "ab"[n >= 50])), f"r:{n}", "ab"[n >= 50]) for n in range(100))
    shots = choose_shots(make_encoder(bases().tokenizer, "human-assistant"), rows, (), 1000)
    assert Counted.asked == 6
    assert {one.label for one in shots} == {"a", "b"}


def lora(base, folder, size=0.5, **how):
    """A LoRA adapter of PEFT's on another copy of the base, all that it adds drawn anew; its folder, and the model with it."""
    torch.manual_seed(0)
    again = load_base(ModelConfig(name=base.name, device="cpu")).model
    model = peft.get_peft_model(again, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **{"target_modules": ["q_proj"], **how}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder, model


def test_a_lora_adapter_competes_and_leaves_the_base_as_it_was(bases, stored, held, tmp_path):
    base = bases()
    folder, model = lora(base, tmp_path / "lora")
    before = evaluate(base, stored, held)
    both = evaluate(base, stored, held, Contest(adapters=(folder,), answers=True, max_new_tokens=4))
    after = evaluate(base, stored, held)
    assert list(both.contestants) == ["base", "text", "prompt", "lora"]
    losses = [one.contestants["base"].scores["loss"].value for one in (before, both, after)]
    assert losses[0] == losses[1] == losses[2]
    oracle = loss_of(SimpleNamespace(model=model), encode_rows(stored.encoder, held, 200).encoded[3])
    assert both.contestants["lora"].table.losses[3] == pytest.approx(oracle, rel=1e-4)
    assert oracle != pytest.approx(before.contestants["base"].table.losses[3], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # what PEFT says of merging
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # with a head of its own, and one that is the embedding table
@pytest.mark.parametrize("how", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_adapter_that_trains_the_head_is_scored_with_its_head(bases, make_config, held, tmp_path, family, how):
    base = bases(family)
    list(train(make_config(f"model.name={base.name}", "train.steps=1"), base=base))
    stored = load_prompt(tmp_path / "run", base)
    folder, model = lora(base, tmp_path / "lora", **how)
    both = evaluate(base, stored, held, Contest(adapters=(folder,), answers=True, max_new_tokens=4))
    rows = encode_rows(stored.encoder, held, 200)
    oracle = loss_of(SimpleNamespace(model=model), rows.encoded[3])
    assert both.contestants["lora"].table.losses[3] == pytest.approx(oracle, rel=1e-4)
    assert oracle != pytest.approx(both.contestants["base"].table.losses[3], rel=1e-3)
    reading = read_rows(Contestant("lora", (stored,), adapter=folder), 0, [[rows.examples[3]]], [[rows.encoded[3]]])
    asked = torch.tensor([[tiny.BOS, *reading.questions[0]]])
    said = model.generate(input_ids=asked, max_new_tokens=4, do_sample=False, eos_token_id=sorted(base.stop_ids), pad_token_id=tiny.PAD)
    text = base.tokenizer.decode(said[0, asked.shape[1] :], skip_special_tokens=True)
    assert both.contestants["lora"].table.answers[3] == first_answer(text, stops_of([stored.encoder], rows.examples))[0]
    assert evaluate(base, stored, held).contestants["base"].table.losses[3] == both.contestants["base"].table.losses[3]
    assert freeze(base.model, base.tokenizer, "").fingerprint == base.fingerprint, "the base is as it was, to the last module"


def test_an_adapter_whose_logits_are_not_its_heads_is_refused(bases, stored, held, tmp_path, monkeypatch):
    folder, _ = lora(bases(), tmp_path / "lora", target_modules=["lm_head"])
    monkeypatch.setattr(contestants, "adapted_head", lambda base: base.head)
    with pytest.raises(ArtifactError, match=r"lora cannot be put on .*: its logits are more than"):
        evaluate(bases(), stored, held, Contest(adapters=(folder,)))


def glued_tokenizer():
    """One that, as most do, has the blank before a letter or a brace in one token with it."""
    tokenizer = json.loads(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    for letter in "ag{":
        tokenizer["model"]["vocab"][f"Ġ{letter}"] = len(tokenizer["model"]["vocab"])
        tokenizer["model"]["merges"].append(["Ġ", letter])
    whole = Tokenizer.from_str(json.dumps(tokenizer))
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("template", ["human-assistant", "Q: {{ text }}\nA: "])
def test_an_untrained_base_is_asked_with_text_as_text_is_tokenized(template):
    """Examples with their answers in one piece, no blank at the end; what is scored stands behind the same tokens for all."""
    encoder = make_encoder(glued_tokenizer(), template)
    *shots, row = (
        Example((Message("user", asked), Message("assistant", answer)), "", fields={"text": asked}) for asked, answer in ("ba", "yg", "za")
    )
    plain = encoder.encode(row)
    few, bare = Contestant("few-shot", (), shots=tuple(shots)), Contestant("base", ())
    asked, full = few.question(encoder, row, plain), few.full(encoder, row, plain)
    glued, blank = encoder.tokenizer.convert_tokens_to_ids(["Ġa", "Ġg"]), encoder.tokenizer.convert_tokens_to_ids("Ġ")
    assert [token for token in asked if token in glued] == glued
    assert not [token for token in (*plain.ids, *full.ids) if token in glued]
    assert (full.ids[-len(plain) :], full.num_supervised) == (plain.ids, plain.num_supervised)
    assert encoder.tokenizer.decode(full.question) == encoder.tokenizer.decode((*asked, blank))
    assert bare.question(encoder, row, plain) == plain.question[:-1]
    assert (plain.question[-1], asked[-1]) == (blank, plain.question[-2])


def test_what_was_trained_is_asked_as_it_was_trained(bases, stored, held):
    base = bases()
    rows = encode_rows(stored.encoder, held, 200)
    line = all_contestants(base, [("prompt", stored)], text="Say it.", shots=held.examples[-2:], adapters=(Path("lora"),))
    for one in line:
        reading = read_rows(one, 0, [[example] for example in rows.examples], [[row] for row in rows.encoded])
        for row, asked in zip(rows.encoded, reading.questions, strict=True):
            ending = row.question if one.name in ("prompt", "lora") else row.question[:-1]
            assert asked[-6:] == ending[-len(asked) :][-6:]
    alone = read_rows(line[1], 0, [rows.examples[:1]], [rows.encoded[:1]])
    assert len(alone.questions[0]) == 1, "with one row all of the text is shared, but for what predicts"


# ---- answers -------------------------------------------------------------------------------------------------------


def test_mixed_batches_answer_as_one_by_one(bases, stored, held):
    base = bases()
    line = all_contestants(base, [("prompt", stored)], text="Say it.", ensemble=False)
    rows = encode_rows(stored.encoder, held, 200)
    readings = {one.name: [read_rows(one, 0, [[example] for example in rows.examples], [[row] for row in rows.encoded])] for one in line}
    pairs = [(name, row) for name in readings for row in range(len(held.examples))]
    mixed = {(said.contestant, said.row): said for said in answer(base, readings, pairs, 6)}
    assert set(mixed) == set(pairs)
    for pair in pairs:
        (alone,) = answer(base, readings, [pair], 6)
        assert alone == mixed[pair]


def test_an_answer_ends_with_its_line_or_with_the_next_turn(bases, tmp_path):
    encoder = make_encoder(bases().tokenizer, "human-assistant")
    jinja = make_encoder(bases().tokenizer, "Q: {{ prompt }}\nA: ")
    strange = make_encoder(bases().tokenizer, "{{ prompt.no.such.field }}{{ 1 / 0 }}")
    lines, poems = (
        load_examples(str(tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": text}]))).examples
        for text in ("b\n", "b\nc")
    )
    assert stops_of([encoder, jinja, strange], lines) == ("\n", "\nHuman:", "\nQ:")
    assert stops_of([encoder, jinja], poems) == ("\nHuman:", "\nQ:")
    assert stops_of([encoder], [poems[0].answered("a\nHuman: says")]) == ()
    assert first_answer("\n b\nc\n\nHuman: d", ("\n",)) == ("b", True)
    assert first_answer(" b\nc\n\nHuman: d", ("\nHuman:",)) == ("b\nc", True)
    assert first_answer("\n\n", ("\n",)) == ("", False)


def test_answers_of_all_contestants_end_where_a_stop_text_does(bases, stored, held):
    """A letter that they say somewhere stands for the end of a line: what is before it is left, and nothing more is computed."""
    base = bases()
    rows = encode_rows(stored.encoder, held, 200)
    readings = {
        one.name: [read_rows(one, 0, [[example] for example in rows.examples], [[row] for row in rows.encoded])]
        for one in all_contestants(base, [("prompt", stored)])
    }
    pairs = [(name, row) for name in readings for row in range(len(rows.examples))]
    whole = {(said.contestant, said.row): said for said in answer(base, readings, pairs, 12)}
    for name in readings:
        later = "".join(said.text[1:] for pair, said in whole.items() if pair[0] == name)
        stop = next(letter for letter in later if letter.isascii() and letter.isprintable() and letter != " ")
        cut = {(one.contestant, one.row): one for one in answer(base, readings, pairs, 12, (stop,))}
        stopped = [pair for pair in pairs if stop in whole[pair].text]
        assert {pair[0] for pair in stopped} >= {name}
        for pair in stopped:
            assert cut[pair].text == first_answer(whole[pair].text, (stop,))[0]
            assert cut[pair].ended
            assert cut[pair].num_tokens <= whole[pair].num_tokens
        assert min(cut[pair].num_tokens for pair in stopped) < 12
        assert all(cut[pair] == whole[pair] for pair in pairs if pair not in stopped)


@pytest.mark.parametrize("family", ["llama", *tiny.WHOLE])
def test_decoding_ends_where_it_is_told(bases, family):
    base = bases(family)
    texts, six = [tuple(range(10, 10 + length)) for length in (2, 5, 3)], Sampling(max_new_tokens=6)

    def after_two():
        said = []
        return lambda token: said.append(token) or len(said) == 2

    starts = ((no_prompt(base, tiny.BOS), ()),)
    whole = {number: ids for number, ids, _ in decode_whole(base, [Question(starts, (text,), six) for text in texts])}
    some = {number: ids for number, ids, _ in decode_whole(base, [Question(starts, (text,), six, after_two()) for text in texts])}
    assert min(map(len, whole.values())) > 2
    assert some == {number: ids[:2] for number, ids in whole.items()}


def test_an_interrupted_evaluation_goes_on(bases, stored, held, tmp_path):
    def events():
        return evaluating(bases(), stored, held, Contest(answers=True, max_new_tokens=5), out=tmp_path / "out")

    broken = events()
    for event in broken:
        if getattr(event, "doing", "") == "answering" and event.done == 30:
            broken.close()
            break
    (file,) = tmp_path.glob("out/*/predictions.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 31
    file.write_text("\n".join(lines) + '\n{"contestant": "ba', encoding="utf-8")
    went_on = [event for event in events() if getattr(event, "doing", "") == "answering"]
    assert went_on[0].done == 30
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert len(rows) == len({(row["contestant"], row["row"]) for row in rows}) == 75
    whole = evaluate(bases(), stored, held, Contest(answers=True, max_new_tokens=5))
    resumed = json.loads((file.parent / "evaluation.json").read_text(encoding="utf-8"))
    assert resumed == {"format": 1, **json.loads(json.dumps(whole.as_dict()))}


def test_an_adapter_that_was_trained_again_is_asked_again(bases, stored, held, tmp_path):
    def answers(size):
        folder, _ = lora(bases(), tmp_path / "lora", size, target_modules=["q_proj", "up_proj"])
        contest = Contest(adapters=(folder,), answers=True, max_new_tokens=4)
        found = evaluate(bases(), stored, held, contest, out=tmp_path / "out")
        assert found.contestants["lora"].table.answers == evaluate(bases(), stored, held, contest).contestants["lora"].table.answers
        return found.folder, found.contestants["lora"].table.answers

    first, second, again = answers(0.1), answers(2.0), answers(0.1)
    assert first == again != second
    assert first[0] != second[0]


def test_another_precision_of_the_base_is_another_evaluation(bases, stored, held, tmp_path):
    half = load_base(ModelConfig(name=bases().name, device="cpu", dtype="bfloat16"))
    contest = Contest(answers=True, max_new_tokens=4)
    folders = [evaluate(base, stored, held, contest, out=tmp_path / "out").folder for base in (bases(), half, bases())]
    assert half.fingerprint == bases().fingerprint
    assert folders[0] == folders[2] != folders[1]


def test_another_file_in_the_place_of_the_predictions_is_refused(bases, stored, held, tmp_path):
    contest = Contest(answers=True, max_new_tokens=2)
    folder = evaluate(bases(), stored, held, contest, out=tmp_path / "out").folder
    (folder / "predictions.jsonl").write_text("mine\n", encoding="utf-8")
    with pytest.raises(Exception, match="is not of this evaluation"):
        evaluate(bases(), stored, held, contest, out=tmp_path / "out")
    assert (folder / "predictions.jsonl").read_text(encoding="utf-8") == "mine\n"


# ---- what fits -----------------------------------------------------------------------------------------------------


def test_rows_and_metrics_that_do_not_fit_are_one_sentence(bases, stored, held, tmp_path, make_config):
    for name, said in (
        ("accuracy", "accuracy needs rows with a text and a label"),
        ("blau", "no metric is called 'blau'"),
        ("no.such:f", "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=said):
            evaluate(bases(), stored, held, Contest(metrics=(name,)))
    file = tmp_path / "labelled.jsonl"
    labelled(tmp_path)
    list(train(make_config(f"data.train={file}", f"data.eval={file}", "train.steps=1", f"train.out={tmp_path / 'labels'}")))
    with pytest.raises(DataError, match="the rows have no labels, the prompt was trained on rows with a text and a label"):
        evaluate(bases(), load_prompt(tmp_path / "labels", bases()), held)


def test_a_metric_of_the_users_own(bases, stored, held):
    both = evaluate(bases(), stored, held, Contest(metrics=("operator:ne", "exact_match"), max_new_tokens=3))
    for result in both.contestants.values():
        assert result.scores["operator:ne"].value == pytest.approx(1 - result.scores["exact_match"].value)


# ---- scores --------------------------------------------------------------------------------------------------------


def of_labels(truth, chosen, sure=0.8, labels=("a", "b", "c")):
    losses = np.full((len(truth), len(labels)), -math.log((1 - sure) / (len(labels) - 1)))
    losses[np.arange(len(truth)), chosen] = -math.log(sure)
    return Table(("",) * len(truth), labels=labels, truth=np.array(truth), label_losses=losses)


def score(name, table):
    return METRICS[name].of(table)(np.ones(len(table.references)))


def test_scores_of_labels():
    table = of_labels([0, 0, 1, 1, 2], [0, 1, 1, 1, 0])
    assert score("accuracy", table) == pytest.approx(3 / 5)
    assert score("macro_f1", table) == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert confusion(table) == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert score("calibration_error", table) == pytest.approx(0.8 - 0.6)


def test_scores_of_answers():
    table = Table(('{"a": 1, "b": null}', "the cat sat"), answers=('{"a": 1, "c": 2}', "the cat sat"))
    assert score("exact_match", table) == 0.5
    assert score("json_valid", table) == 0.5
    assert score("json_fields", table) == pytest.approx((1 / 3 + 0) / 2)
    lone = Table(('{"a": 1}',) * 6, answers=("1", '"a"', "true", "null", "[]", "{}"))
    assert score("json_valid", lone) == pytest.approx(2 / 6), "a lone number or word is no record"
    chinese = Table(("我喜欢喝茶", "天气很好"), answers=("我喜欢喝茶", "天气不好"))
    assert score("rouge_l", chinese) == pytest.approx((1 + 0.75) / 2)
    import sacrebleu

    assert score("bleu", chinese) * 100 == pytest.approx(
        sacrebleu.corpus_bleu(["我喜欢喝茶", "天气不好"], [["我喜欢喝茶", "天气很好"]], tokenize="zh").score
    )
    assert 0.5 < score("chrf", chinese) < 1


def judged(better, worse, labels=("a", "b")):
    """The verdict on two columns of right and wrong rows."""
    weights = bootstrap_weights(len(better))
    tables = {
        name: of_labels([0] * len(rows), [0 if right else 1 for right in rows], labels=labels)
        for name, rows in (("x", better), ("y", worse))
    }
    return verdict(
        METRICS["accuracy"],
        ("x", "y"),
        {name: estimate(METRICS["accuracy"], table, weights) for name, table in tables.items()},
        len(better),
    )


def test_a_planted_gain_of_five_points_is_seen_and_no_gain_is_not():
    random = np.random.default_rng(1)
    for _ in range(5):
        base = random.random(1000) < 0.7
        lost, won = random.choice(np.flatnonzero(base), 40, replace=False), random.choice(np.flatnonzero(~base), 90, replace=False)
        gained = base.copy()
        gained[lost], gained[won] = False, True
        assert judged(gained, base).outcome == "better"
        assert judged(base, gained).outcome == "worse"
        assert judged(base, base).outcome == "cannot tell"
        assert judged(base, base).rows_needed is None


def test_what_few_rows_cannot_tell_and_how_many_would():
    random = np.random.default_rng(2)
    base = random.random(100) < 0.5
    gained = base.copy()
    gained[np.flatnonzero(~base)[:6]] = True
    gained[np.flatnonzero(base)[:3]] = False
    told = judged(gained, base)
    assert told.outcome == "cannot tell"
    assert 200 < told.rows_needed < 2000
    assert judged([True] * 10, [False] * 10).outcome == "cannot tell", "ten rows are too few, whatever they say"
    close = judged([n < 8 for n in range(64)], [n >= 62 for n in range(64)])
    assert (close.outcome, close.low, close.rows_needed) == ("cannot tell", 0, 65), "as many rows as there are cannot be what it takes"


def test_the_bootstrap_is_paired_and_its_interval_is_the_known_one():
    rows = np.arange(1000) % 4 > 0
    one = estimate(METRICS["accuracy"], of_labels([0] * 1000, [0 if right else 1 for right in rows]), bootstrap_weights(1000))
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 1000)
    assert (one.low, one.high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.005)


def test_a_prompt_without_effect_is_never_called_better(bases, stored, tmp_path):
    """Rows that are the padding token: nothing was learned, so nothing may be claimed on labels without meaning."""
    base = bases()
    rows = [{"text": f"film {n * 7919 % 1000}", "label": ("good", "bad")[n * 31 // 7 % 2]} for n in range(120)]
    loaded = load_examples(str(tiny.write_rows(tmp_path / "noise.jsonl", rows)))
    pad = replace(stored, soft=replace(stored.soft, rows_PH=base.embed_ids([tiny.PAD] * stored.soft.length)))
    evaluation = evaluate(base, pad, loaded)
    assert {one.outcome for one in evaluation.verdicts if one.first == "prompt"} <= {"cannot tell", "worse"}


def test_unknown_metrics_are_found_before_the_base_is_loaded(make_config, bases, monkeypatch, capsys):
    config, loaded = make_config("train.steps=1"), []
    list(train(config, base=bases()))
    monkeypatch.setattr(softprompt, "load_base", lambda *how: loaded.append(how))
    monkeypatch.setattr("sys.argv", ["softprompt", "eval", config.train.out, "--metric", "los"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "no metric is called 'los': there are loss, perplexity" in capsys.readouterr().err
    assert not loaded


def test_a_run_is_evaluated_on_its_own_rows_whole_whatever_its_limit_and_without_its_training_file(make_config, tmp_path, monkeypatch):
    """data.limit is of training rows; a run whose training file has gone can still be evaluated on another."""
    from softprompt.arguments import read_arguments

    list(train(make_config("train.steps=1", "data.limit=3")))
    held, examples = read_arguments(tmp_path / "run", (), None, None, ()).rows()
    assert (len(held.examples), len(examples.examples)) == (7, 3)
    assert len(read_arguments(tmp_path / "run", (), None, None, ("data.limit=2",)).rows()[0].examples) == 2
    (tmp_path / "train.jsonl").unlink()
    held, examples = read_arguments(tmp_path / "run", (), str(tmp_path / "eval.jsonl"), None, ()).rows()
    assert (len(held.examples), examples) == (7, None)
    split = make_config("train.steps=1", f"data.train={tmp_path / 'eval.jsonl'}", f"train.out={tmp_path / 'split'}")
    list(train(split.model_copy(update={"data": split.data.model_copy(update={"eval": None, "eval_fraction": 0.3})})))
    held, examples = read_arguments(tmp_path / "split", (), None, None, ()).rows()
    assert (len(held.examples), len(examples.examples)) == (2, 5)
