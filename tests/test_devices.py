"""Where a batch lies is not what comes out of it; what cannot be laid out is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import devices, tasks
from diffmbrl.agents import RandomAgent
from diffmbrl.agents.learn import learn
from diffmbrl.cli import main as cli
from diffmbrl.runs import metrics
from diffmbrl.runs.checkpoint import newest_valid
from diffmbrl.tasks import noisy
from tests.test_resume import same, wait_for

ROOT = Path(__file__).resolve().parents[1]
COORDINATED = {"JAX_NUM_PROCESSES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def start(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
    """A process of this Python with this package."""
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=cwd, env=surroundings, text=True, stdout=-1, stderr=-1
    )


def ended(process: subprocess.Popen) -> str:
    """What it printed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def test_four_devices_agree_with_one():
    """Forced devices of the host, in a process that has them from its beginning."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    found = json.loads(ended(start("tests.on_devices", XLA_FLAGS=flags)).splitlines()[-1])
    assert found["product"] < 1e-6 and found["reductions"] > 0  # a Gauss-Newton product is added up across them
    # Three updates multiply what one rounds, by a matrix that is solved.
    assert found["gauss-newton"] < 1e-3
    # Of a population the returns alone go around, once an update; each device rolls out its two of eight.
    assert found["sent"] == [1, 0, True] and found["programs of a plan"] == 2  # on one device, and on four
    assert found["population"] < 1e-5
    assert found["policies"] < 1e-5 and found["plans"] < 1e-5 and found["agents"] < 1e-5
    # Each device wrote its own rows: two of eight, one key of four.
    assert found["checkpoint"] == [True, True] and found["shards"] == [[1, 2], [2, 2]]
    assert found["programs of a solve"] == 1 and found["buffers on"] == 4


def pair(folder: Path, command: str) -> list[subprocess.Popen]:
    """Two processes on loopback, with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}"}
    words = ["diffmbrl.cli.main", *command.split()]
    return [start(*words, cwd=folder, JAX_PROCESS_ID=str(i), **address, **COORDINATED) for i in (0, 1)]


def both(run: Path, command: str) -> str:
    """A command to its end; what the first process said, which alone writes the run."""
    first, second = map(ended, pair(run.parent, command))
    assert "report:" in first and "report:" not in second
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert {path.name for path in run.parent.iterdir()} <= {"run", "whole"}
    return first


LEARN = "learn lqr --agent random --horizon 10 --seeds 4 --real-steps 300 --devices 4 --out run"


