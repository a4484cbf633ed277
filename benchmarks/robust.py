"""The default second-order method with nothing tuned, beside L-BFGS and Adam: twenty seeds of every task.

`krylov-newton`, `explored-newton`, L-BFGS and Adam as the command line makes them, on 256 training and 256 held-out starts,
float32. Adam runs its four rates on the first five seeds, and the rate of the lowest median training cost on all of them. A
seed succeeds if at least 95% of the held-out starts end well in the task's own words (`diffmbrl tasks`): upright or balanced
and slow, hovering, near the origin. Costs are -return. CPU time is the process's for each seed, compile time apart.

Seeds run five at a time, and what is done is in the results file: a run that was interrupted goes on from there.
"""

from benchmarks.arms import HEAD, TOGETHER, Case, Ledger
from benchmarks.record import table

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
ARMS = ("krylov-newton", "explored-newton", "lbfgs", "adam")
SEEDS, STARTS = 20, 256


def run(*, quick: bool) -> None:
    ledger = Ledger("robust", quick=quick)
    for first in range(0, TOGETHER if quick else SEEDS, TOGETHER):
        for arm in ARMS:
            for name, horizon in SETTINGS[:2] if quick else SETTINGS:
                case = ledger.tuned(Case(name, horizon, arm, "default", 32 if quick else STARTS))
                ledger.run(case, first=first)
                print(table(HEAD, [ledger.row(case)]).splitlines()[-1], flush=True)
    print(f"\nMedians over seeds; float32; {STARTS} starts\n\n{table(HEAD, ledger.rows())}")
