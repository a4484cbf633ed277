r"""How far back should a gradient reach? Truncated backpropagation through time, from one step to the whole episode.

After Metz et al. (2021): the adjoint is stopped at every t-th state (`BPTT(Truncated(t))`), t = 1 ... T, and Adam makes a fixed
number of updates from random weights at the full horizon, without continuation, the gradient clipped to norm 1 or not. The
returns are the task's, untruncated, on held-out starts. All t and seeds of an arm are lanes of one program.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from diffmbrl.gradients import BPTT, Truncated
from diffmbrl.optimizers import OptaxSolver
from diffmbrl.optimizers.clipped import clipped_adam
from diffmbrl.report.figures import name_ends, style_of
from experiments.arms import Arm, train
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "The final cost against the truncation has an interior optimum: a few steps see too little, the whole unroll learns badly; "
    "clipping the gradient does not rescue the full unroll."
)
ARMS = {"clipped": clipped_adam, "not clipped": optax.adam}


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizons: tuple[int, ...]  # of the tasks
    every: tuple[int, ...]  # of which those up to the task's horizon, and the horizon itself
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    updates: int
    rate: float


FULL = Size(("pendulum", "cartpole-swingup"), (200, 100), (1, 2, 4, 8, 16, 32, 64), 3, 32, (16, 16), 200, 1e-2)
QUICK = FULL._replace(tasks=FULL.tasks[:1], horizons=(40,), every=(1, 8), seeds=2, starts=8, hidden=(6,), updates=20)


def measure(size: Size, parts: Any):
    """A sweep over truncations for each task and arm; trained in float32, as users do."""
    numbers: dict[str, Any] = {}
    for name, T in zip(size.tasks, size.horizons, strict=True):
        every = [*(k for k in size.every if k < T), T]
        found = numbers[name] = {"every": every}
        for label in ARMS:
            options: dict[str, Any] = {k: getattr(size, k) for k in ("seeds", "starts", "hidden")}
            part = {"task": name, "T": T, "arm": label, "every": every, "updates": size.updates, "rate": size.rate}
            found[label] = parts(part | options, partial(_sweep, name, T, label, every, size, options))
            yield numbers


def _sweep(name: str, T: int, label: str, every: list[int], size: Size, options: dict[str, Any]) -> dict[str, Any]:
    def make(k: Any, steps: int) -> Any:
        return OptaxSolver(ARMS[label], learning_rate=size.rate, gradient=BPTT(Truncated(int(k))))

    with jax.enable_x64(False):
        run = train(Arm(make, size.updates, every), name, horizon=T, looks=2, **options)
    return {k: run[k] for k in ("train_by_rate", "test_by_rate", "cpu")}


def conclude(numbers: Any) -> str:
    """Where the optimum is, and what the whole unroll costs beside it."""
    return " ".join(_sentence(name, found) for name, found in numbers.items())


def _sentence(name: str, found: Any) -> str:
    every, said = found["every"], []
    for label in (label for label in ARMS if label in found):
        cost = np.median(array(found[label]["test_by_rate"]), axis=1)
        best = int(np.argmin(cost))
        place = "interior" if 0 < best < len(every) - 1 else "at the end of the sweep"
        said.append(
            f"{label}, the lowest median cost is {cost[best]:.3g} at t = {every[best]} ({place}); one step costs "
            f"{cost[0]:.3g}, the full unroll {cost[-1]:.3g}"
        )
    return f"{name}: {'; '.join(said)}."


def paint(numbers: Any) -> Any:
    """A panel for each task: the final cost on held-out starts against the truncation."""
    figure, axes = sheet(1, [0.9] * len(numbers))
    heading(figure, "The adjoint stopped at every t-th state: final cost after a fixed number of Adam updates")
    styles = {label: style_of(label, index=i) for i, label in enumerate(ARMS)}
    for axis, (name, found) in zip(axes[0], numbers.items(), strict=True):
        runs = {label: array(found[label]["test_by_rate"]) for label in ARMS if label in found}
        log_limits(axis, "x", [found["every"]])
        log_limits(axis, "y", list(runs.values()))
        lines = [band(axis, styles[label], found["every"], cost) for label, cost in runs.items()]
        axis.set_xlabel("t [steps]; the last is the whole episode")
        axis.set_ylabel("cost on held-out starts")
        title(axis, name)
        name_ends(axis, lines)
    return figure
