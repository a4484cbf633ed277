"""One tiny comparison of a method of each kind, from the first record to the report."""

import io
import json
import shutil
from dataclasses import asdict, replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.core import NoTerminal
from diffmbrl.diagnostics.sample_statistics import SampleStatistics
from diffmbrl.info import EvaluationCounts
from diffmbrl.jobs import compare as comparison
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
from diffmbrl.jobs.compare import compare_methods, resolve
from diffmbrl.jobs.configs import CompareConfig, RunOptions
from diffmbrl.jobs.policies import load_policy
from diffmbrl.methods import METHODS
from diffmbrl.report import rebuild, summarise, table
from diffmbrl.rollout import episode_returns
from diffmbrl.runs import read_metrics
from tests.problems import of

# Swept over rates, sequential in its seeds, with a grid of dampings, with the true Hessian, and a planner.
ROWS = {name: METHODS[name] for name in ("adam", "lbfgs", "gauss-newton", "newton-cg", "ilqr")}
SETTING = CompareConfig(
    task="lqr",
    methods=tuple(ROWS),
    horizon=10,
    parameters={"mass": 1.5},
    hidden=(4,),
    seeds=2,
    starts=4,
    steps=5,
    budget=100.0,
    rates=(1e-2, 1e-1),
    continuation="discounts",
    x64=False,
    key=0,
)
PARAMETERS = 4 * 2 + 4 + 4 + 1
ARMS = [(name, rate) for name, row in ROWS.items() for rate in (SETTING.rates if row.rates else [None])]
EVALUATION = {
    "train",
    "test",
    "success",
    "J",
    "gradient_norm",
    "damping",
    "accepted",
    "nonfinite",
    *EvaluationCounts._fields,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    printed = io.StringIO()
    folder = compare_methods(SETTING, RunOptions(out=tmp_path_factory.mktemp("runs") / "tiny", stream=printed))
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def records(run):
    found, note = read_metrics(run[0] / "metrics.jsonl")
    assert note is None
    return found


def test_the_folder(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "provenance.json",
        "metrics.jsonl",
        "status.json",
        "checkpoints",
        "figures",
        "policies",
        "report.html",
    }
    config = json.loads((folder / "config.json").read_text())
    for name, value in asdict(SETTING).items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value), name
    assert config["held_out"] == comparison.HELD_OUT
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "finished" and status["ended"]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["x64"] is False and provenance["versions"]["jax"] == jax.__version__
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert {path.rsplit(".", 1)[1] for path in figures} == {"png", "svg"}
    assert {name[:-4] for name in figures if name.endswith("png")} == {n[:-4] for n in figures if n.endswith("svg")}
    assert all((folder / "figures" / name).stat().st_size > 1000 for name in figures)


def test_evaluations_of_policies_carry_the_spread_of_their_gradients(records):
    names = [f"spread_{name}" for name in SampleStatistics._fields]
    for e in of(records, "eval"):
        if METHODS[e["method"]].kind == "plan":
            assert not set(names) & set(e)
            continue
        assert all(len(e[name]) == SETTING.seeds for name in names)
        assert all(0 < x <= 1 for x in e["spread_tail"]) and e["spread_nonfinite"] == [0] * SETTING.seeds
    # |mean| is that of the gradient itself: at the start, of the same policies for all.
    first = [e for e in of(records, "eval", update=0) if METHODS[e["method"]].kind == "policy"]
    assert len({tuple(np.round(e["spread_norm"], 4)) for e in first}) == 1


def test_its_policies_come_back(run):
    """Of the best rate; the held-out return is that of the last evaluation."""
    folder, _ = run
    task = tasks.lqr(horizon=10, mass=1.5)
    assert {path.name for path in (folder / "policies").iterdir()} == {
        f"{name}.{kind}" for name, row in ROWS.items() if row.kind == "policy" for kind in ("json", "npz")
    }
    _, test, _ = draw_starts(task, SETTING.seeds, SETTING.starts, comparison.HELD_OUT, SETTING.key)
    [row] = [row for row in summarise(folder).rows if row.arm.method == "adam"]
    for seed in range(SETTING.seeds):
        saved = load_policy(f"{folder}:adam:{seed}", task)
        assert (saved.rate, saved.seed) == (row.arm.rate, seed)
        J = float(np.mean(episode_returns(saved.policy, task, test)))
        assert pytest.approx(row.arm["test"][-1][seed], rel=1e-5) == J


