"""Answers: the same alone and in a batch, whole characters only, and limits that are said in a sentence."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from softprompt.artifact import StoredPrompt, find_prompts, load_prompt
from softprompt.config import ModelConfig, load_config
from softprompt.engine.loading import load_base
from softprompt.engine.model import FrozenBase
from softprompt.errors import ConfigError, DataError
from softprompt.generation import Ensemble, Spelled, generate, stream, without_prompt
from softprompt.sampling import Sampling
from softprompt.training import train

TEXTS = ["bring tea", "please please bring 咖啡", "x", "a longer question than the others, so that padding is needed"]
GREEDY = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.95, top_k=50, seed=7)


def make_prompt(base: FrozenBase, home: Path, text: str) -> StoredPrompt:
    rows = tiny.write_rows(home / "rows.jsonl", tiny.some_rows(12))
    settings = [
        f"model.name={base.name}", "model.device=cpu", f"data.train={rows}", f"prompt.text={text}", "optim.lr=0.05", "train.steps=1",
        f"train.out={home / 'run'}",
    ]  # fmt: skip
    list(train(load_config(None, settings), base=base))
    return load_prompt(home / "run", base)


@pytest.fixture(scope="module")
def prompts(bases, tmp_path_factory) -> list[StoredPrompt]:
    """Two prompts of different lengths."""
    return [make_prompt(bases(), tmp_path_factory.mktemp("prompt"), text) for text in ("Repeat the drink.", "Say it.")]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> FrozenBase:
    """A base whose next token follows from the last one alone; after a question it says 水咖 and ends."""
    tokenizer = tiny.tiny_tokenizer(adds_bos=False)
    chain = [*tokenizer(" 水咖")["input_ids"], tiny.EOS]
    folder = tiny.tiny_folder(tmp_path_factory.mktemp("parrot"), adds_bos=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = torch.nn.functional.normalize(torch.randn(tiny.VOCABULARY, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.get_input_embeddings().weight.copy_(rows)
        head = model.get_output_embeddings().weight.zero_()
        for token, following in pairwise(chain):
            head[following] = rows[token]
    model.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder), device="cpu"))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_texts_in_a_batch_are_answered_as_each_alone(bases, prompts, sampling):
    together = generate(bases(), prompts[0], TEXTS, sampling)
    assert together == [generate(bases(), prompts[0], [text], sampling)[0] for text in TEXTS]
    assert len(set(together)) > 1


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_different_prompts_in_a_batch_answer_as_each_alone(bases, prompts, sampling):
    jobs = [(prompt, text) for text in TEXTS for prompt in prompts]
    together = generate(bases(), [prompt for prompt, _ in jobs], [text for _, text in jobs], sampling)
    assert prompts[0].soft.length != prompts[1].soft.length
    assert together == [generate(bases(), prompt, [text], sampling)[0] for prompt, text in jobs]
    assert together[0::2] != together[1::2], "both prompts say the same: nothing was compared"


def test_the_bare_base_stands_in_a_batch_beside_a_prompt(bases, prompts):
    bare = without_prompt(bases(), prompts[0])
    together = generate(bases(), [bare, prompts[0]], ["bring tea"] * 2, GREEDY)
    assert together == [generate(bases(), prompt, ["bring tea"], GREEDY)[0] for prompt in (bare, prompts[0])]


def test_the_seed_decides_about_sampling(bases, prompts):
    one, same, other = (generate(bases(), prompts[0], TEXTS, Sampling(20, temperature=1.5, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("sampling", [Sampling(8, temperature=1, seed=1), Sampling(8, temperature=2.0, top_p=1, seed=1)])
def test_whole_numbers_are_taken_for_sampling(bases, prompts, sampling):
    as_written = replace(sampling, temperature=float(sampling.temperature), top_p=float(sampling.top_p))
    assert generate(bases(), prompts[0], TEXTS, sampling) == generate(bases(), prompts[0], TEXTS, as_written)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_pieces_join_to_the_answers(bases, prompts, sampling):
    pieces = list(stream(bases(), prompts[0], TEXTS, sampling))
    answers = generate(bases(), prompts[0], TEXTS, sampling)
    for row, answer in enumerate(answers):
        own = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in own) == answer
        assert [piece.last for piece in own] == [False] * (len(own) - 1) + [True]


def test_max_new_tokens_is_kept(bases, prompts):
    longer = generate(bases(), prompts[0], TEXTS, Sampling(6, temperature=2.0))
    shorter = generate(bases(), prompts[0], TEXTS, Sampling(2, temperature=2.0))
    tokens = [len(bases().tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in longer]
    assert shorter != longer
    assert max(tokens) > 2
    assert all(len(answer) <= 2 for answer in shorter)


def test_an_answer_ends_at_the_end_of_text_token(parrot, tmp_path):
    prompt = without_prompt(parrot, make_prompt(parrot, tmp_path, "Say it."))
    assert generate(parrot, prompt, ["bring tea"], Sampling(50)) == ["水咖"]


def test_a_character_of_several_tokens_comes_in_one_piece(parrot, tmp_path):
    prompt = without_prompt(parrot, make_prompt(parrot, tmp_path, "Say it."))
    pieces = [piece.text for piece in stream(parrot, prompt, ["bring tea"], Sampling(50))]
    assert [piece for piece in pieces if piece] == ["水", "咖"]


def other_tokenizers():
    """Such as write blanks as marks and unknown characters as bytes, and such as mark what goes on with a word."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁te", "a", "t", "e", "水", "!", "▁a"]
    scores = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    marks = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    marks.pre_tokenizer, marks.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    )
    vocabulary = ["[UNK]", "tea", "##s", "a", "!", "'", "##m", "水"]
    words = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return [tiny.tiny_tokenizer(), *(PreTrainedTokenizerFast(tokenizer_object=one, eos_token="</s>") for one in (marks, words))]


