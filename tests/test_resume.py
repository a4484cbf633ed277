"""Runs that are interrupted, killed or damaged, and go on to the numbers of a run in one piece, bit for bit."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.agents.registry import AGENTS as REGISTRY
from diffmbrl.agents.registry import AgentRow
from diffmbrl.cli import main as cli
from diffmbrl.jobs import compare, plan
from diffmbrl.jobs import learn as race
from diffmbrl.jobs.configs import CompareConfig, LearnConfig, PlanConfig, RunOptions
from diffmbrl.jobs.resume import resume_run
from diffmbrl.methods import METHODS
from diffmbrl.planners import ILQR, MPC, control
from diffmbrl.planners.episode import finish, proceed, start
from diffmbrl.runs import Session, metrics
from tests.agents import AGENTS
from tests.problems import some_slow

TIMES = {"seconds", "cpu_seconds", "compile_seconds", "wall"}
COMPARE = CompareConfig(
    task="lqr",
    methods=("gauss-newton", "cem"),  # lanes with a model's report, and planners that draw
    horizon=10,
    parameters={"mass": 1.5},
    hidden=(4,),
    seeds=2,
    starts=2,
    steps=5,
    budget=100.0,
    rates=(1e-2, 1e-1),
    continuation="discounts",
    x64=False,
    key=0,
)
PLAN = PlanConfig("pendulum-swingup", "ilqr", False, 20, None, 5, {}, {}, 0.01, 0, 2, 0, False)
MPC_RUN = PlanConfig("cartpole-balance", "cem", True, 4, 5, None, {}, {}, 0.01, 2, 2, 0, False)
LEARN = LearnConfig(
    task="pendulum",
    agents=("random", "small"),
    options={},
    real_steps=60,
    budget=100.0,
    seeds=2,
    evaluations=2,
    horizon=10,
    parameters={},
    noise=0.01,
    sensor_noise=0.0,
    key=0,
    x64=False,
)


def agent(name: str, patch: pytest.MonkeyPatch) -> None:
    """An agent of the tests' table as "small" of the registry, and another beside it."""
    for row in AGENTS:
        if row.name in (name, "random"):
            patch.setitem(REGISTRY, "small" if row.name == name else "random", AgentRow(_maker(row), "a small one", 60))


def _maker(row):
    return lambda task: row.make(task)


def measured(folder: Path) -> list[dict]:
    """The records, without times."""
    records, note = metrics.read_metrics(folder / "metrics.jsonl")
    assert note is None
    return [{name: x for name, x in record.items() if name not in TIMES} for record in records]


