"""A base that thinks and ends its turns with a token of their own, in every verb and export; a tokenizer larger than the base's table."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from gguf import GGUFReader
from other_engines import LlamaServer, some_prompt, tiny_gguf
from tiny import TURN_END, chat_tokenizer, write_rows
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.artifact import load_prompt
from softprompt.cli import main
from softprompt.config import ModelConfig, load_config
from softprompt.data import load_examples
from softprompt.encode import Encoder
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.errors import DataError
from softprompt.evaluation import Contest, evaluate
from softprompt.export import Wanted, export
from softprompt.generation import Ensemble, generate, stream
from softprompt.inspection import nearest_tokens
from softprompt.sampling import Sampling
from softprompt.training import train

PLAIN = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
)
THINKS = PLAIN.replace("':' + m.content", "':' + ('<think></think>' if m.role == 'assistant' and loop.last else '') + m.content")
OPENS = PLAIN.replace("assistant:'", "assistant:<think>'")


def parrot(folder: Path, template: str, answer: list[str]) -> FrozenBase:
    """A base whose next token follows from the last one alone: after a question it says the tokens of `answer`, and after its last one
    goes on for ever."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    asked = "<think>" if template == OPENS else ":"
    chain = tokenizer.convert_tokens_to_ids([asked, *answer, "x", "y", "z", "w", "x"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.tiny_folder(folder))
    rows = torch.nn.functional.normalize(torch.randn(tiny.VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(rows)
        head = model.get_output_embeddings().weight.zero_()
        for token, following in pairwise(chain):
            head[following] += rows[token]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder), device="cpu"))


