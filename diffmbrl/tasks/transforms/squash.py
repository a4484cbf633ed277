"""Action limits moved into the plant: the action becomes a logit without limits."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Dynamics, Reward, State, Task
from diffmbrl.policies import squash


class _Limits(eqx.Module):
    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, z: Float[Array, " m"]) -> Float[Array, " m"]:
        return squash(z, np.asarray(self.low), np.asarray(self.high))


class SquashedDynamics(eqx.Module):
    """s' = f(s, squash(z))."""

    inner: Dynamics
    limits: _Limits

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        return self.inner(s, self.limits(a), key=key)


class SquashedReward(eqx.Module):
    """r(s, squash(z))."""

    inner: Reward
    limits: _Limits

    def __call__(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.inner(s, self.limits(a))


def squashed(task: Task) -> Task:
    r"""Move action limits into the plant, $a = c + h\tanh z$, for planners that cannot keep them.

    c is the centre of an action's limits and h half their width.

    Args:
        task: Task with any action limits.

    Returns:
        The same task with actions $z \in R^m$; actions without limits are unchanged.

    >>> from diffmbrl import tasks
    >>> squashed(tasks.cartpole_balance()).a_high
    Array([inf], dtype=float32)
    """
    finite = jnp.isfinite(task.a_low) & jnp.isfinite(task.a_high)
    if not bool(jnp.any(finite)):
        return task
    limits = _Limits(tuple(task.a_low.tolist()), tuple(task.a_high.tolist()))
    return eqx.tree_at(
        lambda t: (t.dynamics, t.reward, t.a_low, t.a_high),
        task,
        (
            SquashedDynamics(task.dynamics, limits),
            SquashedReward(task.reward, limits),
            jnp.where(finite, -jnp.inf, task.a_low),
            jnp.where(finite, jnp.inf, task.a_high),
        ),
    )
