"""The default second-order method with nothing tuned, beside L-BFGS and Adam: twenty seeds of every task.

`krylov-newton`, L-BFGS and Adam as the command line makes them, on 256 training and 256 held-out starts, float32. Adam runs its
four rates on the first five seeds, and the rate of the lowest median training cost on all of them. A seed succeeds if at least
95% of the held-out starts end well in the task's own words (`diffmbrl tasks`): upright or balanced and slow, hovering, near the
origin. Costs are -return. CPU time is the process's for each seed, compile time apart.

Seeds run five at a time, and what is done is in the results file: a run that was interrupted goes on from there.
"""

import json
import time
from typing import Any

import jax
import numpy as np

import diffmbrl as d
from benchmarks.record import path, save, table
from diffmbrl.lanes import PolicyLanes, draw
from diffmbrl.methods import METHODS, solver
from diffmbrl.solve import CHUNK

SETTINGS = (
    ("lqr-unstable-8", 50),
    ("quadrotor2d", 100),
    ("pendulum-swingup", 100),
    ("cartpole-balance", 100),
    ("cartpole-swingup", 100),
    ("pendulum", 200),
    ("pendulum-swingup", 200),
    ("cartpole-balance", 200),
    ("cartpole-swingup", 200),
)
ARMS = ("krylov-newton", "lbfgs", "adam")
SEEDS, TOGETHER, STARTS, HELD_OUT, WELL = 20, 5, 256, 256, 0.95
HEAD = ["task, T, method", "seeds", "succeeded", "starts", "train", "test", "worst", "sequential", "CPU s", "compile s"]


def run(*, quick: bool) -> None:
    done = _done(quick)
    for first in range(0, TOGETHER if quick else SEEDS, TOGETHER):
        for arm in ARMS:
            for name, horizon in SETTINGS[:2] if quick else SETTINGS:
                rate = _rate(done, name, horizon, arm, quick)
                _five_seeds(done, name, horizon, arm, rate, first, quick)
                print(table(HEAD, [_row(done, name, horizon, arm, rate)]).splitlines()[-1], flush=True)
    print(f"\nMedians over seeds; float32; {STARTS} starts\n\n{table(HEAD, _rows(done))}")


def _five_seeds(
    done: list[dict], name: str, horizon: int, arm: str, rate: float | None, first: int, quick: bool
) -> None:
    """Run them, and save, unless they are there."""
    if not any(r["seed"] == first for r in _of(done, name, horizon, arm, rate)):
        done += _run(name, horizon, arm, rate, first, quick)
        save("robust", {"columns": HEAD, "rows": _rows(done), "seeds": done}, quick=quick)


def _rate(done: list[dict], name: str, horizon: int, arm: str, quick: bool) -> float | None:
    """The learning rate of the lowest median training cost on the first five seeds; None for a method without one."""
    medians = {}
    for rate in METHODS[arm].rates:
        _five_seeds(done, name, horizon, arm, rate, 0, quick)
        costs = [float(r["train"]) for r in _of(done, name, horizon, arm, rate) if r["seed"] < TOGETHER]
        medians[rate] = float(np.median(np.where(np.isfinite(costs), costs, np.inf)))
    return min(medians, key=lambda rate: medians[rate]) if medians else None


def _run(name: str, horizon: int, arm: str, rate: float | None, first: int, quick: bool) -> list[dict[str, Any]]:
    row, task = METHODS[arm], _task(name, horizon)
    steps = row.steps // 10 if quick else row.steps
    train, test, keys = draw(task, first + TOGETHER, 32 if quick else STARTS, HELD_OUT, 0)
    draws = (jax.tree.map(lambda x: x[first:], train), test, keys[first:])
    made = solver(row, task, rate=rate, steps=steps, continuation="default")
    hidden = d.tasks.TASKS["lqr" if name.startswith("lqr") else name].hidden
    lanes = PolicyLanes([made], task, hidden, draws, sequential=row.sequential)
    compiling, cpu, wall = lanes.compile(), time.process_time(), time.perf_counter()
    for before in range(0, steps, CHUNK):
        lanes.advance(before, min(CHUNK, steps - before))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    look = lanes.evaluate()
    shared = {"task": name, "horizon": horizon, "arm": arm, "rate": rate, "updates": steps, "compile": compiling}
    shared |= {"cpu": cpu / TOGETHER, "wall": wall / TOGETHER, "parameters": lanes.parameters}
    return [
        shared
        | {
            "seed": first + k,
            "train": -float(look["train"][0, k]),
            "test": -float(look["test"][0, k]),
            "success": float(look["success"][0, k]),
            **{work: float(look[work][0, k]) for work in ("sequential", "forward", "jvp", "vjp", "nonfinite")},
        }
        for k in range(TOGETHER)
    ]


def _task(name: str, horizon: int) -> d.Task:
    if name == "lqr-unstable-8":
        return d.tasks.random_lqr(jax.random.key(0), 8, 3, stability="unstable", horizon=horizon)
    return d.tasks.make(name, horizon=horizon)


def _of(done: list[dict], name: str, horizon: int, arm: str, rate: float | None) -> list[dict]:
    return [r for r in done if (r["task"], r["horizon"], r["arm"], r["rate"]) == (name, horizon, arm, rate)]


def _row(done: list[dict], name: str, horizon: int, arm: str, rate: float | None) -> list[Any]:
    runs = _of(done, name, horizon, arm, rate)
    column = {
        key: np.asarray([float(r[key]) for r in runs]) for key in ("train", "test", "success", "sequential", "cpu")
    }
    label = f"{name} {horizon} {arm}" + ("" if rate is None else f" {rate:g}")
    succeeded = int(np.sum(column["success"] >= WELL))
    costs = [np.median(column["train"]), np.median(column["test"]), np.max(column["test"])]
    spent = [np.median(column["sequential"]), np.mean(column["cpu"]), runs[0]["compile"]]
    return [label, len(runs), succeeded, *map(float, [np.mean(column["success"]), *costs, *spent])]


def _rows(done: list[dict]) -> list[list[Any]]:
    keys = dict.fromkeys((r["task"], r["horizon"], r["arm"], r["rate"]) for r in done)
    return [_row(done, *key) for key in keys]


def _done(quick: bool) -> list[dict]:
    """The seeds that an earlier run has left; none for a quick one."""
    file = path("robust", quick=quick)
    return json.loads(file.read_text())["result"]["seeds"] if file.exists() and not quick else []