def test_every_method_at_every_rate_is_an_arm(records):
    arms = of(records, "arm")
    assert [(arm["method"], arm["rate"]) for arm in arms] == ARMS
    for arm in arms:
        row = ROWS[arm["method"]]
        assert (arm["order"], arm["policy_kind"], arm["label"]) == (row.order, row.kind, arm["method"])
        assert arm["compile_seconds"] > 0
        assert arm["parameters"] == (10 if row.kind == "plan" else PARAMETERS)
        assert sum(updates for _, updates, _ in arm["continuation"]) == SETTING.steps
    assert {record["kind"] for record in records} == {"arm", "eval", "gradient_profile", "path", "spectrum", "stop"}


def test_what_second_order_methods_say_of_their_models(run, records):
    paths = of(records, "path")
    assert {path["method"] for path in paths} == {
        name for name, row in ROWS.items() if row.order == 2 and row.kind == "policy"
    }
    for path in paths:
        last = of(records, "eval", method=path["method"])[-1]
        assert all(len(last[name]) == SETTING.seeds for name in ("agreement", "negative", "gap"))
        assert np.all(np.isfinite(last["agreement"])) and len(path["predicted"]) == len(path["dampings"])
    [gauss_newton] = of(records, "eval", method="gauss-newton", update=5)
    assert np.all((np.asarray(gauss_newton["gap"]) > 0) & (np.asarray(gauss_newton["gap"]) < 1))
    assert np.all(np.asarray(gauss_newton["curvature"]) > 0)
    assert "gap" not in of(records, "eval", method="adam", update=5)[0]
    names = {path.stem for path in (run[0] / "figures").iterdir()}
    assert {"model-gap", "model-agreement", "model-curvature", "model-negative", "model-path"} <= names


@pytest.mark.parametrize("method, rate", ARMS)
def test_evaluations(records, method, rate):
    evaluations = of(records, "eval", method=method, rate=rate)
    assert [e["update"] for e in evaluations] == list(range(SETTING.steps + 1))
    assert all(set(e) >= EVALUATION for e in evaluations)
    assert all(len(e[name]) == SETTING.seeds for e in evaluations for name in EVALUATION)
    assert evaluations[0]["seconds"] == 0 and np.all(np.diff([e["seconds"] for e in evaluations]) > 0)
    for name in EvaluationCounts._fields:
        counts = np.asarray([e[name] for e in evaluations])
        assert np.all(counts[0] == 0) and np.all(np.diff(counts, axis=0) >= 0)
    sequential = np.asarray([e["sequential"] for e in evaluations])
    assert np.all(np.diff(sequential, axis=0) > 0)
    assert np.all(np.isfinite([e["train"] for e in evaluations])) and not np.any(evaluations[-1]["nonfinite"])
    # A twentieth of an update's worth at the smaller rate of gradient descent, but better.
    assert np.all(np.asarray(evaluations[-1]["train"]) > evaluations[0]["train"])
    assert np.all(np.asarray(evaluations[-1]["test"]) > evaluations[0]["test"])
    [stop] = of(records, "stop", method=method, rate=rate)
    assert stop["reason"] == "5 updates"


def test_all_methods_start_from_the_same_policies_and_starts(records):
    policies = [e for e in of(records, "eval", update=0) if ROWS[e["method"]].kind == "policy"]
    for name in ("train", "test", "success"):
        np.testing.assert_allclose([e[name] for e in policies], [policies[0][name]] * len(policies), rtol=1e-5)
    # Seeds differ in both.
    assert policies[0]["train"][0] != policies[0]["train"][1] and policies[0]["test"][0] != policies[0]["test"][1]


def test_second_order_methods_are_ahead_after_five_updates(records):
    last = {(e["method"], e["rate"]): np.mean(e["train"]) for e in of(records, "eval", update=5)}
    assert last["gauss-newton", None] > max(last["adam", rate] for rate in SETTING.rates)
    # The exact optimum bounds them all.
    assert last["ilqr", None] >= max(last.values()) - 1e-5


