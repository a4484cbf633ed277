"""Test whether the return has a gradient in the actions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.core import Task
from diffmbrl.policies import OpenLoop
from diffmbrl.rollout import mean_return

STARTS = 4


def action_gradient(task: Task, *, seed: int = 0) -> Float[Array, "T m"]:
    """Compute dJ/da_t at random actions, the mean over four random starts.

    Args:
        task: The task; actions are uniform within its limits, standard normal where there are none.
        seed: The random seed.

    Returns:
        The gradient, shape [T, m].

    >>> from diffmbrl import tasks
    >>> action_gradient(tasks.lqr(horizon=5)).shape
    (5, 1)
    """
    key_a, key_s = jax.random.split(jax.random.key(seed))
    finite = jnp.isfinite(task.a_low) & jnp.isfinite(task.a_high)
    low = jnp.where(finite, task.a_low, 0)
    width = jnp.where(finite, task.a_high, 0) - low
    shape = (task.horizon, task.m)
    within = low + width * jax.random.uniform(key_a, shape, task.a_low.dtype)
    a = jnp.where(finite, within, jax.random.normal(key_a, shape, task.a_low.dtype))
    return _gradient(OpenLoop(a), task, task.starts(key_s, STARTS)).a


def refuse_without_gradient(task: Task) -> None:
    """Refuse a task whose return has a gradient of exactly zero in every action.

    Args:
        task: The task.

    Raises:
        ValueError: If dJ/da is exactly 0 at random actions.
    """
    if not bool(jnp.any(action_gradient(task) != 0)):
        raise ValueError(
            f"the reward of task '{task.name}' has no gradient in the action within its horizon of {task.horizon}: dJ/da is "
            "exactly 0 at random actions; use a method that does not differentiate, or a shaped reward"
        )


@jax.jit
def _gradient(plan: OpenLoop, task: Task, s0: Array) -> OpenLoop:
    return jax.grad(mean_return)(plan, task, s0)
