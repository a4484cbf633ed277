"""One method on one task from several seeds, as every comparison of optimisers here runs and records it."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import diffmbrl as d
from benchmarks.record import alone, path, save
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.methods import METHODS, solver
from diffmbrl.optimizers import Krylov

HELD_OUT, TOGETHER = 256, 5  # held-out starts; seeds that run side by side
WELL = 0.95  # share of the held-out starts that must end well in the task's own words for a seed to succeed
# Costs in BPTT gradients of the same starts, from the benchmark of primitives: a product of the Gauss-Newton matrix, one of the
# Hessian, a rollout.
PRODUCT, HESSIAN, FORWARD = 0.75, 2.4, 1 / 4.2


class Case(NamedTuple):
    """What a run depends on, but for the seed."""

    task: str
    horizon: int
    arm: str
    continuation: str
    starts: int
    rate: float | None = None


def task_of(case: Case) -> d.Task:
    """The case's task; `lqr-unstable-8` is a random linear system with 8 states, 3 actions and a spectral radius of 1.1."""
    if case.task == "lqr-unstable-8":
        return d.tasks.random_lqr(jax.random.key(0), 8, 3, stability="unstable", horizon=case.horizon)
    return d.tasks.make(case.task, horizon=case.horizon)


class Ledger:
    """The seeds that were run, in a results file: what an interrupted benchmark has done it does not do again.

    Several processes may fill one file. A seed has its costs at so many `looks` on the way.
    """

    def __init__(self, name: str, *, quick: bool, looks: int = 1):
        self.name, self.quick, self.looks = name, quick, looks
        self.seeds: list[dict[str, Any]] = [] if quick else self._kept()

    def _kept(self) -> list[dict[str, Any]]:
        file = path(self.name, quick=self.quick)
        return json.loads(file.read_text())["result"]["seeds"] if file.exists() else []

    def of(self, case: Case) -> list[dict[str, Any]]:
        """The seeds of one case."""
        wanted = case._asdict()
        return [run for run in self.seeds if all(run[key] == value for key, value in wanted.items())]

    def run(self, case: Case, *, first: int = 0) -> None:
        """Run five seeds and save, unless they are there."""
        if self._has(case, first):
            return
        self.seeds = self.seeds if self.quick else self._kept()  # another process may have run them meanwhile
        if not self._has(case, first):
            self.save(_run(case, first, self.quick, self.looks))

    def _has(self, case: Case, first: int) -> bool:
        return any(run["seed"] == first for run in self.of(case))

    def save(self, found: Sequence[dict[str, Any]] = (), **more: Any) -> None:
        """Write the file: the rows, `more` tables and the seeds, those there and those `found` that are not."""
        with alone():
            # Read again: another process may have added to the file meanwhile, even the same.
            self.seeds = self.seeds if self.quick else self._kept()
            there = {_of_what(run) for run in self.seeds}
            self.seeds = [*self.seeds, *(run for run in found if _of_what(run) not in there)]
            save(self.name, {"columns": HEAD, "rows": self.rows(), **more, "seeds": self.seeds}, quick=self.quick)

    def tuned(self, case: Case) -> Case:
        """The case at the rate of the table with the lowest median training cost on the first five seeds."""
        medians, rates = {}, METHODS[case.arm].rates
        if len(rates) == 1:
            return case._replace(rate=rates[0])
        for rate in rates:
            self.run(case._replace(rate=rate))
            costs = np.asarray(
                [float(run["train"]) for run in self.of(case._replace(rate=rate)) if run["seed"] < TOGETHER]
            )
            medians[rate] = float(np.median(np.where(np.isfinite(costs), costs, np.inf)))
        return case._replace(rate=min(medians, key=lambda rate: medians[rate]) if medians else None)

    def rows(self) -> list[list[Any]]:
        """A row of the table for each case."""
        cases = dict.fromkeys(Case(*(run[key] for key in Case._fields)) for run in self.seeds)
        return [self.row(case) for case in cases]

    def row(self, case: Case) -> list[Any]:
        """Medians over seeds; CPU time is the mean of a seed."""
        runs = self.of(case)
        keys = ("train", "test", "success", "gradients", "sequential", "cpu")
        train, test, success, gradients, sequential, cpu = (np.asarray([float(r[key]) for r in runs]) for key in keys)
        rate = "" if case.rate is None else f" {case.rate:g}"
        label = f"{case.task} {case.horizon} {case.continuation} {case.arm}{rate}"
        numbers = [np.mean(success), np.median(train), np.median(test), np.max(test), np.median(gradients)]
        spent = [np.median(sequential), np.mean(cpu), runs[0]["compile"]]
        return [label, len(runs), int(np.sum(success >= WELL)), *map(float, [*numbers, *spent])]


