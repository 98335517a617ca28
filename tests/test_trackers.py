"""Trackers, each for real and offline: the curves of a run, its losses and answers, and what an evaluation finds."""

import json
import sqlite3
import sys
import time
from pathlib import Path

import pytest

from softprompt import cli
from softprompt.config import TrainConfig
from softprompt.trackers import TABLES, Sheet, tracking
from softprompt.training import train

AWKWARD = Sheet("awkward", ("name", "score", "a|b"), (("水 | tea\nnext", 0.5, None), ("<b>", 1, "x")))


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = next(path.parent for path in folder.rglob("events.out.tfevents.*") if path.parent.name == "softprompt")
    reader = EventAccumulator(str(place))
    reader.Reload()
    scalars = {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
    texts = {name: reader.Tensors(name)[-1].tensor_proto.string_val[0].decode() for name in reader.Tags()["tensors"]}
    return scalars, {name.removesuffix("/text_summary"): _table(text) for name, text in texts.items()}


def _table(text):
    first, _, *rest = ([cell.strip() for cell in line[2:-2].split(" | ")] for line in text.split("\n"))
    return first, rest


def mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'softprompt'")
    run = client.search_runs(experiment.experiment_id)[0]  # the latest
    assert run.info.status == "FINISHED"
    scalars = {name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    tables = {}
    for file in client.list_artifacts(run.info.run_id):
        table = json.loads(Path(client.download_artifacts(run.info.run_id, file.path, str(folder))).read_text())
        tables[file.path.removesuffix(".json")] = (table["columns"], table["data"])
    return scalars, tables


def trackio(folder):
    (database,) = (folder / "trackio").rglob("softprompt*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    connection.close()
    scalars, tables = {}, {}
    for _, step, text in (row for row in rows if row[0] == rows[-1][0]):
        for name, value in json.loads(text).items():
            if isinstance(value, dict):
                tables[name] = (list(value["_value"][0]), [list(row.values()) for row in value["_value"]])
            else:
                scalars.setdefault(name, []).append((step, value))
    return scalars, tables


def wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    place = (folder / "wandb" / "latest-run").resolve()
    scalars, tables, records = {}, {}, []
    deadline = time.monotonic() + 60
    while not (records and records[-1].HasField("exit")):  # written by a process of W&B's own, which may lag behind
        assert time.monotonic() < deadline, f"{place} has no end"
        records = [Record.FromString(record) for record in _records(next(place.glob("*.wandb")).read_bytes())]
    for record in records:
        for item in record.history.item:
            (name, *part), value = item.nested_key, json.loads(item.value_json)
            if part == ["path"]:
                table = json.loads((place / "files" / value).read_text())
                tables[name] = (table["columns"], table["data"])
            elif not part and not name.startswith("_"):
                scalars.setdefault(name, []).append((record.history.step.num, value))
    return scalars, tables


def _records(file):
    """The records of LevelDB's log format: blocks of 32 KiB, of pieces with checksum, length and kind (1 whole, 2 to 4 parts)."""
    at, parts = 7, b""  # the file begins with seven bytes of its own
    while at + 7 <= len(file):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        if at + 7 + length > len(file):
            return
        parts += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


READERS = {"tensorboard": tensorboard, "mlflow": mlflow, "trackio": trackio, "wandb": wandb}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for databases: MLflow takes seconds to make one, W&B and trackio look for their places once."""
    return tmp_path_factory.mktemp("trackers")


@pytest.fixture(params=sorted(READERS))
def tracker(request, shared, tmp_path, monkeypatch):
    """(name, read): a tracker that keeps everything on this disk, and a function that reads its latest run back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(shared))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(shared / "trackio"))
    return request.param, lambda: READERS[request.param](tmp_path if request.param == "tensorboard" else shared)


def test_every_tracker_of_the_configuration_writes_tables_and_is_read_here():
    (names,) = (field.annotation.__args__[0].__args__ for key, field in TrainConfig.model_fields.items() if key == "trackers")
    assert set(names) == set(TABLES) == set(READERS)


def test_a_run_reports_curves_losses_and_answers_then_its_evaluation(tracker, make_config, monkeypatch, capsys, tmp_path):
    name, read = tracker
    config = make_config("train.steps=3", f"train.trackers=['{name}']")
    *_, finished = train(config)
    scalars, tables = read()
    assert [step for step, _ in scalars["loss"]] == [1, 2, 3]
    assert [step for step, _ in scalars["eval_loss"]] == [0, 3]
    assert scalars["eval_loss"][-1][1] == pytest.approx(finished.result["eval_loss_after"], rel=1e-5)
    columns, rows = tables["prompts"]
    (only,) = rows
    assert only[0] == "seed-0"
    assert float(only[columns.index("eval_loss_after")]) == pytest.approx(finished.result["eval_loss_after"], abs=1e-4)
    columns, rows = tables["samples"]
    assert [row[:2] for row in rows[:2]] == [["bring tea", "tea"], ["please bring coffee", "coffee"]]

    words = ["eval", tmp_path / "run", "model.device=cpu", "--answers", "--json", tmp_path / "eval.json"]
    monkeypatch.setattr(sys, "argv", ["softprompt", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code, capsys.readouterr().err
    result = json.loads((tmp_path / "eval.json").read_text())
    _, tables = read()
    columns, rows = tables["contestants"]
    assert [row[0] for row in rows] == list(result["contestants"])
    for row in rows:
        low, high = result["intervals"][row[0]]["loss"]
        shown = [float(row[columns.index(column)]) for column in ("loss", "loss from", "loss to")]
        assert shown == pytest.approx([result["contestants"][row[0]]["loss"], low, high], abs=1e-4)
    columns, rows = tables["answers"]
    assert columns == ["question", "wanted", *result["contestants"]]
    assert [row[1] for row in rows] == ["tea", "coffee", "水", "milk", "juice", "咖啡", "tea"]


def test_any_text_fits_into_a_table(tracker, make_config, tmp_path):
    name, read = tracker
    with tracking([name], make_config(), tmp_path / "run", "one") as track:
        track.table(AWKWARD, 0)
    for _ in range(50):  # W&B's own process writes the file, on a busy machine some time after the run has ended
        if "awkward" in (tables := read()[1]):
            break
        time.sleep(0.2)
    columns, rows = tables["awkward"]
    if name == "tensorboard":
        assert (columns[2], rows[0][0], len(rows[0])) == ("a\\|b", "水 \\| tea<br>next", 3)
    else:
        assert columns == list(AWKWARD.columns)
        assert rows == [list(row) for row in AWKWARD.rows]


def test_a_command_can_leave_the_run_s_trackers_out(make_config, monkeypatch, tmp_path):
    config = make_config("train.steps=1", "train.trackers=['tensorboard']")
    list(train(config))
    before = sorted((tmp_path / "run").rglob("events*"))
    monkeypatch.setattr(sys, "argv", ["softprompt", "eval", str(tmp_path / "run"), "model.device=cpu", "train.trackers=[]"])
    with pytest.raises(SystemExit):
        cli.main()
    assert sorted((tmp_path / "run").rglob("events*")) == before
