"""A sweep is its points, each as if it were run alone; what is finished is not run again; what is hostile is refused."""

import importlib.util
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from diffmbrl.cli import main as cli
from diffmbrl.jobs import compare
from diffmbrl.jobs.configs import CompareConfig, RunOptions
from diffmbrl.jobs.sweep import runner, sweep
from diffmbrl.jobs.sweep.groups import groups
from diffmbrl.jobs.sweep.points import parse
from diffmbrl.report import rebuild, skeleton, summary_text, sweep_report
from diffmbrl.runs import read_metrics as read_records

SETTING = {"task": "lqr", "method": "adam", "horizon": 5, "hidden": [3], "seeds": 2, "starts": 3, "steps": 4}
SETTING |= {"continuation": "none", "lr": 0.1}
GRID = {"lr": [0.01, 0.1], "param": {"mass": [1.0, 2.0]}}


def asked(setting=None, grid=None, random=None, **top):
    setting = {key: x for key, x in (SETTING if setting is None else setting).items() if key not in {**(grid or {})}}
    return parse({"setting": setting, "grid": grid or {}, "random": random or {}, **top})


# The file.

REFUSED = {
    "an unknown key": ('jbo = "compare"', "unknown key of a sweep 'jbo'; did you mean 'job'?"),
    "an unknown setting": ("[setting]\ntsak = 1", "'tsak'; did you mean 'task'?"),
    "an option of methods": ("[setting]\noption.rate = 1", "unknown key of [setting] of a sweep of compare 'option'"),
    "an unknown job": ('job = "plan"', "unknown job 'plan'; did you mean"),
    "no task": ('[setting]\nmethod = "adam"', "a sweep of compare needs a task"),
    "a name that leads out": ('name = "../../etc"', "name must be of letters, digits"),
    "a name that is HTML": ("name = '<script>'", "name must be of letters, digits"),
    "not TOML": ("[setting", "is not TOML"),
    "a task that is HTML": (
        "[setting]\ntask = '<b>x</b>'\nmethod = 'adam'\nlr = 0.1",
        "unknown task '<b>x</b>'; did you mean",
    ),
    "no list": ("[grid]\nlr = 0.1", "[grid] has lists of values: lr = [...]; got 0.1"),
    "a value twice": ("[grid]\nlr = [0.1, 0.1]", "[grid] lr has a value twice"),
    "text for a number": ("[setting]\nseeds = 'many'", "seeds must be a whole number, got 'many'"),
    "half a seed": ("[grid]\nseeds = [1.5]", "seeds must be a whole number, got 1.5"),
    "nan": ("[grid]\nlr = [nan]", "lr must be a finite number, got nan"),
    "given twice": ("[setting]\nlr = 0.1\n[grid]\nlr = [0.1]", "lr is given twice"),
    "random without a number": ("[random]\nlr = { low = 1, high = 2 }", "[random] needs points"),
    "an empty range": ("[random]\npoints = 2\nlr = { low = 2, high = 1 }", "low below high"),
    "log of 0": ("[random]\npoints = 2\nlr = { low = 0, high = 1, scale = 'log' }", "above 0 if log"),
    "an unknown scale": ("[random]\npoints = 2\nlr = { low = 1, high = 2, scale = 'lg' }", "did you mean 'log'?"),
    "random text": ("[random]\npoints = 2\nmethod = { low = 1, high = 2 }", "[random] draws numbers"),
    "too many": (f"[grid]\nkey = {list(range(101))}\nseeds = {list(range(1, 101))}\n[setting]\ntask='lqr'\nmethod='a'",
                 "this makes 10,100 points; a sweep has at most 10,000"),
    "no rate": ("[setting]\ntask = 'lqr'\nmethod = 'adam'", "method adam needs a learning rate: lr = 0.001"),
    "a rate too many": ("[setting]\ntask = 'lqr'\nmethod = 'ilqr'\nlr = 0.1", "method ilqr takes no lr: leave it out"),
    "an unknown parameter": ("[setting]\ntask = 'lqr'\nmethod = 'ilqr'\nparam.mas = 2", "did you mean 'mass'?"),
    "a wrong value in one point": (
        "[setting]\ntask = 'lqr'\nmethod = 'adam'\n[grid]\nlr = [0.1, -1]", "got -1 (at lr = -1.0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text, wanted", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(text, wanted, folder, capsys):
    (folder / "bad.toml").write_text(text)
    assert cli.main(["sweep", "bad.toml"]) == 2
    out, err = capsys.readouterr()
    assert wanted in err and err.count("\n") == 1 and out == ""
    assert [path.name for path in folder.iterdir()] == ["bad.toml"]


def test_yaml_is_refused_unread(folder, capsys):
    (folder / "s.yaml").write_text("task: !!python/object/apply:os.system ['touch pwned']\n")
    assert cli.main(["sweep", "s.yaml"]) == 2
    assert "'s.yaml' is YAML, whose tags may name any Python object; a sweep is TOML" in capsys.readouterr().err
    assert cli.main(["sweep", "nothing.toml"]) == 2
    assert "cannot read 'nothing.toml'" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["s.yaml"]


# The points.


def test_every_combination_of_grid_and_draws():
    found = asked(grid=GRID | {"seeds": [1, 2]}, random={"points": 3, "key": {"low": 0, "high": 9}})
    settings = [point.setting for point in found.points]
    assert found.varied == ("lr", "param.mass", "seeds", "key")
    assert len({(s["lr"], s["param.mass"], s["seeds"]) for s in settings}) == 8
    assert all(s["task"] == "lqr" and 0 <= s["key"] <= 9 for s in settings)


def test_a_longer_sweep_begins_with_the_shorter_one():
    lr = {"low": 1e-4, "high": 1.0, "scale": "log"}
    setting = {key: x for key, x in SETTING.items() if key not in ("lr", "starts")}
    few, many = (
        asked(setting, random={"points": n, "lr": lr, "starts": {"low": 2, "high": 4}}).points for n in (5, 200)
    )
    assert many[:5] == few
    rates, starts = (np.array([point.setting[name] for point in many]) for name in ("lr", "starts"))
    assert rates.min() > 1e-4 and rates.max() < 1 and abs(np.median(np.log10(rates)) + 2) < 0.5
    assert set(starts.tolist()) == {2, 3, 4} and starts.dtype == int
    assert len({point.name for point in many}) == 200


# What compiles together.


def test_groups_are_what_differs_in_leaves_alone():
    found = asked(grid=GRID | {"method": ["adam", "sgd"], "horizon": [5, 6], "key": [0, 1]})
    made = groups(found, list(found.points))
    assert sorted(len(group.points) for group in made) == [8] * 4
    for group in made:
        assert len({(p.setting["method"], p.setting["horizon"]) for p in group.points}) == 1
    # Limits of the actions are constants of a policy's program.
    limits = asked(SETTING | {"task": "quadrotor2d"}, grid={"lr": [0.1, 0.2], "param": {"mass": [0.4, 0.5]}})
    assert [len(group.points) for group in groups(limits, list(limits.points))] == [2, 2]


def test_groups_have_at_most_so_many_replicas():
    found = asked(grid={"lr": [0.1 * k for k in range(1, 8)]}, replicas=6)
    assert [len(group.points) for group in groups(found, list(found.points))] == [3, 2, 2]


def test_agents_whose_options_are_sizes_are_groups_of_their_own():
    setting = {"task": "pendulum", "agent": "sac", "seeds": 2, "real_steps": 600}
    grid = {"option": {"units": [4, 8], "rate": [1e-3, 1e-2]}, "noise": [0.0, 0.1]}
    found = parse({"job": "learn", "setting": setting, "grid": grid})
    assert [len(group.points) for group in groups(found, list(found.points))] == [4, 4]


# Runs.


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    place, said = tmp_path_factory.mktemp("sweeps") / "sweep", []
    found = asked(grid=GRID)
    assert sweep(found, out=place, say=said.append) == (place, True)
    return found, place, said


def test_a_point_is_the_run_alone(ran, tmp_path):
    found, place, said = ran
    assert said == [
        "4 points, 0 of them finished before; 1 groups that compile together to run",
        "[1/1] adam on lqr: 4 points x 2 seeds",
    ]
    records = read_records(place / "metrics.jsonl")[0]
    assert [record["status"] for record in records] == ["finished"] * 4
    [point] = [p for p in found.points if p.setting["lr"] == 0.1 and p.setting["param.mass"] == 2.0]
    given = {**SETTING, "budget": 1e9, "x64": False, "key": 0, "rates": (0.1,), "methods": ("adam",), "hidden": (3,)}
    given = {name: x for name, x in given.items() if name in CompareConfig.__dataclass_fields__}
    alone = compare.compare_methods(
        CompareConfig(parameters={"mass": 2.0}, **given), RunOptions(out=tmp_path / "alone")
    )
    last = [record for record in read_records(alone / "metrics.jsonl")[0] if record["kind"] == "eval"][-1]
    [own] = [record["last"] for record in records if record["point"] == point.name]
    for name in ("train", "test", "success", "update"):
        np.testing.assert_allclose(own[name], last[name], rtol=1e-4, err_msg=name)


def test_a_point_of_a_planner_has_the_held_out_return_of_the_run_alone(tmp_path):
    setting = {"task": "pendulum-swingup", "method": "ilqr", "horizon": 5, "seeds": 2, "starts": 3, "steps": 3}
    folder, complete = sweep(
        asked(setting, {"param": {"gravity": [9.0, 11.0]}}), out=tmp_path / "s", say=lambda _: None
    )
    assert complete
    own = {r["setting"]["param.gravity"]: r["last"] for r in read_records(folder / "metrics.jsonl")[0]}
    given = {
        "methods": ("ilqr",),
        "parameters": {"gravity": 11.0},
        "hidden": (3,),
        "rates": (),
        "continuation": "default",
    }
    given |= {"budget": 1e9, "x64": False, "key": 0} | {k: x for k, x in setting.items() if k != "method"}
    alone = compare.compare_methods(CompareConfig(**given), RunOptions(out=tmp_path / "alone"))
    last = [record for record in read_records(alone / "metrics.jsonl")[0] if record["kind"] == "eval"][-1]
    for name in ("train", "test", "success", "update", "nonfinite"):
        np.testing.assert_allclose(own[11.0][name], last[name], rtol=1e-4, err_msg=name)


def test_what_is_finished_is_not_run_again(ran, monkeypatch):
    found, place, _ = ran
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("run again"))
    assert sweep(found, out=place, say=lambda _: None) == (place, True)


def test_what_is_missing_is_run_and_no_more(ran, monkeypatch):
    _, place, _ = ran
    more, seen = asked(grid=GRID | {"lr": [0.01, 0.1, 0.2]}), []
    one = more.points[0]
    status = place / "points" / one.name / "status.json"
    kept = status.read_text()
    status.write_text(json.dumps({"status": "running"}))  # killed
    monkeypatch.setattr(runner, "run", lambda sweep, group, *_: seen.extend(group.points))
    assert sweep(more, out=place, say=lambda _: None) == (place, False)
    assert {p.name for p in seen} == {one.name} | {p.name for p in more.points if p.setting["lr"] == 0.2}
    assert "2 of 6 points" in (place / "report.html").read_text() or "missing" in (place / "report.html").read_text()
    state = json.loads((place / "status.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "3 of 6 points are finished")
    status.write_text(kept)


def test_the_report_is_made_of_its_data_alone_and_escaped(ran, tmp_path):
    found, place, _ = ran
    sweep(found, out=place, processes=0, say=lambda _: None)
    page = (place / "report.html").read_bytes()
    assert rebuild(place).read_bytes() == page
    text = summary_text(place)
    assert "Of 4 points the best is" in text and "Points differ in param.mass" in page.decode()
    assert {path.name for path in (place / "figures").iterdir()} == {"returns.png", "returns.svg"}
    config = {"name": "n", "of": "compare", "varied": ["method"], "task": "n", "job": "sweep"}
    evil = "<script>alert(1)</script>"
    lasts = [{"train": [1.0, 2.0], "test": [x, 2.0], "update": 3, "seconds": 1.0} for x in (1.0, np.inf)]
    records = [
        {"kind": "point", "point": evil, "setting": {"method": m}, "status": "failed", "reason": evil, "last": last}
        for m, last in zip((evil, "b"), lasts, strict=True)
    ]
    data = skeleton.RunData(config, {}, records, [], tmp_path / "figures")
    made = skeleton.compose_page(data, sweep_report.contents(data))
    assert evil not in made and "&lt;script&gt;" in made and "counts as minus infinity" in made


def test_a_folder_of_something_else_is_left_alone(ran, tmp_path):
    found, _, _ = ran
    (tmp_path / "config.json").write_text('{"job": "compare"}')
    with pytest.raises(ValueError, match="not empty"):
        sweep(found, out=tmp_path, say=lambda _: None)


def test_a_folder_that_holds_something_else_than_a_sweep_wrote_is_refused(ran, tmp_path):
    """By what a process or a job of a cluster runs; a point is known by what it sets, not by the name beside it."""
    found, place, _ = ran
    whole, config = json.loads((place / "config.json").read_text()), tmp_path / "config.json"
    one = found.points[0].name
    evil = [whole["points"][0] | {"name": "../../evil"}, *whole["points"][1:]]
    for change, names, wanted in [
        ({"job": "compare"}, [one], "is a run, but not of a sweep"),
        ({"points": [{"name": one}]}, [one], "does not hold what a sweep writes"),
        ({"points": evil}, ["../../evil"], "unknown point of the sweep '../../evil'"),
        ({"of": "plan"}, [one], "unknown point of the sweep"),
    ]:
        config.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=wanted):
            runner.run_points(tmp_path, names)
    config.unlink()
    config.symlink_to(place / "config.json")
    with pytest.raises(ValueError, match="is a symbolic link"):
        runner.run_points(tmp_path, [one])
    with pytest.raises(ValueError, match="is a symbolic link"):
        sweep(found, out=tmp_path, say=lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_group_that_fails_keeps_no_other_from_running(tmp_path, monkeypatch):
    found, said, true = asked(grid={"method": ["adam", "sgd"]}), [], runner.run

    def run(sweep, group, *rest):
        if group.points[0].setting["method"] == "adam":
            raise ValueError("no such luck")
        true(sweep, group, *rest)

    monkeypatch.setattr(runner, "run", run)
    folder, complete = sweep(found, out=tmp_path / "sweep", say=said.append)
    assert not complete and "[1/2] failed: no such luck" in said
    assert [r["status"] for r in read_records(folder / "metrics.jsonl")[0]] == ["missing", "finished"]


@pytest.mark.slow
def test_agents_in_processes_of_their_own(folder, capsys, monkeypatch):
    """From the file to the table; two groups, which differ in a size."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (folder / "idle.toml").write_text(
        'job = "learn"\n[setting]\ntask = "lqr"\nagent = "random"\nhorizon = 5\nseeds = 2\nreal_steps = 40\n'
        "option.warmup = 20\nevaluations = 2\n[grid]\noption.every = [10, 20]\nparam.mass = [1.0, 2.0]\n"
    )
    assert cli.main(["sweep", "idle.toml", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 points, 0 of them finished before; 2 groups" in out and "Of 4 points the best is" in out
    assert {path.name for path in (folder / "runs").iterdir()} == {"idle-sweep"}
    records = read_records(folder / "runs" / "idle-sweep" / "metrics.jsonl")[0]
    assert [record["last"]["update"] for record in records] == [40] * 4
    # Random actions are the same whatever lies beside them, and a heavier mass costs another return.
    J = np.array([record["last"]["test"] for record in records]).reshape(2, 2, 2)  # every, mass, seed
    np.testing.assert_allclose(J[0], J[1], rtol=1e-5)
    assert np.abs(J[0, 0] - J[0, 1]).min() > 1e-6


# A cluster.


def test_slurm_without_submitit(ran, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="--slurm needs submitit: pip install"):
        sweep(ran[0], out=tmp_path / "new", slurm={}, say=lambda _: None)
    assert not (tmp_path / "new").exists()


def test_slurm_is_given_the_commands_of_the_groups(tmp_path, monkeypatch):
    found, seen, said = asked(grid={"method": ["adam", "sgd"], "lr": [0.1, 0.2]}), [], []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            seen.append((Path(folder).name, cluster))

        def update_parameters(self, **parameters):
            seen.append(parameters)

        def submit(self, command):
            seen.append(command)
            return types.SimpleNamespace(job_id="7")

    helpers = types.SimpleNamespace(CommandFunction=lambda command: command)
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor, helpers=helpers))
    folder, complete = sweep(
        found, out=tmp_path / "sweep", slurm={"timeout_min": 5, "cluster": "debug"}, say=said.append
    )
    assert not complete and seen[:2] == [("jobs", "debug"), {"timeout_min": 5}]
    commands = seen[2:]
    assert [command[1:4] for command in commands] == [["-m", "diffmbrl.jobs.sweep", str(folder)]] * 2
    assert [name for command in commands for name in command[4:]] == [point.name for point in found.points]
    assert said[1:3] == ["job 7: adam on lqr: 2 points x 2 seeds", "job 7: sgd on lqr: 2 points x 2 seeds"]
    # What such a command does, here.
    ran = []
    monkeypatch.setattr(runner, "run", lambda sweep, group, folder, facts: ran.append((sweep.job, group.points)))
    runner.run_points(folder, commands[0][4:])
    assert ran == [("compare", tuple(found.points[:2]))]


@pytest.mark.slow
def test_a_cluster_of_this_machine(folder, monkeypatch):
    """submitit's own executor: jobs are submitted, run, and are collected afterwards."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: the extra `slurm`")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    (folder / "idle.toml").write_text(
        'job = "learn"\n[setting]\ntask = "lqr"\nagent = "random"\nhorizon = 5\nseeds = 2\nreal_steps = 40\n'
        "option.warmup = 20\nevaluations = 2\n[grid]\noption.every = [10, 20]\n"
    )
    # In a process of its own: as it is imported, submitit has logging close every handler, and absl's closes pytest's stderr.
    command = [
        sys.executable,
        "-m",
        "diffmbrl.cli.main",
        "sweep",
        "idle.toml",
        "--slurm",
        "cluster=local",
        "timeout_min=10",
    ]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.count("\njob ") == 2
    for _ in range(600):
        if cli.main(["sweep", "idle.toml", "--processes", "0"]) == 0:
            break
        time.sleep(1)
    records = read_records(folder / "runs" / "idle-sweep" / "metrics.jsonl")[0]
    assert [record["status"] for record in records] == ["finished"] * 2