def same(folder: Path, whole: Path) -> None:
    """Every record, to the last bit and in its order, and every array that was left; finished."""
    assert [json.dumps(x) for x in measured(folder)] == [json.dumps(x) for x in measured(whole)]
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    kept = [path.relative_to(whole) for path in sorted(whole.glob("*/*.npz"))]
    assert kept == [path.relative_to(folder) for path in sorted(folder.glob("*/*.npz"))]
    for name in kept:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def stopped_at(look: int, job, patch: pytest.MonkeyPatch, error=KeyboardInterrupt) -> None:
    """Run a job until just after a look, and stop it as a signal would."""
    seen, honest = [], Session.save

    def looked(self, state, **numbers):
        honest(self, state, **numbers)
        seen.append(numbers)
        if len(seen) == look:
            raise error

    with patch.context() as inner:
        inner.setattr(Session, "save", looked)
        with pytest.raises(error):
            job()


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of the time of a small run."""
    monkeypatch.setattr("diffmbrl.jobs.job.rebuild", lambda folder: folder)


JOBS = {
    "compare": (lambda **places: compare.compare_methods(COMPARE, RunOptions(stream=io.StringIO(), **places)), (1, 8)),
    "plan": (lambda **places: plan.make_plan(PLAN, RunOptions(stream=io.StringIO(), **places)), (1, 3)),
    "mpc": (lambda **places: plan.make_plan(MPC_RUN, RunOptions(stream=io.StringIO(), **places)), (2,)),
    "learn": (lambda **places: race.race_agents(LEARN, RunOptions(stream=io.StringIO(), **places)), (2, 4)),
}


@pytest.mark.parametrize("name", some_slow(JOBS, "learn"))
def test_an_interrupted_run_goes_on_to_the_same_numbers(name, tmp_path, monkeypatch, undrawn):
    """From a look of its first arm, and from one of its second."""
    agent("mbpo", monkeypatch)
    job, looks = JOBS[name]
    whole = job(out=tmp_path / "whole")
    for look in looks:
        folder = tmp_path / f"at-{look}"
        stopped_at(look, lambda folder=folder: job(out=folder, checkpoint_every=1e9), monkeypatch)
        status = json.loads((folder / "status.json").read_text())
        assert (status["status"], status["reason"]) == ("interrupted", "interrupted by the user")
        # Only the last look is kept: nothing was due before.
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
        printed = io.StringIO()
        resume_run(folder, RunOptions(stream=printed))
        assert "resumed from checkpoint 1" in printed.getvalue()
        same(folder, whole)
        [entry] = json.loads((folder / "provenance.json").read_text())["resumed"]
        assert entry["checkpoint"] == 1 and entry["remarks"] == [] and entry["versions"]["jax"] == jax.__version__
        with pytest.raises(ValueError, match="is finished: there is nothing to resume"):
            resume_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("row", AGENTS, ids=lambda row: row.name)
def test_every_agent_goes_on_to_the_same_numbers(row, tmp_path, monkeypatch, undrawn):
    agent(row.name, monkeypatch)
    setting = replace(LEARN, agents=("small",), real_steps=row.real_steps)
    whole = race.race_agents(setting, RunOptions(out=tmp_path / "whole", stream=io.StringIO()))
    stopped_at(
        2, lambda: race.race_agents(setting, RunOptions(out=tmp_path / "cut", stream=io.StringIO())), monkeypatch
    )
    same(resume_run(tmp_path / "cut", RunOptions(stream=io.StringIO())), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in COMPARE.methods])
def test_every_method_goes_on_to_the_same_numbers(name, tmp_path, monkeypatch, undrawn):
    setting = replace(COMPARE, methods=(name,))
    whole = compare.compare_methods(setting, RunOptions(out=tmp_path / "whole", stream=io.StringIO()))
    stopped_at(
        1, lambda: compare.compare_methods(setting, RunOptions(out=tmp_path / "cut", stream=io.StringIO())), monkeypatch
    )
    same(resume_run(tmp_path / "cut", RunOptions(stream=io.StringIO())), whole)


def test_an_episode_in_pieces_is_the_episode():
    task = tasks.cartpole_balance(horizon=7)
    mpc = MPC.init(ILQR(), task, horizon=4, iterations=2)
    s0, key = task.initial(jax.random.key(0)), jax.random.key(1)
    go = jax.jit(proceed)

    def cut(*counts):
        episode, first = start(mpc, task, s0), 0
        for count in counts:
            episode = go(mpc, task, s0, episode, key, first=jnp.int32(first), count=jnp.int32(count))
            first += count
        return jax.tree.leaves(finish(episode))

    for x, y, z in zip(cut(1, 4, 9), cut(7), jax.tree.leaves(jax.jit(control)(mpc, task, s0, key)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, rtol=1e-4, atol=1e-5)  # another program: equal to rounding


WORDS = (
    "compare lqr --methods adam --steps 90 --horizon 5 --hidden 4 --seeds 2 --starts 2 --lr 0.01 --checkpoint-every 0"
)


def program(folder: Path, words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "diffmbrl.cli.main", *words.split()]
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen(command, cwd=folder, env=os.environ | path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(found, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if found() or process.poll() is not None:
            return
        time.sleep(0.02)


def killed(folder: Path, words: str, moments: list[float]) -> list[int]:
    """Run, kill so many seconds after each process has begun to record, and go on; from which checkpoints, 0 for none yet."""
    steps, run = [], folder / "run"
    for number, moment in enumerate([*moments, None]):
        process = program(folder, f"{words} --out run" if number == 0 else "resume run --checkpoint-every 0")
        if moment is not None:
            size = _size(run / "metrics.jsonl")
            wait_for(lambda size=size: _size(run / "metrics.jsonl") > size, process)
            time.sleep(moment)
            process.kill()
        out, err = process.communicate()
        assert process.returncode == (0 if moment is None else -signal.SIGKILL), err.decode()
        steps += [
            int(step or 0) for step in re.findall(r"resumed from (?:checkpoint (\d+)|the beginning)", out.decode())
        ]
    return steps


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_killed_and_resumed(folder, capsys):
    """kill -9, SIGTERM, and then to the end: the numbers of a run in one piece."""
    assert cli.main([*WORDS.split(), "--out", "whole"]) == 0
    run = folder / "run"
    process = program(folder, f"{WORDS} --out run")
    wait_for((run / "checkpoints" / "2").exists, process)
    process.kill()
    process.communicate()
    assert json.loads((run / "status.json").read_text())["status"] == "running"

    process = program(folder, "resume run --checkpoint-every 0")
    wait_for((run / "checkpoints" / "8").exists, process)
    with pytest.raises(ValueError, match="under way in another process"):
        resume_run(run)
    process.terminate()
    err = process.communicate()[1]
    assert process.returncode == 143, err.decode()
    assert err.decode() == "diffmbrl: interrupted; to continue: diffmbrl resume run\n"
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "interrupted by SIGTERM")
    assert (run / "report.html").exists() and cli.main(["report", "run"]) == 0

    capsys.readouterr()
    assert cli.main(["resume", "run"]) == 0
    assert capsys.readouterr().out.startswith("resumed from checkpoint")
    same(run, folder / "whole")
    assert len(json.loads((run / "provenance.json").read_text())["resumed"]) == 2
    assert cli.main(["resume", "run"]) == 0
    assert capsys.readouterr().out == "'run' is finished: there is nothing to resume\n"


@pytest.mark.slow
def test_killed_at_twenty_random_moments(folder):
    """Of a run that none of the processes would end: each is killed at work, and the next loses no checkpoint."""
    words = WORDS.replace("--steps 90", "--steps 12800 --budget 1e6")
    assert cli.main([*words.split(), "--out", "whole"]) == 0
    draws = random.Random(0)
    steps = killed(folder, words, [draws.uniform(0, 1) for _ in range(20)])
    assert len(steps) == 20 and steps == sorted(steps)
    same(folder / "run", folder / "whole")
