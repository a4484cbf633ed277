"""First against second order on policy parameters: the same starts, policies and discount schedule for every arm.

`cartpole-balance` and `pendulum-swingup` at T = 100 and 200, 32 training and 256 test starts, five seeds, float64, with the
default continuation and without. Adam runs at four rates: the best by the median of its final training cost is shown, the
others are kept, and its work and CPU time are those of one rate. Costs are -return.

One gradient is a BPTT gradient of the 32 starts. A second-order update is counted as what it costs in them: its linearisation
as 1, each product as .75 (the bound that the benchmark of primitives holds it to), each damping tried as a forward rollout,
1 / 4.6. CPU time is the process's, compile time apart, for all seeds together.
"""

import time
from typing import Any

import jax
import numpy as np
import optax

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.lanes import PolicyLanes, draw
from diffmbrl.methods import METHODS, clipped_adam
from diffmbrl.solve import CHUNK

TASKS = ("cartpole-balance", "pendulum-swingup")
RATES = METHODS["adam"].rates
PRODUCT, FORWARD = 0.75, 1 / 4.6  # in gradients
ARMS = {
    "adam": (lambda rate: d.Descend(clipped_adam, learning_rate=rate), 800, False),
    "lbfgs": (lambda rate: d.Descend(optax.lbfgs, memory_size=20), 600, True),
    "gauss-newton": (lambda rate: d.GaussNewton(), 75, False),
    "gauss-newton-dense": (lambda rate: d.GaussNewton(system=d.Dense()), 75, False),
}
DENSE = "gauss-newton-dense"  # in one setting only: on 1217 parameters, or at T = 200, it takes minutes a seed


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    rows: list[list[Any]] = []
    details = []
    head = [
        "task, T, continuation, method",
        "train",
        "test",
        "test worst",
        "best visited",
        "success",
        "gradients",
        "sequential",
        "CPU s",
    ]
    for name in TASKS:
        for horizon in (50,) if quick else (100, 200):
            for continued in (True, False):
                for arm in ARMS:
                    if arm == DENSE and not (continued and name == "cartpole-balance" and horizon == 100):
                        continue
                    outcome = _run_arm(name, horizon, continued, arm, quick)
                    details.append(outcome)
                    label = f"{name} {horizon} {'discounts' if continued else 'none'} {arm}"
                    columns = [
                        "train",
                        "test",
                        "test_worst",
                        "best_visited",
                        "success",
                        "gradients",
                        "sequential",
                        "cpu",
                    ]
                    rows.append([label, *(outcome[column] for column in columns)])
                    print(table(head, rows[-1:]).splitlines()[-1], flush=True)
                    save("first_vs_second", {"columns": head, "rows": rows, "arms": details}, quick=quick)
    print(f"\nMedians over seeds of the costs; work per seed; float64\n\n{table(head, rows)}")


def _run_arm(name: str, horizon: int, continued: bool, arm: str, quick: bool) -> dict[str, Any]:
    """One arm: its costs over seeds and its work; of several rates the best, with the others' costs beside it."""
    make, steps, sequential = ARMS[arm]
    steps, seeds = (max(5, steps // 20), 2) if quick else (steps, 5)
    rates = RATES if arm == "adam" else (None,)
    task = d.tasks.make(name, horizon=horizon)
    draws = draw(task, seeds, 32, 256, 0)
    solvers = [make(rate) for rate in rates]
    schedules = [d.Continuation.discounted(solver, steps) for solver in solvers] if continued else solvers
    lanes = PolicyLanes(schedules, task, d.tasks.TASKS[name].hidden, draws, sequential=sequential)
    compiling = lanes.compile()
    every = min(CHUNK, max(1, steps // 15))
    done, cpu, visited = 0, 0.0, []
    while done < steps:
        count = min(every, steps - done)
        begun = time.process_time()
        lanes.advance(done, count)
        cpu += time.process_time() - begun
        done += count
        visited.append(lanes.evaluate())
    by_rate = [_outcome(visited, rate) for rate in range(len(rates))]
    medians = [outcome["train"] for outcome in by_rate]
    best = int(np.argmin(np.where(np.isfinite(medians), medians, np.inf)))
    return {
        "task": name,
        "horizon": horizon,
        "continued": continued,
        "arm": arm,
        "rate": rates[best],
        "rates": dict(zip(map(str, rates), medians, strict=True)),
        "gradients": _gradients(solvers[best], visited[-1], best, steps, 32 * horizon),
        "cpu": cpu / len(rates),
        "compile": compiling,
        "parameters": lanes.parameters,
        "updates": steps,
        **by_rate[best],
    }


def _outcome(visited: list[dict[str, np.ndarray]], rate: int) -> dict[str, Any]:
    """Costs of one rate over its seeds: at the end, and on the test starts where the training cost was lowest."""
    train = np.stack([-look["train"][rate] for look in visited])
    test = np.stack([-look["test"][rate] for look in visited])
    best = np.argmin(np.where(np.isfinite(train), train, np.inf), axis=0)
    at_best = test[best, np.arange(train.shape[1])]
    success = visited[-1]["success"][rate]
    return {
        "train": float(np.median(train[-1])),
        "test": float(np.median(test[-1])),
        "test_worst": float(np.max(test[-1])),
        "best_visited": float(np.median(at_best)),
        "success": float(np.mean(success)),
        "sequential": float(np.median(visited[-1]["sequential"][rate])),
        "train_by_seed": train[-1].tolist(),
        "test_by_seed": test[-1].tolist(),
        "success_by_seed": success.tolist(),
    }


def _gradients(solver: Any, last: dict[str, np.ndarray], rate: int, steps: int, batch_steps: int) -> float:
    """Work in BPTT gradients of the training starts."""
    if isinstance(solver, d.GaussNewton):
        products = solver.system.rank * PRODUCT if isinstance(solver.system, d.Krylov) else 0.0
        return steps * (1 + products + 12 * FORWARD)
    return float(np.median(last["vjp"][rate])) / batch_steps
