"""The open batch: a question gets the same tokens whatever joins or leaves beside it, and with its own settings."""

import random
from dataclasses import replace
from itertools import islice

import pytest
import tiny
import torch
from test_invariants import some_prompt

from softprompt.engine import decode as decode_module
from softprompt.engine.decode import OpenBatch, Question, Token, decode, decode_whole, fitting
from softprompt.engine.prompt import deepened, no_prompt, shapes_of
from softprompt.engine.slots import BLOCK
from softprompt.sampling import Sampling

FAMILIES = ["bloom", "llama", "mistral", "gemma3_text", "gpt2", "phi3", *tiny.RECURRENT, *tiny.WHOLE]
HOW = (
    Sampling(9),
    Sampling(14, temperature=1.5, top_p=0.95, top_k=50, seed=7),
    Sampling(5, temperature=0.8, seed=1),
    Sampling(11, temperature=1.5, top_k=9),
)


def some_starts(base):
    """Prompts of two kinds and five lengths, before and after BOS, one with a text behind it."""
    rows = [some_prompt(base, length, position, seed=length) for length, position in ((6, "start"), (2, "after_bos"), (9, "start"))]
    deep = [deepened(base, rows[0].rows_PH, "start", tiny.BOS)] if shapes_of(base.prefill([base.embed_ids([0])]).layers) else []
    return [*((one, ()) for one in (*rows, *deep, no_prompt(base, tiny.BOS))), (rows[1], (50, 60, 70))]


def some_questions(base, count, seed=0):
    draw, starts = random.Random(seed), some_starts(base)
    texts = [tuple(draw.randrange(10, 200) for _ in range(draw.randrange(1, 12))) for _ in range(count)]
    return [Question((draw.choice(starts),), (text,), draw.choice(HOW)) for text in texts]


def alone(base, question):
    ((_, ids, ended),) = decode_whole(base, [question])
    return ids, ended


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_join_and_leave_and_nothing_else_changes(bases, family):
    base = bases(family)
    questions = some_questions(base, 14)
    expected = [alone(base, question) for question in questions]
    draw, batch, said = random.Random(1), OpenBatch(base), {}
    dropped, joined_beside_others = set(), 0
    waiting = list(questions)
    while waiting or batch.answers:
        count = draw.randrange(1, 4)
        if waiting and (not batch.answers or draw.random() < 0.5):
            joined_beside_others += bool(batch.answers)
            batch.admit(waiting[:count])
            waiting = waiting[count:]
        for token in batch.advance():
            if isinstance(token, Token) and token.id is not None:
                said.setdefault(token.row, []).append(token.id)
        if batch.answers and draw.random() < 0.1:
            gone = draw.choice(batch.answers).number
            dropped.add(gone)
            batch.drop({gone})
    assert joined_beside_others > 2
    assert dropped, "somebody left before the end"
    for number, (ids, _) in enumerate(expected):
        own = said.get(number, [])
        assert own == (ids[: len(own)] if number in dropped else ids)
    assert len({tuple(ids) for ids, _ in expected}) > 5


def test_a_queue_of_many_questions_fills_a_bounded_batch(bases, monkeypatch):
    base = bases()
    monkeypatch.setattr(decode_module, "ROWS", 5)
    monkeypatch.setattr(decode_module, "POSITIONS", 120)
    monkeypatch.setattr(decode_module, "WINDOW", 8)
    questions = some_questions(base, 30)
    rows, positions, admitted = [], [], []
    whole, step = OpenBatch.admit, OpenBatch.advance

    def admitting(batch, some):
        admitted.append((len(batch.answers), len(some)))
        return whole(batch, some)

    def advancing(batch):
        events = step(batch)
        rows.append(batch.num_rows)
        positions.append(batch.rows.slots.num_positions)
        return events

    monkeypatch.setattr(OpenBatch, "admit", admitting)
    monkeypatch.setattr(OpenBatch, "advance", advancing)
    found = {number: (ids, ended) for number, ids, ended in decode_whole(base, questions)}
    assert [found[number] for number in range(30)] == [alone(base, question) for question in questions]
    assert 3 <= max(rows) <= 5
    assert max(positions) <= 120 or max(rows) == 1
    assert any(before and joined for before, joined in admitted), "some joined a batch that went on"


