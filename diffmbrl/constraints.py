r"""Constraints of a task on states and actions, beyond the action limits.

$$h(s_t, a_t) = 0,\quad g(s_t, a_t) \le 0 \quad (t < T),\qquad h_T(s_T) = 0,\quad g_T(s_T) \le 0$$

`planners/multiple_shooting.py` enforces them; other planners ignore them, and `violation` measures by how much they fail.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.core import Trajectory


class Constraints(eqx.Module):
    """Functions that must be zero, or at most zero, along a trajectory; None where there is none.

    Args:
        equality: h(s, a) = 0, shape [k], before the horizon.
        inequality: g(s, a) <= 0, shape [k], before the horizon.
        final_equality: h_T(s_T) = 0, shape [k].
        final_inequality: g_T(s_T) <= 0, shape [k].

    >>> import equinox as eqx
    >>> class Floor(eqx.Module):
    ...     def __call__(self, s, a):
    ...         return -s[:1]
    >>> Constraints(inequality=Floor()).equality is None
    True
    """

    equality: Callable | None = None
    inequality: Callable | None = None
    final_equality: Callable | None = None
    final_inequality: Callable | None = None


def violation(constraints: Constraints, trajectory: Trajectory) -> Float[Array, ""]:
    """Measure the largest violation of any constraint along one trajectory, in the constraint's own units.

    Args:
        constraints: The constraints.
        trajectory: One trajectory, without a batch axis.

    Returns:
        The violation, 0 if all hold; a value that is not finite counts as infinite.
    """
    worst = jnp.zeros((), trajectory.r.dtype)
    along, final = (trajectory.s, trajectory.a), trajectory.s_T
    for function, inputs, size in [
        (constraints.equality, along, jnp.abs),
        (constraints.inequality, along, _above),
    ]:
        if function is not None:
            worst = jnp.maximum(worst, _largest(size(jax.vmap(function)(*inputs))))
    for function, size in [(constraints.final_equality, jnp.abs), (constraints.final_inequality, _above)]:
        if function is not None:
            worst = jnp.maximum(worst, _largest(size(function(final))))
    return worst


def _above(x: Array) -> Array:
    return jnp.maximum(x, 0)


def _largest(x: Array) -> Array:
    return jnp.max(jnp.where(jnp.isfinite(x), x, jnp.inf), initial=0.0)
