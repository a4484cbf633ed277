"""Run a group of sweep points as one program: replica p * seeds + k is seed k of point p, with leaves of its own.

Each point has a folder `points/<name>/` like a run's: config.json, provenance.json, metrics.jsonl, status.json. Its records
are of kind "eval": `update` (updates, or real steps), `seconds` of the group's clock, and for each seed the mean returns
`train` and `test`, `success` if the task defines it, and `nonfinite`, the number of non-finite values so far.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.agents.learn import learn
from diffmbrl.jobs.batch import BatchedPlanRuns, BatchedPolicyRuns, BatchedRuns, draw_starts
from diffmbrl.jobs.batch.programs import stack
from diffmbrl.jobs.sweep.groups import Group
from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint
from diffmbrl.runs import Writer, running
from diffmbrl.runs.folder import set_status, write_json
from diffmbrl.solve.loop import CHUNK

HELD_OUT = 256
EVALUATIONS = 20  # along a run
Write = Callable[[int, dict[str, Any]], None]  # an evaluation of a point of the group, by its number


def run(sweep: SweepFile, group: Group, folder: Path, facts: dict[str, Any]) -> None:
    """Run the points of a group in one program.

    Args:
        sweep: The sweep that the points are of.
        group: Points that compile together.
        folder: The folder in which each point has one of its own.
        facts: The points' provenance.
    """
    with contextlib.ExitStack() as stacked:
        writers = [stacked.enter_context(_recorded(sweep, point, folder, facts)) for point in group.points]

        def write(i: int, record: dict[str, Any]) -> None:
            writers[i].write({"kind": "eval", "lanes": len(writers) * group.seeds} | record)

        (_run_methods if sweep.job == "compare" else _run_agents)(group, write)


@contextlib.contextmanager
def _recorded(sweep: SweepFile, point: SweepPoint, folder: Path, facts: dict[str, Any]) -> Iterator[Writer]:
    """A new folder for the point: one that an unfinished run has left is removed."""
    path = folder / point.name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write_json(path / "config.json", {"job": sweep.job, "x64": sweep.x64, "setting": point.setting})
    write_json(path / "provenance.json", facts)
    set_status(path, "running")
    with running(path), Writer(path / "metrics.jsonl") as writer:
        yield writer


def _run_agents(group: Group, write: Write) -> None:
    first, seeds = group.members[0], group.seeds
    agent, system = (stack([getattr(member, part) for member in group.members], seeds) for part in ("agent", "system"))
    keys = jnp.concatenate([jax.random.split(jax.random.key(m.setting.key), seeds) for m in group.members])
    shape, train = (len(group.members), seeds), np.full(len(keys), np.nan)

    def on_record(record: dict[str, Any], _: Any) -> None:
        ended = record["ended"].sum(axis=1)
        mean = np.nansum(record["returns"], axis=1) / np.maximum(ended, 1)
        # A non-finite return is recorded as NaN. If its episode ended, the mean must not leave it out.
        broken = (record["ended"] & ~np.isfinite(record["returns"])).any(axis=1)
        train[:] = np.where(ended > 0, np.where(broken, -np.inf, mean), train)
        if "evaluation" not in record:
            return
        test = np.mean(record["evaluation"], axis=1).reshape(shape)
        for i in range(shape[0]):
            returns = {"train": train.reshape(shape)[i], "test": test[i]}
            write(i, {"update": record["real_steps"], "seconds": record["seconds"], **returns})

    learn(
        agent,
        system,
        keys,
        real_steps=first.real_steps,
        seconds=first.setting.budget,
        evaluations=first.evaluations,
        evaluate_every=max(1, -(-(first.real_steps - first.agent.warmup) // (first.agent.every * EVALUATIONS))),
        on_record=on_record,
        in_axes=(0, 0),
    )


def _run_methods(group: Group, write: Write) -> None:
    first, runs = group.members[0], _batched(group)
    runs.compile()
    done, spent = 0, 0.0
    every = max(1, min(CHUNK, -(-first.steps // EVALUATIONS)))
    while True:
        returns = runs.returns()
        returns["nonfinite"] = returns["nonfinite"].astype(np.int64)
        for i in range(len(group.members)):
            write(i, {"update": done, "seconds": spent} | {name: x[i] for name, x in returns.items()})
        if done >= first.steps or spent >= first.setting.budget:
            return
        begun, count = time.perf_counter(), min(every, first.steps - done)
        runs.advance(done, count)
        spent, done = spent + time.perf_counter() - begun, done + count


def _batched(group: Group) -> BatchedRuns:
    """The points as variants of the same batched runs that a comparison makes."""
    first, members = group.members[0], group.members
    setting, row = first.setting, first.method
    draws = [draw_starts(m.task, setting.seeds, setting.starts, HELD_OUT, m.setting.key) for m in members]
    solvers, tasks = [m.solver for m in members], [m.task for m in members]
    if row.kind == "plan":
        return BatchedPlanRuns(solvers, tasks, draws)
    return BatchedPolicyRuns(solvers, tasks, setting.hidden, draws, sequential=row.sequential, draws_noise=row.draws)
