"""The server's own engine: an answer is the same whoever is beside it, and what leaves memory comes back."""

import asyncio
import json
import math
import random
from dataclasses import replace

import pytest
import tiny
import torch
from test_decode import some_starts
from test_invariants import some_prompt
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from softprompt.artifact import load_prompt, make_card, write_prompt
from softprompt.card import DataCard
from softprompt.config import load_config
from softprompt.data import Message
from softprompt.encode import make_encoder
from softprompt.engine.decode import OpenBatch, Question, Read, Token, decode, decode_whole
from softprompt.engine.prompt import deepened, no_prompt, prefix_of
from softprompt.errors import ArtifactError, ConfigError, DataError
from softprompt.generation import Ensemble, generate
from softprompt.sampling import Sampling
from softprompt.serve import own
from softprompt.serve.asking import Ask, Begun, Busy, NotServed, Said
from softprompt.serve.own import start
from softprompt.serve.spelling import Spelling
from softprompt.serve.telling import Telling

CLOSE = 1e-4


def stored(folder, base, seed=1, *, length=6, position="start", deep=False):
    """A prompt's folder over a tiny base."""
    encoder = make_encoder(base.tokenizer, "human-assistant")
    soft = replace(some_prompt(base, length, position, seed), bos_id=encoder.bos_id)
    soft = deepened(base, soft.rows_PH, position, encoder.bos_id) if deep else soft
    config = load_config(None, [f"model.name={base.name}", "data.train=rows.jsonl", f"prompt.method={'prefix' if deep else 'prompt'}"])
    data = DataCard(train="rows.jsonl", num_train=1, train_fingerprint="", num_eval=0, eval_fingerprint=None, labels=(), label_words={})
    write_prompt(folder, soft, make_card(config, base, soft, encoder, data, "random", {}), base)
    return folder


def with_engine(base, prompts, do, **how):
    """Runs `do(engine)` on an event loop of its own."""

    async def run():
        engine = start(base, prompts, **how)
        try:
            return await do(engine)
        finally:
            await engine.close(5)

    room = base.shelf.room
    try:
        return asyncio.run(run())
    finally:
        base.shelf.room = room


async def answered(engine, ask):
    """(Begun, the whole text, its scores, how it finished)."""
    begun, text, scores, finish = None, "", [], None
    async for event in engine.ask(ask):
        if isinstance(event, Begun):
            begun = event
        else:
            text, scores, finish = text + event.text, [*scores, *event.scores], event.finish
    return begun, text, scores, finish


def answer(base, prompts, ask, **how):
    return with_engine(base, prompts, lambda engine: answered(engine, ask), **how)


def test_64_requests_of_20_prompts_get_what_each_gets_alone(bases, tmp_path, monkeypatch):
    base = bases("gemma3_text")
    monkeypatch.setattr(own, "CPU_PIECE", 12)
    kinds = [(length, position, deep) for length in (1, 3, 6, 9, 14) for position in ("start", "after_bos") for deep in (False, True)]
    prompts = {
        f"p{number}": stored(tmp_path / f"p{number}", base, number, length=length, position=position, deep=deep)
        for number, (length, position, deep) in enumerate(kinds)
    }
    draw = random.Random(0)
    head = " ".join(draw.choice("abcdefgh") for _ in range(40))
    how = [
        Sampling(9),
        Sampling(14, 1.5, 0.95, 50, 7),
        Sampling(6, 0.8, seed=1, min_p=0.05),
        Sampling(11, 1.5, top_k=9, presence_penalty=0.5),
    ]
    asks = [
        Ask(
            draw.choice(list(prompts)),
            draw.choice(["", head, head]) + f" bring {number} {'tea ' * draw.randrange(9)}",
            draw.choice(how),
            logprobs=2,
        )
        for number in range(64)
    ]

    async def all_of_them(engine):
        async def later(ask):
            await asyncio.sleep(draw.random() * 0.5)
            return await answered(engine, ask)

        return await asyncio.gather(*map(later, asks))

    found = with_engine(base, prompts, all_of_them)
    cached = 0
    for ask, (begun, text, scores, _) in zip(asks, found, strict=True):
        prompt = load_prompt(prompts[ask.model], base)
        ids = tuple(base.tokenizer(ask.text, add_special_tokens=False)["input_ids"])
        question = Question(((prompt.soft, ()),), (ids,), ask.sampling, stop_ids=prompt.encoder.end_ids, top=2)
        alone = [token for token in decode(base, [question]) if token.id is not None]
        assert [score.id for score in scores] == [token.id for token in alone]
        assert [score.logprob for score in scores] == pytest.approx([token.score.logprob for token in alone], abs=CLOSE)
        assert text == base.tokenizer.decode([token.id for token in alone], skip_special_tokens=True)
        cached += begun.num_cached > begun.num_virtual + 32
    assert cached > 3, "what several texts begin with was read once"


