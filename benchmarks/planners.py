"""iLQR and DDP against their peers on four systems, and from many starts; float64, T = 100, no limits, one core.

Times are CPU seconds of the process, medians of interleaved rounds, and are given as multiples of a rollout compiled by XLA
(`value` of an open-loop plan, on the device, no call from Python). "To .1%" is up to the iteration whose cost is within .1% of
the lowest that the same solver found; the column of costs says whether it is the others' optimum. Compile time is tracing,
lowering and XLA's, without a cache. A peer that is not installed is skipped with a line.
"""

import os
import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffmbrl as d
from benchmarks.planner_peers import PEERS
from benchmarks.record import save, table
from benchmarks.timing import medians
from benchmarks.trajectory_problems import PROBLEMS, problem
from diffmbrl.core import Task
from diffmbrl.planners import Plans

HORIZON, MOST, INNER, SOLVES, FEW = 100, 500, 200, 10, 20
TOLERANCES, NEAR, SHARE = (1e-3, 1e-4, 1e-5, 1e-6), 1e-3, 0.99
PLANNERS = {"ilqr": d.ILQR, "ddp": d.DDP}


def run(*, quick: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # a compile time that comes from a cache is none
    # One core for all: before the first computation, so that XLA has one thread too.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with jax.enable_x64(True):
        parts = {
            "one_start": _one_start(quick=quick),
            "many_starts": _many_starts((1, 64) if quick else (1, 64, 1024, 8192)),
        }
    save("planners", parts, quick=quick)


def _one_start(*, quick: bool) -> dict[str, Any]:
    rows = []
    for name in PROBLEMS:
        task = problem(name, HORIZON)
        solvers, compiling = {}, {}
        for label, make in PLANNERS.items():
            solvers[label], compiling[label] = _ours(make(), task)
        for label, peer in PEERS.items():
            try:
                solve = peer(name, task)
            except ImportError as error:
                print(f"{label} is skipped: {error}")
                continue
            if solve is not None:
                solvers[label] = solve
        rows += _to_optimum(name, task, solvers, compiling, rounds=3 if quick else 5)
        print(".", end="", flush=True)
    head = ["", "cost", "iterations", "to .1%", "an iteration, us", "to .1%, ms", "rollouts", "compile, CPU s"]
    print(f"\nFrom x0 and zero actions, T = {HORIZON}, float64\n\n{table(head, rows)}\n")
    return {"columns": head, "rows": rows}


def _ours(planner: Any, task: Task) -> tuple[Any, float]:
    """As `solve` runs it but for the rows of its history: all iterations in one program, their number traced; its compile time.

    SOLVES of them, one after another in that program, as the rollouts are: the call from Python is no part of either.
    """
    plan, s0 = planner.first_plan(task), task.initial(jax.random.key(0))

    @jax.jit
    def iterate(planner, plan, task, s0, count):
        def update(i, state):
            plan, carry, _ = state
            plan, carry, info = planner.update(plan, carry, task, s0, key=None)
            return plan, carry, info.J

        def one(i, J):
            moved = eqx.tree_at(lambda plan: plan.a, plan, plan.a + 1e-30 * J)
            return jax.lax.fori_loop(0, count, update, (moved, planner.init(plan, task), J))[2]

        return jax.lax.fori_loop(0, SOLVES, one, jnp.zeros(()))

    begun = time.process_time()
    compiled = iterate.lower(planner, plan, task, s0, jnp.int32(1)).compile()
    compiling = time.process_time() - begun

    def solve(iterations: int, *, record: bool = False) -> Any:
        if record:
            return -d.solve(planner, plan, task, s0, None, iterations, relative=1e-12)[1].info.J
        return jax.block_until_ready(compiled(planner, plan, task, s0, jnp.int32(iterations)))

    return solve, compiling


def _to_optimum(name: str, task: Task, solvers: dict, compiling: dict, *, rounds: int) -> list[list[Any]]:
    costs = {label: np.asarray(solve(MOST, record=True)) for label, solve in solvers.items()}
    needed = {label: int(np.argmax(c <= c.min() * 1.001)) for label, c in costs.items()}
    calls = {"rollout": _rollouts(task)}
    for label, count in needed.items():
        calls[label] = partial(solvers[label], count)
        calls[label]()  # compiled for this number, where that is needed
    seconds = medians(calls, rounds=rounds, clock=time.process_time)
    rollout = seconds.pop("rollout") / INNER
    seconds = {label: spent / (SOLVES if label in PLANNERS else 1) for label, spent in seconds.items()}
    rows: list[list[Any]] = [[name, "", "", "", f"{rollout * 1e6:.2f}", "", "1", ""]]
    for label, c in costs.items():
        spent, count = seconds[label], needed[label]
        each = [spent / count * 1e6, spent * 1e3, spent / rollout, compiling.get(label, "-")]
        rows.append([f"  {label}", f"{c.min():.5f}", str(len(c) - 1), str(count), *each])
    return rows


def _rollouts(task: Task) -> Any:
    """INNER rollouts as one call."""
    a, s0 = d.Affine.zeros(task).a, task.initial(jax.random.key(0))

    @jax.jit
    def rollouts(a, task, s0):
        # A rollout that depends on the last, so that none is hoisted out of the loop.
        return jax.lax.fori_loop(
            0, INNER, lambda i, x: x + 1e-30 * d.episode_return(d.OpenLoop(a + x), task, s0), jnp.zeros((), a.dtype)
        )

    return partial(rollouts, a, task, s0)


def _many_starts(batches: tuple[int, ...]) -> dict[str, Any]:
    """`plans` of iLQR to a relative change of 1e-6; of the most starts up to 1024 also FEW updates each, whatever they gain.

    And to .1% of the optimum: with the loosest of the relative changes that leaves 99% of the starts within .1% of where a
    change of 1e-9 ends them.
    """
    rows, equal = [], max(batch for batch in batches if batch <= 1024)
    for name in PROBLEMS:
        task = problem(name, HORIZON)
        noise = jax.random.normal(jax.random.key(1), (max(batches), task.n), task.a_low.dtype)
        starts = task.initial(jax.random.key(0)) + 0.1 * noise
        jax.block_until_ready(_rollouts(task)())
        rollout = medians({"": _rollouts(task)}, clock=time.process_time)[""] / INNER
        rates, solves = zip(*(_rate(task, starts[:batch], steps=300, relative=1e-6) for batch in batches), strict=True)
        found, few = solves[-1], _rate(task, starts[:equal], steps=FEW, relative=0.0)[0]
        ended = [float(found.iterations.mean()), str(found.iterations.max()), found.useful, _ends(found)]
        rows.append([name, f"{rollout * 1e6:.2f}", *rates, *ended, few, *_near(task, starts[:equal])])
        print(".", end="", flush=True)
    head = ["", "rollout, us", *(f"{batch} starts" for batch in batches), "iterations", "most", "useful", "ended by"]
    head += [f"{equal} starts, {FEW} updates", f"{equal} starts, to .1%", "by a relative change of", "share within .1%"]
    print(f"\nSolves per CPU second, x0 + .1 N(0, I), to a relative change of 1e-6\n\n{table(head, rows)}\n")
    return {"columns": head, "rows": rows}


def _near(task: Task, starts: jax.Array) -> list[Any]:
    """Solves per CPU second to .1% of the optimum, the relative change that ends them, and the share that is there."""
    optimum = np.asarray(_rate(task, starts, steps=MOST, relative=1e-9)[1].J)
    tried: list[list[Any]] = []
    for relative in TOLERANCES:
        rate, found = _rate(task, starts, steps=MOST, relative=relative)
        share = float(np.mean(optimum - np.asarray(found.J) <= NEAR * np.abs(optimum)))
        tried.append([rate, f"{relative:g}", share])
        if share >= SHARE:
            break
    return tried[-1]


def _rate(task: Task, starts: jax.Array, *, steps: int, relative: float) -> tuple[float, Plans]:
    """Solves per CPU second, and what they found."""
    solve = partial(d.plans, d.ILQR(), task, starts, relative=relative)
    solve(steps=1)  # compiles
    begun = time.process_time()
    found = solve(steps=steps)
    return len(starts) / (time.process_time() - begun), found


def _ends(found: Plans) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.ends().items())
