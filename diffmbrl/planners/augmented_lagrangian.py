r"""Constraints of a trajectory as terms of its cost, with multipliers.

$$\sum_t \lambda_t^\top h_t + \tfrac\rho2|h_t|^2 + \tfrac1{2\rho}\big(|\max(0, \mu_t + \rho g_t)|^2 - |\mu_t|^2\big)$$

for equalities h = 0 and inequalities g <= 0, of every step and of the last state; the limits of the task's actions are
inequalities among them. At a minimum of this sum, $\lambda + \rho h$ and $\max(0, \mu + \rho g)$ are better multipliers.

Reference: Nocedal and Wright 2006, sections 17.3 and 17.4; Howell, Jackson, Manchester 2019 (ALTRO), section III.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.constraints import Constraints
from diffmbrl.core import State, Task, Trajectory
from diffmbrl.second_order.linearize import Linearization, flat_states


class Each(NamedTuple):
    """One number for each constraint, its value or its multiplier; with another axis, its derivatives."""

    equality: Float[Array, "T k *z"]
    inequality: Float[Array, "T l *z"]  # the task's, then the lower and the upper limits of the actions
    final_equality: Float[Array, "k_T *z"]
    final_inequality: Float[Array, "l_T *z"]


def constraint_values(task: Task, trajectory: Trajectory) -> Each:
    """Return the value of every constraint along a trajectory; -inf for an infinite limit."""
    return _stage(task, trajectory.s, trajectory.a)._replace(**_final(task, trajectory.s_T))


def none(task: Task, s0: State, dtype: jnp.dtype) -> Each:
    """Return a zero for each constraint.

    Raises: `TypeError` if the task's constraints are not `Constraints`, `ValueError` if one does not return an axis [k].
    """
    if not (task.constraints is None or isinstance(task.constraints, Constraints)):
        raise TypeError(f"task.constraints must be Constraints or None, got {type(task.constraints).__name__}")
    for name, arguments in [
        ("equality", (s0, task.a_low)),
        ("inequality", (s0, task.a_low)),
        ("final_equality", (s0,)),
        ("final_inequality", (s0,)),
    ]:
        function = None if task.constraints is None else getattr(task.constraints, name)
        shape = (0,) if function is None else jax.eval_shape(function, *arguments).shape
        if len(shape) != 1:
            raise ValueError(f"the {name} of task '{task.name}' has shape {list(shape)}; expected one axis [k]")
    T = task.horizon
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((T, *x.shape), x.dtype), s0)
    actions = jax.ShapeDtypeStruct((T, task.m), dtype)
    shapes = jax.eval_shape(lambda s, a, s_T: _stage(task, s, a)._replace(**_final(task, s_T)), states, actions, s0)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes)


def estimates(values: Each, multipliers: Each, penalty: Float[Array, ""]) -> Each:
    r"""$\lambda + \rho h$ and $\max(0, \mu + \rho g)$: the next multipliers, and the forces of the constraints now."""
    raised = jax.tree.map(lambda value, multiplier: multiplier + penalty * value, values, multipliers)
    return raised._replace(
        inequality=jnp.maximum(raised.inequality, 0), final_inequality=jnp.maximum(raised.final_inequality, 0)
    )


def cost(values: Each, multipliers: Each, penalty: Float[Array, ""]) -> Float[Array, ""]:
    """Return the terms that the constraints add to the cost."""
    # For equalities the same in one square: y = lambda + rho h, (y^2 - lambda^2) / (2 rho) = lambda h + rho h^2 / 2.
    forces = estimates(values, multipliers, penalty)
    squares = jax.tree.map(lambda y, multiplier: jnp.sum(y**2) - jnp.sum(multiplier**2), forces, multipliers)
    return sum(squares, jnp.zeros((), penalty.dtype)) / (2 * penalty)


def with_constraints(
    lin: Linearization, task: Task, trajectory: Trajectory, forces: Each, penalty: Float[Array, ""]
) -> tuple[Linearization, Linearization]:
    """Add the derivatives of the constraints: for the step, and without curvature for the gradient of the Lagrangian.

    The curvature is Gauss-Newton's, rho J' J over equalities and pressed inequalities: positive semidefinite.
    """
    x, unravel = flat_states(trajectory.s)
    n, m = lin.B.shape[1:]

    def stage(z, y, y_low, y_high):
        values = lambda z: _of_step(task, unravel(z[:n]), z[n:])  # noqa: E731
        J_h, J_g = jax.jacfwd(values)(z)
        k = J_h.shape[0]
        J = jnp.concatenate([J_h, J_g])
        pressed = jnp.concatenate([jnp.ones(k, z.dtype), (y[k:] > 0).astype(z.dtype)])
        limits = jnp.zeros(n + m, z.dtype).at[n:].set(((y_low > 0) | (y_high > 0)).astype(z.dtype))
        c = J.T @ y + jnp.zeros(n + m, z.dtype).at[n:].set(y_high - y_low)
        return c, penalty * ((J.T * pressed) @ J + jnp.diag(limits))

    l = forces.inequality.shape[1] - 2 * m
    y = jnp.concatenate([forces.equality, forces.inequality[:, :l]], axis=1)
    low, high = forces.inequality[:, l : l + m], forces.inequality[:, l + m :]
    with jax.default_matmul_precision("highest"):
        c, H = jax.vmap(stage)(jnp.concatenate([x, trajectory.a], axis=1), y, low, high)
        s_T, unravel_T = flat_states(jax.tree.map(lambda x: x[None], trajectory.s_T))
        J_h, J_g = jax.jacfwd(lambda s: tuple(_final(task, unravel_T(s)).values()))(s_T[0])
        pressed = (forces.final_inequality > 0).astype(c.dtype)
        c_T = J_h.T @ forces.final_equality + J_g.T @ forces.final_inequality
        H_T = penalty * (J_h.T @ J_h + (J_g.T * pressed) @ J_g)
    first = lin._replace(c_s=lin.c_s + c[:, :n], c_a=lin.c_a + c[:, n:], c_T=lin.c_T + c_T)
    return first._replace(H=lin.H + H, H_T=lin.H_T + H_T), first


def largest_violation(values: Each) -> Float[Array, ""]:
    """Return the largest |h| or positive g; a value that is not finite counts as infinite."""
    above = [jnp.maximum(x, 0) for x in (values.inequality, values.final_inequality)]
    return _largest(jnp.abs(values.equality), jnp.abs(values.final_equality), *above)


def residual(values: Each, forces: Each) -> Each:
    """Return the residual of the KKT conditions: h, and min(-g, y), zero if g or y is zero and neither has the wrong sign."""
    return values._replace(
        inequality=jnp.minimum(-values.inequality, forces.inequality),
        final_inequality=jnp.minimum(-values.final_inequality, forces.final_inequality),
    )


def bounded(multipliers: Each, largest: Float[Array, ""]) -> Each:
    """Bound the multipliers, since those of constraints that cannot be met grow without limit."""
    return jax.tree.map(lambda x: jnp.clip(x, -largest, largest), multipliers)


def _of_step(task: Task, s: State, a: Array) -> tuple[Array, Array]:
    """Return equalities and inequalities of the task, without the limits of actions."""
    made = (_call(task, "equality"), _call(task, "inequality"))
    empty = jnp.zeros(0, a.dtype)
    return tuple(empty if f is None else f(s, a) for f in made)  # type: ignore[return-value]


def _stage(task: Task, s: State, a: Array) -> Each:
    h, g = jax.vmap(lambda s, a: _of_step(task, s, a))(s, a)
    empty = jnp.zeros(0, a.dtype)
    return Each(h, jnp.concatenate([g, task.a_low - a, a - task.a_high], axis=1), empty, empty)


def _final(task: Task, s_T: State) -> dict[str, Array]:
    empty = jnp.zeros(0, jax.tree.leaves(s_T)[0].dtype)
    made = {name: _call(task, name) for name in ("final_equality", "final_inequality")}
    return {name: empty if f is None else f(s_T) for name, f in made.items()}


def _call(task: Task, name: str) -> Callable | None:
    return None if task.constraints is None else getattr(task.constraints, name)


def _largest(*arrays: Array) -> Array:
    flat = jnp.concatenate([x.ravel() for x in arrays])
    return jnp.max(jnp.where(jnp.isfinite(flat), flat, jnp.inf), initial=0.0)
