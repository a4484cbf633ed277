"""The untuned second-order method on every task, twenty seeds, and its rivals in the same run.

`explored-newton` on twenty seeds; `krylov-newton`, L-BFGS and Adam on the first five of them: as the command line makes them,
on 256 training and 256 held-out starts, float32. Of Adam's four rates that of the lowest median training cost is shown. A
seed succeeds if at least 95% of the held-out starts end well in the task's own words (`diffmbrl tasks`): upright or balanced
and slow, hovering, near the origin. Costs are -return. CPU time is the process's for each seed, compile time apart.

Seeds run five at a time, and what is done is in the results file: a run that was interrupted goes on from there. On a CPU
`NPROC=1`, one thread, takes the least CPU time.
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
SEEDS = {"explored-newton": 20, "krylov-newton": TOGETHER, "lbfgs": TOGETHER, "adam": TOGETHER}
STARTS = 256


def run(*, quick: bool) -> None:
    ledger = Ledger("robust", quick=quick)
    for arm, seeds in SEEDS.items():
        for first in range(0, TOGETHER if quick else seeds, TOGETHER):
            for name, horizon in SETTINGS[:2] if quick else SETTINGS:
                case = ledger.tuned(Case(name, horizon, arm, "default", 32 if quick else STARTS))
                ledger.run(case, first=first)
                print(table(HEAD, [ledger.row(case)]).splitlines()[-1], flush=True)
    print(f"\nMedians over seeds; float32; {STARTS} starts\n\n{table(HEAD, ledger.rows())}")
