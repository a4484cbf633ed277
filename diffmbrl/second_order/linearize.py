r"""Derivatives of a task along a trajectory, in parallel over time.

The sign changes here: rewards r are maximised, while costs $c_t = -w_t r(s_t, a_t)$, $c_T = -w_T \phi(s_T)$ are minimised
along the linearised dynamics $ds_{t+1} = A_t\,ds_t + B_t\,da_t$. No time step waits for another; the recursions over time are
in `riccati.py`.

States that are not one flat array are flattened (float leaves only). Steps after the end of an episode have zero derivatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, Trajectory, cond_once, is_plan
from diffmbrl.rollout import step_keys


class Linearization(NamedTuple):
    """Derivatives along one trajectory, or several stacked on a last axis; costs are weighted, negative rewards.

    Args:
        A: Derivatives of the next state in the state.
        B: Derivatives of the next state in the action.
        c_s: Gradients of the costs in the state.
        c_a: Gradients of the costs in the action.
        H: Hessians of the costs in (s, a), projected to be positive semidefinite.
        c_T: Gradient of the terminal cost.
        H_T: Hessian of the terminal cost, projected likewise.
    """

    A: Float[Array, "T n n *batch"]
    B: Float[Array, "T n m *batch"]
    c_s: Float[Array, "T n *batch"]
    c_a: Float[Array, "T m *batch"]
    H: Float[Array, "T n+m n+m *batch"]
    c_T: Float[Array, "n *batch"]
    H_T: Float[Array, "n n *batch"]


def flat_states(states: State) -> tuple[Array, Callable[[Array], State]]:
    """Flatten states with a leading axis.

    Args:
        states: States, each leaf of shape [T, ...].

    Returns:
        The states as an array [T, n], and the function that restores one state from an array [n].

    Raises:
        TypeError: If a leaf is not floating point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path)
            raise TypeError(f"states must be float to be linearised; leaf {name or 's'} is {leaf.dtype}")
    if isinstance(states, jax.Array) and states.ndim == 2:
        return states, lambda x: x
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], states))
    return jax.vmap(lambda s: ravel_pytree(s)[0])(states), unravel


