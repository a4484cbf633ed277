"""`diffmbrl plan`: plans and controllers end to end, records against Riccati, and a report that is a function of its data."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from diffmbrl import tasks
from diffmbrl.cli import main as cli
from diffmbrl.jobs.configs import PlanConfig
from diffmbrl.jobs.plan import resolve
from diffmbrl.methods import METHODS
from diffmbrl.render.shapes import Circle, Line
from diffmbrl.report.plan_report import _shape, sentence, shape_record, text
from diffmbrl.report.skeleton import RunData, of_kind
from diffmbrl.runs import metrics
from tests.problems import riccati

SETTING = PlanConfig("lqr", "ilqr", False, 6, None, 3, {}, {}, 0.0, 0, 2, 0, False)


def test_plans_are_riccatis_and_the_report_is_rebuilt(folder, capsys):
    words = "plan lqr --planner ilqr --horizon 6 --iterations 3 --starts 2 --key 5 --x64 --model-mismatch mass=1.2"
    assert cli.main(words.split()) == 0
    out, err = capsys.readouterr()
    [run] = (folder / "runs").iterdir()
    assert err == "" and out.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert "[2/2] start 1" in out and "gradient norm" in out and "In its model the plan was worth" in out
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    config = json.loads((run / "config.json").read_text())
    assert (config["job"], config["mismatch"], config["starts"]) == ("plan", {"mass": 1.2}, 2)

    records, damage = metrics.read_metrics(run / "metrics.jsonl")
    assert damage is None
    for result, trajectory in zip(of_kind(records, "result"), of_kind(records, "trajectory"), strict=True):
        optimum = riccati(tasks.lqr(horizon=6))
        assert result["model_return"] == pytest.approx(float(optimum.J(trajectory["s"][0])), rel=1e-6)
        assert result["return"] != pytest.approx(result["model_return"], rel=1e-3)
        np.testing.assert_allclose(trajectory["gains"], optimum.K, atol=1e-5)
        assert np.shape(trajectory["s"]) == (7, 2) and np.shape(trajectory["a"]) == (6, 1)
    assert len(of_kind(records, "frames")[0]["frames"]) == 7

    page = (run / "report.html").read_bytes()
    assert page.count(b"<svg") >= 3 and b"http://" not in page and b"https://" not in page
    for name in ("trajectory.png", "trajectory.svg", "returns.png", "animation-0.gif"):
        assert (run / "figures" / name).stat().st_size > 1000
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page


@pytest.mark.slow
def test_a_controller_on_a_late_and_noisy_plant(folder, capsys):
    words = "plan cartpole-balance --mpc --steps 5 --horizon 4 --starts 2 --noise 0.01 --delay 2 --out run"
    assert cli.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "[1/1] mpc of ilqr 5/5" in out and "ms a step" in out and "ilqr in the loop ends with" in out
    config = json.loads((folder / "run" / "config.json").read_text())
    assert (config["horizon"], config["steps"], config["iterations"]) == (4, 5, 1)
    records = metrics.read_metrics(folder / "run" / "metrics.jsonl")[0]
    for trajectory in of_kind(records, "trajectory"):
        a = np.asarray(trajectory["a"])
        # What arrives in the first two steps was sent before the episode.
        assert np.all(a[:2] == 0) and np.all(a[2:] != 0) and np.abs(a).max() <= 10
    page = (folder / "run" / "report.html").read_text()
    assert "on 0 of 2" in page or "on 1 of 2" in page or "on 2 of 2" in page


@pytest.mark.parametrize(
    "change, message",
    [
        ({"planner": "ilrq"}, "unknown planner 'ilrq'; did you mean 'ilqr'?"),
        ({"planner": "adam"}, "unknown planner 'adam'"),
        ({"starts": 0}, "starts must be at least 1, got 0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"key": -1}, "key must be a whole number from 0"),
        ({"steps": 5}, "--steps is for a controller: give --mpc too"),
        ({"delay": 1}, "--delay is for a controller: give --mpc too"),
        ({"devices": 0}, "devices must be a whole number of at least 1, got 0"),
        ({"mpc": True, "delay": -1}, "delay must be at least 0 steps, got -1"),
        ({"mpc": True, "horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"noise": -0.5}, "std of the noise must be finite and not negative, got -0.5"),
        ({"mismatch": {"maas": 1.2}}, "unknown parameter of task 'lqr' 'maas'; did you mean 'mass'?"),
        ({"mismatch": {"mass": 0.0}}, "the mismatch of mass must be a finite positive factor, got 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError) as refused:
        resolve(replace(SETTING, **change))
    assert message in str(refused.value)


def test_mismatch_and_parameters_multiply():
    prepared = resolve(
        replace(SETTING, task="cartpole-balance", parameters={"m_p": 0.2}, mismatch={"m_p": 1.5, "l": 2.0})
    )
    model, plant = prepared.model.dynamics, prepared.plant.dynamics.inner
    assert float(model.m_p) == pytest.approx(0.2) and float(plant.m_p) == pytest.approx(0.3)
    assert float(plant.l) == pytest.approx(1.0) and float(plant.m_c) == float(model.m_c)


def test_what_devices_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(
        "diffmbrl.jobs.plan.setting.mesh_of", lambda count: Mesh(np.array(jax.devices()[:1] * count), ("batch",))
    )
    for change, message in [
        ({}, "ilqr plans from one start after another, on one device, got 3: devices share the samples of"),
        ({"mpc": True}, "2 starts cannot be shared out evenly among 3 devices; the nearest that can: 3"),
        ({"planner": "cem"}, "256 samples cannot be shared out evenly among 3 devices; the nearest that can: 255"),
    ]:
        with pytest.raises(ValueError) as refused:
            resolve(replace(SETTING, devices=3, **change))
        assert message in str(refused.value)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.kind == "plan"])
def test_every_planner_is_offered(name):
    assert resolve(replace(SETTING, planner=name.replace("-", "_"))).solver.kind == "plan"


def test_shapes_survive_their_record():
    for shape in (Line(np.array([[0.0, 1.0], [0.5, -1.0]]), "ground"), Circle(np.array([0.1, 0.2]), 0.3, "target")):
        back = _shape(json.loads(json.dumps(shape_record(shape))))
        assert type(back) is type(shape) and back.role == shape.role
        np.testing.assert_allclose(back[0], shape[0])


def test_a_run_without_results_says_so():
    config = {"planner": "ilqr", "starts": 1, "mpc": False}
    assert text(RunData(config, {}, [], [], Path("figures"))) == sentence(config, []) == "No start has ended."
    result = {"return": float("nan"), "success": None, "model_return": None}
    assert "return of -" in sentence(config, [result])