def test_profiles_and_spectra(records):
    for kind, length in [("gradient_profile", 10), ("spectrum", PARAMETERS)]:
        for method, rate in ARMS:
            for when in ("start", "end"):
                [found] = of(records, kind, method=method, rate=rate, when=when)
                size = 10 if ROWS[method].kind == "plan" else length
                assert len(found["values"]) == size and np.all(np.isfinite(found["values"]))
    [spectrum] = of(records, "spectrum", method="gauss-newton", rate=None, when="start")
    assert spectrum["values"] == sorted(spectrum["values"], reverse=True)


def test_progress_was_shown(run):
    lines = run[1].splitlines()
    assert [line for line in lines if line.endswith(tuple(ROWS))] == [
        f"[{number}/{len(ROWS)}] {name}" for number, name in enumerate(ROWS, start=1)
    ]
    assert sum("5/5  return" in line for line in lines) == len(ROWS)


def test_the_report_can_be_rebuilt_from_its_data_alone(run, tmp_path):
    folder, _ = run
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "provenance.json", "metrics.jsonl", "status.json"):
        shutil.copy(folder / name, copy / name)
    page = rebuild(copy)
    assert page.read_bytes() == (folder / "report.html").read_bytes()
    for figure in (folder / "figures").iterdir():
        assert (copy / "figures" / figure.name).read_bytes() == figure.read_bytes()
    html = page.read_text()
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script src" not in html
    assert all(name in html for name in ROWS)


def test_the_table_names_every_method(run):
    text = table.text(summarise(run[0]))
    assert all(name in text for name in ROWS)


@pytest.mark.slow
def test_the_same_setting_is_the_same_run(run, records, tmp_path):
    again = compare_methods(
        replace(SETTING, methods=("adam", "ilqr")), RunOptions(out=tmp_path / "again", stream=io.StringIO())
    )
    for method, rate in [("adam", 1e-2), ("ilqr", None)]:
        for one, other in zip(
            of(records, "eval", method=method, rate=rate),
            of(read_metrics(again / "metrics.jsonl")[0], "eval", method=method, rate=rate),
            strict=True,
        ):
            assert {**one, "seconds": 0} == {**other, "seconds": 0} or (
                one["update"] == 0 and one["train"] == other["train"] and one["test"] == other["test"]
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ROWS])
def test_every_other_method_runs_and_is_in_the_report(name, tmp_path):
    setting = replace(SETTING, methods=(name,), continuation="default", steps=7)
    folder = compare_methods(setting, RunOptions(out=tmp_path / "run", stream=io.StringIO()))
    assert all(np.isfinite(e["train"]).all() for e in of(read_metrics(folder / "metrics.jsonl")[0], "eval"))
    assert name in (folder / "report.html").read_text()


class Stairs(eqx.Module):
    """Minus the action's size in steps: the derivative is zero wherever there is one."""

    def __call__(self, s, a):
        return -jnp.floor(1000 * jnp.abs(a[0])) / 1000


@pytest.mark.slow
def test_estimators_side_by_side_where_only_they_can_climb(tmp_path, monkeypatch):
    def stepped(name, *, horizon, **parameters):
        task = tasks.lqr(horizon=horizon)
        return eqx.tree_at(lambda t: (t.reward, t.terminal), task, (Stairs(), NoTerminal()))

    monkeypatch.setattr(comparison, "make", stepped)
    setting = replace(SETTING, methods=("adam",), rates=(1e-2,), horizon=6, starts=6, steps=3, continuation="none")
    with pytest.raises(ValueError, match="has no gradient in the action"):
        resolve(setting)
    setting = replace(setting, estimators=("likelihood-ratio-loo", "evolution"))
    found = []
    for out in ("one", "two"):
        folder = compare_methods(setting, RunOptions(out=tmp_path / out, stream=io.StringIO()))
        found.append(read_metrics(folder / "metrics.jsonl")[0])
    arms = of(found[0], "arm")
    assert [arm["method"] for arm in arms] == ["adam+likelihood-ratio-loo", "adam+evolution"]
    assert [arm["estimator"] for arm in arms] == ["likelihood-ratio-loo", "evolution"]
    for name in (arm["method"] for arm in arms):
        one, two = ([e["gradient_norm"] for e in of(records, "eval", method=name)][1:] for records in found)
        assert one == two  # the same key, the same noise
        assert all(norm > 0 for norm in np.ravel(one)) and len(set(np.ravel(one))) == np.size(one)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["estimators"] == list(setting.estimators)
    assert "adam+evolution" in (tmp_path / "one" / "report.html").read_text()


