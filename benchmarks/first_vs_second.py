"""First against second order on policy parameters: every task, four horizons, every arm with the same continuation.

Five seeds, 128 training and 256 held-out starts, float32; each arm with its own number of updates, under the schedule of
discounts and under that of trust (`Continuation`). Methods with a learning rate run all those of the table: the best by the
median of its final training cost is named. Costs are -return; a seed succeeds as in `robust`. One gradient is a BPTT gradient
of the starts; a second-order update counts as what it costs in them. CPU time is the process's for each seed, compile time
apart.

In full this takes a day on two cores. What is done is in the results file: a run that was interrupted goes on from there, most
telling settings first. On a GPU it is the same command.
"""

from benchmarks.arms import HEAD, Case, Ledger
from benchmarks.record import table

TASKS = ("cartpole-balance", "pendulum-swingup", "cartpole-swingup", "quadrotor2d", "pendulum", "lqr-unstable-8")
HORIZONS = (100, 50, 200, 400)
ARMS = (
    "lbfgs",
    "krylov-newton",
    "gauss-newton",
    "muon",
    "adam-decay",
    "soap",
    "newton-cg",
    "consensus",
    "sigma-metric",
)
DENSE = ("gauss-newton-dense", "newton-dense")  # on the cart-pole's small policies alone: hours on others
SMALL = ("cartpole-balance", "lqr-unstable-8")
STARTS = 128


def run(*, quick: bool) -> None:
    ledger = Ledger("first_vs_second", quick=quick)
    for horizon in (20,) if quick else HORIZONS:
        for name in TASKS[:1] if quick else TASKS:
            for arm in ARMS[:3] if quick else (*ARMS, *(DENSE if name in SMALL else ())):
                for continuation in ("trust", "discounts"):
                    case = ledger.tuned(Case(name, horizon, arm, continuation, 32 if quick else STARTS))
                    ledger.run(case)
                    print(table(HEAD, [ledger.row(case)]).splitlines()[-1], flush=True)
    print(f"\nMedians over seeds; float32; {STARTS} starts\n\n{table(HEAD, ledger.rows())}")
