r"""Constraints of a task: where a trajectory may go, and what its actions may be, beyond their limits.

$$h(s_t, a_t) = 0,\quad g(s_t, a_t) \le 0 \quad (t < T),\qquad h_T(s_T) = 0,\quad g_T(s_T) \le 0$$

A planner that knows constraints enforces them (`planners/multiple_shooting.py`); one that does not leaves them alone, and
`violation` says by how much.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.core import Trajectory


class Constraints(eqx.Module):
    """Functions (s, a) -> [k] and s -> [k] that must be zero, or at most zero; None where there is none.

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
    """The largest violation of any constraint along one trajectory, in the constraint's own units; 0 if all hold.

    A value that is not finite counts as infinite.
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
