r"""How much of a planner's step a policy can follow.

$w^* = -M^{-1} g$ is the step of iLQR around the policy's own closed loop: what the actions should change by at each time, were
they free. The undamped Gauss-Newton step $d$ minimises $|G d - w^*|_M$ over the policy's parameters, since

$$\tfrac12 |G d - w^*|_M^2 = \tfrac12 d^\top G^\top M G\,d + d^\top G^\top g + \mathrm{const}.$$

G d is the projection of w* onto what the policy can express, in the metric M, and the rest of it is orthogonal.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.second_order.curvature import CurvatureModel, Vector, curve, planner_step


def projection_gap(model: CurvatureModel, d: Vector, *, damping: float = 1e-6) -> Float[Array, ""]:
    r"""$|G d - w^*|_M / |w^*|_M$ for a step d of the parameters, over all starts.

    0 when the policy follows the planner's step, 1 for no step at all; beyond 1, the step is worse than none by the model.
    `damping` is that of w*, relative to the curvature of M along g; NaN where M is not finite.

    >>> import jax, jax.numpy as jnp
    >>> from diffmbrl import Neural, tasks
    >>> from diffmbrl.second_order.curvature import gauss_newton
    >>> task = tasks.lqr(horizon=10)
    >>> model = gauss_newton(Neural.init(task, key=jax.random.key(0)), task, task.starts(jax.random.key(0), 8))
    >>> float(projection_gap(model, jnp.zeros_like(model.gradient)))
    1.0
    """
    lin, K, g = model.linearization, model.K, model.g
    squared = jnp.sum(g * g)
    scale = jnp.sum(g * curve(lin, K, g)) / jnp.where(squared > 0, squared, 1.0)
    planned = planner_step(lin, K, damping * jnp.where(scale > 0, scale, 1.0), g)
    missed = model.push(d) - planned
    apart, whole = (jnp.sum(w * curve(lin, K, w)) for w in (missed, planned))
    # Nothing planned, nothing missed.
    return jnp.sqrt(jnp.maximum(apart, 0) / jnp.where(whole > 0, whole, 1.0))
