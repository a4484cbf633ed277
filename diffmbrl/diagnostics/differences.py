r"""Check of a gradient against central differences of the return."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task
from diffmbrl.rollout import mean_return

DIRECTIONS = 3  # random directions, in addition to the gradient's own
STEPS = (1e-4, 1e-6, 1e-8)


def difference_error(
    policy: Policy, task: Task, s0: State, gradient: Float[Array, " P"], key: PRNGKeyArray
) -> Float[Array, ""]:
    r"""Relative error of a gradient of the mean return over `s0`, along the gradient itself and a few random directions.

    $$\min_h \frac{|\,\delta_h - U g\,|}{|U g|},\qquad (\delta_h)_j = \frac{J(\theta + h u_j) - J(\theta - h u_j)}{2h}$$

    The smallest error over the steps h = 1e-4, 1e-6 and 1e-8 counts, so that neither curvature nor rounding is mistaken for an
    error of the gradient; a wrong gradient is wrong at every step. A jump farther than h from all starts is not detected; that
    is the purpose of `bias_test`.

    Args:
        policy: The policy, in float64.
        task: The task, in float64.
        s0: Start states, shape [B, ...].
        gradient: The gradient of the mean return, shape [P], in the order of `ravel_pytree(policy)`.
        key: Key of the random directions.

    Returns:
        The relative error; 0 if gradient and differences are both 0.

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
