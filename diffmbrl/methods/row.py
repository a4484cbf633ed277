"""A row of the table of methods, and the solver it makes for a task and a number of updates."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx

from diffmbrl.choices import validate_choice
from diffmbrl.core import Solver, Task
from diffmbrl.gradients.registry import estimator
from diffmbrl.optimizers import Continuation, MultiStart

CONTINUATIONS = ("default", "discounts", "trust", "measured", "none")


class Method(NamedTuple):
    """How a method is made and run in a comparison."""

    make: Callable[[float | None, int, Task], Solver]  # of a learning rate, where it has one, and the number of updates
    order: int  # 1 or 2, 0 without gradients; L-BFGS counts as 1: it is given gradients only
    kind: str  # "policy", or "plan": every start is planned anew
    steps: int  # updates by default
    rates: tuple[float, ...] = ()  # learning rates swept by default; none for a method without one
    sequential: bool = False  # seeds one after another: its line search branches, and `vmap` would run both branches
    default: bool = True  # whether `compare` runs it unasked
    most_parameters: int | None = None  # beyond which it does not fit
    race: float = 0.0  # share of the updates over which four first policies race; 0 for no race
    continuation: str = "discounts"  # the schedule by default: "discounts", "trust", "growing" for plans, or "none"
    estimator: str = "bptt"  # of the gradient, in methods that take one
    own_gradient: bool = False  # its gradient is part of the method: it takes no other
    description: str = ""  # what it is, in a line

    @property
    def takes_estimator(self) -> bool:
        """Whether its policy gradient can be another: of first-order methods without a line search, on policies."""
        return self.order == 1 and self.kind == "policy" and not (self.sequential or self.own_gradient)

    @property
    def draws(self) -> bool:
        """Whether its updates need a key."""
        return estimator(self.estimator)[1].draws

    @property
    def differentiates(self) -> bool:
        """Whether it needs derivatives of the reward in the actions."""
        return self.order > 0 and estimator(self.estimator)[1].differentiates


def solver(row: Method, task: Task, *, rate: float | None, steps: int, continuation: str) -> Solver:
    """The method's solver for `steps` updates, inside a continuation unless that is "none".

    "default" is the row's own: discounts .8, .9, .95, .98, 1 for first-order methods; discounts and trust in the measured
    sensitivity of each start for second-order ones; growing horizons for iLQR, which a discount does not help. Sampling
    planners and shooting, which do worse with those, have none, whatever is asked. "discounts", "trust" and "measured"
    (discounts as the measured growth of the closed loop allows them) give all policy methods the same. A raced method goes
    on with the best of four policies after its share of the updates.
    Raises: `ValueError` for another name, or fewer updates than stages.
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
    """The method with each of the estimators of its gradient, as `adam+truncated`; as it is with "bptt" or none named.

    Second-order methods and planners take none: they differentiate more than a policy's gradient, or no policy.
    Raises: `ValueError` for an unknown estimator, or one other than "bptt" for a method that searches along a line.
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

    def made(make: Any) -> Any:
        return lambda rate, steps, task: eqx.tree_at(
            lambda descend: descend.gradient, row.make(rate, steps, task), make(task), is_leaf=lambda x: x is None
        )

    return [
        (name, row) if given == "bptt" else (f"{name}+{given}", row._replace(make=made(chosen.make), estimator=given))
        for given, chosen in rows
    ]


def schedule(made: Solver) -> list[list[float | int | None]] | None:
    """The stages of a continuation as [discount, updates, bound of trust or None], for the record; None without one."""
    made = made.solver if isinstance(made, MultiStart) else made
    if not isinstance(made, Continuation):
        return None
    bounds = [None] * made.lengths.size if made.trusts is None else made.trusts.tolist()
    stages = zip(made.discounts.tolist(), made.lengths.tolist(), bounds, strict=True)
    return [
        [round(discount, 6), updates, None if bound is None or math.isinf(bound) else bound]
        for discount, updates, bound in stages
    ]
