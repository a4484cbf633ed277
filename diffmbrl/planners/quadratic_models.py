r"""Quadratic models of a task along a trajectory: with the curvature of the costs alone, or of the dynamics too (DDP).

$$H_t = \nabla^2 c_t + \sum_i \lambda_{t+1,i} \nabla^2 f_i,\qquad \lambda_t = c_{s,t} + A_t^\top \lambda_{t+1}$$

is the Hessian of the Hamiltonian in (s, a), and the LQR problem with it is Newton's method on the actions.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, Trajectory
from diffmbrl.rollout import returns, rollout, step_keys
from diffmbrl.second_order.linearize import Linearization, each_step, feedback, flat_states, linearize
from diffmbrl.second_order.riccati import closed_loop
from diffmbrl.second_order.small_matrices import matmul


class QuadraticModel(NamedTuple):
    """A linearisation whose Hessians are positive semidefinite, and the exact ones where they are known."""

    lin: Linearization
    exact: Float[Array, "T d d"] | None


class FirstOrder(eqx.Module):
    """Gauss-Newton model: the Hessians of the costs, projected to be positive semidefinite, and none of the dynamics.

    Reference: Li and Todorov 2004.
    """

    def __call__(self, task: Task, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> QuadraticModel:
        return QuadraticModel(linearize(task, trajectory, key), None)


class SecondOrder(eqx.Module):
    """Newton's model: the Hessians of the Hamiltonian as well, in parallel over time.

    Costs n + m more tangents of the gradient of f' lambda.

    They are used as they are or not at all. Damped until the sweep is positive definite, they took 46 to 168 iterations to
    0.1% of the optimum on pendulum, acrobot and quadrotor, and projected to be positive semidefinite 20 to 67, where iLQR takes
    28, 23 and 3; used only where the sweep is positive definite as it is, they save iLQR's slow last iterations.

    Reference: Jacobson and Mayne 1970; Dunn and Bertsekas 1989 for the costate in the place of V's gradient.
    """

    def __call__(self, task: Task, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> QuadraticModel:
        lin = linearize(task, trajectory, key)
        return QuadraticModel(lin, hamiltonian(task, trajectory, costates(lin), key))


def costates(lin: Linearization) -> Float[Array, "T n"]:
    r"""$\lambda_1 .. \lambda_T$: the gradients of the cost to go in the state that each step leads to."""

    def step(costate, x):
        A, c_s = x
        return c_s + jnp.sum(A * costate[:, None], axis=0), costate

    return jax.lax.scan(step, lin.c_T, (lin.A, lin.c_s), reverse=True)[1]


def hamiltonian(
    task: Task, trajectory: Trajectory, costates: Float[Array, "T n"], key: PRNGKeyArray | None = None
) -> Float[Array, "T d d"]:
    """The Hessians of the Hamiltonian in (s, a), not projected; zero after the end of an episode."""
    x, unravel = flat_states(trajectory.s)
    n, alive = x.shape[1], trajectory.alive[:-1]

    def value(z, costate, w, t):
        key_s = step_keys(key, t)[1]
        s, a = unravel(z[:n]), z[n:]
        return jnp.vdot(costate, ravel_pytree(task.dynamics(s, a, key=key_s))[0]) - w * task.reward(s, a)

    def tangents(z, *given):
        # As the Jacobians in linearize.py; on the last axis the tangents are contiguous.
        _, push = jax.linearize(lambda z: jax.grad(value)(z, *given), z)
        return jax.vmap(push, out_axes=1)(np.eye(z.size, dtype=z.dtype))

    # A step after the end is replaced by the start before anything is evaluated: see `diffmbrl.rollout`.
    z = jnp.concatenate([x, trajectory.a], axis=1)
    z = z if task.done is None else jnp.where(alive[:, None], z, z[0])
    given = costates, task.weights[:-1], jnp.arange(task.horizon)
    with jax.default_matmul_precision("highest"):
        H = each_step(tangents, task)(z, *given)
    return H if task.done is None else jnp.where(alive[:, None, None], H, jnp.zeros_like(H))


class Expansion(NamedTuple):
    r"""The return to go of following a plan: $J_t(s) \approx J_t + v_t^\top (s - s_t) + (s - s_t)^\top V_t (s - s_t) / 2$.

    Args:
        V: Second derivative of the return to go in the state, shape [T + 1, n, n].
        v: First derivative, shape [T + 1, n].
        J: Return to go along the trajectory, shape [T + 1].
    """

    V: Float[Array, "T1 n n"]
    v: Float[Array, "T1 n"]
    J: Float[Array, " T1"]


def expansion(policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Expansion:
    r"""Expand the return to go to second order along the closed loop of a plan or policy, to first order in f.

    $$V_t = -\tilde H_t + \tilde A_t^\top V_{t+1} \tilde A_t,\qquad v_t = -\tilde c_t + \tilde A_t^\top v_{t+1}$$

    with the closed loop's derivatives. $v_0$ is exactly dJ/ds_0; V is exact for linear-quadratic tasks, and Riccati's at their
    optimum.

    Args:
        policy: Plan or policy.
        task: Task.
        s0: One start state.
        key: Key of the noise; None for none.

    Returns:
        The expansion along the trajectory.

    >>> import jax
    >>> from diffmbrl import Affine, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> expansion(Affine.zeros(task), task, task.initial(jax.random.key(0))).V.shape
    (21, 2, 2)
    """
    trajectory = rollout(policy, task, s0, key)
    lin = closed_loop(linearize(task, trajectory, key), feedback(policy, trajectory, key))
    n = lin.A.shape[1]

    def step(carry, x):
        V, v, J = carry
        A, c_s, H, r = x
        V, v, J = matmul(A.T, matmul(V, A)) - H[:n, :n], jnp.sum(A * v[:, None], axis=0) - c_s, J + r
        return (V, v, J), (V, v, J)

    final = returns(trajectory, task) - jnp.vdot(task.weights[:-1], trajectory.r)
    last = (-lin.H_T, -lin.c_T, final)
    _, rest = jax.lax.scan(step, last, (lin.A, lin.c_s, lin.H, task.weights[:-1] * trajectory.r), reverse=True)
    return Expansion(*(jnp.concatenate([x, y[None]]) for x, y in zip(rest, last, strict=True)))
