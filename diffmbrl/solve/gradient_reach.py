"""Whether any reward can be improved through the actions by its gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.core import Task
from diffmbrl.policies import OpenLoop
from diffmbrl.rollout import mean_return

STARTS = 4


def action_gradient(task: Task, *, seed: int = 0) -> Float[Array, "T m"]:
    """dJ/da_t at random actions within the limits (standard normal where there are none), mean over four random starts.

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
    """Raises: `ValueError` if the gradient of the return in every action is exactly zero."""
    if not bool(jnp.any(action_gradient(task) != 0)):
        raise ValueError(
            f"the reward of task '{task.name}' has no gradient in the action within its horizon of {task.horizon}: dJ/da is "
            "exactly 0 at random actions; use a method that does not differentiate, or a shaped reward"
        )


@jax.jit
def _gradient(plan: OpenLoop, task: Task, s0: Array) -> OpenLoop:
    return jax.grad(mean_return)(plan, task, s0)
