r"""The optimal plan as a differentiable function of the start state and of the task's leaves.

At an optimum the Lagrangian $L = \sum_t c_t + \lambda_{t+1}^\top(f(s_t, a_t) - s_{t+1})$ is stationary in states, actions and
costates. With p for the start, masses, goals, weights, limits, its total derivative along p is an LQR problem with gaps
(`kkt.py`):

$$\min_{dz} \sum_t \tfrac12 dz_t^\top H_t\,dz_t + (L_{zp}\,dp)_t^\top dz_t,\qquad
ds_{t+1} = A_t\,ds_t + B_t\,da_t + f_p\,dp,\quad ds_0 = dp_{s_0}$$

H is the exact Hessian of the Hamiltonian, $c_{zz} + \lambda_{t+1}^\top f_{zz}$, not projected: Gauss-Newton's, which iLQR plans
with, has another stationary point's derivative, wrong even in sign. One Riccati sweep and three linear passes, however the
plan was found; nothing of the planner is differentiated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import Solver, State, Task, Trajectory, is_planner, where
from diffmbrl.planners.quadratic_models import hamiltonian
from diffmbrl.policies import Affine
from diffmbrl.rollout import returns, rollout, step_keys
from diffmbrl.second_order.kkt import solve_with_gaps
from diffmbrl.second_order.linearize import Linearization, flat_states, linearize
from diffmbrl.second_order.parallel_riccati import choose
from diffmbrl.second_order.riccati import RiccatiSolution

AT_LIMIT = 1e-5  # of the size of a limit: how near an action must be to count as at it
REJECTED = 6  # updates in a row that change nothing, after which a planner has ended


class Optimum(NamedTuple):
    """An optimal plan whose derivatives are those of the optimum, and how far they can be trusted.

    Args:
        plan: The plan, differentiable in `a` and `s`; its gains K have no derivative.
        trajectory: Its trajectory, differentiable.
        J: Its return, differentiable.
        gradient_norm: Norm of dJ/da in the actions that are not at a limit.
        distance: Largest change of an action in the remaining Newton step.
        definite: Whether the exact Hessian of -J in those actions is positive definite.
        ok: Whether the plan is a maximum to within the tolerance. If not, the derivatives are still those of the
            formula: of a stationary point that is no maximum (`definite` is False), or with an error of the order
            of `distance`.
    """

    plan: Affine
    trajectory: Trajectory
    J: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    distance: Float[Array, "*batch"]
    definite: Bool[Array, "*batch"]
    ok: Bool[Array, "*batch"]


def optimal(
    planner: Solver,
    task: Task,
    s0: State,
    *,
    steps: int,
    plan: Affine | None = None,
    key: PRNGKeyArray | None = None,
    tolerance: float = 1e-4,
) -> Optimum:
    r"""Plan from `s0` and differentiate the solution: $\partial a^*/\partial(s_0, \text{task})$.

    It works under `jit`, `vmap`, `grad` and `jvp`; see `implicit` for the derivatives.

    Args:
        planner: Solver of kind "plan" on `Affine` plans.
        task: Task, in whose float leaves the result is differentiable.
        s0: Start state, in which the result is differentiable.
        steps: Largest number of updates; planning ends early when several updates in a row change nothing.
        plan: First plan; None for the planner's own.
        key: Key of the noise; None for none.
        tolerance: As for `implicit`.

    Returns:
        The plan with its derivatives.

    Raises:
        TypeError: If the solver is not of kind "plan".
        ValueError: If `steps` is not a whole number of at least 1.

    >>> import equinox as eqx
    >>> from diffmbrl import ILQR, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> effort = eqx.filter_grad(lambda s0: jnp.sum(optimal(ILQR(), task, s0, steps=3).plan.a ** 2))
    >>> effort(jnp.array([1.0, 0.0])).shape
    (2,)
    """
    if not is_planner(planner):
        raise TypeError(
            f"optimal needs a planner, whose kind is 'plan'; {type(planner).__name__} is a {planner.kind!r}"
        )
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    # Gradients stop before the loop: reverse mode cannot enter it, and need not.
    held, fixed_task, fixed_s0 = jax.lax.stop_gradient((planner.first_plan(task) if plan is None else plan, task, s0))

    def going(state):
        _, _, rejected, i = state
        return (i < steps) & (rejected < REJECTED)

    def update(state):
        plan, carry, rejected, i = state
        plan, carry, info = planner.update(plan, carry, fixed_task, fixed_s0, key=key)
        return plan, carry, jnp.where(info.accepted, 0, rejected + 1), i + 1

    zero = jnp.zeros((), jnp.int32)
    held, *_ = jax.lax.while_loop(going, update, (held, planner.init(held, fixed_task), zero, zero))
    return implicit(held, task, s0, key, tolerance=tolerance)


def implicit(plan: Any, task: Task, s0: State, key: PRNGKeyArray | None = None, *, tolerance: float = 1e-4) -> Optimum:
    r"""Attach to an optimal plan the derivatives of the optimum with respect to start state and task.

    Actions that press against a limit stay at it and move with it.

    Args:
        plan: `Affine` plan, already optimal.
        task: Task, in whose float leaves the result is differentiable.
        s0: One start state; use `vmap` for many.
        key: Key of the noise; None for none.
        tolerance: Largest change of an action in the remaining Newton step, relative to 1 + the largest action, for
            which `ok` is true. In single precision few plans are nearer than 1e-3.

    Returns:
        The plan with its derivatives.

    Raises:
        TypeError: If the plan is not an `Affine`.
        ValueError: If the task has constraints, which are not differentiated.

    Cost: one rollout, its linearisation with the Hessians of f, a Riccati sweep, and three linear passes per tangent or
    cotangent. Reference: Amos et al. 2018, Differentiable MPC; Jin et al. 2020, Pontryagin differentiable programming,
    Lemma 5.2.

    >>> from diffmbrl import ILQR, solve, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> s0 = jnp.array([1.0, 0.0])
    >>> plan, _ = solve(ILQR(), Affine.zeros(task), task, s0, None, steps=3)
    >>> dJ = jax.grad(lambda s0: implicit(plan, task, s0).J)(s0)
    >>> bool(implicit(plan, task, s0).ok), dJ.shape
    (True, (2,))
    """
    if not isinstance(plan, Affine):
        raise TypeError(f"implicit differentiates an Affine plan, such as ILQR returns; got {type(plan).__name__}")
    if task.constraints is not None:
        raise ValueError(f"task '{task.name}' has constraints; implicit derivatives know the limits of actions alone")
    plan = jax.lax.stop_gradient(plan)
    s, a, s_T, held = _stationary(task, s0, plan, key)
    unravel = ravel_pytree(s0)[1]
    states, last = jax.vmap(unravel)(s), unravel(s_T)
    alive = held.alive > 0
    with jax.default_matmul_precision("highest"):
        r = jax.vmap(task.reward)(where(alive[:-1], states, s0), a)
    trajectory = Trajectory(states, a, jnp.where(alive[:-1], r, jnp.zeros_like(r)), alive, last)
    near = held.distance <= tolerance * (1 + jnp.max(jnp.abs(a)))
    return Optimum(
        plan=Affine(plan.K, a, s, plan.low, plan.high),
        trajectory=trajectory,
        J=returns(trajectory, task),
        gradient_norm=held.gradient_norm,
        distance=held.distance,
        definite=held.definite > 0,
        ok=(held.definite > 0) & near,
    )


class _Held(NamedTuple):
    """Results without a derivative; all float, since a custom derivative needs tangents of every result."""

    alive: Array
    gradient_norm: Array
    distance: Array
    definite: Array


class _Point(NamedTuple):
    """A stationary point: the trajectory, its factorised KKT system, and which actions a limit holds."""

    trajectory: Trajectory
    costates: Float[Array, "T n"]  # of s_1 .. s_T
    lin: Linearization  # exact Hessians; held actions cut out
    B: Float[Array, "T n m"]  # with those, and the columns of the Hessians that belong to actions
    across: Float[Array, "T n+m m"]
    sweep: RiccatiSolution
    at_low: Bool[Array, "T m"]
    at_high: Bool[Array, "T m"]
    held: _Held


@jax.custom_jvp
def _stationary(task: Task, s0: State, plan: Affine, key: PRNGKeyArray | None) -> tuple[Array, Array, Array, _Held]:
    return _values(_point(task, s0, plan, key))


@_stationary.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    task, s0, plan, key = primals
    task_dot, s0_dot, _, _ = tangents
    point = _point(task, s0, plan, key)
    # Actions at a limit move with it, and the other variables respond.
    zero = jnp.zeros_like(point.trajectory.a)
    a_dot = jnp.where(point.at_low, task_dot.a_low, jnp.where(point.at_high, task_dot.a_high, zero))
    free = ~(point.at_low | point.at_high)
    n = point.lin.A.shape[1]
    c, moved, c_T = jax.jvp(_first_order(point.trajectory, point.costates, key), (task,), (task_dot,))[1]
    c = c + jnp.einsum("tij,tj->ti", point.across, a_dot, precision="highest")
    moved = moved + jnp.einsum("tij,tj->ti", point.B, a_dot, precision="highest")

    lin = point.lin._replace(c_s=c[:, :n], c_a=jnp.where(free, c[:, n:], zero), c_T=c_T)
    gaps = jnp.concatenate([ravel_pytree(s0_dot)[0][None], moved])
    step = solve_with_gaps(lin, point.sweep, gaps, sweeps=choose(task.horizon))
    return _values(point), (step.s, step.a + a_dot, step.s_T, jax.tree.map(jnp.zeros_like, point.held))


def _values(point: _Point) -> tuple[Array, Array, Array, _Held]:
    s, _ = flat_states(point.trajectory.s)
    return s, point.trajectory.a, ravel_pytree(point.trajectory.s_T)[0], point.held


def _point(task: Task, s0: State, plan: Affine, key: PRNGKeyArray | None) -> _Point:
    """Follow the plan; compute costates, exact Hessians, and the sweep that factorises them."""
    sweeps = choose(task.horizon)
    trajectory = rollout(plan, task, s0, key)
    a, alive = trajectory.a, trajectory.alive
    lin = linearize(task, trajectory, key)
    n, m = lin.B.shape[1:]

    # Costates through the closed loop, which is stable where the open one is not; at the optimum they are the same.
    near_low, near_high = _at(a, task.a_low), _at(a, task.a_high)
    K = jnp.where((near_low | near_high)[..., None], 0.0, plan.K).astype(plan.K.dtype)
    closed = lin.A + jnp.einsum("tij,tjk->tik", lin.B, K, precision="highest")
    c_s = lin.c_s + jnp.einsum("tji,tj->ti", K, lin.c_a, precision="highest")
    eye = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), closed.shape)
    costates = sweeps.adjoint(closed, eye, jnp.zeros_like(closed), c_s, jnp.zeros_like(c_s), lin.c_T)
    g = lin.c_a + jnp.einsum("tij,ti->tj", lin.B, costates, precision="highest")

    # Past the end of an episode an action has no effect, and is held constant.
    ended = jnp.broadcast_to(~alive[:-1, None], a.shape)
    at_low, at_high = near_low & (g > 0) & ~ended, near_high & (g < 0) & ~ended
    free = (~(at_low | at_high | ended)).astype(a.dtype)
    H, H_T = hamiltonian(task, trajectory, costates, key), _last_hessian(task, trajectory)
    across = H[:, :, n:]
    mask = jnp.concatenate([jnp.ones((task.horizon, n), a.dtype), free], axis=1)
    H = jnp.where(mask[:, :, None] * mask[:, None, :] > 0, H, np.eye(n + m, dtype=a.dtype))
    B, lin = lin.B, Linearization(lin.A, lin.B * free[:, None], lin.c_s, g * free, H, lin.c_T, H_T)
    sweep = sweeps.riccati(
        lin._replace(c_s=jnp.zeros_like(lin.c_s), c_T=jnp.zeros_like(lin.c_T)), jnp.zeros((), a.dtype)
    )
    step = sweeps.respond(lin.A, lin.B, sweep.K, sweep.k)[1]
    held = _Held(
        alive.astype(a.dtype), jnp.linalg.norm(g * free), jnp.max(jnp.abs(step)), sweep.definite.astype(a.dtype)
    )
    return _Point(trajectory, costates, lin, B, across, sweep, at_low, at_high, held)


def _at(a: Array, limit: Array) -> Array:
    return jnp.abs(a - limit) <= AT_LIMIT * (1 + jnp.abs(jnp.where(jnp.isfinite(limit), limit, 0.0)))


def _first_order(trajectory: Trajectory, costates: Array, key: PRNGKeyArray | None) -> Callable:
    """The function of the task -> gradients of the Hamiltonian [T, n+m], next states [T, n], gradient of the last cost."""
    x, unravel = flat_states(trajectory.s)
    x_T = ravel_pytree(trajectory.s_T)[0]
    n, alive = x.shape[1], trajectory.alive

    def first_order(task):
        def step(s, a, w, costate, alive, t):
            z = jnp.concatenate([s, a])
            c = jax.grad(_hamiltonian)(z, task, w, costate, unravel, key, t)
            return jax.tree.map(
                lambda y: jnp.where(alive, y, jnp.zeros_like(y)), (c, _next(z, task, n, unravel, key, t))
            )

        states = jnp.where(alive[:-1, None], x, x[0])
        with jax.default_matmul_precision("highest"):
            times = jnp.arange(task.horizon)
            c, moved = jax.vmap(step)(states, trajectory.a, task.weights[:-1], costates, alive[:-1], times)
            c_T = jax.grad(_last)(jnp.where(alive[-1], x_T, x[0]), task, unravel)
        return c, moved, jnp.where(alive[-1], c_T, jnp.zeros_like(c_T))

    return first_order


def _last_hessian(task: Task, trajectory: Trajectory) -> Array:
    """Hessian of the last cost, not projected."""
    x, unravel = flat_states(trajectory.s)
    x_T = ravel_pytree(trajectory.s_T)[0]
    alive = trajectory.alive[-1]
    with jax.default_matmul_precision("highest"):
        H = jax.hessian(_last)(jnp.where(alive, x_T, x[0]), task, unravel)
    return jnp.where(alive, H, jnp.zeros_like(H))


def _hamiltonian(
    z: Array, task: Task, w: Array, costate: Array, unravel: Callable, key: PRNGKeyArray | None, t: Array
) -> Array:
    n = costate.shape[0]
    return jnp.vdot(costate, _next(z, task, n, unravel, key, t)) - w * task.reward(unravel(z[:n]), z[n:])


def _next(z: Array, task: Task, n: int, unravel: Callable, key: PRNGKeyArray | None, t: Array) -> Array:
    return ravel_pytree(task.dynamics(unravel(z[:n]), z[n:], key=step_keys(key, t)[1]))[0]


def _last(s: Array, task: Task, unravel: Callable) -> Array:
    return -task.weights[-1] * task.terminal(unravel(s))
