"""An evaluation: contestants on the same rows, scores with intervals, verdicts; against outside oracles and planted differences."""

import json
import math

import numpy as np
import peft
import pytest
import tiny
import torch

from softprompt.answers import answer
from softprompt.artifact import load_prompt
from softprompt.contestants import choose_shots, enter, line_up
from softprompt.data import load_examples
from softprompt.encode import encode_rows, make_encoder
from softprompt.errors import ConfigError, DataError
from softprompt.evaluation import Contest, evaluate, evaluating
from softprompt.likelihood import candidate_losses, row_losses
from softprompt.metrics import METRICS, Table, bootstrap_weights, confusion, estimate, metric_named, verdict
from softprompt.prompt import no_prompt, prefix_of
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


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.RECURRENT])
def test_candidates_of_one_reading_score_as_whole_rows(bases, tmp_path, family):
    """Labels that begin alike, rows of uneven lengths, some whose question holds an answer already."""
    base = bases(family)
    encoder = make_encoder(base.tokenizer, "human-assistant")
    rows = encode_rows(encoder, labelled(tmp_path, 9), 200)
    words = ("good", "goodish", "bad", "b")
    candidates = [[encoder.encode(one.answered(word)) for word in words] for one in rows.examples]
    bos = no_prompt(base, tiny.BOS)
    with torch.no_grad():
        prefix = prefix_of(base, [bos])
    alone = torch.stack([row_losses(base, prefix, column, 64) for column in zip(*candidates, strict=True)], dim=1)
    together = candidate_losses(base, prefix, candidates, 64)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_candidates_read_their_text_once(bases, tmp_path, monkeypatch):
    base = bases()
    encoder = make_encoder(base.tokenizer, "human-assistant")
    rows = encode_rows(encoder, labelled(tmp_path, 6), 200)
    candidates = [[row] * 3 for row in rows.encoded]
    read = []
    whole = type(base).continue_from
    monkeypatch.setattr(
        type(base), "continue_from", lambda self, *how, **more: read.append(how[3].sum().item()) or whole(self, *how, **more)
    )
    candidate_losses(base, prefix_of(base, [no_prompt(base, tiny.BOS)]), candidates, 10_000)
    texts = sum(len(row) for row in rows.encoded)
    assert sum(read) < texts + 6 * 3 * 3


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
    from softprompt.contestants import Contestant

    for contestant in (Contestant("text", (Stored,), wish="Judge."), Contestant("few-shot", (Stored,), shots=shots)):
        entry = enter(base, contestant, 0, [[one] for one in rows.examples], [[row] for row in rows.encoded])
        full = [contestant.full(encoder, one, row) for one, row in zip(rows.examples, rows.encoded, strict=True)]
        assert [row.num_supervised for row in full] == [row.num_supervised for row in rows.encoded]
        assert entry.tokens == pytest.approx(sum(map(len, full)) / 12 - sum(map(len, rows.encoded)) / 12)
        assert entry.soft.length > 5
        with torch.no_grad():
            whole = row_losses(base, prefix_of(base, [Stored.soft]), full, 10_000)
            shared = row_losses(base, prefix_of(base, [entry.soft]), [own[0] for own in entry.rows], 10_000)
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4)


def test_examples_fit_take_the_labels_in_turn_and_leave_out_held_rows(bases, tmp_path):
    encoder = make_encoder(bases().tokenizer, "human-assistant")
    examples = labelled(tmp_path).examples
    shots = choose_shots(encoder, examples, examples[:5], 300)
    assert sorted(one.label for one in shots[:3]) == ["bad", "good", "goodish"]
    assert not {one.source for one in shots} & {one.source for one in examples[:5]}
    assert sum(len(encoder.encode(one)) for one in shots) <= 300
    assert choose_shots(encoder, examples, (), 10) == ()


