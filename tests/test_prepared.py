"""Rows in arrays: the same ids as one by one, kept for the next time under a name that never fits others, whole after any kill."""

import gzip
import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import AddedToken

import softprompt
from softprompt import prepared
from softprompt.config import load_config
from softprompt.data import Example, Loaded, Message, Reading, held_of, load_examples
from softprompt.encode import make_encoder
from softprompt.errors import ConfigError, DataError
from softprompt.events import Preparing, returned
from softprompt.flat import Flat, FlatWriter
from softprompt.prepared import Wanted, preparing
from softprompt.rows import encode_file, load_rows
from softprompt.training import train

OWN = "{% for m in messages %}{{ m.content }}|{% endfor %}{{ prompt }} {{ extra }}\n"
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = ("human-assistant", OWN, TURNS)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """A cache of its own, and rows that are few and yet many."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepared, "BATCH", 8)
    monkeypatch.setattr(prepared, "SMALL", 8)
    monkeypatch.setattr(prepared, "EARLY", 40)


def mixed_rows(count):
    """Questions, conversations, system turns, control tokens as text, empty answers, answers that are cut away."""
    kinds = (
        lambda n: {"prompt": f"question {n} 水", "completion": f"answer {n}", "extra": "x</s>y"},
        lambda n: {"prompt": f"says </s> and <pad> {n}", "completion": "<s>no</s>", "extra": ""},
        lambda n: {"messages": talk(f"a{n}", f"b{n}", "c", "d" * (n % 7)), "extra": "e"},
        lambda n: {"messages": [{"role": "system", "content": "Be brief."}, *talk(f"a{n}", "b" * n)], "extra": "e"},
        lambda n: {"prompt": f"long {n} " * 9, "completion": "late", "extra": ""},
        lambda n: {"prompt": f"{n}", "completion": "", "extra": ""},
    )
    return [kinds[n % len(kinds)](n) for n in range(count)]


def talk(*turns):
    return [{"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)]


def passes(monkeypatch):
    """The sources that are read from now on."""
    seen, read = [], Reading.__iter__

    def watched(self):
        seen.append(self.source)
        return read(self)

    monkeypatch.setattr(Reading, "__iter__", watched)
    return seen


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "rows").glob("*") if path.suffix != ".lock")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_the_ids_are_those_of_each_row_alone(tmp_path, template, adds_bos, kept):
    tokenizer = tiny.tiny_tokenizer(adds_bos=adds_bos)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<user>"), AddedToken("<assistant>")]})
    source = str(tiny.write_rows(tmp_path / "rows.jsonl", mixed_rows(60)))
    encoder = make_encoder(tokenizer, template)
    rows = encode_file(source, tokenizer, template=template, max_length=50, cache=kept)
    alone, number, rejected = load_examples(source), 0, []
    for example in alone.examples:
        try:
            wanted = encoder.encode(example, 50)
        except DataError as error:
            rejected.append((example.source, error.reason))
            continue
        assert rows.encoded[number] == wanted, example
        kept_turns = rows.examples[number]
        assert (kept_turns.messages, kept_turns.source, kept_turns.turns) == (example.messages, example.source, example.turns)
        assert dict(kept_turns.fields) == (dict(example.fields) if template == OWN else {})
        number += 1
    assert len(rows.encoded) == number > 20
    assert any(row.num_cut and row.num_lost for row in rows.encoded), "some were cut"
    assert sorted((one.source, one.reason) for one in rows.rejected) == sorted([*rejected, *((r.source, r.reason) for r in alone.rejected)])
    assert rows.fingerprint == alone.fingerprint
    assert bool(entries(tmp_path)) == kept


def test_a_start_from_many_rows_looks_at_some_of_them(tmp_path, make_config, bases, monkeypatch):
    from softprompt import init
    from softprompt.job import prepare

    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": chr(97 + n // 8)} for n in range(160)])
    asked, made = [], Flat.encoded
    monkeypatch.setattr(init, "LOOKED_AT", 20)
    monkeypatch.setattr(Flat, "encoded", lambda self, number: asked.append(number) or made(self, number))
    for source in ("vocab", "examples"):
        del asked[:]
        config = make_config(f"data.train={rows}", f"data.eval={rows}", f"prompt.init={source}", "prompt.length=40")
        note = returned(prepare(config, bases())).untrained["seed-0"].note
        assert sorted(asked) == list(range(0, 160, 8)), "spread evenly"
        assert "of 20 training rows" in note if source == "vocab" else "training rows" in note


def test_the_arrays_are_as_documented(tmp_path):
    source = str(tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(20)]))
    rows = encode_file(source, tiny.tiny_tokenizer())
    start, length = rows.column("start"), rows.column("length")
    assert (rows.flat.ids.dtype, rows.flat.supervised.dtype, start.dtype, length.dtype) == (np.int32, np.bool_, np.int64, np.int32)
    own = slice(start[3], start[3] + length[3])
    assert tiny.tiny_tokenizer().decode(rows.flat.ids[own]) == "Human: t3\n\nAssistant: b</s>"
    assert rows.flat.ids[own][rows.flat.supervised[own]].tolist() == [*tiny.tiny_tokenizer()("b", add_special_tokens=False)["input_ids"], 2]
    assert (rows.labels, [example.label for example in rows.examples[:3]]) == (("a", "b"), ["a", "b", "a"])
    assert isinstance(rows.flat.ids.base, np.memmap), "mapped, not read"


# ---- kept ----------------------------------------------------------------------------------------------------------


PLAIN = [{"prompt": f"question {n}", "completion": f"answer {n}", "other": f"o{n}"} for n in range(20)]


def load(tmp_path, *, tokenizer=None, template="human-assistant", date=None, system=None, num_tokens=None, **wanted):
    encoder = make_encoder(tokenizer or tiny.tiny_tokenizer(), template, date=date, system=system, num_tokens=num_tokens)
    return returned(preparing(encoder, Wanted(**{"source": str(tmp_path / "rows.jsonl"), "max_length": 60, **wanted})))


def test_the_second_time_nothing_is_read(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    seen = passes(monkeypatch)
    first, second = load(tmp_path), load(tmp_path)
    assert len(seen) == 1
    assert second.flat.rows.tolist() == first.flat.rows.tolist()
    assert (second.flat.ids.tolist(), second.fingerprint, second.notes) == (first.flat.ids.tolist(), first.fingerprint, first.notes)


def other_rows(tmp_path):
    tiny.write_rows(tmp_path / "rows.jsonl", [{**row, "prompt": row["prompt"].replace("q", "Q")} for row in PLAIN])


def moved_rows(tmp_path):
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")


def grown_tokenizer():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["question"])
    return tokenizer


CLOCK = "{{ strftime_now('%d %b %Y') }}" + TURNS
CHANGES = {
    "bytes": (other_rows, {}, {}),
    "place": (moved_rows, {}, {"source": "moved.jsonl"}),
    "template": (None, {}, {"template": TURNS}),
    "chat template": (
        None,
        {"tokenizer": tiny.chat_tokenizer(TURNS), "template": "chat"},
        {"tokenizer": tiny.chat_tokenizer(TURNS.replace("<", "[")), "template": "chat"},
    ),
    "date": (None, {"template": CLOCK, "date": "2026-01-01"}, {"template": CLOCK, "date": "2026-01-02"}),
    "system": (None, {}, {"system": "Be brief."}),
    "tokenizer": (None, {}, {"tokenizer": grown_tokenizer()}),
    "bos": (None, {}, {"tokenizer": tiny.tiny_tokenizer(adds_bos=False)}),
    "number of tokens": (None, {"num_tokens": 259}, {"num_tokens": 84}),
    "length": (None, {}, {"max_length": 30}),
    "limit": (None, {}, {"limit": 12}),
    "columns": (None, {}, {"columns": {"prompt": "other", "completion": "completion"}}),
    "label words": (None, {}, {"label_words": {"a": "b"}}),
    "range": (None, {}, {"source": "rows.jsonl[3:]"}),
    "several": (None, {}, {"source": ("rows.jsonl", "rows.jsonl")}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_another_name(tmp_path, monkeypatch, name):
    """Whatever decides about rows: with it changed, they are made anew, and equal to those that were never kept."""
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    change, before, after = CHANGES[name]
    load(tmp_path, **before)
    if change is not None:
        change(tmp_path)
    if "source" in after:
        names = [after["source"]] if isinstance(after["source"], str) else after["source"]
        places = tuple(str(tmp_path / one) for one in names)
        after = {**after, "source": places[0] if len(places) == 1 else places}
    seen = passes(monkeypatch)
    found, fresh = load(tmp_path, **{**before, **after}), load(tmp_path, **{**before, **after}, cache=False)
    assert len(seen) == 2, "read again, both times"
    assert found.flat.ids.tolist() == fresh.flat.ids.tolist()
    assert [found.flat.place(number) for number in range(len(found.flat.rows))] == [
        fresh.flat.place(number) for number in range(len(fresh.flat.rows))
    ]
    assert found.rejected == fresh.rejected


@pytest.mark.parametrize("change", ["code", "version"])
def test_other_code_is_another_name(tmp_path, monkeypatch, change):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    load(tmp_path)
    if change == "code":
        monkeypatch.setattr(prepared, "_code", lambda: "other")
    else:
        monkeypatch.setattr(prepared, "version", lambda package: "0.0")
    seen = passes(monkeypatch)
    load(tmp_path)
    assert len(seen) == 1


def test_a_file_in_a_folder_a_pattern_or_packed_is_noticed_when_it_changes(tmp_path, monkeypatch):
    (tmp_path / "many").mkdir()
    tiny.write_rows(tmp_path / "many" / "a.jsonl", PLAIN[:10])
    (tmp_path / "many" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(PLAIN[10]).encode()))
    seen = passes(monkeypatch)
    for source in (str(tmp_path / "many"), str(tmp_path / "many" / "*.jsonl*")):
        del seen[:]
        assert len(load(tmp_path, source=source).flat.rows) == len(load(tmp_path, source=source).flat.rows)
        assert len(seen) == 1
        (tmp_path / "many" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({**PLAIN[10], "prompt": source}).encode()))
        again = load(tmp_path, source=source)
        assert again.flat.turns(10)[0][1] == source
        tiny.write_rows(tmp_path / "many" / "c.jsonl", [{"prompt": source, "completion": "new"}])
        assert len(load(tmp_path, source=source).flat.rows) == 12
        (tmp_path / "many" / "c.jsonl").unlink()


def test_few_rows_and_data_cache_false_keep_nothing(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    seen = passes(monkeypatch)
    assert load(tmp_path, cache=False).flat.ids.tolist() == load(tmp_path, cache=False).flat.ids.tolist()
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN[:7])
    load(tmp_path)
    assert entries(tmp_path) == []
    assert len(seen) == 3


def test_a_damaged_folder_is_made_anew(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    first = load(tmp_path).flat.ids.tolist()
    (place,) = (tmp_path / "cache" / "rows" / name for name in entries(tmp_path))
    for file in ("ids.npy", "facts.json", "rows.npy"):
        (place / file).write_bytes((place / file).read_bytes()[:-9])
        seen = passes(monkeypatch)
        assert load(tmp_path).flat.ids.tolist() == first
        assert len(seen) == 1


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    names: dict[int, str] = {}
    for length in (50, 51, 52):
        load(tmp_path, max_length=length)
        (names[length],) = set(entries(tmp_path)) - set(names.values())
        os.utime(tmp_path / "cache" / "rows" / names[length], (length, length))
    load(tmp_path, max_length=50)  # used again
    size = sum(file.stat().st_size for file in (tmp_path / "cache" / "rows" / names[50]).iterdir())
    monkeypatch.setattr(prepared, "CACHE_BYTES", int(2.5 * size))
    held = load(tmp_path, max_length=51)
    os.utime(tmp_path / "cache" / "rows" / names[51], (51, 51))
    load(tmp_path, max_length=53)
    left = set(entries(tmp_path))
    assert names[50] in left
    assert {names[51], names[52]} & left == set()
    assert len(left) == 2
    assert held.flat.ids[:5].tolist() == load(tmp_path, max_length=51).flat.ids[:5].tolist(), "what is mapped stays"
    monkeypatch.setattr(prepared, "CACHE_BYTES", 1)
    load(tmp_path, max_length=54)
    assert len(entries(tmp_path)) == 1, "the newest is kept, however large"


# ---- kills, several processes, changes meanwhile -------------------------------------------------------------------


@contextmanager
def child(work):
    """A copy of this process that does the work and ends."""
    number = os.fork()
    if not number:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield number
    finally:
        os.waitpid(number, 0)


def killed_at(moment, tmp_path, monkeypatch):
    """Runs until the moment-th write or renaming, and no further; whether that came."""

    def work():
        count = 0

        def counted(real):
            def call(*given, **how):
                nonlocal count
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*given, **how)

            return call

        for owner, name in ((FlatWriter, "end_batch"), (FlatWriter, "close"), (Path, "rename"), (os, "fsync"), (Path, "write_text")):
            setattr(owner, name, counted(getattr(owner, name)))
        load(tmp_path)

    number = os.fork()
    if not number:
        work()
        os._exit(0)
    _, status = os.waitpid(number, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signals")
def test_after_a_kill_at_any_moment_the_rows_are_right_and_nothing_is_left_over(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN * 5)
    wanted = load(tmp_path, cache=False).flat
    for moment in range(1, 21):
        assert killed_at(moment, tmp_path, monkeypatch), moment
        found = load(tmp_path).flat
        assert (found.rows.tolist(), found.ids.tolist()) == (wanted.rows.tolist(), wanted.ids.tolist())
        (name,) = entries(tmp_path)
        assert sorted(file.name for file in (tmp_path / "cache" / "rows" / name).iterdir()) == [
            "facts.json",
            "ids.npy",
            "rows.npy",
            "supervised.npy",
            "texts.npy",
        ]
        for file in (tmp_path / "cache" / "rows" / name).iterdir():
            file.unlink()
        (tmp_path / "cache" / "rows" / name).rmdir()
    assert not killed_at(1000, tmp_path, monkeypatch)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_of_two_that_start_at_once_one_reads(tmp_path, monkeypatch, caplog):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN * 5)
    read, log = Reading.__iter__, tmp_path / "log"

    def watched(self):
        with log.open("a") as file:
            file.write("read\n")
        time.sleep(0.3)
        yield from read(self)

    monkeypatch.setattr(Reading, "__iter__", watched)
    with child(lambda: load(tmp_path)):
        while not log.exists():
            time.sleep(0.01)
        found = load(tmp_path).flat
    assert log.read_text() == "read\n"
    assert "another process prepares the same rows" in caplog.text
    assert found.ids.tolist() == load(tmp_path, cache=False).flat.ids.tolist()


def test_without_locks_the_rows_of_the_faster_process_are_taken(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    close = FlatWriter.close

    def slow(self):
        with monkeypatch.context() as patch:
            patch.setattr(FlatWriter, "close", close)
            load(tmp_path)  # another one begins later and is done earlier
        close(self)

    @contextmanager
    def no_locks(place):
        yield

    monkeypatch.setattr(prepared, "_alone", no_locks)
    monkeypatch.setattr(FlatWriter, "close", slow)
    found = load(tmp_path)
    assert found.flat.ids.tolist() == load(tmp_path, cache=False).flat.ids.tolist()
    assert len(entries(tmp_path)) == 1


def test_the_draft_of_a_process_that_is_gone_goes_with_the_next_rows(tmp_path):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    draft = tmp_path / "cache" / "rows" / ".abc.123.draft"
    draft.mkdir(parents=True)
    load(tmp_path)
    assert not draft.exists()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    read = Reading.__iter__

    def changed(self):
        for number, row in enumerate(read(self)):
            if number == 12:
                with rows.open("a") as file:
                    file.write(json.dumps(PLAIN[0]) + "\n")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "__iter__", changed)
        with pytest.raises(DataError, match=r"rows.jsonl changed while it was read: start again"):
            load(tmp_path)
    assert entries(tmp_path) == []
    assert len(load(tmp_path).flat.rows) == 21


def test_ctrl_c_while_rows_are_read_leaves_nothing(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    read = Reading.__iter__

    def interrupted(self):
        for number, row in enumerate(read(self)):
            if number == 17:
                assert len(list((tmp_path / "cache" / "rows").glob(".*.draft"))) == 1, "it is being written"
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Reading, "__iter__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path)
    assert entries(tmp_path) == []
    assert len(load(tmp_path).flat.rows) == 20


def test_a_disk_without_room_is_one_sentence(tmp_path, monkeypatch):
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FlatWriter, "close", full)
    with pytest.raises(DataError, match=r"tokenized rows cannot be written to .*: No space left on device; SOFTPROMPT_CACHE names another"):
        load(tmp_path)
    assert entries(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "cache").write_text("no folder can be made here, whoever runs this")
    tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    assert len(load(tmp_path).flat.rows) == 20


# ---- said soon -----------------------------------------------------------------------------------------------------


def test_a_pass_says_how_far_it_is(tmp_path, make_config):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    events = list(train(make_config(f"data.train={rows}", "train.steps=1")))
    said = [event for event in events if isinstance(event, Preparing)]
    assert [(one.num_rows, one.total) for one in said] == [(8, 20), (16, 20), (20, 20)]
    assert '"preparing"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train(make_config(f"data.train={rows}", "train.steps=1", f"train.out={tmp_path / 'again'}"))
    assert not [event for event in again if isinstance(event, Preparing)], "kept"


def test_too_many_unusable_rows_are_said_before_all_is_read(tmp_path, make_config, monkeypatch):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{n}", "completion": "a" if n % 2 else ""} for n in range(400)])
    consumed, read = [], Reading.__iter__
    monkeypatch.setattr(Reading, "__iter__", lambda self: (consumed.append(row) or row for row in read(self)))
    with pytest.raises(DataError, match=r"^20 of the first 40 rows rejected, data.max_rejected allows 3: .*rows.jsonl:1 \(and 19 more\): "):
        list(train(make_config(f"data.train={rows}", "data.max_rejected=3")))
    assert len(consumed) <= 56
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"^200 of the first 400 rows rejected"):
        list(train(make_config(f"data.train={rows}", "data.max_rejected=199")))


def test_for_rows_that_are_too_long_the_length_that_keeps_them_is_said(tmp_path, make_config):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "q" * (10 + n % 5), "completion": "yes"} for n in range(50)])
    with pytest.raises(DataError, match=r"data.max_length = 39 keeps them whole$"):
        list(train(make_config(f"data.train={rows}", "data.max_length=8")))
    *_, finished = train(make_config(f"data.train={rows}", f"data.eval={rows}", "data.max_length=39", "train.steps=1"))
    assert finished.result["steps"] == 1


# ---- splits, sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [False, True])
def test_a_share_held_out_is_that_of_the_rows_one_by_one(tmp_path, make_config, bases, system):
    """Copies stay on one side; held-out rows without a system turn get that of all training rows."""
    rows = [*PLAIN, *PLAIN[:5], {"prompt": "long " * 40, "completion": "late"}]
    source = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    config = load_config({**make_config().model_dump(exclude_none=True), "data": {"train": str(source), "eval_fraction": 0.3}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 100, "max_rejected": 9})})
    if system:
        of_training = [not held for held in held_of([f"{row['prompt']}" for row in rows], 0.3, 0)]
        told = [{**row, "system": "Be brief."} if trained else row for row, trained in zip(rows, of_training, strict=True)]
        tiny.write_rows(tmp_path / "rows.jsonl", told)
    loaded = load_examples(str(source))
    sides = held_of([example.turns for example in loaded.examples], 0.3, 0)
    encoder = make_encoder(bases().tokenizer, "human-assistant")
    found, train_rows, held = load_rows(config, encoder)
    for side, part in ((False, train_rows), (True, held)):
        own = tuple(example for example, on in zip(loaded.examples, sides, strict=True) if on is side)
        usable = [example for example in own if "long" not in example.messages[-2].content]
        assert [row.source for row in part.encoded] == [example.source for example in usable]
        assert part.fingerprint == Loaded(own, ()).fingerprint
        assert list(part.encoded) == [found.encode(example, 100) for example in usable]
    assert len(train_rows.rejected) + len(held.rejected) == 1
    if system and all(example.messages[0].role == "system" for example, on in zip(loaded.examples, sides, strict=True) if not on):
        assert found.system == "Be brief."


def test_a_folder_of_files_is_read_by_name(tmp_path, make_config):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PLAIN[:9]), folder / "b.parquet", row_group_size=4)
    tiny.write_rows(folder / "a.jsonl", PLAIN[9:])
    (folder / "deep" / "c.csv").write_text("prompt,completion\nlast,one\n")
    (folder / "README.md").write_text("not rows")
    found = load_examples(str(folder))
    assert [example.source for example in found.examples[:2]] == [f"{folder / 'a.jsonl'}:1", f"{folder / 'a.jsonl'}:2"]
    assert found.examples[11].source == f"{folder / 'b.parquet'}: row 1"
    assert found.examples[-1].response == "one"
    assert len(found.examples) == 21


def test_weights_decide_how_much_of_each_source_a_step_has(tmp_path, make_config, bases):
    from softprompt.job import prepare

    for name, count in (("a", 30), ("b", 6)):
        tiny.write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": name} for n in range(count)])
    sources = json.dumps([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    config = make_config(f"data.train={sources}", "data.weights=[1, 3]", "train.steps=9")
    setup = returned(prepare(config, bases()))
    for step in range(9):
        names = [Path(row.source.partition(":")[0]).stem for row in setup.rows_of(step)[0]]
        assert names.count("b") == 3
    with pytest.raises(ConfigError, match=r"data.weights needs a list of sources in data.train"):
        make_config("data.weights=[1, 3]")
    empty = tiny.write_rows(tmp_path / "b.jsonl", [{"prompt": "x" * 900, "completion": "late"}])
    with pytest.raises(DataError, match=r"data.weights: no usable training row is left of source 2, whose weight is 3"):
        returned(prepare(make_config(f"data.train={sources}", "data.weights=[1, 3]", "data.max_rejected=1", "train.steps=9"), bases()))
    assert empty.exists()


def test_a_hub_data_set_is_streamed_where_that_is_wanted(tmp_path, make_config, monkeypatch):
    """datasets' own streaming, of a file that stands for the hub."""
    import datasets

    rows, real, asked = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN), datasets.load_dataset, []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, streaming))
        return real("json", data_files=str(rows), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    streamed, whole = (load_examples("team/rows", limit=9, stream=on) for on in (True, False))
    assert asked == [("team/rows", True), ("team/rows", False)]
    assert streamed == whole
    assert len(whole.examples) == 9
    events = list(train(make_config("data.train=team/rows", "data.stream=true", "train.steps=1")))
    assert asked[-1] == ("team/rows", True)
    assert events[-1].result["steps"] == 1


@pytest.mark.parametrize("template", ["human-assistant", "{{ prompt }} ({{ other }}): "])
def test_eval_and_doctor_read_what_the_run_has_kept(tmp_path, make_config, monkeypatch, template):
    """The examples of a few-shot context too, with their columns where the template uses them."""
    from softprompt.arguments import read_arguments
    from softprompt.doctor import diagnose

    rows = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    tree = make_config().model_dump(exclude_none=True)
    tree["data"] = {"train": str(rows), "eval_fraction": 0.3, "template": template}
    list(train(load_config(tree)))
    seen = passes(monkeypatch)
    given = read_arguments(tmp_path / "run", (), None, None, ())
    held, shots = given.rows()
    assert (len(held.examples), len(shots.examples)) == (6, 14)
    diagnose(tmp_path / "run")
    assert seen == []
    whole = {example.source: example for example in load_examples(str(rows)).examples}
    for example in (*held.examples, *shots.examples):
        assert example.messages == whole[example.source].messages
        assert dict(example.fields) == (dict(whole[example.source].fields) if "other" in template else {})


def test_the_doctor_needs_no_training_rows(tmp_path, make_config):
    from softprompt.doctor import diagnose

    rows = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    list(train(make_config(f"data.train={rows}", "train.steps=2")))
    rows.unlink()
    assert list(diagnose(tmp_path / "run")) == ["seed-0"]


# ---- the same everywhere -------------------------------------------------------------------------------------------


def test_a_run_from_kept_rows_is_a_run_from_rows_in_memory(tmp_path, make_config, monkeypatch):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", PLAIN)
    results = []
    for number, few in enumerate((10**9, 8, 8)):
        monkeypatch.setattr(prepared, "SMALL", few)
        list(train(make_config(f"data.train={rows}", f"train.out={tmp_path / str(number)}")))
        results.append((tmp_path / str(number) / "prompt" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


def test_a_row_comes_back_with_tools_and_weights():
    from softprompt.data.examples import turns_text
    from softprompt.flat import StoredExamples

    call = {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    examples = [
        Example((Message("user", "a"), Message("assistant", "b", False), Message("user", "c"), Message("assistant", "d")), "x\ny:1"),
        Example((Message("user", "a"), Message("assistant", "", True, call), Message("tool", "1"), Message("assistant", "b")), "z", "l"),
        Example((Message("user", "a"), Message("assistant", "b")), "t", tools=({"name": "f"}, "user")),
    ]
    writer = FlatWriter()
    for example in examples:
        writer.add(None, example, turns_text(example), label=0 if example.label else -1, part=0, unlearned=0)
    writer.close()
    assert list(StoredExamples(writer.in_memory(), ("l",))) == examples


def test_rows_are_a_sequence(tmp_path):
    source = str(tiny.write_rows(tmp_path / "rows.jsonl", PLAIN))
    rows = encode_file(source, tiny.tiny_tokenizer())
    assert len(list(rows.encoded)) == len(rows.examples) == 20
    assert rows.encoded[-1] == rows.encoded[19]
    assert rows.examples[2:4] == (rows.examples[2], rows.examples[3])
    with pytest.raises(IndexError):
        rows.encoded[20]
    assert softprompt.encode_file is encode_file


def test_the_hash_of_a_split_is_that_of_its_rows():
    numbers = list(range(50)) * 2
    random.Random(0).shuffle(numbers)
    assert sum(held_of(numbers, 0.2, 1)) == 20
    assert replace(Loaded((), ()), notes=("x",)).fingerprint == Loaded((), ()).fingerprint