def linearize(task: Task, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> Linearization:
    r"""Differentiate dynamics and costs along one trajectory.

    Args:
        task: Task whose dynamics, reward and terminal reward are differentiated.
        trajectory: One rollout of it.
        key: The rollout's key, so that noisy dynamics are linearised at the noise that was drawn; None without noise.

    Returns:
        Jacobians of the dynamics, gradients and projected Hessians of the costs.

    Raises:
        TypeError: If a leaf of the state is not floating point.

    Cost: n + m tangents of f, one gradient and n + m Hessian columns of r for each time step.

    >>> import jax
    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> linearize(task, rollout(OpenLoop.zeros(task), task, task.initial(jax.random.key(0)))).A.shape
    (5, 2, 2)
    """
    x, unravel = flat_states(trajectory.s)
    x_T = ravel_pytree(trajectory.s_T)[0]
    n = x.shape[1]

    def step(z, t):
        return ravel_pytree(task.dynamics(unravel(z[:n]), z[n:], key=step_keys(key, t)[1]))[0]

    def jacobian(z, t):
        # The part that all tangents share is evaluated once. XLA knows the zeros of numpy's eye.
        _, push = jax.linearize(lambda z: step(z, t), z)
        return jax.vmap(push, out_axes=1)(np.eye(z.size, dtype=z.dtype))

    def cost(z, w):
        return -w * task.reward(unravel(z[:n]), z[n:])

    def final(s):
        def cost_T(s):
            return -task.weights[-1] * task.terminal(unravel(s))

        return jax.grad(cost_T)(s), jax.hessian(cost_T)(s)

    alive = trajectory.alive
    # A step after the end is replaced by the start before anything is evaluated: see `diffmbrl.rollout`.
    z = jnp.concatenate([x, trajectory.a], axis=1)
    z = z if task.done is None else jnp.where(alive[:-1, None], z, z[0])
    with jax.default_matmul_precision("highest"):
        F = each_step(jacobian, task)(z, jnp.arange(task.horizon))
        c, H = (jax.vmap(derivative(cost))(z, task.weights[:-1]) for derivative in (jax.grad, jax.hessian))
        c_T, H_T = final(jnp.where(alive[-1], x_T, x[0]) if task.done is not None else x_T)
    if task.done is not None:
        held = jnp.eye(n, z.shape[1], dtype=z.dtype)
        F = jnp.where(alive[:-1, None, None], F, held)
        H = jnp.where(alive[:-1, None, None], H, jnp.zeros_like(H))
        c = jnp.where(alive[:-1, None], c, jnp.zeros_like(c))
        c_T, H_T = jax.tree.map(lambda y: jnp.where(alive[-1], y, jnp.zeros_like(y)), (c_T, H_T))
    # One projection for all: jaxlib's batched eigh waits on XLA's thread pool, and two at a time can deadlock.
    H = project(jnp.concatenate([H, jnp.pad(H_T, (0, H.shape[-1] - n))[None]]))
    return Linearization(F[:, :, :n], F[:, :, n:], c[:, :n], c[:, n:], H[:-1], c_T, H[-1, :n, :n])


def each_step(f: Callable[..., Array], task: Task) -> Callable[..., Array]:
    """Map a function over time steps: all at once, or on a CPU one after another if the dynamics are arithmetic alone.

    On a CPU XLA makes one function of such a loop, and a kernel for each quantity of all steps at once: the loop is up to a
    third faster and compiles in half the time (12-state quadrotor). Networks multiply matrices by all steps at once.

    Args:
        f: Function of one time step's slices.
        task: Task whose dynamics `f` evaluates.

    Returns:
        The function of slices stacked on a leading time axis.
    """
    matrices = any(jnp.ndim(x) > 1 for x in jax.tree.leaves(task.dynamics))
    if matrices or jax.default_backend() != "cpu":
        return jax.vmap(f)
    return lambda *given: jax.lax.map(lambda x: f(*x), given)


def feedback(policy: Policy, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> Float[Array, "T m n"]:
    """Gains K_t = dpi/ds of a policy along one trajectory, all time steps at once; zero after the end of the episode.

    Args:
        policy: Policy or plan.
        trajectory: One rollout of it.
        key: The rollout's key; None without noise.

    Returns:
        The gains.

    >>> import jax
    >>> from diffmbrl import Linear, rollout, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> policy = Linear.zeros(task)
    >>> feedback(policy, rollout(policy, task, task.initial(jax.random.key(0)))).shape
    (5, 1, 2)
    """
    x, unravel = flat_states(trajectory.s)

    def gain(pi, s, t, alive):
        key_a = step_keys(key, t)[0]
        K = jax.jacrev(lambda s: pi(unravel(s), key=key_a))(jnp.where(alive, s, x[0]))
        return jnp.where(alive, K, jnp.zeros_like(K))

    axes = (0 if is_plan(policy) else None, 0, 0, 0)
    return jax.vmap(gain, in_axes=axes)(policy, x, jnp.arange(x.shape[0]), trajectory.alive[:-1])


def project(H: Float[Array, "N d d"]) -> Float[Array, "N d d"]:
    """Nearest positive semidefinite matrices in the Frobenius norm.

    Args:
        H: Matrices; their symmetric parts are projected.

    Returns:
        The projections.

    Cost: Most costs are diagonal or convex in (s, a). The eigendecomposition of thousands of tiny matrices, which is expensive,
    runs only if some matrix is neither diagonal nor positive semidefinite by Gershgorin's discs.
    """
    H = (H + jnp.swapaxes(H, -1, -2)) / 2
    diagonal = jnp.diagonal(H, axis1=-2, axis2=-1)
    radius = jnp.sum(jnp.abs(H), axis=-1) - jnp.abs(diagonal)
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)
    clipped = jnp.maximum(diagonal, 0)[..., None] * eye
    is_diagonal = jnp.all(radius == 0, axis=-1)
    easy = is_diagonal | jnp.all(diagonal >= radius, axis=-1)
    result = jnp.where(is_diagonal[..., None, None], clipped, H)

    def eigen(result):
        # `result` equals H where it matters. XLA would hoist an eigh of H itself out of the loop and run it always.
        values, vectors = jnp.linalg.eigh(result)
        full = jnp.einsum("...ij,...j,...kj->...ik", vectors, jnp.maximum(values, 0), vectors, precision="highest")
        return jnp.where(easy[..., None, None], result, full)

    return cond_once(~jnp.all(easy), eigen, result)
