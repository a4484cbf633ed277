"""Wall-clock time of first and second order on many cores: 1024 starts, on the device that JAX has.

`cartpole-balance` and `pendulum-swingup`, T = 100, float32, one seed at a time, three seeds; every method with its default
schedule. A method's time is that of its updates until its cost on held-out starts first comes within 2% of what L-BFGS ends
with, compile time and evaluation apart; its passes are rollouts and sweeps one after another. On a GPU:
`pip install '.[cuda12]'` and the same command.
"""

from typing import Any

import jax
import numpy as np

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.methods import METHODS, solver

TASKS = ("cartpole-balance", "pendulum-swingup")
ARMS = ("lbfgs", "krylov-newton", "newton-dense", "gauss-newton", "gauss-newton-dense")
HEAD = ["task, method", "seconds", "passes", "updates", "reached", "final cost", "compile s"]
WITHIN, LOOKS = 1.02, 40


def run(*, quick: bool) -> None:
    starts, seeds, horizon = (16, 1, 10) if quick else (1024, 3, 100)
    rows, curves = [], []
    for name in TASKS[:1] if quick else TASKS:
        goals: list[float] = []
        for arm in ARMS[:2] if quick else ARMS:
            found = [_curve(name, arm, starts, horizon, seed, quick) for seed in range(seeds)]
            goals = goals or [curve["test"][-1] * WITHIN for curve in found]
            reached = [_first(curve, goal) for curve, goal in zip(found, goals, strict=True)]
            curves += found
            cells = [np.median([r[key] for r in reached]) for key in ("seconds", "passes", "update")]
            got = sum(np.isfinite(r["seconds"]) for r in reached)
            final = np.median([curve["test"][-1] for curve in found])
            rows.append([f"{name} {arm}", *map(float, cells), f"{got} of {seeds}", float(final), found[0]["compile"]])
            print(table(HEAD, rows[-1:]).splitlines()[-1], flush=True)
            device = jax.devices()[0].device_kind
            save("wide", {"device": device, "columns": HEAD, "rows": rows, "curves": curves}, quick=quick)
    print(f"\n{starts} starts, T = {horizon}, float32, {jax.devices()[0].device_kind}\n\n{table(HEAD, rows)}")


def _curve(name: str, arm: str, starts: int, horizon: int, seed: int, quick: bool) -> dict[str, Any]:
    """Held-out cost, seconds and passes against updates."""
    row, task = METHODS[arm], d.tasks.make(name, horizon=horizon)
    steps = max(6, row.steps // 20) if quick else row.steps
    train, test, keys = draw_starts(task, seed + 1, starts, 256, 0)
    made = solver(row, task, rate=None, steps=steps, continuation="default")
    lanes = BatchedPolicyRuns(
        [made], task, d.tasks.TASKS[name].hidden, (train[seed:], test, keys[seed:]), sequential=row.sequential
    )
    run = learning_curve(lanes, steps, evaluations=LOOKS)
    evaluations = run.evaluations[1:]
    return {
        "task": name,
        "arm": arm,
        "seed": seed,
        "compile": run.compile,
        "update": run.updates[1:],
        "seconds": run.wall[1:],
        "passes": [float(x["sequential"][0, 0]) for x in evaluations],
        "test": [-float(x["test"][0, 0]) for x in evaluations],
    }


def _first(curve: dict[str, Any], goal: float) -> dict[str, float]:
    """What was spent when the held-out cost first reached the goal; infinite if it never did."""
    there = np.flatnonzero(np.asarray(curve["test"]) <= goal)
    return {key: curve[key][there[0]] if there.size else float("inf") for key in ("seconds", "passes", "update")}