@pytest.mark.slow
def test_two_processes_learn_together_and_checkpoint(tmp_path):
    """The checkpoint has all seeds, those of the other process too."""
    run = tmp_path / "run"
    both(run, LEARN)
    with np.load(run / "buffers" / "random.npz") as file:
        shapes = {file[name].shape[0] for name in file.files}
    assert shapes == {4}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [len(line["evaluation"]) for line in lines if "evaluation" in line] == [4, 4, 4]
    kept, wrong = newest_valid(run / "checkpoints")
    assert wrong == [] and kept.host["numbers"]["done"] == 300
    assert {leaf["shape"][0] for leaf in kept.leaves} == {4}


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_numbers(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = LEARN.replace("300", "2000") + " --checkpoint-every 0"
    both(whole, command.replace("--out run", "--out whole"))
    killed = pair(tmp_path, command)
    wait_for((run / "checkpoints" / "3").exists, killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    assert json.loads((run / "status.json").read_text())["status"] == "running"
    assert "resumed from checkpoint" in both(run, "resume run")
    same(run, whole)


@pytest.mark.slow
def test_two_processes_compare_together(tmp_path):
    """The same numbers as one process, to rounding."""
    command = (
        "compare cartpole-balance --horizon 5 --methods adam ilqr --lr 0.01 --hidden 3 --steps 5 --seeds 1 --starts 4"
    )
    run = tmp_path / "run"
    both(run, f"{command} --devices 4 --out run")
    assert cli.main([*command.split(), "--out", str(tmp_path / "alone")]) == 0
    two, one = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "alone")
    )
    assert [x["kind"] for x in two] == [x["kind"] for x in one]
    for x, y in zip(two, one, strict=True):
        if x["kind"] == "eval":
            np.testing.assert_allclose(x["train"], y["train"], rtol=1e-4)
            np.testing.assert_allclose(x["test"], y["test"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["mppi", "ilqr"])
def test_two_processes_control_together(planner, tmp_path):
    """Of one the samples are shared, of the other the starts; the numbers of one process, to rounding, and so when killed."""
    command = f"plan cartpole-balance --mpc --planner {planner} --steps 30 --horizon 4 --starts 4 --checkpoint-every 0"
    run = tmp_path / "run"
    killed = pair(tmp_path, f"{command} --devices 4 --out run")
    wait_for((run / "checkpoints" / "2").exists, killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    assert "resumed from checkpoint" in both(run, "resume run")
    assert cli.main([*command.split(), "--out", str(tmp_path / "alone")]) == 0
    two, one = (
        [x for x in metrics.read_metrics(folder / "metrics.jsonl")[0] if x["kind"] == "trajectory"]
        for folder in (run, tmp_path / "alone")
    )
    assert len(two) == len(one) == 4
    for x, y in zip(two, one, strict=True):
        for name in ("s", "a"):
            np.testing.assert_allclose(x[name], y[name], rtol=1e-3, atol=1e-3)


def test_every_lane_may_have_hyperparameters_and_a_system_of_its_own():
    """A lane of many is the run alone."""
    keys, mass = jax.random.split(jax.random.key(0), 2), (1.0, 2.0)
    plants = [noisy(tasks.lqr(horizon=10, mass=m), std=0.0) for m in mass]
    agents = [RandomAgent(warmup=10, every=10) for _ in mass]
    from diffmbrl.agents.collect import System

    systems = [System(plant) for plant in plants]
    together = jax.tree.map(lambda *x: jnp.stack(x), *agents), jax.tree.map(lambda *x: jnp.stack(x), *systems)
    given = {"real_steps": 30, "evaluations": 2}
    lanes = learn(*together, keys, in_axes=(0, 0), **given)
    for i, system in enumerate(systems):
        alone = learn(agents[i], system, keys[i : i + 1], **given)
        np.testing.assert_allclose(lanes.buffer.rows.s[i], alone.buffer.rows.s[0], rtol=1e-6)
        np.testing.assert_allclose(lanes.records[-1]["evaluation"][i], alone.records[-1]["evaluation"][0], rtol=1e-5)
    assert np.abs(lanes.buffer.rows.s[0] - lanes.buffer.rows.s[1]).max() > 1e-3


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match=r"10 starts cannot be shared out evenly among 4 devices; .* 8 or 12"):
        devices.check_divisible(10, 4, "starts")
    with pytest.raises(ValueError, match=r"250 samples cannot be shared out evenly among 4 devices; .* 248 or 252"):
        devices.check_divisible(250, 4, "samples")
    with pytest.raises(ValueError, match=r"3 seeds cannot be shared out evenly among 4 devices; .*: 4$"):
        devices.check_divisible(3, 4, "seeds")


REFUSED = {
    "compare lqr --devices 0": "devices must be a whole number of at least 1, got 0",
    "compare lqr --devices 4": "devices must be at most the 1 cpu there are, got 4; XLA_FLAGS=--xla_force_host",
    "learn lqr --agent random --devices 4": "devices must be at most the 1 cpu there are, got 4",
    "plan lqr --planner cem --devices 4": "devices must be at most the 1 cpu there are, got 4",
}


@pytest.mark.parametrize("command, wanted", REFUSED.items())
def test_devices_that_are_not_there(command, wanted, folder, capsys):
    if jax.device_count() > 1:
        pytest.skip("this process has several devices")
    assert cli.main(command.split()) == 2
    assert wanted in capsys.readouterr().err and list(folder.iterdir()) == []


def test_another_process_that_is_no_number(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be a whole number, got 'first'"):
        devices.init_distributed(1)