def test_a_budget_ends_a_method(tmp_path):
    folder = compare_methods(
        replace(SETTING, methods=("adam",), rates=(1e-2,), budget=1e-9),
        RunOptions(out=tmp_path / "short", stream=io.StringIO()),
    )
    found = read_metrics(folder / "metrics.jsonl")[0]
    assert [e["update"] for e in of(found, "eval")] == [0, 1]
    assert of(found, "stop")[0]["reason"] == "budget of 1e-09 s after 1 of 5 updates"


def test_a_run_that_fails_says_so(tmp_path, monkeypatch):
    def broken(self, done, updates):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchedPolicyRuns, "advance", broken)
    out = tmp_path / "failed"
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_methods(replace(SETTING, methods=("adam",), rates=(1e-2,)), RunOptions(out=out, stream=io.StringIO()))
    status = json.loads((out / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("failed", "RuntimeError: out of memory")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"task": "lqrr"}, "unknown task 'lqrr'; did you mean 'lqr'"),
        ({"methods": ("adam", "ilqrr")}, "unknown method 'ilqrr'; did you mean 'ilqr'"),
        ({"methods": ("adam", "adam")}, "each method can be named once, got adam adam"),
        ({"methods": ("gauss_newton", "gauss-newton")}, "each method can be named once"),
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"parameters": {"mas": 1.0}}, "unknown parameter of task 'lqr' 'mas'; did you mean 'mass'"),
        ({"parameters": {"mass": float("nan")}}, "mass of task 'lqr' must be a finite positive number, got nan"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"starts": -1}, "starts must be at least 1, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 4}, "5 stages need at least 5 updates, got 4"),
        ({"budget": 0.0}, "budget must be a positive number of seconds, got 0"),
        ({"budget": float("nan")}, "budget must be a positive number of seconds, got nan"),
        ({"rates": (1e-2, -1.0)}, "a learning rate must be a finite positive number, got -1"),
        ({"rates": (float("nan"),)}, "a learning rate must be a finite positive number, got nan"),
        ({"rates": (0.1, 0.1)}, "each learning rate can be named once, got 0.1 0.1"),
        ({"hidden": (4, 0)}, r"hidden needs at least one layer of at least one unit, got \[4, 0\]"),
        (
            {"methods": ("newton-dense",), "hidden": (40, 40)},
            r"newton-dense forms matrices .* at most 1500 parameters; hidden \[40, 40\] makes 1801",
        ),
        ({"estimators": ("truncate",)}, "unknown estimator 'truncate'; did you mean 'truncated'"),
        ({"estimators": ("bptt", "bptt")}, "each estimator can be named once, got bptt bptt"),
        ({"estimators": ("truncated",)}, "lbfgs takes no --estimator truncated: its line search"),
        ({"methods": ("ilqr",), "estimators": ("truncated",)}, "is for first-order methods .* none of ilqr takes one"),
        ({"continuation": "defualt"}, "unknown continuation 'defualt'; did you mean 'default'"),
        ({"key": -1}, "key must be a whole number from 0 to 4294967295, got -1"),
        ({"key": 2**32}, "key must be a whole number from 0 to 4294967295, got 4294967296"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_written(fields, message, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        compare_methods(replace(SETTING, **fields), RunOptions(out=out))
    assert not out.exists()


def test_a_good_setting_prepares_its_task():
    _, task, rows = resolve(replace(SETTING, methods=("gauss_newton",)))
    assert (task.horizon, [name for name, _ in rows]) == (10, ["gauss-newton"])
    np.testing.assert_array_equal(task.dynamics.B, tasks.lqr(mass=1.5).dynamics.B)


def test_a_task_without_a_gradient_is_for_methods_that_take_none():
    setting = replace(SETTING, task="heaviside", parameters={}, horizon=1)
    with pytest.raises(
        ValueError, match=r"'heaviside' has no gradient in the action .* use a method that does not diff"
    ):
        resolve(replace(setting, methods=("cem", "adam")))
    _, task, rows = resolve(replace(setting, methods=("cem", "mppi")))
    assert (task.name, [name for name, _ in rows]) == ("heaviside", ["cem", "mppi"])
