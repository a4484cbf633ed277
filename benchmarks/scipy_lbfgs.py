"""scipy's L-BFGS-B against optax's L-BFGS: the same objective, discount stages and iterations.

`cartpole-balance` and `pendulum-swingup` at T = 100, 128 training and 256 test starts, three seeds, float64, 600 iterations in
the default discount stages, 20 pairs of memory. scipy's L-BFGS-B, without bounds, drives a compiled gradient from Python;
optax's whole update, line search included, is compiled. Costs are -return; CPU time is the process's for all seeds together,
compile time apart; gradients and sequential passes are medians over seeds.

Reference: Byrd, Lu, Nocedal, Zhu 1995 (L-BFGS-B); More and Thuente 1994 (its line search).
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.core import State, Task, reweighted
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.rollout import returns

TASKS, HORIZON, STARTS, SEEDS, STEPS, MEMORY = ("cartpole-balance", "pendulum-swingup"), 100, 128, 3, 600, 20
HEAD = ["task, L-BFGS of", "train", "test", "train worst", "test worst", "success", "gradients", "sequential", "CPU s"]
WORSE = 1e10  # what scipy is told of a return that is not finite: its line search has no word for it


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    rows: list[list[Any]] = []
    arms = []
    steps = STEPS // 20 if quick else STEPS
    for name in TASKS:
        for arm, of in (("scipy", by_scipy), ("optax", by_optax)):
            outcome = of(name, steps, SEEDS)
            arms.append(outcome)
            train, test = outcome["train"], outcome["test"]
            numbers = [np.median(train), np.median(test), np.max(train), np.max(test), np.mean(outcome["success"])]
            rows.append(
                [f"{name} {arm}", *map(float, numbers), *(outcome[x] for x in ("gradients", "sequential", "cpu"))]
            )
            print(table(HEAD, rows[-1:]).splitlines()[-1], flush=True)
            save("scipy_lbfgs", {"columns": HEAD, "rows": rows, "arms": arms}, quick=quick)
    print(f"\nCosts over seeds, medians and worst; {STARTS} starts, T = {HORIZON}, float64\n\n{table(HEAD, rows)}")


def by_scipy(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """All seeds one after another, through one compiled function: stages are values of its weights."""
    task = d.tasks.make(name, horizon=HORIZON)
    train, test, keys = draw_starts(task, seeds, STARTS, 256, 0)
    schedule = d.Continuation.discounted(d.OptaxSolver(optax.lbfgs), steps)
    stages = [(schedule.weights(task, k), int(length)) for k, length in enumerate(schedule.lengths)]
    passes = int(d.BPTT().work(task, STARTS).sequential)
    policies = [d.Neural.init(task, hidden=d.tasks.TASKS[name].hidden, key=key) for key in keys]
    unravel = ravel_pytree(policies[0])[1]
    traces: list[str] = []

    @jax.jit
    def compiled(x, task, s0, weights):
        traces.append(name)
        return _value_and_gradient(unravel(x), task, s0, weights)

    begun = time.perf_counter()
    jax.block_until_ready(compiled(np.asarray(ravel_pytree(policies[0])[0]), task, train[0], stages[0][0]))
    compiling, cpu, runs = time.perf_counter() - begun, 0.0, []
    for policy, s0 in zip(policies, train, strict=True):
        started = time.process_time()
        runs.append(descend(compiled, np.asarray(ravel_pytree(policy)[0]), task, s0, stages))
        cpu += time.process_time() - started
    evaluated = [_evaluate(unravel(x), task, s0, test) for (x, _), s0 in zip(runs, train, strict=True)]
    gradients = [sum(stage["gradients"] for stage in record) for _, record in runs]
    return {
        "task": name,
        "horizon": HORIZON,
        "arm": "scipy",
        "schedule": "discounts",
        "updates": steps,
        **{key: [float(x[key]) for x in evaluated] for key in ("train", "test", "success")},
        "gradients": float(np.median(gradients)),
        "sequential": float(np.median(gradients)) * passes,
        "cpu": cpu,
        "compile": compiling,
        "traces": len(traces),
        "stages": [record for _, record in runs],
    }


def descend(
    compiled: Callable, x: np.ndarray, task: Task, s0: State, stages: list[tuple[Any, int]]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The last point, and of each stage its iterations, gradients, non-finite returns and why it ended.

    A stage ends after its iterations, or where the line search finds nothing lower; never by a tolerance.
    """
    record = []
    for weights, length in stages:
        bad = 0

        def objective(x: np.ndarray, weights: Any = weights) -> tuple[float, np.ndarray]:
            nonlocal bad
            value, gradient = (np.asarray(y) for y in compiled(x, task, s0, weights))
            if np.isfinite(value) and np.all(np.isfinite(gradient)):
                return float(value), gradient
            bad += 1
            return WORSE, np.zeros_like(x)

        options = {"maxcor": MEMORY, "maxiter": length, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0}
        found = minimize(objective, x, jac=True, method="L-BFGS-B", options=options)
        x = found.x
        record.append(
            {"iterations": int(found.nit), "gradients": int(found.nfev), "nonfinite": bad, "stop": str(found.message)}
        )
    return x, record


def by_optax(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """The row `lbfgs` of the table of methods."""
    task = d.tasks.make(name, horizon=HORIZON)
    solver = d.Continuation.discounted(d.OptaxSolver(optax.lbfgs, memory_size=MEMORY), steps)
    lanes = BatchedPolicyRuns(
        [solver], task, d.tasks.TASKS[name].hidden, draw_starts(task, seeds, STARTS, 256, 0), sequential=True
    )
    whole = learning_curve(lanes, steps, evaluations=1)
    look = whole.evaluations[-1]
    return {
        "task": name,
        "horizon": HORIZON,
        "arm": "optax",
        "schedule": "discounts",
        "updates": steps,
        "train": (-look["train"][0]).tolist(),
        "test": (-look["test"][0]).tolist(),
        "success": look["success"][0].tolist(),
        "gradients": float(np.median(look["vjp"][0])) / (STARTS * HORIZON),
        "sequential": float(np.median(look["sequential"][0])),
        "cpu": whole.cpu[-1],
        "compile": whole.compile,
    }


def _value_and_gradient(policy: Any, task: Task, s0: State, weights: Any) -> tuple[Any, Any]:
    """-J and its gradient in flat parameters, by the same BPTT."""
    J, gradient = d.BPTT()(policy, reweighted(task, weights), s0, None)
    return -J, -ravel_pytree(gradient)[0]


@jax.jit
def _evaluate(policy: d.Neural, task: Task, train: State, test: State) -> dict[str, Any]:
    trajectories = d.rollouts(policy, task, test)
    held_out = jax.vmap(lambda tau: returns(tau, task))(trajectories)
    success = jax.vmap(task.success)(trajectories.s_T) if task.success is not None else jax.numpy.zeros(1)
    return {"train": -d.mean_return(policy, task, train), "test": -held_out.mean(), "success": success.mean()}
