r"""The part of a planner's step that a policy can follow.

$w^* = -M^{-1} g$ is the step of iLQR around the policy's own closed loop: the best change of the actions if they were free at
each time. The undamped Gauss-Newton step $d$ minimises $|G d - w^*|_M$ over the policy's parameters, since

$$\tfrac12 |G d - w^*|_M^2 = \tfrac12 d^\top G^\top M G\,d + d^\top G^\top g + \mathrm{const}.$$

G d is the projection of w* onto what the policy can express, in the metric M, and the rest of it is orthogonal.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.second_order.curvature import CurvatureModel, Vector, curve, planner_step


def projection_gap(model: CurvatureModel, d: Vector, *, damping: float = 1e-6) -> Float[Array, ""]:
    r"""Projection gap $|G d - w^*|_M / |w^*|_M$ of a step d of the parameters, over all starts.

    Args:
        model: Gauss-Newton model of the policy.
        d: Step of the parameters.
        damping: Damping of w*, relative to the curvature of M along g.

    Returns:
        0 if the policy follows the planner's step, 1 for no step, above 1 for a step that the model rates worse than none; NaN
        where M is not finite.

    Cost: One Riccati sweep, three products with M and one with G.

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
    # A gap of 0 if the planner has no step.
    return jnp.sqrt(jnp.maximum(apart, 0) / jnp.where(whole > 0, whole, 1.0))
