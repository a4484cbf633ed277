"""First against second order on policy parameters: every task, four horizons, every arm with the same continuation.

Five seeds, 64 training and 256 held-out starts, float32; each arm with its own number of updates, under the schedule of trust
(`Continuation.trusted`), which is that of second-order methods by default; L-BFGS and Adam under their own default, discounts,
as well, and `explored-newton`, which has a schedule of its own, as it is. Methods with a learning rate run all those of the
table at the shortest horizon, and the best by the median of its final training cost everywhere. Costs are -return; a seed
succeeds as in `robust`. One gradient is a BPTT gradient of the starts; a second-order update counts as what it costs in them.
CPU time is the process's for each seed, compile time apart.

In full this takes some ten hours on two cores. What is done is in the results file: a run that was interrupted goes on from
there, short horizons first. On a GPU it is the same command.
"""

from benchmarks.arms import HEAD, Case, Ledger
from benchmarks.record import table

TASKS = ("cartpole-balance", "pendulum-swingup", "cartpole-swingup", "quadrotor2d", "pendulum", "lqr-unstable-8")
HORIZONS = (50, 100, 200, 400)
ARMS = (
    ("lbfgs", "trust"),
    ("krylov-newton", "trust"),
    ("gauss-newton", "trust"),
    ("adam-decay", "trust"),
    ("lbfgs", "discounts"),
    ("adam-decay", "discounts"),
    ("explored-newton", "default"),
    ("muon", "trust"),
    ("soap", "trust"),
    ("newton-cg", "trust"),
    ("sigma-metric", "trust"),
    ("consensus", "trust"),
)
STARTS = 64


def run(*, quick: bool) -> None:
    ledger = Ledger("first_vs_second", quick=quick)
    for horizon in (20,) if quick else HORIZONS:
        for name in TASKS[:1] if quick else TASKS:
            for arm, continuation in ARMS[:3] if quick else ARMS:
                shortest = Case(name, 20 if quick else HORIZONS[0], arm, continuation, 32 if quick else STARTS)
                case = ledger.tuned(shortest)._replace(horizon=horizon)
                ledger.run(case)
                print(table(HEAD, [ledger.row(case)]).splitlines()[-1], flush=True)
    print(f"\nMedians over seeds; float32; {STARTS} starts\n\n{table(HEAD, ledger.rows())}")
