"""Training runs of an experiment: one method at its learning rates, all seeds at once, evaluated on the way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffmbrl.core import Solver
from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.tasks import make
from experiments.programs import forget_programs

HELD_OUT = 256


class Arm(NamedTuple):
    """A solver for a learning rate, its updates, the rates it is tried at (none for one without), whether seeds go in turn."""

    make: Callable[[float | None, int], Solver]  # of a rate and the number of updates
    steps: int
    rates: Sequence[float] = ()
    sequential: bool = False


def train(
    arm: Arm, name: str, *, horizon: int, hidden: Sequence[int], seeds: int, starts: int, looks: int
) -> dict[str, Any]:
    """Costs (-J) and work against updates, [looks, seeds], of the rate with the lowest median of final training costs.

    A cost that is not finite counts as infinite. `cpu` is the process's seconds for all seeds of one rate, without compiling
    and looking; `compile` is next to nothing where a run before has compiled the same program. `gap` is the median projection
    gap of the updates since the look before.
    """
    forget_programs()
    task = make(name, horizon=horizon)
    rates: list[float | None] = list(arm.rates) or [None]
    lanes = BatchedPolicyRuns(
        [arm.make(rate, arm.steps) for rate in rates],
        task,
        hidden,
        draw_starts(task, seeds, starts, HELD_OUT, 0),
        sequential=arm.sequential,
    )
    run = learning_curve(lanes, arm.steps, evaluations=looks)
    seen = run.evaluations
    final = _costs(seen[-1]["train"])
    best = int(np.argmin(np.median(final, axis=1)))
    last = seen[-1]
    out = {
        "update": run.updates,
        "cpu": [seconds / len(rates) for seconds in run.cpu],
        "compile": run.compile,
        "parameters": lanes.parameters,
        "rate": rates[best],
        "rates": list(arm.rates),
        "train_by_rate": final if arm.rates else [],
        "test_by_rate": _costs(last["test"]) if arm.rates else [],
        "train": np.stack([_costs(look["train"][best]) for look in seen]),
        "test": np.stack([_costs(look["test"][best]) for look in seen]),
        "success": last["success"][best],
        "sequential": [float(np.mean(look["sequential"][best])) for look in seen],
        "evaluations": [float(np.mean(sum(look[k][best] for k in ("forward", "jvp", "vjp")))) for look in seen],
    }
    if "gap" in last:
        out["gap"] = np.stack([look["gap"][best] for look in seen[1:]])
    return out


def _costs(returns: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(returns), -returns, np.inf)
