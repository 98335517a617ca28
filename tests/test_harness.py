"""A soft prompt in the lm-evaluation-harness, on tasks that lie here: scores equal to plain forwards over joined embeddings."""

import json
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch

from softprompt import cli
from softprompt.artifact import load_prompt
from softprompt.errors import ConfigError
from softprompt.training import train

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

PAIRS = [("Say it: ", "tea"), ("bring ", "coffee please"), ("", "milk"), ("a longer question of some length? ", "水"), ("x", " y")]


@pytest.fixture(params=["after_bos", "start"])
def model(request, make_config, tmp_path):
    from softprompt.harness import SoftPromptLM

    list(train(make_config("train.steps=6", f"prompt.position={request.param}")))
    return SoftPromptLM(str(tmp_path / "run"), device="cpu", batch_size=8)


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def joined_logits(model, ids):
    """[len(ids) + 1, V]: what plain transformers says after the prompt and after each of these tokens."""
    base, soft = model.base, model.stored.soft
    embeds = torch.cat([soft.embeds(base), base.embed_ids(ids)])
    with torch.no_grad():
        return base.model(inputs_embeds=embeds[None]).logits[0, -len(ids) - 1 :].float()


def test_loglikelihood_is_that_of_joined_embeddings(model):
    for (context, continuation), (score, greedy) in zip(PAIRS, model.loglikelihood(requests(*PAIRS), disable_tqdm=True), strict=True):
        whole, start = model.tok_encode(context + continuation), len(model.tok_encode(context.rstrip()))
        logits = joined_logits(model, whole)[start:-1]
        oracle = logits.log_softmax(dim=-1).gather(1, torch.tensor(whole[start:])[:, None]).sum().item()
        assert score == pytest.approx(oracle, rel=1e-4)
        assert greedy == (logits.argmax(dim=-1).tolist() == whole[start:])


def test_what_it_says_itself_is_greedy(model):
    (said,) = model.generate_until(requests(("bring tea", {"until": [], "max_gen_toks": 5})))
    ids = model.tok_encode("bring tea")
    own = []
    for _ in range(5):
        own.append(joined_logits(model, [*ids, *own])[-1].argmax().item())
        if own[-1] in model.base.stop_ids:
            break
    assert said == model.tokenizer.decode(own, skip_special_tokens=True)
    (row,) = [model._row(ids, own)]
    assert model._loglikelihood_tokens([(None, ids, own)])[0][1] is True
    assert model._loglikelihood_tokens([(None, ids, [own[0] + 1])])[0][1] is False
    assert row.num_supervised == len(own)


def test_answers_end_at_their_stop_texts_and_long_contexts_lose_their_beginning(model):
    asked = [("tea", {"until": ["\n", "e"], "max_gen_toks": 8}), ("z" * 2000, {"until": "q", "max_gen_toks": 3})]
    said = model.generate_until(requests(*asked))
    assert "e" not in said[0]
    assert len(model._question("z" * 2000)) == model.max_length - model.max_gen_toks
    assert len(model._row([5] * 2000, [6, 7])) == model.max_length


def test_rolling_likelihood_scores_every_token_once(model, monkeypatch):
    text = "some tea, some coffee"
    ids = model.tok_encode(text)
    oracle = joined_logits(model, ids)[:-1].log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
    assert model.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(oracle, rel=1e-4)
    seen = []
    monkeypatch.setattr(type(model), "max_length", 8)
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda parts: seen.extend(parts) or [(0.0, True)])
    model.loglikelihood_rolling(requests((text,)))
    assert [token for _, _, own in seen for token in own] == ids


def test_no_logits_of_many_tokens_are_ever_held(model, monkeypatch):
    """Rolling texts have thousands of scored tokens, and a vocabulary hundreds of thousands of entries."""
    held, logits = [], type(model.base.head).logits

    def counted(head, states):
        held.append(states.shape[:-1].numel())
        return logits(head, states)

    monkeypatch.setattr(type(model.base.head), "logits", counted)
    text = "some tea, some coffee, and more of both"
    ids = model.tok_encode(text)
    said = joined_logits(model, ids)[:-1].log_softmax(dim=-1)
    held.clear()
    scores = model._loglikelihood_tokens([(None, ids[:-count], ids[-count:]) for count in (1, 9, len(ids) - 1)])
    assert not held
    for count, (score, greedy) in zip((1, 9, len(ids) - 1), scores, strict=True):
        own = torch.tensor(ids[-count:])
        assert score == pytest.approx(said[-count:].gather(1, own[:, None]).sum().item(), rel=1e-4)
        assert greedy == bool((said[-count:].argmax(dim=-1) == own).all())


def test_a_task_from_the_command_line(model, tmp_path, monkeypatch, capsys):
    """Multiple choice: the accuracy is that of likelihoods over joined embeddings."""
    rows = [{"q": f"bring {word} {n}", "right": n % 2} for n, word in enumerate(["tea", "milk", "juice", "coffee"] * 3)]
    tiny.write_rows(tmp_path / "task.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "drinks.yaml").write_text(
        "task: drinks\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'task.jsonl'}}}\n"
        'doc_to_text: "{{q}}:"\ndoc_to_choice: ["tea", "milk"]\ndoc_to_target: right\nmetric_list: [{metric: acc}]\n',
        encoding="utf-8",
    )
    words = ["run", "--model", "softprompt", "--model_args", f"prompt={tmp_path / 'run'}", "--device", "cpu", "--tasks", "drinks"]
    more = ["--include_path", folder, "--output_path", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["softprompt", "lm-eval", *map(str, words + more)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    (file,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(file.read_text(encoding="utf-8"))["results"]["drinks"]["acc,none"]
    right = []
    for row in rows:
        scores = []
        for choice in ("tea", "milk"):
            context, whole = model.tok_encode(row["q"] + ":"), model.tok_encode(f"{row['q']}: {choice}")
            logits = joined_logits(model, whole)[len(context) : -1].log_softmax(dim=-1)
            scores.append(logits.gather(1, torch.tensor(whole[len(context) :])[:, None]).sum().item())
        right.append(scores.index(max(scores)) == row["right"])
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert "drinks" in capsys.readouterr().out


def test_the_prompts_own_template_on_request(make_config, bases, tmp_path):
    from softprompt.harness import SoftPromptLM

    list(train(make_config("train.steps=2")))
    model = SoftPromptLM(str(tmp_path / "run"), device="cpu", template=True)
    question = load_prompt(tmp_path / "run", bases()).encoder.question("bring tea")
    assert model._question("bring tea") == question
    assert model._encode_pair("bring tea", " tea") == (list(question), model.tok_encode("tea"))
    with pytest.raises(ConfigError, match="softprompt knows prompt, device"):
        SoftPromptLM(str(tmp_path / "run"), devise="cpu")