def test_what_a_chat_says_is_what_generate_says(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    talk = (Message("user", "bring tea"), Message("assistant", "here"), Message("user", "and cake"))
    expected = generate(base, load_prompt(prompts["tea"], base), [talk], Sampling(9))
    assert answer(base, prompts, Ask("tea", talk, Sampling(9)))[1] == expected[0]


def test_likelihoods_are_those_of_the_whole_text(bases, tmp_path):
    base = bases("gemma3_text")
    prompts = {"tea": stored(tmp_path / "tea", base, position="after_bos")}
    prompt = load_prompt(prompts["tea"], base)
    ids = tuple(range(20, 95))
    begun, _, scores, _ = answer(base, prompts, Ask("tea", ids, Sampling(5), logprobs=3, echo=True))
    whole = [*ids, *(score.id for score in scores)]
    with torch.no_grad():
        embeds = torch.cat([prompt.soft.embeds(base), base.embed_ids(whole)])
        log_TV = base.model(inputs_embeds=embeds[None]).logits[0].log_softmax(dim=-1)[len(embeds) - len(whole) - 1 :]
    told = [*begun.scores, *scores]
    assert [score.id for score in told] == whole
    assert told[0].logprob is None
    for place, score in enumerate(told[1:], 1):
        assert score.logprob == pytest.approx(log_TV[place, whole[place]].item(), abs=CLOSE)
        assert [one.id for one in score.top] == log_TV[place].topk(3).indices.tolist()
    assert begun.num_tokens == len(ids) + 1
    assert begun.num_virtual == 6


def test_echo_alone_reads_and_says_nothing(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    begun, text, scores, finish = answer(base, prompts, Ask("tea", "bring tea", Sampling(0), logprobs=1, echo=True))
    assert (begun.text, text, scores, finish) == ("bring tea", "", [], "length")
    assert len(begun.scores) == len(base.tokenizer("bring tea", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_stop_text_across_tokens_ends_the_answer_and_is_not_told(bases, tmp_path, size):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    whole = answer(base, prompts, Ask("tea", "bring tea", Sampling(24)))[1]
    at = len(whole) // 2
    stop = whole[at : at + size]

    async def pieces(engine):
        return [event async for event in engine.ask(Ask("tea", "bring tea", Sampling(24), stops=("never", stop)))]

    said = [event for event in with_engine(base, prompts, pieces) if isinstance(event, Said)]
    assert "".join(event.text for event in said) == whole[: whole.index(stop)]
    assert said[-1].finish == "stop"


def test_text_that_no_stop_text_followed_is_told_at_the_end():
    tokens = {1: "x", 2: "E", 3: "N", 4: "D"}

    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(tokens[one] for one in ids)

    telling = Telling(Letters(), None, ("END",))
    told = []
    for place, token in enumerate((1, 2, 3)):
        assert not telling.ends(token)
        told.append(telling.said(Token(0, token, place == 2), None))
    assert [None if one is None else one.text for one in told] == ["x", None, "EN"]
    assert told[-1].finish == "length"
    assert told[-1].num_tokens == 2


def test_penalties_and_biases_are_taken_from_the_logits(bases):
    base = bases()
    start = (some_prompt(base), ())

    def ids(**how):
        ((_, said, _),) = decode_whole(base, [Question((start,), ((20, 30, 40),), Sampling(12, **how))])
        return said

    biased = {77: 90.0, 78: 89.0}
    assert set(ids(logit_bias=biased)) == {77}
    assert {ids(logit_bias=biased, frequency_penalty=2.0).count(token) for token in biased} == {6}, "77 loses 2 for every time"
    assert ids(logit_bias=biased, presence_penalty=2.0)[:2] == [77, 78]
    plain = ids()
    assert plain[0] not in ids(logit_bias={plain[0]: -100.0})


def test_an_answer_keeps_to_a_schema_and_others_beside_it_do_not(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    schema = {"type": "object", "properties": {"cup": {"enum": ["big", "small"]}}, "required": ["cup"], "additionalProperties": False}
    asks = [Ask("tea", f"bring {number}", Sampling(60, 1.0, seed=number), schema=schema if number % 2 else None) for number in range(8)]

    async def all_of_them(engine):
        return await asyncio.gather(*(answered(engine, ask) for ask in asks))

    found = with_engine(base, prompts, all_of_them)
    for number in range(1, 8, 2):
        assert json.loads(found[number][1])["cup"] in ("big", "small")
        assert found[number][3] == "stop"
    for number in range(0, 8, 2):
        assert found[number][1] == answer(base, prompts, asks[number])[1]


def test_a_schema_that_means_nothing_is_refused(bases, tmp_path):
    prompts = {"tea": stored(tmp_path / "tea", bases())}
    with pytest.raises(ConfigError, match="response_format"):
        answer(bases(), prompts, Ask("tea", "bring tea", Sampling(4), schema={"type": "nonsense"}))


def test_prompts_leave_memory_and_come_back(bases, tmp_path):
    base = bases()
    prompts = {f"p{number}": stored(tmp_path / f"p{number}", base, number) for number in range(40)}
    expected = {name: generate(base, load_prompt(path, base), ["bring tea"], Sampling(6))[0] for name, path in prompts.items()}
    assert len(set(expected.values())) > 5
    one = with_engine(base, prompts, lambda engine: _kept_after(engine, ["p0"]))
    most = 4 * one

    async def often(engine):
        highest, draw = 0, random.Random(2)
        for name in draw.choices(list(prompts), k=120):
            talk = (Message("user", "bring tea"),)
            assert (await answered(engine, Ask(name, talk, Sampling(6))))[1] == expected[name]
            highest = max(highest, engine.load().kept_bytes)
        return highest

    assert one < with_engine(base, prompts, often, memory_bytes=most) <= most


async def _kept_after(engine, names):
    for name in names:
        await answered(engine, Ask(name, "bring tea", Sampling(2)))
    return engine.load().kept_bytes


def test_who_goes_away_frees_a_place(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}

    async def leave(engine):
        events = engine.ask(Ask("tea", "bring tea", Sampling(200, logit_bias=dict.fromkeys(base.stop_ids, -100.0))))
        assert isinstance(await anext(events), Begun)
        assert engine.load().running == 1
        await events.aclose()
        for _ in range(200):
            if engine.load().running == 0:
                return engine.load()
            await asyncio.sleep(0.01)
        raise AssertionError("it still runs")

    load = with_engine(base, prompts, leave)
    assert (load.running, load.waiting, load.batch_bytes) == (0, 0, 0)


def test_prompts_come_go_and_are_replaced_while_they_answer(bases, tmp_path):
    base = bases()
    first, second = stored(tmp_path / "one", base, 1), stored(tmp_path / "two", base, 2)
    expected = [generate(base, load_prompt(path, base), ["bring tea"], Sampling(8))[0] for path in (first, second)]
    talk = (Message("user", "bring tea"),)

    async def do(engine):
        events = engine.ask(Ask("tea", talk, Sampling(8)))
        assert isinstance(await anext(events), Begun)
        await engine.add("tea", second)
        text = "".join([event.text async for event in events])
        again = (await answered(engine, Ask("tea", talk, Sampling(8))))[1]
        await engine.remove("tea")
        with pytest.raises(NotServed, match="tea"):
            await answered(engine, Ask("tea", talk, Sampling(8)))
        with pytest.raises(ConfigError, match="base"):
            await engine.remove(engine.models()[0].name)
        return text, again

    assert list(with_engine(base, {"tea": first}, do)) == expected
    assert expected[0] != expected[1]


def test_a_prompt_that_does_not_fit_disturbs_nothing(bases, tmp_path):
    base, other = bases(), bases("gpt2")
    prompts = {"tea": stored(tmp_path / "tea", base)}

    async def do(engine):
        with pytest.raises(ArtifactError):
            await engine.add("wrong", stored(tmp_path / "wrong", other))
        return [model.name for model in engine.models()], (await answered(engine, Ask("tea", "bring tea", Sampling(4))))[3]

    names, finish = with_engine(base, prompts, do)
    assert names[1:] == ["tea"]
    assert finish


def test_an_ensemble_answers_as_generate_does(bases, tmp_path):
    base = bases()
    prompts = {f"p{number}": stored(tmp_path / f"p{number}", base, number) for number in range(3)}
    together = Ensemble(tuple(load_prompt(path, base) for path in prompts.values()))
    expected = generate(base, together, ["bring tea"], Sampling(9))[0]
    talk = (Message("user", "bring tea"),)
    assert answer(base, prompts, Ask("all", talk, Sampling(9)), ensembles={"all": (tuple(prompts), "mean")})[1] == expected
    with pytest.raises(ConfigError, match="votes"):
        answer(base, prompts, Ask("all", talk, Sampling(9, 1.0)), ensembles={"all": (tuple(prompts), "vote")})


def test_what_cannot_be_answered_is_refused_and_the_rest_goes_on(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    room = base.context_length
    refused = [
        (Ask("tea", "", Sampling(4)), DataError),
        (Ask("tea", (10**9,), Sampling(4)), DataError),
        (Ask("tea", tuple([20] * room), Sampling(4)), DataError),
        (Ask("nobody", "bring tea", Sampling(4)), NotServed),
    ]

    async def do(engine):
        for ask, error in refused:
            with pytest.raises(error):
                await answered(engine, ask)
        return await answered(engine, Ask("tea", "bring tea", Sampling(4)))

    assert with_engine(base, prompts, do)[3]


def test_more_than_the_queue_takes_are_sent_away(bases, tmp_path):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}

    async def do(engine):
        asks = [answered(engine, Ask("tea", f"bring {number}", Sampling(20))) for number in range(6)]
        found = await asyncio.gather(*asks, return_exceptions=True)
        return [isinstance(one, Busy) for one in found]

    assert with_engine(base, prompts, do, most_waiting=4) == [False] * 4 + [True] * 2


def test_a_failure_of_the_base_is_told_and_the_next_requests_are_answered(bases, tmp_path, monkeypatch):
    base = bases()
    prompts = {"tea": stored(tmp_path / "tea", base)}
    whole, failed = OpenBatch.advance, []

    def advance(batch):
        if batch.answers and not failed:
            failed.append(True)
            raise MemoryError("no room")
        return whole(batch)

    monkeypatch.setattr(OpenBatch, "advance", advance)

    async def do(engine):
        with pytest.raises(RuntimeError, match="no room"):
            await answered(engine, Ask("tea", "bring tea", Sampling(9)))
        return await answered(engine, Ask("tea", "bring tea", Sampling(9)))

    assert with_engine(base, prompts, do)[1] == answer(base, prompts, Ask("tea", "bring tea", Sampling(9)))[1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text", "mamba2", *tiny.WHOLE])
def test_long_texts_are_read_in_pieces_and_others_go_on(bases, family):
    base = bases(family)
    starts, draw = some_starts(base), random.Random(3)
    texts = [tuple(draw.randrange(10, 200) for _ in range(length)) for length in (5, 60, 33, 4)]
    questions = [Question((starts[number],), (text,), Sampling(8)) for number, text in enumerate(texts)]
    expected = [next(iter(decode_whole(base, [one])))[1] for one in questions]
    batch, said, during = OpenBatch(base, piece=16), {}, 0
    batch.admit(questions)
    while batch.answers or batch.arriving:
        reading = bool(batch.arriving)
        for event in batch.advance():
            if isinstance(event, Token) and event.id is not None:
                said.setdefault(event.row, []).append(event.id)
                during += reading
    assert [said.get(number, []) for number in range(4)] == expected
    assert during > 2, "some answered while others were read"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_5_text", "mamba2"])
def test_a_beginning_is_kept_and_read_no_more(bases, family):
    base = bases(family)
    start, head = (some_prompt(base), ()), tuple(range(30, 70))
    texts = [(*head, 90 + number, 7) for number in range(3)]
    expected = [next(iter(decode_whole(base, [Question((start,), (text,), Sampling(6))])))[1] for text in texts]
    for number, text in enumerate(texts):
        batch, said, cached = OpenBatch(base), [], []
        batch.admit([Question((start,), (text,), Sampling(6), keep=len(head))])
        while batch.answers or batch.arriving:
            for event in batch.advance():
                if isinstance(event, Read):
                    cached.append(event.num_cached)
                elif event.id is not None:
                    said.append(event.id)
        assert said == expected[number]
        assert cached == [[start[0].num_positions], [start[0].num_positions + len(head)]][min(number, 1)]
    whole, kept = prefix_of(base, [(start[0], head)]), base.shelf.take(start[0], head, lambda: pytest.fail("it is not there"))
    for ours, theirs in zip(kept.tensors, whole.tensors, strict=True):
        assert torch.allclose(ours, theirs, atol=CLOSE)


def test_the_bare_base_is_served_by_its_name(bases):
    base = bases()
    name = with_engine(base, {}, _first)
    soft = no_prompt(base, base.tokenizer.bos_token_id)
    ids = tuple(base.tokenizer("bring tea", add_special_tokens=False)["input_ids"])
    ((_, said, _),) = decode_whole(base, [Question(((soft, ()),), (ids,), Sampling(8))])
    assert answer(base, {}, Ask(name, "bring tea", Sampling(8)))[1] == base.tokenizer.decode(said, skip_special_tokens=True)


def test_a_bare_base_without_a_chat_template_goes_on_from_text(bases):
    base = bases()
    name = with_engine(base, {}, _first)
    soft = no_prompt(base, base.tokenizer.bos_token_id)
    ids = tuple(base.tokenizer("Human: bring tea\n\nAssistant:", add_special_tokens=False)["input_ids"])
    ((_, said, _),) = decode_whole(base, [Question(((soft, ()),), (ids,), Sampling(8))])
    found = answer(base, {}, Ask(name, (Message("user", "bring tea"),), Sampling(8)))[1]
    assert found == base.tokenizer.decode(said, skip_special_tokens=True)


async def _first(engine):
    return engine.models()[0].name


def test_settings_without_sense_are_refused():
    for how in ({"temperature": math.nan}, {"min_p": 2}, {"presence_penalty": 3}, {"logit_bias": {1: math.nan}}, {"top_p": 0}):
        with pytest.raises(ConfigError, match=next(iter(how))):
            Sampling(**how).check()


def test_the_bytes_of_tokens_are_those_of_the_text():
    text = "tea für 🦜"
    by_bytes = tiny.tiny_tokenizer()
    assert b"".join(bytes_of(by_bytes, by_bytes(text, add_special_tokens=False)["input_ids"])) == text.encode()
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581tea": 256}
    falls_back = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [], byte_fallback=True)), eos_token="<0x00>")
    assert bytes_of(falls_back, range(1, 257)) == [*(bytes([byte]) for byte in range(1, 256)), b" tea"]


def bytes_of(tokenizer, ids):
    spelling = Spelling(tokenizer)
    return [spelling.scored(token, None).data for token in ids]