def test_a_lora_adapter_competes_and_leaves_the_base_as_it_was(bases, stored, held, tmp_path):
    base = bases()
    model = peft.get_peft_model(
        tiny.tiny_base(tmp_path / "again").model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    model.save_pretrained(str(tmp_path / "lora"))
    before = evaluate(base, stored, held)
    both = evaluate(base, stored, held, Contest(adapters=(tmp_path / "lora",), answers=True, max_new_tokens=4))
    after = evaluate(base, stored, held)
    assert list(both.contestants) == ["base", "text", "prompt", "lora"]
    losses = [one.contestants["base"].scores["loss"].value for one in (before, both, after)]
    assert losses[0] == losses[1] == losses[2]
    row = encode_rows(stored.encoder, held, 200).encoded[3]
    labels = torch.tensor([[-100] + [token if on else -100 for token, on in zip(row.ids, row.supervised, strict=True)]])
    oracle = model(input_ids=torch.tensor([[tiny.BOS, *row.ids]]), labels=labels).loss.item() * row.num_supervised
    assert both.contestants["lora"].table.losses[3] == pytest.approx(oracle, rel=1e-4)
    assert oracle != pytest.approx(before.contestants["base"].table.losses[3], rel=1e-3)


# ---- answers -------------------------------------------------------------------------------------------------------


def test_mixed_batches_answer_as_one_by_one(bases, stored, held):
    base = bases()
    line = line_up(base, [("prompt", stored)], text="Say it.", ensemble=False)
    rows = encode_rows(stored.encoder, held, 200)
    entries = {one.name: [enter(base, one, 0, [[example] for example in rows.examples], [[row] for row in rows.encoded])] for one in line}
    pairs = [(name, row) for name in entries for row in range(len(held.examples))]
    mixed = {(said.contestant, said.row): said for said in answer(base, entries, pairs, 6)}
    assert set(mixed) == set(pairs)
    for pair in pairs:
        (alone,) = answer(base, entries, [pair], 6)
        assert alone == mixed[pair]


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
    assert resumed == json.loads(json.dumps(whole.as_dict()))


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


def test_the_bootstrap_is_paired_and_its_interval_is_the_known_one():
    rows = np.arange(1000) % 4 > 0
    one = estimate(METRICS["accuracy"], of_labels([0] * 1000, [0 if right else 1 for right in rows]), bootstrap_weights(1000))
    spread = 1.96 * math.sqrt(0.75 * 0.25 / 1000)
    assert (one.low, one.high) == pytest.approx((0.75 - spread, 0.75 + spread), abs=0.005)


def test_a_prompt_without_effect_is_never_called_better(bases, stored, tmp_path):
    """Rows that are the padding token: nothing was learned, so nothing may be claimed on labels without meaning."""
    from dataclasses import replace

    base = bases()
    rows = [{"text": f"film {n * 7919 % 1000}", "label": ("good", "bad")[n * 31 // 7 % 2]} for n in range(120)]
    loaded = load_examples(str(tiny.write_rows(tmp_path / "noise.jsonl", rows)))
    pad = replace(stored, soft=replace(stored.soft, rows_PH=base.embed_ids([tiny.PAD] * stored.soft.length)))
    evaluation = evaluate(base, pad, loaded)
    assert {one.outcome for one in evaluation.verdicts if one.first == "prompt"} <= {"cannot tell", "worse"}


def test_unknown_metrics_are_found_before_the_base_is_loaded():
    with pytest.raises(ConfigError, match="there are loss, perplexity"):
        metric_named("los")


def test_a_run_is_evaluated_on_its_own_rows_whole_whatever_its_limit_and_without_its_training_file(make_config, tmp_path, monkeypatch):
    """data.limit is of training rows; a run whose training file has gone can still be evaluated on another."""
    from softprompt.lineup import entered

    list(train(make_config("train.steps=1", "data.limit=3")))
    held, examples = entered(tmp_path / "run", (), None, None, ()).rows()
    assert (len(held.examples), len(examples.examples)) == (7, 3)
    assert len(entered(tmp_path / "run", (), None, None, ("data.limit=2",)).rows()[0].examples) == 2
    (tmp_path / "train.jsonl").unlink()
    held, examples = entered(tmp_path / "run", (), str(tmp_path / "eval.jsonl"), None, ()).rows()
    assert (len(held.examples), examples) == (7, None)
    split = make_config("train.steps=1", f"data.train={tmp_path / 'eval.jsonl'}", f"train.out={tmp_path / 'split'}")
    list(train(split.model_copy(update={"data": split.data.model_copy(update={"eval": None, "eval_fraction": 0.3})})))
    held, examples = entered(tmp_path / "split", (), None, None, ()).rows()
    assert (len(held.examples), len(examples.examples)) == (2, 5)
