"""The same task with its equations of motion integrated in smaller steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task


def refined(task: Task, *, substeps: int = 2) -> Task | None:
    """Integrate a task's equations of motion in smaller steps, under the same action.

    Time steps, actions and rewards stay, so any change of the results is the error of the integrator.

    Args:
        task: Task with dynamics that integrate equations of motion.
        substeps: Number of smaller steps of dt / substeps per step.

    Returns:
        The task with finer integration, or None if no module of its dynamics has a static field `dt`: a map that is
        exact or was learned cannot be refined.

    Raises:
        ValueError: If `substeps` is below 2.

    >>> from diffmbrl import tasks
    >>> refined(tasks.cartpole_balance()).dynamics.inner.dt, refined(tasks.lqr())
    (0.025, None)
    """
    if not isinstance(substeps, int) or substeps < 2:
        raise ValueError(f"substeps must be a whole number of at least 2, got {substeps!r}")
    made = _refine(task.dynamics, substeps)
    return None if made is None else eqx.tree_at(lambda t: t.dynamics, task, made)


class Substeps(eqx.Module):
    """`count` steps of f under one action."""

    inner: Callable
    count: int = eqx.field(static=True)

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        for i in range(self.count):
            s = self.inner(s, a, key=None if key is None else jax.random.fold_in(key, i))
        return s


def _refine(dynamics: Any, substeps: int) -> Any:
    """The dynamics with the module that has the `dt` refined, or None."""
    if not dataclasses.is_dataclass(dynamics) or isinstance(dynamics, type):
        return None
    fields = {field.name: getattr(dynamics, field.name) for field in dataclasses.fields(dynamics)}
    if isinstance(fields.get("dt"), float):
        finer: Any = dataclasses.replace(dynamics, dt=fields["dt"] / substeps)
        return Substeps(finer, substeps)
    for name, inner in fields.items():
        if callable(inner) and (made := _refine(inner, substeps)) is not None:
            return eqx.tree_at(lambda module, name=name: getattr(module, name), dynamics, made)
    return None
