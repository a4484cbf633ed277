r"""A gradient against central differences of the return that it is said to be the gradient of."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.rollout import mean_return

DIRECTIONS = 3  # random ones, beside the gradient's own
STEPS = (1e-4, 1e-6, 1e-8)


def difference_error(
    policy: Any, task: Task, s0: State, gradient: Float[Array, " P"], key: PRNGKeyArray
) -> Float[Array, ""]:
    r"""Relative error of a gradient of the mean return over `s0`, along the gradient itself and a few random directions.

    $$\min_h \frac{|\,\delta_h - U g\,|}{|U g|},\qquad (\delta_h)_j = \frac{J(\theta + h u_j) - J(\theta - h u_j)}{2h}$$

    in float64, the best of steps of 1e-4, 1e-6 and 1e-8, since neither curvature nor rounding should be mistaken for an error
    of
    the gradient; a wrong one is wrong at every step. 0 if gradient and differences are both 0. `key` draws the directions. A
    jump that no start is within h of is not seen: the test of bias is for that.
    Cost: 24 rollouts from each start.

    >>> from diffmbrl import Linear, mean_return, tasks
    >>> with jax.enable_x64(True):
    ...     task = tasks.lqr(horizon=10)
    ...     policy, s0, key = Linear.zeros(task), task.starts(jax.random.key(0), 4), jax.random.key(1)
    ...     gradient, _ = ravel_pytree(jax.grad(mean_return)(policy, task, s0))
    ...     bool(difference_error(policy, task, s0, gradient, key) < 1e-6)
    True
    """
    theta, unravel = ravel_pytree(policy)
    random = jax.random.normal(key, (DIRECTIONS, theta.size), theta.dtype)
    U = jnp.concatenate([gradient[None], random])
    lengths = jnp.linalg.norm(U, axis=1, keepdims=True)
    U = U / jnp.where(lengths > 0, lengths, 1.0)
    slopes = jnp.matmul(U, gradient, precision="highest")

    def slope(h, u):
        ahead, behind = jax.lax.map(
            lambda x: mean_return(unravel(x), task, s0), jnp.stack([theta + h * u, theta - h * u])
        )
        return (ahead - behind) / (2 * h)

    def error(h):
        return jnp.linalg.norm(jax.lax.map(lambda u: slope(h, u), U) - slopes)

    best = jnp.nanmin(jnp.stack([error(jnp.asarray(h, theta.dtype)) for h in STEPS]))
    size = jnp.linalg.norm(slopes)
    return jnp.where(best == 0, 0.0, best / size)