HEAD = [
    "task, T, continuation, method",
    "seeds",
    "succeeded",
    "starts",
    "train",
    "test",
    "worst",
    "gradients",
    "sequential",
    "CPU s",
    "compile s",
]


def _of_what(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[key] for key in (*Case._fields, "seed"))


def _run(case: Case, first: int, quick: bool, looks: int) -> list[dict[str, Any]]:
    # Programs of the runs before: of hundreds of them a process may have no more maps of memory than the system allows.
    jax.clear_caches()
    row, task = METHODS[case.arm], task_of(case)
    steps = max(6, row.steps // 10) if quick else row.steps
    train, test, keys = draw_starts(task, first + TOGETHER, case.starts, HELD_OUT, 0)
    draws = (jax.tree.map(lambda x: x[first:], train), test, keys[first:])
    made = solver(row, task, rate=case.rate, steps=steps, continuation=case.continuation)
    hidden = d.tasks.TASKS["lqr" if case.task.startswith("lqr") else case.task].hidden
    lanes = BatchedPolicyRuns([made], task, hidden, draws, sequential=row.sequential)
    whole = learning_curve(lanes, steps, evaluations=looks)
    cpu, wall = ((np.asarray(x[1:]) / TOGETHER).tolist() for x in (whole.cpu, whole.wall))
    seen = whole.evaluations[1:]
    shared = case._asdict() | {"updates": steps, "compile": whole.compile, "parameters": lanes.parameters}
    shared |= {"cpu": cpu[-1], "wall": wall[-1]}
    runs, look = [], seen[-1]
    for k in range(TOGETHER):
        work = {name: float(look[name][0, k]) for name in ("sequential", "forward", "jvp", "vjp", "nonfinite")}
        costs = {"train": -float(look["train"][0, k]), "test": -float(look["test"][0, k])}
        gradients = _gradients(made, work, steps, lanes.parameters, case)
        found = {"seed": first + k, "success": float(look["success"][0, k]), "gradients": gradients}
        curve = {"cpu": cpu, "sequential": [float(x["sequential"][0, k]) for x in seen]}
        curve |= {name: [-float(x[name][0, k]) for x in seen] for name in ("train", "test")}
        curve = {name: [float(f"{x:.5g}") for x in values] for name, values in curve.items()}
        runs.append(shared | costs | work | found | ({"curve": curve} if looks > 1 else {}))
    return runs


def _gradients(made: Any, work: dict[str, float], steps: int, parameters: int, case: Case) -> float:
    """Work in BPTT gradients of the training starts; NaN for a matrix formed whole, which is no number of them."""
    if isinstance(made, d.Sequential):
        searching = min(int(made.updates), steps)
        search, last = _searched(made.first, searching, case), steps - searching
        judging = 2 * FORWARD * last  # of BestSoFar
        return search + judging + _gradients(made.then, work, last, parameters, case)
    inner = made
    while isinstance(inner, d.Continuation | d.MultiStart | d.BestSoFar):
        inner = inner.solver
    batch_steps = case.starts * case.horizon
    if isinstance(inner, d.OptaxSolver):
        return work["vjp"] / batch_steps
    if isinstance(inner, d.GaussNewton) and isinstance(inner.system, Krylov):
        return steps * (1 + min(inner.system.rank, parameters) * PRODUCT + 12 * FORWARD)
    if isinstance(inner, d.KrylovNewton) and inner.rank is not None:
        # In a race the Hessian is of all the starts that an entrant sees, and all starts judge.
        racing = min(int(made.updates), steps) if isinstance(made, d.MultiStart) else 0
        hessian = 1 + min(inner.rank, parameters) * HESSIAN
        plain = 1 + min(inner.structured, parameters) * PRODUCT + 30 * FORWARD
        share = min(1.0, inner.starts / case.starts)
        entered = made.entrants * min(1.0, made.starts / case.starts) if isinstance(made, d.MultiStart) else 0.0
        race = entered * (plain + hessian) + (made.entrants + 1) * FORWARD if racing else 0.0
        return racing * race + (steps - racing) * (plain + share * hessian)
    return float("nan")


def _searched(raced: Any, steps: int, case: Case) -> float:
    """Short windows: forward, recomputed and back, and a rollout of as many starts to judge; all entrants in the race."""
    windows = raced.solver
    share = windows.environments * (windows.window / case.horizon + FORWARD) / case.starts
    racing = min(int(raced.updates), steps)
    return (racing * raced.entrants + steps - racing) * share
