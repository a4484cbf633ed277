"""What trust in the measured sensitivity of the closed loop brings, to Gauss-Newton and to L-BFGS.

`cartpole-balance` at T = 100 and 200, 128 training and 256 test starts, five seeds, float64. Every arm with the schedule of
discounts alone and with the schedule that also weighs the starts by their sensitivity (`Continuation.trusted`). Costs are
-return; CPU time is the process's for all seeds together, compile time apart.
"""

import time
from typing import Any

import jax
import numpy as np
import optax

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.lanes import PolicyLanes, draw
from diffmbrl.solve import CHUNK

NAME, STARTS, SEEDS = "cartpole-balance", 128, 5
ARMS = {
    "lbfgs": (lambda: d.Descend(optax.lbfgs, memory_size=20), 600, True),
    "gauss-newton": (lambda: d.GaussNewton(system=d.Krylov(10)), 150, False),
}
SCHEDULES = {"discounts": d.Continuation.discounted, "trust": d.Continuation.trusted}
HEAD = [
    "T, schedule, method",
    "train",
    "test",
    "train worst",
    "test worst",
    "success",
    "sequential",
    "CPU s",
    "compile s",
]


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    rows: list[list[Any]] = []
    arms = []
    for horizon in (50,) if quick else (100, 200):
        for arm in ARMS:
            for schedule in SCHEDULES:
                outcome = _run(horizon, arm, schedule, quick)
                arms.append(outcome)
                train, test = outcome["train"], outcome["test"]
                numbers = [np.median(train), np.median(test), np.max(train), np.max(test), np.mean(outcome["success"])]
                more = [outcome["sequential"], outcome["cpu"], outcome["compile"]]
                rows.append([f"{horizon} {schedule} {arm}", *map(float, numbers), *more])
                print(table(HEAD, rows[-1:]).splitlines()[-1], flush=True)
                save("trust", {"columns": HEAD, "rows": rows, "arms": arms}, quick=quick)
    print(f"\nCosts over seeds, medians and worst; {STARTS} starts, float64\n\n{table(HEAD, rows)}")


def _run(horizon: int, arm: str, schedule: str, quick: bool) -> dict[str, Any]:
    make, steps, sequential = ARMS[arm]
    steps = steps // 10 if quick else steps
    task = d.tasks.make(NAME, horizon=horizon)
    solver = SCHEDULES[schedule](make(), steps)
    lanes = PolicyLanes(
        [solver], task, d.tasks.TASKS[NAME].hidden, draw(task, SEEDS, STARTS, 256, 0), sequential=sequential
    )
    compiling, cpu = lanes.compile(), time.process_time()
    for done in range(0, steps, CHUNK):
        lanes.advance(done, min(CHUNK, steps - done))
    cpu = time.process_time() - cpu
    look = lanes.evaluate()
    return {
        "horizon": horizon,
        "arm": arm,
        "schedule": schedule,
        "updates": steps,
        "train": (-look["train"][0]).tolist(),
        "test": (-look["test"][0]).tolist(),
        "success": look["success"][0].tolist(),
        "sequential": float(np.median(look["sequential"][0])),
        "cpu": cpu,
        "compile": compiling,
    }
