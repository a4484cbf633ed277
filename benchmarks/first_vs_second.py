"""First against second order on policy parameters: every task, four horizons, every arm with the same continuation.

Five seeds, 64 training and 256 held-out starts, float32; each arm with its own number of updates, under the schedule of trust
(`Continuation.trusted`), which is that of second-order methods by default; two of either order under discounts, the default of
first order, as well, and `explored-newton`, which has a schedule of its own, as it is. Methods with a learning rate run all
those of the table at the shortest horizon, and the best by the median of its final training cost everywhere. Costs are -return;
a seed succeeds as in `robust`. One gradient is a BPTT gradient of the starts; a second-order update counts as what it costs in
them. CPU time is the process's for each seed, compile time apart.

The second table measures every arm against the best of first and quasi-Newton order on that task and horizon, by the median of
final test costs: the ratio of those medians, and how many sequential passes and CPU seconds it took until the median over seeds
was within 5% of that best; beside them the least that a method of first order took which also ends there. Costs are looked at
sixteen times on the way.

In full this takes some ten hours on two cores. What is done is in the results file: a run that was interrupted goes on from
there, short horizons first. On a GPU it is the same command. On a CPU `NPROC=1`, one thread, takes the least CPU time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.arms import HEAD, Case, Ledger
from benchmarks.record import table
from diffmbrl.methods import METHODS

TASKS = ("cartpole-balance", "pendulum-swingup", "cartpole-swingup", "quadrotor2d", "pendulum", "lqr-unstable-8")
HORIZONS = (50, 100, 200, 400)
ARMS = (
    ("lbfgs", "trust"),
    ("krylov-newton", "trust"),
    ("gauss-newton", "trust"),
    ("adam-decay", "trust"),
    ("lbfgs", "discounts"),
    ("krylov-newton", "discounts"),
    ("gauss-newton", "discounts"),
    ("adam-decay", "discounts"),
    ("explored-newton", "default"),
    ("muon", "trust"),
    ("soap", "trust"),
    ("newton-cg", "trust"),
    ("sigma-metric", "trust"),
    ("consensus", "trust"),
)
STARTS, LOOKS, WITHIN = 64, 16, 1.05
TARGETS = ["task, T, continuation, method", "test / best first", "passes", "least of first", "CPU s", "least of first"]


def run(*, quick: bool) -> None:
    ledger = Ledger("first_vs_second", quick=quick, looks=LOOKS)
    horizons, starts = ((20,), 32) if quick else (HORIZONS, STARTS)
    chosen: list[Case] = []
    for horizon in horizons:
        for name in TASKS[:1] if quick else TASKS:
            for arm, continuation in ARMS[:3] if quick else ARMS:
                shortest = Case(name, horizons[0], arm, continuation, starts)
                case = ledger.tuned(shortest)._replace(horizon=horizon)
                ledger.run(case)
                chosen.append(case)
                print(table(HEAD, [ledger.row(case)]).splitlines()[-1], flush=True)
    rows = list(against_first(ledger, chosen))
    ledger.save(targets={"columns": TARGETS, "rows": rows})
    print(f"\nMedians over seeds; float32; {starts} starts\n\n{table(HEAD, ledger.rows())}")
    print(f"\nUntil within {WITHIN - 1:.0%} of the best of first order\n\n{table(TARGETS, rows)}")


def against_first(ledger: Ledger, cases: list[Case]) -> Iterator[list[Any]]:
    """A row for each case, beside the first-order cases of the same task and horizon that end within the target."""
    for setting in dict.fromkeys((case.task, case.horizon) for case in cases):
        there = [case for case in cases if (case.task, case.horizon) == setting]
        rivals = {case: _final(ledger, case) for case in there if METHODS[case.arm].order == 1}
        best = min(rivals.values())
        target = WITHIN * best
        # Of many that end there one is cheapest, and it need not be the one that ends a thousandth lower.
        least = zip(*(_reached(ledger, x, target) for x, final in rivals.items() if final <= target), strict=True)
        least_passes, least_cpu = map(min, least)
        for case in there:
            passes, cpu = _reached(ledger, case, target)
            label = f"{case.task} {case.horizon} {case.continuation} {case.arm}"
            yield [label, _final(ledger, case) / best, passes, least_passes, cpu, least_cpu]


def _final(ledger: Ledger, case: Case) -> float:
    return float(np.median(_over(ledger, case, "test")[:, -1]))


def _reached(ledger: Ledger, case: Case, target: float) -> tuple[float, float]:
    """Sequential passes and CPU seconds of a seed at the first look with a median within the target; infinite if none is."""
    there = np.median(_over(ledger, case, "test"), axis=0) <= target
    if not there.any():
        return float("inf"), float("inf")
    first = int(np.argmax(there))
    passes, cpu = (np.median(_over(ledger, case, name), axis=0) for name in ("sequential", "cpu"))
    return float(passes[first]), float(cpu[first])


def _over(ledger: Ledger, case: Case, name: str) -> np.ndarray:
    """[seeds, looks] of a quantity on the way; a cost that is not finite counts as infinite."""
    x = np.asarray([[float(value) for value in run["curve"][name]] for run in ledger.of(case)])
    return np.where(np.isfinite(x), x, np.inf)
