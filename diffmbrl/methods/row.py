"""A row of the table of methods, and the solver it makes for a task and a number of updates."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import equinox as eqx

from diffmbrl.choices import validate_choice
from diffmbrl.core import Solver, Task
from diffmbrl.gradients.registry import estimator
from diffmbrl.optimizers import Continuation, MultiStart

CONTINUATIONS = ("default", "discounts", "trust", "measured", "none")


class Method(NamedTuple):
    """A row of the table of methods: how a method is made and run in a comparison.

    Args:
        make: Function of the learning rate (None if the method has none), the number of updates and the task, which
            returns the solver.
        order: Order of the derivatives: 0, 1 or 2. L-BFGS counts as 1, since it is given gradients only.
        kind: "policy", or "plan" if every start is planned separately.
        steps: Default number of updates.
        rates: Default learning rates to sweep; empty for a method without one.
        sequential: Whether seeds run one after another: the line search branches, and `vmap` would run both
            branches.
        default: Whether `compare` runs the method unasked.
        most_parameters: Largest number of policy parameters for which the method fits into memory; None for any.
        race: Fraction of the updates over which four first policies compete; 0 for a single one.
        continuation: Default schedule: "discounts", "trust", "growing" for plans, or "none".
        estimator: Name of the gradient estimator.
        own_gradient: Whether the gradient is part of the method, which then takes no other estimator.
        description: One line for tables.
    """

    make: Callable[[float | None, int, Task], Solver]
    order: int
    kind: str
    steps: int
    rates: tuple[float, ...] = ()
    sequential: bool = False
    default: bool = True
    most_parameters: int | None = None
    race: float = 0.0
    continuation: str = "discounts"
    estimator: str = "bptt"
    own_gradient: bool = False
    description: str = ""

    @property
    def takes_estimator(self) -> bool:
        """Whether the method accepts another gradient estimator: a first-order method on policies without a line search."""
        return self.order == 1 and self.kind == "policy" and not (self.sequential or self.own_gradient)

    @property
    def draws(self) -> bool:
        """Whether the updates need a key."""
        return estimator(self.estimator)[1].draws

    @property
    def differentiates(self) -> bool:
        """Whether the method needs derivatives of the reward in the actions."""
        return self.order > 0 and estimator(self.estimator)[1].differentiates


def solver(row: Method, task: Task, *, rate: float | None, steps: int, continuation: str) -> Solver:
    """Make the solver of a method, inside a continuation unless that is "none".

    "default" is the method's own: discounts .8, .9, .95, .98, 1 for first-order methods; discounts and trust in the measured
    sensitivity of each start for second-order ones; growing horizons for iLQR, which a discount does not help. "discounts",
    "trust" and "measured" (discounts as far as the measured growth of the closed loop allows) apply to all policy methods.
    Sampling planners and shooting perform worse with a schedule and never have one. A method with a race continues with
    the best of four policies after its fraction of the updates.

    Args:
        row: Row of the method.
        task: Task to solve.
        rate: Learning rate; None for a method without one.
        steps: Number of updates.
        continuation: Name of the schedule, one of `CONTINUATIONS`.

    Returns:
        The solver.

    Raises:
        ValueError: If the continuation is unknown, or there are fewer updates than stages.
    """
    validate_choice("continuation", continuation, CONTINUATIONS)
    inner = row.make(rate, steps, task)
    made = inner if "none" in (continuation, row.continuation) else _continued(inner, row, task, steps, continuation)
    return MultiStart(made, updates=max(1, round(row.race * steps))) if row.race else made


def _continued(inner: Solver, row: Method, task: Task, steps: int, continuation: str) -> Continuation:
    if row.kind == "plan":
        return Continuation.growing(inner, steps, horizon=task.horizon)
    chosen = row.continuation if continuation == "default" else continuation
    return {
        "discounts": Continuation.discounted,
        "trust": partial(Continuation.trusted, horizon=task.horizon),
        "measured": Continuation.measured,
    }[chosen](inner, steps)


def estimated(name: str, row: Method, estimators: Sequence[str]) -> list[tuple[str, Method]]:
    """Combine a method with each of several gradient estimators.

    Second-order methods and planners take none: they differentiate more than a policy's gradient, or no policy.

    Args:
        name: Name of the method.
        row: Its row.
        estimators: Names of gradient estimators.

    Returns:
        Pairs of a name such as `adam+truncated` and a row; the given pair for "bptt", or if no estimator is named.

    Raises:
        ValueError: If an estimator is unknown, or the method uses a line search and cannot take it.
    """
    rows = [estimator(given) for given in estimators]
    if not row.takes_estimator or not rows:
        refused = [given for given, _ in rows if given != "bptt"]
        if row.sequential and refused:
            raise ValueError(
                f"{name} takes no --estimator {refused[0]}: its line search differentiates the return itself; leave {name} "
                "out, or take adam"
            )
        return [(name, row)]

    def made(make: Callable) -> Callable:
        return lambda rate, steps, task: eqx.tree_at(
            lambda descend: descend.gradient, row.make(rate, steps, task), make(task), is_leaf=lambda x: x is None
        )

    return [
        (name, row) if given == "bptt" else (f"{name}+{given}", row._replace(make=made(chosen.make), estimator=given))
        for given, chosen in rows
    ]


def schedule(made: Solver) -> list[list[float | int | None]] | None:
    """List the stages of a continuation, for the record of a run.

    Args:
        made: Solver of a method.

    Returns:
        A list of [discount, number of updates, bound of the trust or None], or None without a continuation.
    """
    made = made.solver if isinstance(made, MultiStart) else made
    if not isinstance(made, Continuation):
        return None
    bounds = [None] * made.lengths.size if made.trusts is None else made.trusts.tolist()
    stages = zip(made.discounts.tolist(), made.lengths.tolist(), bounds, strict=True)
    return [
        [round(discount, 6), updates, None if bound is None or math.isinf(bound) else bound]
        for discount, updates, bound in stages
    ]
