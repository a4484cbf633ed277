"""The command line: good input runs, bad input gives one line on stderr, exit code 2 and nothing written."""

import io
import json
import os
import subprocess
import sys

import jax
import pytest

import diffmbrl
from diffmbrl.cli import main as cli
from diffmbrl.jobs.compare import resolve
from diffmbrl.jobs.configs import CompareConfig, DiagnoseConfig, LearnConfig, PlanConfig, RunOptions
from diffmbrl.jobs.table import JOBS
from diffmbrl.methods import METHODS
from diffmbrl.tasks import TASKS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, and the precision as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    x64 = jax.config.jax_enable_x64
    yield tmp_path
    jax.config.update("jax_enable_x64", x64)


BAD = {
    "no command": (
        "",
        "expected a command: compare, plan, diagnose, learn, race, resume, sweep, report, render, agents, tasks, doctor; see",
    ),
    "unknown command": ("comapre lqr", "unknown command 'comapre'; did you mean 'compare'?"),
    "no task": ("compare", "TASK"),
    "unknown task": ("compare lqrr", "unknown task 'lqrr'; did you mean 'lqr'?"),
    "unknown task, underscores": ("compare cartpole_balance", "did you mean 'cartpole-balance'?"),
    "unknown method": ("compare lqr --methods adam l-bfgs", "unknown method 'l-bfgs'; did you mean 'lbfgs'?"),
    "a method twice": ("compare lqr --methods adam adam", "each method can be named once, got adam adam"),
    "unknown continuation": ("compare lqr --continuation nne", "unknown continuation 'nne'; did you mean 'none'?"),
    "horizon 0": ("compare lqr --horizon 0", "horizon must be a whole number of at least 1, got 0"),
    "negative horizon": ("compare lqr --horizon -5", "horizon must be a whole number of at least 1, got -5"),
    "half a horizon": ("compare lqr --horizon 1.5", "no type matching {None}|INT could be instantiated from ['1.5']"),
    "no number": ("compare lqr --seeds many", "Error parsing --seeds: invalid literal for int() with base 10: 'many'"),
    "seeds 0": ("compare lqr --seeds 0", "seeds must be at least 1, got 0"),
    "starts 0": ("compare lqr --starts 0", "starts must be at least 1, got 0"),
    "steps 0": ("compare lqr --steps 0", "steps must be at least 1, got 0"),
    "fewer steps than stages": ("compare lqr --methods adam --steps 2", "5 stages need at least 5 updates, got 2"),
    "no budget": ("compare lqr --budget 0", "budget must be a positive number of seconds, got 0"),
    "negative rate": ("compare lqr --lr 0.1 -1", "a learning rate must be a finite positive number, got -1"),
    "rate nan": ("compare lqr --lr nan", "a learning rate must be a finite positive number, got nan"),
    "empty layer": ("compare lqr --hidden 16 0", "hidden needs at least one layer of at least one unit, got [16, 0]"),
    "a key too large": (f"compare lqr --key {10**20}", f"key must be a whole number from 0 to 4294967295, got {10**20}"),
    "mass nan": ("compare lqr --param mass=nan", "mass of task 'lqr' must be a finite positive number, got nan"),
    "mass -1": ("compare cartpole-balance --param m_p=-1", "m_p of task 'cartpole-balance' must be a finite positive number"),
    "no value": ("compare lqr --param mass", "--param takes name=value with a number, such as m_p=0.2; got 'mass'"),
    "no number for a parameter": ("compare lqr --param mass=heavy", "got 'mass=heavy'"),
    "unknown parameter": ("compare lqr --param mas=2", "'mas'; did you mean 'mass'?"),
    "a parameter twice": ("compare lqr --param mass=1 mass=2", "--param mass is given more than once: mass=1 mass=2"),
    "unknown option": ("compare lqr --sedes 3", "Unrecognized options: --sedes, 3; did you mean '--seeds'?"),
    "an option without its value": ("compare lqr --seeds", "Missing value for argument '--seeds'"),
    "one word too many": ("compare lqr pendulum", "Unrecognized options: pendulum"),
    "no such run": ("report nowhere", "'nowhere' is not a run: it has no config.json"),
    "no run": ("report", "RUN"),
    "plan: unknown planner": ("plan lqr --planner ilrq", "unknown planner 'ilrq'; did you mean 'ilqr'?"),
    "plan: a parameter that is none": ("plan lqr --model-mismatch maas=2", "did you mean 'mass'?"),
    "plan: half a pair": ("plan lqr --model-mismatch mass", "--model-mismatch takes name=value with a number"),
    "plan: steps of no controller": ("plan lqr --steps 3", "--steps is for a controller: give --mpc too"),
    "diagnose: unknown task": ("diagnose lqrr", "unknown task 'lqrr'; did you mean 'lqr'?"),
    "diagnose: horizon 0": ("diagnose lqr --horizons 0 5", "a horizon must be a whole number of at least 1, got 0"),
    "diagnose: a horizon twice": ("diagnose lqr --horizons 5 5", "each horizon can be named once, got 5 5"),
    "diagnose: negative noise": ("diagnose lqr --std -0.1", "std must be a finite positive number, got -0.1"),
    "diagnose: no run": ("diagnose lqr --policy nowhere", "'nowhere' is not a run"),
    "render: no run": ("render nowhere", "'nowhere' is not a run: it has no config.json"),
    "a real system": ("plan gym:Pendulum-v1", "'gym:Pendulum-v1' is a real system, whose dynamics cannot be called"),
    "gym: discrete": ("learn gym:CartPole-v1 --agent mpc", "action space of 'CartPole-v1' is Discrete(2): expected a Box"),
    "gym: unknown": ("learn gym:Pendulm-v1 --agent mpc", "Gymnasium does not make 'Pendulm-v1'"),
    "gym: noise": ("learn gym:Pendulum-v1 --agent mpc --noise 0.1", "--noise is for tasks whose states are known"),
    "gym: given": ("learn gym:Pendulum-v1 --agent mpc --given rewrad", "did you mean 'reward'?"),
    "given of a task": ("learn lqr --agent mpc --given reward", "of task 'lqr' reward and end are given"),
    "unknown option of doctor": ("doctor --x46", "Unrecognized options: --x46; did you mean '--x64'?"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, wanted", BAD.values(), ids=BAD)
def test_bad_input(arguments, wanted, folder, capsys):
    assert refused(arguments.split(), capsys).find(wanted) >= 0
    assert list(folder.iterdir()) == []


def refused(arguments, capsys) -> str:
    """The one line on stderr."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffmbrl: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and "│" not in err and "─" not in err
    return err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", ["unknown option", "no number", "no task", "an option without its value"])
def test_whatever_the_terminal_can_draw(name, encoding, capsys, monkeypatch):
    arguments, wanted = BAD[name]
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert cli.main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert wanted in err and err.count("\n") == 1 and "│" not in err and "--- " not in err


def test_a_folder_that_is_not_empty(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine")
    assert "the folder 'run' is not empty: choose a new one or empty it" in refused(
        ["compare", "lqr", "--out", "run"], capsys
    )
    assert [path.name for path in folder.rglob("*")] == ["run", "notes.txt"]


def test_a_file_or_a_path_through_one(folder, capsys):
    (folder / "file").write_text("mine")
    assert "'file' is not a folder: choose a new path" in refused(["compare", "lqr", "--out", "file"], capsys)
    err = refused(["compare", "lqr", "--out", "file/run"], capsys)
    assert "'file/run' leads through" in err and "is not a folder: choose another path" in err
    assert [path.name for path in folder.iterdir()] == ["file"] and (folder / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(folder, capsys):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs a file system that nobody can write to")
    assert "cannot write to '/proc/run'" in refused(["compare", "lqr", "--out", "/proc/run"], capsys)


def test_a_run_that_is_no_longer_one(folder, capsys):
    (folder / "config.json").write_text("{broken")
    assert refused(["report", "."], capsys)


def test_tasks(folder, capsys):
    assert cli.main(["tasks"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    for name, row in TASKS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        task = row.make()
        assert line.split()[1:5] == [str(task.n), str(task.m), str(task.horizon), f"{task.dt:g}"]
    assert err == "" and list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["--help"],
            [
                "compare",
                "plan",
                "diagnose",
                "learn",
                "race",
                "resume",
                "sweep",
                "report",
                "render",
                "agents",
                "tasks",
                "doctor",
            ],
        ),
        (
            ["compare", "--help"],
            ["TASK", "--methods", "--horizon", "--seeds", "--starts", "--budget", "--lr", "--continuation", "--out"],
        ),
        (["plan", "--help"], ["TASK", "--planner", "--mpc", "--model-mismatch", "--noise", "--delay", "--starts"]),
        (["diagnose", "--help"], ["TASK", "--policy", "--scale", "--horizons", "--starts", "--std", "--key", "--out"]),
        (
            ["learn", "--help"],
            ["TASK", "--agent", "--real-steps", "--budget", "--seeds", "--evaluations", "--option", "--noise", "--out"],
        ),
        (["resume", "--help"], ["RUN", "--checkpoint-every"]),
        (["sweep", "--help"], ["FILE", "--processes", "--slurm", "--out"]),
        (["report", "--help"], ["RUN"]),
    ],
)
def test_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert not end.value.code and err == ""
    assert all(word in out for word in words)


@pytest.mark.slow
def test_compare_and_report(folder, capsys):
    arguments = "compare lqr --methods ilqr --horizon 5 --seeds 2 --starts 3 --steps 2 --param mass=2 --x64 --key 7"
    assert cli.main(arguments.split()) == 0
    out, err = capsys.readouterr()
    [run] = (folder / "runs").iterdir()
    assert run.name.startswith("lqr-compare-") and err == ""
    assert out.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert "ilqr" in out
    config = json.loads((run / "config.json").read_text())
    wanted = {
        "methods": ["ilqr"],
        "horizon": 5,
        "seeds": 2,
        "starts": 3,
        "steps": 2,
        "parameters": {"mass": 2.0},
        "x64": True,
        "key": 7,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert json.loads((run / "provenance.json").read_text())["x64"] is True

    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == page


def test_by_default_all_methods_that_are_marked():
    config = resolve(CompareConfig("cartpole-balance")).config
    assert config.methods == tuple(name for name, row in METHODS.items() if row.default)
    hidden = tuple(TASKS["cartpole-balance"].hidden)
    assert (config.horizon, config.hidden, config.seeds, config.starts) == (100, hidden, 3, 128)
    assert resolve(config).config == config


def test_the_options_of_a_command_are_the_fields_of_its_config(folder, monkeypatch):
    """Every default of the command line is the config's own."""
    found = []
    for name in JOBS:
        monkeypatch.setitem(cli.RUN, name, lambda *configs: found.append(configs) or 0)
    assert cli.main(["compare", "lqr"]) == cli.main(["plan", "lqr"]) == cli.main(["diagnose", "lqr"]) == 0
    assert cli.main(["race", "lqr"]) == cli.main(["learn", "lqr", "--agent", "mpc"]) == 0
    wanted = [CompareConfig("lqr"), PlanConfig("lqr"), DiagnoseConfig("lqr"), LearnConfig("lqr")]
    assert found == [(config, RunOptions()) for config in [*wanted, LearnConfig("lqr", agents=("mpc",))]]


def test_interrupted(folder, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.RUN, "tasks", interrupt)
    assert cli.main(["tasks"]) == 130
    assert capsys.readouterr().err == "diffmbrl: interrupted\n"


@pytest.mark.slow
def test_as_a_program(folder):
    """The module as a process of its own, from another folder."""
    root = os.path.dirname(os.path.dirname(diffmbrl.__file__))
    done = subprocess.run(
        [sys.executable, "-m", "diffmbrl.cli.main", "compare", "lqr", "--horizon", "0"],
        capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": root}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "diffmbrl: horizon must be a whole number of at least 1, got 0\n"
    assert list(folder.iterdir()) == []
