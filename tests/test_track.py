"""Sinks beside metrics.jsonl: what is written is read back (TensorBoard: test_render.py), and one that fails is left out."""

import importlib
import json
import struct

import numpy as np
import pytest

from diffmbrl.cli import main as cli
from diffmbrl.cli.commands import COMMANDS
from diffmbrl.runs import check_sinks, tracked
from diffmbrl.runs import track as tracking
from diffmbrl.runs.track import TrackedPoint, points


def history(folder) -> list[dict[str, float]]:
    """Rows of an offline run of Weights & Biases: a log in blocks of 32 kB, of records in one piece or in several."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[import-not-found]

    [path] = (folder / "wandb").glob("offline-run-*/*.wandb")
    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record, whole = Record.FromString(whole), b""
            if record.HasField("history"):
                rows.append({"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: the extra `track`")
    folder, notes = tmp_path, []
    with tracked(lambda record: None, ["wandb"], folder, {"task": "lqr"}, notes.append) as write:
        for update in range(3):
            write({"kind": "eval", "method": "adam", "rate": 0.1, "update": update, "test": [1.0, 2.0 + update]})
        write({"kind": "eval", "method": "ilqr", "rate": None, "update": 0, "test": [5.0]})
    importlib.import_module("wandb").teardown()  # its service writes behind our back: wait for it
    rows = history(folder)
    assert notes == []
    assert [row["adam 0,1/test"] for row in rows[:3]] == [1.5, 2.0, 2.5]
    assert [row["adam 0,1/step"] for row in rows[:3]] == [0, 1, 2] and rows[3]["ilqr/test"] == 5.0


def test_what_is_plotted():
    said = {
        "kind": "iteration",
        "method": "mpc",
        "real_steps": 20,
        "episodes": [[1.0, 3.0], []],
        "said": {"model_error": [0.5, 0.7]},
    }
    [point] = points(said | {"rejected": [0, 4], "seconds": 1.5})
    assert point[:2] == ("mpc", 20)
    assert point.values == {
        "episodes": 2.0,
        "episodes/seed 0": 2.0,
        "rejected": 2.0,
        "seconds": 1.5,
        "model_error": pytest.approx(0.6),
    }
    assert points({"kind": "foresight", "method": "mpc"}) == []
    [point] = points(
        {"kind": "eval", "method": "adam", "rate": None, "update": 1, "damping": [np.nan, 1.0], "label": "x"}
    )
    assert np.isnan(point.values["damping"]) and set(point.values) == {"damping"}


class Breaks:
    """Fails at its second point, or at once."""

    def __init__(self, folder, config):
        if config.get("at once"):
            raise OSError("no room")
        self.points = []

    def write(self, point):
        if self.points:
            raise RuntimeError("gone")
        self.points.append(point)

    def close(self) -> None:
        raise AssertionError("a sink that has failed is not closed")


@pytest.mark.parametrize("config", [{}, {"at once": True}])
def test_a_sink_that_fails_is_left_out_and_noted_once(tmp_path, monkeypatch, config):
    good = []

    class Keeps(Breaks):
        write = lambda self, point: good.append(point)  # noqa: E731
        close = lambda self: good.append(None)  # noqa: E731

    monkeypatch.setattr(tracking, "SINKS", {"tensorboard": Breaks, "wandb": Keeps})
    written, notes = [], []
    names = ["tensorboard"] if config else ["tensorboard", "wandb"]
    with tracked(written.append, names, tmp_path, config, notes.append) as write:
        for update in range(4):
            write({"kind": "eval", "method": "adam", "update": update, "test": [1.0]})
    assert len(written) == 4 and len(notes) == 1
    said = "OSError: no room" if config else "RuntimeError: gone"
    assert notes[0] == f"--track tensorboard failed and is left out from here on: {said}"
    assert good == (
        [] if config else [TrackedPoint("adam", k, {"test": 1.0, "test/seed 0": 1.0}) for k in range(4)] + [None]
    )


def test_a_sink_that_is_not_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown sink of --track 'tensorbord'; did you mean 'tensorboard'"):
        check_sinks(["tensorbord"])
    with pytest.raises(ValueError, match="each sink can be named once"):
        check_sinks(["tensorboard", "tensorboard"])
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "lqr", "--track", "wandb", "--out", str(tmp_path / "run")]) == 2
    assert "--track wandb needs wandb: pip install 'diffmbrl[track]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_command_that_runs_takes_it():
    for name in ("compare", "learn", "race", "plan", "resume"):
        assert "track" in {field.name for field, *_ in COMMANDS[name].options()}