@pytest.mark.parametrize("tokenizer", other_tokenizers(), ids=["bytes", "marks", "words"])
def test_text_that_grows_token_by_token_is_the_text_of_all_tokens(tokenizer):
    draw, whole = random.Random(0), []
    for _ in range(200):
        text = "".join(draw.choice(["tea", "s", " ", "a", "!", "水", "'m", "咖", "🍵", "é"]) for _ in range(draw.randrange(1, 20)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.insert(draw.randrange(len(ids) + 1), tokenizer.eos_token_id)  # which is no text, wherever it stands
        spelled = Spelled(tokenizer)
        pieces = [*(spelled.add(token) for token in ids), spelled.end()]
        whole.append(tokenizer.decode(ids, skip_special_tokens=True))
        assert "".join(pieces) == spelled.text == whole[-1]
    assert len(set(whole)) > 100


def test_bytes_that_are_no_text_are_spelled_as_a_whole_decoding_spells_them():
    tokenizer, draw = tiny.tiny_tokenizer(), random.Random(0)
    for _ in range(200):
        spelled, ids = Spelled(tokenizer), [draw.randrange(tiny.VOCABULARY - 64) for _ in range(draw.randrange(1, 30))]
        assert "".join([*map(spelled.add, ids), spelled.end()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_only_the_last_tokens_are_decoded_again(monkeypatch):
    tokenizer, decoded = tiny.tiny_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: decoded.append(len(ids)) or decode(ids, **how))
    spelled, text = Spelled(tokenizer), "bring 水 " * 40
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        spelled.add(token)
    assert spelled.text == text
    assert max(decoded) <= 6


def test_no_texts_have_no_answers(bases, prompts):
    assert generate(bases(), prompts[0], []) == []


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_refused(bases, prompts, text):
    with pytest.raises(DataError, match="the text is empty"):
        generate(bases(), prompts[0], ["fine", text])


def test_a_text_that_fills_the_context_is_refused(bases, prompts):
    with pytest.raises(DataError, match="context is 512: shorten the text"):
        generate(bases(), prompts[0], ["x" * 500])


def test_an_answer_ends_where_the_context_ends(bases, prompts):
    taken = 1 + prompts[0].soft.length + len(prompts[0].encoder.question("x"))
    said = generate(bases(), prompts[0], ["x" * (512 - taken - 3 + 1)], Sampling(50, temperature=2.0, seed=3))[0]
    assert 0 < len(said) <= 3


def test_a_long_text_does_not_cut_the_answers_beside_it(bases, prompts):
    texts = ["bring tea", "x" * 470]
    together = generate(bases(), prompts[0], texts, Sampling(40))
    assert together == [generate(bases(), prompts[0], [text], Sampling(40))[0] for text in texts]


def test_one_prompt_for_all_or_one_for_each(bases, prompts):
    with pytest.raises(DataError, match="2 prompts for 1 texts"):
        generate(bases(), prompts, ["bring tea"])


BAD = {
    "max_new_tokens": [0, -1],
    "temperature": [-0.1, math.nan, math.inf],
    "top_p": [0.0, -1.0, 1.1, math.nan],
    "top_k": [-1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_senseless_sampling_is_refused(bases, prompts, key, value):
    with pytest.raises(ConfigError, match=key):
        generate(bases(), prompts[0], ["bring tea"], Sampling(**{key: value}))


# ---- ensembles -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bank(bases, tmp_path_factory) -> list[StoredPrompt]:
    """Three prompts that start from different noise."""
    home = tmp_path_factory.mktemp("bank")
    rows = tiny.write_rows(home / "rows.jsonl", tiny.some_rows(12))
    settings = [
        f"model.name={bases().name}",
        "model.device=cpu",
        f"data.train={rows}",
        "prompt.init=random",
        "prompt.count=3",
        "train.steps=1",
    ]
    list(train(load_config(None, [*settings, f"train.out={home / 'run'}"]), base=bases()))
    return [load_prompt(path, bases()) for path in find_prompts(home / "run")]


def scores_of(base: FrozenBase, prompt: StoredPrompt, text: str, said: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token by transformers' own forward over the whole row."""
    ids = [*prompt.encoder.question(text), *said]
    embeds = torch.cat([prompt.soft.embeds(base), base.embed_ids(ids)])
    with torch.no_grad():
        return base.model(inputs_embeds=embeds[None]).logits[0, -1].log_softmax(dim=-1)


def expected(base: FrozenBase, bank: list[StoredPrompt], text: str, how: str) -> str:
    said: list[int] = []
    while len(said) < GREEDY.max_new_tokens:
        scores = torch.stack([scores_of(base, prompt, text, said) for prompt in bank])
        if how == "mean":
            token = int(scores.mean(dim=0).argmax())
        else:
            first = scores.argmax(dim=-1).tolist()
            most = max(first.count(token) for token in first)
            token = max(
                (token for token in set(first) if first.count(token) == most), key=lambda token: float(scores.exp().mean(dim=0)[token])
            )
        if token in base.stop_ids:
            break
        said.append(token)
    return base.tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("how", ["mean", "vote"])
def test_prompts_that_answer_together_agree_token_by_token(bases, bank, how):
    answers = generate(bases(), Ensemble(tuple(bank), how), TEXTS, GREEDY)
    assert answers == [expected(bases(), bank, text, how) for text in TEXTS]
    assert answers != generate(bases(), bank[0], TEXTS, GREEDY)


def test_mean_and_vote_differ_somewhere(bases, bank):
    mean, vote = (generate(bases(), Ensemble(tuple(bank), how), TEXTS, GREEDY) for how in ("mean", "vote"))
    assert mean != vote


def test_a_prompt_together_with_itself_is_itself(bases, bank):
    assert generate(bases(), Ensemble((bank[0], bank[0])), TEXTS, GREEDY) == generate(bases(), bank[0], TEXTS, GREEDY)


def test_ensembles_and_single_prompts_share_a_batch(bases, bank, prompts):
    mixed = generate(bases(), [Ensemble(tuple(bank)), prompts[0], Ensemble((bank[1], prompts[1])), bank[2]], TEXTS, GREEDY)
    alone = [Ensemble(tuple(bank)), prompts[0], Ensemble((bank[1], prompts[1])), bank[2]]
    assert mixed == [generate(bases(), one, [text], GREEDY)[0] for one, text in zip(alone, TEXTS, strict=True)]


def test_a_vote_cannot_be_sampled(bases, bank):
    with pytest.raises(ConfigError, match="a vote has no probabilities"):
        generate(bases(), Ensemble(tuple(bank), "vote"), TEXTS, SAMPLED)


@pytest.mark.parametrize("family", ["falcon_mamba", "qwen3_5_text"])
def test_prompts_over_a_recurrent_base_answer_together(bases, tmp_path, family):
    base = bases(family)
    prompt = make_prompt(base, tmp_path, "Say it.")
    assert generate(base, Ensemble((prompt, prompt)), TEXTS, GREEDY) == generate(base, prompt, TEXTS, GREEDY)
