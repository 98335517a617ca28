"""The benchmarks: rows of the wanted lengths, and a comparison from end to end on a tiny model. Times are never judged."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import tiny

from softprompt.encode import make_encoder

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other as scripts do

import rows  # noqa: E402
import train_speed  # noqa: E402
import workloads  # noqa: E402

KEYS = {
    "workload", "device", "dtype", "ours_samples_per_second", "peft_samples_per_second", "ratio", "ours_peak_bytes", "peft_peak_bytes",
    "memory_ratio", "loss_difference", "gradient_cosine", "pairs", "machine", "peft_setting", "steps", "examples_per_step",
    "virtual_tokens", "mean_tokens", "mean_supervised",
}  # fmt: skip


@pytest.mark.parametrize("name", workloads.WORKLOADS)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_rows_have_the_lengths_of_their_workload(tmp_path, name, adds_bos):
    # the template alone takes 20 of the tiny tokenizer's tokens: the shortest rows grow, unless they may be that long
    workload = workloads.WORKLOADS[name]
    profile = replace(workload.profile, shortest=max(workload.profile.shortest, 60 if workload.profile.share else 25))
    encoder = make_encoder(tiny.tiny_tokenizer(adds_bos=adds_bos), "human-assistant")
    made = rows.make_rows(replace(workload, profile=profile), 40, encoder, None, seed=0)
    encoded = rows.read_rows(str(rows.write_rows(tmp_path / "rows.jsonl", made)), encoder, profile.longest)
    lengths = [len(row) + adds_bos for row in encoded]
    assert len(encoded) == 40
    assert profile.shortest <= min(lengths) < max(lengths) <= profile.longest
    assert fmean(lengths) == pytest.approx(profile.mean, rel=0.05)
    if profile.labels:
        assert {row.num_supervised for row in encoded} == set(profile.labels)
    else:
        assert fmean(row.num_supervised for row in encoded) == pytest.approx(profile.share * profile.mean, rel=0.05)


def test_rows_come_from_a_data_file(tmp_path):
    answers = ["one short answer", "another answer which is a good deal longer than the first one", "一个简短的回答"]
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"instruction": "Say.", "input": "", "output": answer} for answer in answers])
    encoder = make_encoder(tiny.tiny_tokenizer(), "human-assistant")
    taken = rows.make_rows(workloads.WORKLOADS["tutorial"], 5, encoder, str(data), seed=0)
    assert [row["completion"] for row in taken] == [*answers, *answers[:2]]
    joined = rows.make_rows(workloads.WORKLOADS["long"], 3, encoder, str(data), seed=0)
    encoded = rows.read_rows(str(rows.write_rows(tmp_path / "rows.jsonl", joined)), encoder, 1024)
    assert all(900 <= len(row) + 1 <= 1024 and 0.75 < row.num_supervised / len(row) < 0.85 for row in encoded)
    assert all(answers[1] in row["completion"] for row in joined)


def test_a_comparison_from_end_to_end(tmp_path, monkeypatch, capsys):
    model, out = tiny.tiny_folder(tmp_path / "model"), tmp_path / "out.json"
    how = ["--workload", "tutorial", "--steps", "2", "--pairs", "1", "--dtype", "float32", "--head-tolerance", "0"]
    monkeypatch.setattr(sys, "argv", ["train_speed.py", "--model", str(model), "--json", str(out), *how])
    # one thread: beside other work, threads of a tiny model wait for each other longer than they compute
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train_speed.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result) >= KEYS
    assert result["dtype"] == result["peft_setting"]["dtype"] == "float32"
    assert result["peft_setting"]["batch_size"] == 2
    assert result["pairs"][0]["ours"]["samples"] == result["pairs"][0]["tutorial"]["samples"] == 32
    assert result["loss_difference"] < 1e-4
    assert result["gradient_cosine"] > 0.999
    assert min(result["ours_peak_bytes"], result["peft_peak_bytes"]) > 0
    assert "gradient cosine" in capsys.readouterr().out
