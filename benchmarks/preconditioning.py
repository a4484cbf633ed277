"""Diagonal and block approximations of the Gauss-Newton matrix as metrics of its Krylov space.

`cartpole-balance` and `pendulum-swingup` at T = 100, 64 training and 256 test starts, two seeds, float64. Along one run of
`Continuation.trusted(GaussNewton(system=Krylov(10)), 150)`, at its start, in the stage of discount .9 and at its end: after k
products, the decrease of the undamped quadratic model as a share of the largest that any metric reaches in 30, and the true
improvement by the best of the path of dampings, as a share of the return's size. Then whole runs with 10 products, costs being
-return. The numbers are means over the seeds.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import diffmbrl as d
from benchmarks.record import save, table
from diffmbrl.contrib import Jacobi, Kronecker, LeafBlocks, Preconditioned, SignedJacobi
from diffmbrl.core import State, Task
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
from diffmbrl.optimizers import DampingGrid, Krylov
from diffmbrl.optimizers.damping import scale
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.krylov import lanczos

NAMES, STARTS, SEEDS, UPDATES, RANK = ("cartpole-balance", "pendulum-swingup"), 64, 2, 150, 30
RUNS = ("leaf blocks", "Kronecker", "diagonal")  # and none
PRODUCTS = (5, 10, 20, 30)
POINTS = {"start": (0, 0), "discount .9": (30, 0), "end": (150, 5)}  # updates made, stage in force


def systems(rank: int) -> dict[str, Any]:
    """The metrics, each with `rank` products."""
    makers = {
        "diagonal": Jacobi(),
        "diagonal^.75": Jacobi(power=0.75),
        "4 signs": SignedJacobi(),
        "leaf blocks": LeafBlocks(),
        "Kronecker": Kronecker(),
    }
    return {"none": Krylov(rank)} | {name: Preconditioned(maker, rank) for name, maker in makers.items()}


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_x64", True)
    updates = UPDATES // 10 if quick else UPDATES
    points = {name: (made * updates // UPDATES, stage) for name, (made, stage) in POINTS.items()}
    spaces: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for name in NAMES[:1] if quick else NAMES:
        task = d.tasks.make(name, horizon=50 if quick else 100)
        draws = draw_starts(task, SEEDS, STARTS, 256, 0)
        outcome, policies = _run(name, task, draws, Krylov(10), "none", updates, points)
        runs.append(outcome)
        spaces += _spaces(name, task, draws[0], policies, points, updates)
        save("preconditioning", {"spaces": spaces, "runs": runs}, quick=quick)
        for metric in RUNS:
            runs.append(_run(name, task, draws, systems(10)[metric], metric, updates, {})[0])
            save("preconditioning", {"spaces": spaces, "runs": runs}, quick=quick)
    head = ["task, run of 10 products in the metric of", "train", "test", "test worst", "success", "CPU s"]
    rows = [
        [f"{r['task']}, {r['metric']}", *map(float, (np.mean(r["train"]), np.mean(r["test"]), np.max(r["test"]))),
         float(np.mean(r["success"])), r["cpu"]]
        for r in runs
    ]  # fmt: skip
    print("\n" + table(head, rows))


def _run(name, task, draws, system, metric, updates, points) -> tuple[dict[str, Any], dict[str, Any]]:
    """A whole run, and its policies at the given points."""
    solver = d.Continuation.trusted(d.GaussNewton(system=system), updates, horizon=task.horizon)
    batch = BatchedPolicyRuns([solver], task, d.tasks.TASKS[name].hidden, draws, sequential=False)
    compiling, cpu, done, saved = batch.compile(), 0.0, 0, {}
    stops = {made: point for point, (made, _) in points.items()}
    for stop in sorted({*stops, updates}):
        begun = time.process_time()
        batch.advance(done, stop - done)
        done = stop
        cpu += time.process_time() - begun
        if stop in stops:
            saved[stops[stop]] = batch.policies
    evaluation = batch.evaluate()
    return {
        "task": name,
        "metric": metric,
        "train": (-evaluation["train"][0]).tolist(),
        "test": (-evaluation["test"][0]).tolist(),
        "success": evaluation["success"][0].tolist(),
        "updates": updates,
        "cpu": cpu,
        "compile": compiling,
    }, saved


def _spaces(name, task, train, policies, points, updates) -> list[dict[str, Any]]:
    """At each point and for each metric, the Krylov spaces of growing dimension."""
    schedule = d.Continuation.trusted(d.GaussNewton(), updates, horizon=task.horizon)
    found = []
    for metric, system in systems(RANK).items():
        for point, (_, stage) in points.items():

            def one(policy, s0, stage=stage):
                return schedule.in_force(policy, task, s0, stage)

            eased = jax.vmap(one)(policies[point], train)
            decrease, improved, J = jax.tree.map(np.asarray, _measure(system, policies[point], eased, train))
            found.append(
                {
                    "task": name,
                    "point": point,
                    "metric": metric,
                    "products": PRODUCTS,
                    "decrease": decrease.tolist(),
                    "improved": improved.tolist(),
                    "J": J.tolist(),
                }
            )
    for point in points:
        here = [row for row in found if row["point"] == point]
        best = np.max([row["decrease"] for row in here], axis=(0, 2))
        rows = []
        for row in here:
            share = np.mean(np.array(row["decrease"]) / best[:, None], axis=0)
            gain = np.mean(np.array(row["improved"]) / np.abs(row["J"])[:, None], axis=0)
            rows.append([row["metric"], *share.tolist(), *gain.tolist()])
        head = ["metric", *(f"model, {k}" for k in PRODUCTS), *(f"true, {k}" for k in PRODUCTS)]
        print(f"\n{name}, {point}\n{table(head, rows)}", flush=True)
    return found


@jax.jit
def _measure(system: Any, policies: Any, tasks: Task, train: State) -> tuple[Array, Array, Array]:
    """Decreases of the undamped model and best true improvements, [seeds, dimensions], and returns [seeds]."""

    def one(policy, task, s0):
        model = gauss_newton(policy, task, s0)
        space = system(model, policy, task, None)
        theta, unravel = ravel_pytree(policy)

        def truth(step):
            J = d.mean_return(unravel(theta + step), task, s0)
            return jnp.where(jnp.isfinite(J), J, -jnp.inf)

        out = []
        for k in PRODUCTS:
            # The smaller Krylov space, within the largest one, from the Ritz values alone.
            inner = lanczos(lambda y: space.values * y, space.coefficients, k)
            positive = inner.values > 1e-13 * jnp.max(space.values)
            decrease = 0.5 * jnp.sum(
                jnp.where(positive, inner.coefficients**2 / jnp.where(positive, inner.values, 1.0), 0.0)
            )
            part = inner._replace(vectors=inner.vectors @ space.vectors, values=jnp.maximum(inner.values, 0))
            steps, _ = jax.vmap(part.step)(DampingGrid().dampings.astype(theta.dtype) * scale(part))
            out.append((decrease, jnp.max(jax.lax.map(truth, steps)) - model.J))
        decrease, improved = (jnp.stack(x) for x in zip(*out, strict=True))
        return decrease, improved, model.J

    # One after another: a vmap would keep the columns of several in memory.
    return jax.lax.map(lambda x: one(*x), (policies, tasks, train))
