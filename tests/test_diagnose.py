"""`diffmbrl diagnose`: end to end at a small size, a report that is a function of its data, saved policies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Neural, tasks
from diffmbrl.cli import main as cli
from diffmbrl.jobs.configs import DiagnoseConfig
from diffmbrl.jobs.diagnose import resolve
from diffmbrl.jobs.policies import load_policy, save_policies
from diffmbrl.report import rebuild
from diffmbrl.report.health_report import headline, text
from diffmbrl.report.skeleton import RunData, of_kind
from diffmbrl.runs import metrics

SETTING = DiagnoseConfig("lqr", (3, 6), None, None, (4,), {}, 64, 0.1, 0)


def test_end_to_end(folder, capsys):
    words = "diagnose lqr --horizons 3 6 --starts 64 --hidden 4 --scale 2 --param mass=2 --key 3"
    assert cli.main(words.split()) == 0
    out, err = capsys.readouterr()
    [run] = (folder / "runs").iterdir()
    assert (
        err == "" and run.name.startswith("lqr-diagnose-") and out.splitlines()[-1] == f"report: {run / 'report.html'}"
    )
    assert (
        "[1/1] gradient health 2/2  T = 6" in out and "BPTT is healthy up to T = 6" in out and "Suggested: bptt" in out
    )
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    config = json.loads((run / "config.json").read_text())
    assert (config["job"], config["horizons"], config["parameters"]) == ("diagnose", [3, 6], {"mass": 2.0})

    records, damage = metrics.read_metrics(run / "metrics.jsonl")
    rows, [verdict] = of_kind(records, "health"), of_kind(records, "verdict")
    assert damage is None and [row["horizon"] for row in rows] == [3, 6]
    assert all(len(row["norms"]) == 64 and len(row["contributions"]) == row["horizon"] for row in rows)
    assert verdict["estimator"] == "bptt" and verdict["states"] == ["good", "good"]

    page = (run / "report.html").read_bytes()
    assert page.count(b"<svg") == 6 and b"http://" not in page and b"https://" not in page
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("norms", "signal", "errors", "bias", "curvature", "contributions")
                     for kind in ("png", "svg")}  # fmt: skip
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page

    # Names and numbers that do harm are text, and what is not finite leaves the page whole.
    hostile = folder / "hostile"
    shutil.copytree(run, hostile)
    config |= {"task": "<script>alert(1)</script>", "of": "<b>&"}
    (hostile / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (hostile / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= dict.fromkeys(("plain_norm", "plain_snr", "bias_size", "condition", "growth", "refinement"), "nan")
    lines[1] |= {"float32": "inf", "norms": ["inf"] * 64, "contributions": ["nan"] * 6, "state": "<i>non-finite"}
    (hostile / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = rebuild(hostile).read_text()
    assert "<script>" not in shown and "<b>" not in shown and "<i>" not in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "lqrr"}, "unknown task 'lqrr'; did you mean 'lqr'?"),
        ({"horizons": (0, 5)}, "a horizon must be a whole number of at least 1, got 0"),
        ({"horizons": (5, 5)}, "each horizon can be named once, got 5 5"),
        ({"horizons": (6, 5)}, "horizons must increase, got 6 5"),
        ({"horizons": ()}, "horizons needs at least one number of steps"),
        ({"starts": 3}, "starts must be at least 64"),
        ({"std": -0.1}, "std must be a finite positive number, got -0.1"),
        ({"scale": float("nan")}, "scale must be a finite number of at least 0, got nan"),
        ({"hidden": (0,)}, "hidden needs at least one layer of at least one unit, got [0]"),
        ({"key": -1}, "key must be a whole number from 0"),
        ({"parameters": {"mas": 1.0}}, "did you mean 'mass'?"),
        ({"policy": "nowhere", "hidden": ()}, "'nowhere' is not a run: expected RUN, RUN:method or RUN:method:seed"),
    ],
)
def test_bad_settings(change, message, folder):
    with pytest.raises(ValueError) as refused:
        resolve(replace(SETTING, **change))
    assert message in str(refused.value)


@pytest.fixture
def run(folder):
    """What a comparison leaves: two rates, three seeds, of which nothing was measured."""
    task = tasks.lqr(horizon=5)
    policies = jax.vmap(lambda k: Neural.init(task, hidden=(4,), key=k))(jax.random.split(jax.random.key(0), 6))
    place = folder / "run:1"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"task": "lqr", "hidden": [4]}))
    records = [{"kind": "eval", "method": "adam", "rate": rate, "update": 0, "seconds": 0, "train": [J] * 3, "test": [J] * 3}
               for rate, J in ((0.1, -2.0), (0.2, -1.0))]  # fmt: skip
    (place / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    save_policies(place, "adam", policies, rates=[0.1, 0.2], seeds=3)
    return place, task, policies


def test_saved_policies_come_back(run):
    place, task, policies = run
    for name, lane in [("run:1", 3), ("run:1:adam", 3), ("run:1:adam:2", 5)]:
        saved = load_policy(name, task)
        assert (saved.method, saved.rate, saved.seed) == ("adam", 0.2, lane - 3)
        wanted = jax.tree.map(lambda x: x[lane], policies)  # noqa: B023
        assert jax.tree.structure(saved.policy) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(saved.policy), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == b.dtype and bool(jnp.all(a == b))
    assert not any(b"pickle" in path.read_bytes() for path in (place / "policies").iterdir())


def test_policies_that_are_not_what_they_should_be(run):
    place, task, _ = run

    def refused(name, task=task):
        with pytest.raises(ValueError) as error:
            load_policy(name, task)
        return str(error.value)

    assert "is of task 'lqr', not 'pendulum-swingup'" in refused("run:1", tasks.pendulum_swingup())
    assert "unknown method of the run 'adma'; did you mean 'adam'?" in refused("run:1:adma")
    assert "the run has seeds 0 to 2, got 3" in refused("run:1:adam:3")
    assert "the seed of a policy must be a whole number, got 'x'" in refused("run:1:adam:x")
    (place / "config.json").write_text(json.dumps({"task": "lqr", "hidden": [5]}))
    assert "needs" in refused("run:1")
    file = place / "policies" / "adam.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "SHA-256 is another" in refused("run:1")
    shutil.rmtree(place / "policies")
    assert "has no policies" in refused("run:1")


def test_scale_and_policy_exclude_each_other(folder, capsys):
    with pytest.raises(ValueError, match="--scale is for a random initial policy"):
        resolve(replace(SETTING, policy="run", scale=0.1, hidden=()))
    assert cli.main(["diagnose", "lqr", "--policy", "run", "--hidden", "4"]) == 2
    assert "--hidden is for a random initial policy" in capsys.readouterr().err


def test_scale_is_of_the_last_layer():
    default, small = (resolve(replace(SETTING, scale=scale)).policy for scale in (None, 0.01))
    np.testing.assert_allclose(small.net.weights[-1], 0.01 * default.net.weights[-1], rtol=1e-6)
    np.testing.assert_array_equal(small.net.weights[0], default.net.weights[0])


def test_a_diagnosis_cut_short_says_so():
    assert text(RunData({}, {}, [], [], Path("figures"))) == headline([]) == "The diagnosis has not ended."
