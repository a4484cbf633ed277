r"""A soft margin before the end of a task, for planners whose reward is constant until the episode ends.

A task that earns 1 a step until it is done has no gradient, and every plan that survives its own horizon earns the same: one
that drifts to the edge is as good as one that stays away from it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from diffmbrl.core import Reward, State, Task, as_float, is_concrete

FIRST = 1e-3  # how far the first probe is from the middle of the starts
DOUBLINGS, HALVINGS = 40, 24


class Margin(eqx.Module):
    """A reward less a cost of nearness to the end."""

    inner: Reward
    weight: Float[Array, ""]
    centre: Float[Array, " n"]
    low: Float[Array, " n"]  # distance from the centre at which the task ends, downwards and upwards along each axis
    high: Float[Array, " n"]

    def __call__(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        x = ravel_pytree(s)[0] - self.centre
        reach = jnp.where(x < 0, self.low, self.high)
        return self.inner(s, a) - self.weight.astype(x.dtype) * jnp.sum((x / reach) ** 2)


def soft_margin(task: Task, *, weight: float | Array = 1.0) -> Task:
    r"""Replace the end of a task by a cost of coming near it: a task to plan for, not to evaluate on.

    $$r(s, a) - w \sum_i (x_i / d_i)^2,\qquad x = s - \bar s$$

    $\bar s$ is the mean of the starts and $d_i$ the distance along axis i, upwards or downwards, at which `task.done`
    becomes true: found by doubling and bisection, and infinite if it never does. If the end is a box, the task ended
    where some $|x_i / d_i|$ was 1. The end itself is removed: under negative rewards a planner would seek it.

    Args:
        task: Task whose episodes can end.
        weight: Cost per step w at the margin, along one axis.

    Returns:
        The task without `done` and with the margin in its reward.

    Raises:
        ValueError: If the task has no end, has ended in the middle of its starts, or ends along no axis of its
            state.

    >>> from diffmbrl import tasks
    >>> [round(float(d), 2) for d in soft_margin(tasks.cartpole_continuous()).reward.high]
    [2.4, 0.21, inf, inf]
    """
    if task.done is None:
        raise ValueError(f"task '{task.name}' has no end to keep a margin from: plan for the task itself")
    centre = jnp.mean(jax.vmap(lambda s: ravel_pytree(s)[0])(task.starts(jax.random.key(0), 256)), axis=0)
    unravel = ravel_pytree(task.initial(jax.random.key(0)))[1]
    lengths = FIRST * 2.0 ** jnp.arange(DOUBLINGS, dtype=centre.dtype)
    done = task.done

    def reach(direction):
        def over(length):
            return done(unravel(centre + length * direction))

        ended = jax.vmap(over)(lengths)
        k = jnp.argmax(ended)

        def halve(_, interval):
            near, far = interval
            middle = (near + far) / 2
            return jnp.where(over(middle), near, middle), jnp.where(over(middle), middle, far)

        far = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.where(k > 0, lengths[k - 1], 0), lengths[k]))[1]
        return jnp.where(jnp.any(ended), far, jnp.inf)

    axes = jnp.eye(centre.shape[0], dtype=centre.dtype)
    low, high = jax.vmap(reach)(-axes), jax.vmap(reach)(axes)
    if is_concrete(low, high) and bool(done(unravel(centre))):
        raise ValueError(f"task '{task.name}' has ended in the middle of its starts, {centre}")
    if is_concrete(low, high) and not bool(jnp.any(jnp.isfinite(jnp.concatenate([low, high])))):
        raise ValueError(
            f"task '{task.name}' ends along no axis of its state, seen from the middle of its starts {centre}"
        )
    margin = Margin(task.reward, as_float(weight), centre, low, high)
    return eqx.tree_at(lambda t: (t.reward, t.done), task, (margin, None))