def test_a_batch_that_never_empties_takes_bounded_memory_and_gives_it_back(bases, monkeypatch):
    base, rows, most = bases(), 8, 480
    monkeypatch.setattr(decode_module, "ROWS", rows)
    monkeypatch.setattr(decode_module, "POSITIONS", most)
    start = (some_prompt(base), ())
    never_stops = dict.fromkeys(base.stop_ids, -1e9)
    endless = [Question((start,), ((10 + number,),), Sampling(30 + number % 20, logit_bias=never_stops)) for number in range(200)]
    one_position = sum(part.nbytes // part.shape[-2] for part in base.prefill([base.embed_ids([10])]).tensors)
    batch, waiting, laid_out = OpenBatch(base), iter(endless), []
    for _ in range(4 * BLOCK):
        while fitting(batch, iter([endless[0]])):
            batch.admit([next(waiting)])
        batch.advance()
        laid_out.append(batch.rows.slots.num_bytes // one_position)
    assert batch.num_rows == rows
    assert max(laid_out) <= most + rows * BLOCK
    batch.drop({answer.number for answer in batch.answers[1:]})
    batch.answers[0].limit = 10 * BLOCK
    for _ in range(BLOCK + 1):
        batch.advance()
    assert batch.rows.slots.num_bytes // one_position <= batch.rows.slots.num_positions + BLOCK


def test_a_question_wider_than_the_batch_is_answered_alone(bases, monkeypatch):
    monkeypatch.setattr(decode_module, "POSITIONS", 3)
    questions = some_questions(bases(), 3)
    found = {number: (ids, ended) for number, ids, ended in decode_whole(bases(), questions)}
    assert [found[number] for number in range(3)] == [alone(bases(), question) for question in questions]


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "mamba2", *tiny.WHOLE])
def test_a_question_ends_where_it_is_told(bases, family):
    base, start = bases(family), (some_prompt(bases(family)), ())

    def after(count):
        said = []
        return lambda token: said.append(token) or len(said) == count

    endless = [Question((start,), ((10, number),), Sampling(8)) for number in range(20, 40)]
    endless = [question for question in endless if len(alone(base, question)[0]) == 8][:2]
    questions = [replace(question, ends=after(count)) for question, count in zip(endless, (2, 3), strict=True)]
    assert sorted((number, len(ids)) for number, ids, _ in decode_whole(base, questions)) == [(0, 2), (1, 3)]


def test_a_prompt_is_read_once_however_often_it_answers(bases, monkeypatch, tmp_path):
    base = tiny.tiny_base(tmp_path / "base")
    start, other = (some_prompt(base), ()), (some_prompt(base, 4, seed=5), (9, 8))
    read, prefill = [], type(base).prefill
    monkeypatch.setattr(type(base), "prefill", lambda self, embeds: read.append(len(embeds)) or prefill(self, embeds))
    for texts in (((10, 11),), ((12,), (13, 14))):
        list(decode(base, [Question((one,), (text,), Sampling(3)) for one in (start, other) for text in texts]))
    assert read == [1, 1]
    del start, other
    assert not len(base.shelf), "what nobody holds any more leaves the shelf"


def test_streams_can_be_interleaved_and_no_mode_stays_on(bases):
    base = bases()
    first, second = (some_questions(base, 4, seed) for seed in (1, 2))
    expected = [list(decode(base, questions)) for questions in (first, second)]
    streams = [decode(base, questions) for questions in (first, second)]
    found = [[], []]
    assert list(islice(streams[0], 1)) == expected[0][:1]
    found[0] += expected[0][:1]
    for _ in range(200):
        for own, stream in zip(found, streams, strict=True):
            own += islice(stream, 1)
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
    assert found == expected
