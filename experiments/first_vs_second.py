r"""First or second order: return against iterations, dynamics evaluations and time, for every policy method of the table.

Every policy method in `methods.METHODS`, with the updates (times `share`) and the schedule that the table gives it; a method
with a learning rate runs at each of `rates`, and the one with the lowest median of final training costs is shown: the sweep is
the last column. A method that cannot take so many parameters is left out, and one that is another's twin in float64. Work and
time are those of one rate; time is the process's CPU time for all seeds together, without compiling.

Each run is kept as soon as it is there, and the figure drawn again, so that it can be stopped and goes on where it was.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.methods import METHODS, Method, solver
from diffmbrl.policies import Neural
from diffmbrl.report.figures import Series, Style, effort_axis, name_ends, style_of
from diffmbrl.tasks import make
from experiments.arms import Arm, train
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "Second order needs far fewer iterations and first order less time for each; the longer the horizon, the more second order "
    "gains; no first-order method at its best rate ends lower than the best of second order."
)


class Size(NamedTuple):
    """How much is measured."""

    task: str
    horizons: tuple[int, ...]
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    share: float  # of the updates that the table gives a method
    continuation: str
    rates: tuple[float, ...]  # for every method with a learning rate
    looks: int


FULL = Size(
    "pendulum-swingup",
    (50, 100, 200, 400),
    3,
    32,
    (8, 8),
    0.5,
    "default",
    (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    20,
)
QUICK = FULL._replace(horizons=(20,), seeds=2, starts=8, hidden=(6,), share=0.05, rates=(1e-2, 1e-1), looks=5)
LEFT_OUT = ("gauss-newton-sqrt",)  # in float64 the steps of the dense one, at ten times its cost
QUICK_METHODS = ("adam", "lbfgs", "gauss-newton", "newton-cg")


def rows(size: Size) -> dict[str, Method]:
    """The methods that take part: of a quick run a few, since each is compiled for a quarter of a minute."""
    policies = {name: row for name, row in METHODS.items() if row.kind == "policy" and name not in LEFT_OUT}
    return {name: row for name, row in policies.items() if size.share >= 0.1 or name in QUICK_METHODS}


def measure(size: Size, parts: Any):
    """A training run of each method at each horizon."""
    numbers: dict[str, Any] = {"task": size.task, "order": {}, "horizons": {}}
    for T in size.horizons:
        task = make(size.task, horizon=T)
        policy = Neural.init(task, hidden=size.hidden, key=jax.random.key(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(policy))
        found: dict[str, Any] = {}
        for name, row in rows(size).items():
            if row.most_parameters is not None and parameters > row.most_parameters:
                continue
            steps = max(6, round(row.steps * size.share))  # six stages need as many updates

            def make_solver(rate: Any, steps: int, row: Method = row, task: Any = task) -> Any:
                return solver(row, task, rate=rate, steps=steps, continuation=size.continuation)

            arm = Arm(make_solver, steps, size.rates if row.rates else (), row.sequential)
            options: dict[str, Any] = {k: getattr(size, k) for k in ("hidden", "seeds", "starts", "looks")}
            part = {"task": size.task, "T": T, "method": name, "updates": steps, "rates": arm.rates}
            part |= {"continuation": size.continuation} | options
            found[name] = parts(part, partial(train, arm, size.task, horizon=T, **options))
            numbers["order"][name] = row.order
            numbers["horizons"][str(T)] = found
            yield numbers


def conclude(numbers: Any) -> str:
    """For each horizon, the best of either order, the order of all, and what it took them to come close to the best."""
    return " ".join(
        [
            f"{numbers['task']}, medians of held-out costs.",
            *(_sentence(T, runs, numbers["order"]) for T, runs in numbers["horizons"].items()),
        ]
    )


def _sentence(T: str, runs: Any, order: Any) -> str:
    final = {name: float(np.median(array(run["test"])[-1])) for name, run in runs.items()}
    ranked = sorted(final, key=lambda name: final[name])
    text = ", ".join(f"{name} {final[name]:.3g}" for name in ranked)
    best = {k: next((name for name in ranked if order[name] == k), None) for k in (1, 2)}
    if best[1] is None or best[2] is None:
        return f"T = {T}: {text}."
    target = 1.1 * max(final[best[1]], final[best[2]])
    reached = []
    for name in (best[1], best[2]):
        run = runs[name]
        middle = np.median(array(run["test"]), axis=1)
        first = int(np.argmax(middle <= target))
        reached.append(
            f"{name} ({final[name]:.3g}) after {run['update'][first]} updates, {run['evaluations'][first]:.1e} dynamics "
            f"evaluations and {run['cpu'][first]:.1f} s"
        )
    edge = [name for name, run in runs.items() if run["rates"] and run["rate"] in (run["rates"][0], run["rates"][-1])]
    remark = f" The best rate of {', '.join(edge)} is at the edge of the sweep." if edge else ""
    return f"T = {T}: {text}. Within 10% of the worse of the two best: {' and '.join(reached)}.{remark}"


MEASURES = {
    "update": "iterations",
    "evaluations": "dynamics evaluations per seed",
    "cpu": "CPU time of all seeds [s]",
}


def paint(numbers: Any) -> Any:
    """A row for each horizon: cost against iterations, evaluations and time, and the sweep of learning rates."""
    figure, axes = sheet(len(numbers["horizons"]), (0.05, 0.05, 1.25, 1.25))
    heading(figure, f"{numbers['task']}: first order (dashed) against second order (solid)")
    styles = {name: style_of(name.replace("gauss-newton", "G-N"), index=i) for i, name in enumerate(numbers["order"])}
    for row, (T, runs) in zip(axes, numbers["horizons"].items(), strict=True):
        lines = []
        for axis, (measure_, xlabel) in zip(row, MEASURES.items(), strict=False):
            effort_axis(axis, [np.asarray(run[measure_], float) for run in runs.values()], xlabel)
            log_limits(axis, "y", [np.median(array(run["test"]), axis=1) for run in runs.values()])
            lines = [
                _line(axis, styles[name], run[measure_], array(run["test"]), first=numbers["order"][name] == 1)
                for name, run in runs.items()
            ]
            axis.set_ylabel("cost on held-out starts")
        name_ends(row[2], lines)
        title(row[0], f"T = {T}")
        title(row[1], "medians over seeds")
        _sweep(row[3], {name: run for name, run in runs.items() if run["rates"]}, styles)
        title(row[3], "at the end, by rate")
    return figure


def _line(axis: Any, style: Style, x: Any, y: np.ndarray, *, first: bool) -> Series:
    """The median without its range, which a dozen of would hide."""
    middle = np.median(y, axis=1)
    every = max(1, len(x) // 6)
    looks: dict[str, Any] = {"linestyle": "--"} if first else {}
    looks |= {"marker": style.marker, "markersize": 3.5, "markevery": every}
    axis.plot(x, np.where(np.isfinite(middle), middle, np.nan), color=style.colour, linewidth=1.5, **looks)
    return Series(style, np.asarray(x, float), middle)


def _sweep(axis: Any, runs: Any, styles: dict[str, Style]) -> None:
    axis.set_xlabel("learning rate")
    axis.set_ylabel("final cost on held-out starts")
    if not runs:
        return
    log_limits(axis, "x", [run["rates"] for run in runs.values()])
    log_limits(axis, "y", [np.median(array(run["test_by_rate"]), axis=1) for run in runs.values()])
    lines = []
    for name, run in runs.items():
        lines.append(band(axis, styles[name], run["rates"], array(run["test_by_rate"]), dashed=True))
    name_ends(axis, lines)