CASES = {
    "plain": (PLAIN, ["r", "e", "d", TURN_END], ""),
    "thinks": (THINKS, ["<think>", "</think>", "r", "e", "d", TURN_END], "<think></think>"),
    "opens": (OPENS, ["</think>", "r", "e", "d", TURN_END], "</think>"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(base, prompt folder, what is thought before "red" is said)."""
    template, answer, thought = CASES[request.param]
    base = parrot(tmp_path_factory.mktemp(request.param) / "base", template, answer)
    folder = tmp_path_factory.mktemp("prompts") / "taste"
    return base, some_prompt(folder, base, template="chat"), thought


def test_an_answer_is_said_without_its_thoughts_and_ends_with_its_turn(case, monkeypatch):
    base, folder, thought = case
    prompt = load_prompt(folder, base)
    pieces = list(stream(base, prompt, ["rose?"], Sampling(max_new_tokens=20)))
    assert "".join(piece.text for piece in pieces) == "red"
    assert "".join(piece.thought for piece in pieces) == thought
    assert generate(base, Ensemble((prompt, prompt)), ["rose?", "sky?"], Sampling(max_new_tokens=20)) == ["red", "red"]
    monkeypatch.setattr(Encoder, "end_ids", frozenset())
    (endless,) = generate(base, prompt, ["rose?"], Sampling(max_new_tokens=20))
    assert endless.startswith("redxyzw"), "it ends by itself"


def test_every_contestant_is_scored_on_what_it_says(case, tmp_path):
    base, folder, _ = case
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"rose {n}?", "completion": "red"} for n in range(4)])
    loaded = load_examples(str(rows))
    contest = Contest(
        train=load_examples(str(write_rows(tmp_path / "shots.jsonl", [{"prompt": "sky?", "completion": "red"}]))), answers=True
    )
    found = evaluate(base, load_prompt(folder, base), loaded, replace(contest, text="Name it."))
    assert {name: result["exact_match"] for name, result in found.contestants.items()} == dict.fromkeys(
        ("base", "text", "few-shot", "prompt"), 1.0
    )
    assert {result.num_unended for result in found.contestants.values()} == {0}


def test_references_are_compared_without_thoughts(case, tmp_path):
    base, folder, _ = case
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "rose?", "completion": "<think>Hm.\nHm.</think>\nred"}] * 2)
    thinks = load_prompt(folder, base).encoder.thinking is not None
    found = evaluate(base, load_prompt(folder, base), load_examples(str(rows)), Contest(answers=True, max_new_tokens=30))
    assert found.contestants["prompt"]["exact_match"] == float(thinks)


def test_the_command_line_keeps_the_thoughts(case, tmp_path, capsys):
    _, folder, thought = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["softprompt", "generate", str(folder), "rose?", "model.device=cpu", "--json", str(tmp_path / "said.json")]
        )
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code in (0, None)
    (said,) = json.loads((tmp_path / "said.json").read_text())["answers"]
    assert (said["answer"], said["thought"]) == ("red", thought)
    assert capsys.readouterr().out.strip().endswith("red")


@pytest.mark.filterwarnings("ignore")
def test_the_harness_ends_where_the_turn_ends(case):
    pytest.importorskip("lm_eval")
    from softprompt.harness import SoftPromptLM

    base, folder, _ = case
    for template, context in ((True, "rose?"), (False, None)):
        model = SoftPromptLM(str(folder), device="cpu", template=template)
        asked = context or model.apply_chat_template([{"role": "user", "content": "rose?"}])
        (said,) = model.generate_until([SimpleNamespace(args=(asked, {"until": ["\n"], "max_gen_toks": 20}))])
        assert said == "red"
    model = SoftPromptLM(str(folder), device="cpu", template=True)
    asked, said = model._encode_pair("rose?", " red")
    example = load_examples_of([{"prompt": "rose?", "completion": "red"}], Path(folder).parent)[0]
    row = load_prompt(folder, base).encoder.encode(example)
    assert (tuple(asked), tuple(said)) == (row.question, row.ids[len(row.question) : -1])


def load_examples_of(rows, folder):
    return load_examples(str(write_rows(folder / "rows.jsonl", rows))).examples


def test_exports_end_where_the_turn_ends(case, tmp_path):
    base, folder, thought = case
    end = base.tokenizer.convert_tokens_to_ids(TURN_END)
    written = export(Wanted([folder], "vocab", tmp_path / "out"))
    assert written["prompts"]["taste"]["end_ids"] == [end]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [tiny.EOS, end]
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "rose?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
    assert tokenizer.decode(said) == f"{thought}red{TURN_END}"
    for form in ("npy", "vllm"):
        assert export(Wanted([folder], form, tmp_path / form))["prompts"]["taste"]["end_ids"] == [end]


def test_a_gguf_file_ends_where_the_turn_ends(tmp_path):
    base = parrot(tmp_path / "base", PLAIN, CASES["plain"][1])
    folder = some_prompt(tmp_path / "taste", base, template="chat")
    export(Wanted([folder], "gguf", tmp_path / "out", gguf_file=tiny_gguf(tmp_path / "base.gguf", base)))
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == base.tokenizer.convert_tokens_to_ids(TURN_END)
    assert (tmp_path / "out" / "Modelfile").read_text().endswith(f'PARAMETER stop "{TURN_END}"\n')
    assert LlamaServer(tmp_path / "out" / "model.gguf").chat("rose?", 12) == "red"


# ---- a system turn and a day, exported -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["human-assistant", "{{ prompt }} ->", "chat"])
def test_an_export_asks_as_the_rows_did(tmp_path, template):
    base = load_base(ModelConfig(name=str(tiny.chat_folder(tmp_path / "base", tiny.CLOCK)), device="cpu"))
    folder = some_prompt(tmp_path / "taste", base, template=template)
    card = json.loads((folder / "card.json").read_text()) | {"system": "Be 'brief'.\n", "date": "2020-05-06"}
    (folder / "card.json").write_text(json.dumps(card))
    question = load_prompt(folder, base).encoder.question("rose?")
    text = base.tokenizer.decode(question)
    assert "Be 'brief'." in text
    assert ("Today: 06 May 2020" in text) == (template == "chat")
    export(Wanted([folder], "vocab", tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "rose?"}], add_generation_prompt=True)["input_ids"]
    assert tuple(ids[-len(question) :]) == question
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "rose?"}]
    assert "brief" not in tokenizer.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
    export(Wanted([folder], "vllm", tmp_path / "vllm"))
    template_of_rows = (tmp_path / "vllm" / "taste.jinja").read_text()
    turns = [{"role": "system", "content": "ROWS"}, {"role": "user", "content": "rose?"}]
    assert "Be 'brief'." in tokenizer.apply_chat_template(turns, chat_template=template_of_rows, tokenize=False, add_generation_prompt=True)


def test_the_system_turn_of_the_command_line_comes_before_that_of_the_card(tmp_path, bases, monkeypatch):
    from softprompt import generation

    base = bases(chat=True)
    folder = some_prompt(tmp_path / "taste", base)
    card = json.loads((folder / "card.json").read_text()) | {"system": "Be brief."}
    (folder / "card.json").write_text(json.dumps(card))
    asked = []
    monkeypatch.setattr(generation, "decode", lambda base, questions: asked.extend(questions) or iter(()))
    for more in ([], ["--system", "Be long."], ["--system", ""]):
        monkeypatch.setattr("sys.argv", ["softprompt", "generate", str(folder), "rose?", "model.device=cpu", *more])
        with pytest.raises(SystemExit):
            main()
    said = [base.tokenizer.decode(question.texts[0]).removesuffix("Human: rose?\n\nAssistant: ") for question in asked]
    assert said == ["Be brief.\n\n", "Be long.\n\n", ""]


# ---- a tokenizer larger than the table -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A base with rows for 259 tokens and a tokenizer that knows one more, as Gemma 3 1B has it."""
    folder = tiny.tiny_folder(tmp_path / "base", vocab_size=259)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=False)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_larger_than_the_table_trains_and_is_looked_at_and_exported(small, make_config, tmp_path):
    config = make_config(f"model.name={small}", "train.steps=3", "prompt.init=vocab")
    *_, finished = train(config)
    *_, again = train(config, resume=True)
    assert again.result == finished.result
    base = load_base(config.model)
    assert (len(base.tokenizer), base.num_tokens) == (260, 259)
    prompt = load_prompt(config.train.out, base)
    assert len(nearest_tokens(base, prompt.soft.rows_PH)) == prompt.soft.length
    assert len(base.drawn_rows(4000, 0)) == 4000
    found = evaluate(base, prompt, load_examples(config.data.eval), Contest(answers=True, max_new_tokens=4))
    assert set(found.contestants) == {"base", "text", "prompt"}
    assert export(Wanted([Path(config.train.out)], "vocab", tmp_path / "out"))["checked"]["logits_relative_error"] < 1e-4
    export(Wanted([Path(config.train.out)], "gguf", tmp_path / "gguf", gguf_file=tiny_gguf(tmp_path / "base.gguf", base)))


def test_a_row_with_a_token_that_has_no_embedding_is_rejected_with_its_place(small, make_config, tmp_path):
    from softprompt.show import show

    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "see <image>", "completion": "b"}] * 2)
    config = make_config(f"model.name={small}", f"data.train={rows}", "data.max_rejected=2", "train.steps=1")
    reason = "the token '<image>' (number 259) has no embedding: the base's table ends at 258; take it out of the text"
    assert [(item.source, item.reason) for item in show(config).rejected] == [(f"{rows}:{line}", reason) for line in (2, 4)]
    started = next(iter(train(config)))
    assert started.num_rejected == 2
    list(train(load_config(config.model_dump(exclude_none=True), [f"train.out={tmp_path / 'other'}"])))
    base = load_base(config.model)
    with pytest.raises(DataError, match="the token '<image>'"):
        generate(base, load_prompt(tmp_path / "other", base), ["see <image>"])


def test_a_text_to_start_from_with_such_a_token_is_refused(small, make_config):
    from softprompt.errors import ConfigError

    with pytest.raises(ConfigError, match=r"holds the token '<image>', which .* has no embedding for"):
        list(train(make_config(f"model.name={small}", "prompt.text=see <image>", "train.steps=1")))
