r"""Jacobians along rollouts, and the contribution of each time step to the gradient.

$$\frac{dJ}{d\theta} = \sum_t G_t^\top \frac{dJ}{da_t},\qquad
\frac{dJ}{da_t} = w_t r_a + B_t^\top \sum_{\tau > t} \Phi_{\tau,t+1}^\top (w_\tau r_s + K_\tau^\top w_\tau r_a),\qquad
\Phi_{\tau,t} = \prod_{k=t}^{\tau-1} (A_k + B_k K_k)$$

where at $\tau = T$ the gradient of $w_T \phi$ replaces those of the rewards. Gradients explode and vanish with the products
$\Phi$ of the closed-loop Jacobians, whose singular values, radii and eigenvalues are in `products.py`. The one-step values
below do not predict them.

>>> import jax
>>> from diffmbrl import Neural, tasks
>>> from diffmbrl.diagnostics.products import log_singular_values, products
>>> task = tasks.pendulum(horizon=50)
>>> found = jacobians(Neural.init(task, key=jax.random.key(0)), task, task.starts(jax.random.key(1), 4))
>>> jax.vmap(lambda A: log_singular_values(products(A)))(found.loop).shape
(4, 50, 2)
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Stateful, Task, is_plan, is_stateful
from diffmbrl.rollout import split_keys, step_keys
from diffmbrl.second_order.curvature import linearize_rollouts
from diffmbrl.second_order.riccati import adjoint

CHUNK = 64  # time steps whose contributions are computed at once


class Jacobians(NamedTuple):
    """Derivatives along a batch of rollouts. After the end of an episode A is the identity, and all others are 0.

    Args:
        A: df/ds, shape [B, T, n, n].
        B: df/da, shape [B, T, n, m].
        K: dpi/ds, shape [B, T, m, n].
        dJ_da: Derivative of each rollout's own return through the closed loop, shape [B, T, m].
        alive: Whether the episode had not ended at s_t, shape [B, T+1].
    """

    A: Float[Array, "B T n n"]
    B: Float[Array, "B T n m"]
    K: Float[Array, "B T m n"]
    dJ_da: Float[Array, "B T m"]
    alive: Bool[Array, "B T1"]

    @property
    def loop(self) -> Float[Array, "B T n n"]:
        """Jacobians of the closed loop, A + B K."""
        return self.A + jnp.matmul(self.B, self.K, precision="highest")


def jacobians(policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Jacobians:
    """A_t, B_t, K_t and dJ/da_t along a batch of rollouts, all time steps at once.

    Args:
        policy: A policy without a memory, or a plan.
        task: The task.
        s0: Start states, shape [B, ...]; states that are not flat are flattened to n numbers.
        key: Key of the rollouts' noise, at which the dynamics are linearised; None for no noise.

    Returns:
        The derivatives, with leading axes of B and T.

    Raises:
        TypeError: For a policy with a memory, whose closed loop is not a function of the state alone, and for states that are
            not float.

    Cost: a rollout, n + m tangents of f and m cotangents of pi for each step, and one adjoint recursion.
    """
    _, trajectory, lin, K = linearize_rollouts(_without_memory(policy), task, s0, key)
    g = adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)
    A, B, K, g = (jnp.moveaxis(x, -1, 0) for x in (lin.A, lin.B, K, g))
    return Jacobians(A, B, K, -g, trajectory.alive.T)


def contributions(
    policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None = None
) -> Float[Array, "T P"]:
    r"""Each time step's part of the gradient of the mean return, $\frac1B \sum_i G_{i,t}^\top \, dJ_i/da_{i,t}$.

    Args:
        policy: A policy without a memory, or a plan.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the rollouts' noise; None for no noise.

    Returns:
        The parts, shape [T, P], in the order of `ravel_pytree(policy)`; their sum is dJ/dtheta. Row t of a plan is zero
        outside the plan's slice t.

    Raises:
        TypeError: As `jacobians`.

    Cost: `jacobians`, and one cotangent of pi for each step and start.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> contributions(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (10, 3)
    """
    _, trajectory, lin, K = linearize_rollouts(_without_memory(policy), task, s0, key)
    g = adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)
    theta, unravel = ravel_pytree(policy)
    keys = split_keys(key, s0)

    def of_step(x):
        t, s, g = x

        def act(theta):
            pi = unravel(theta)
            if is_plan(policy):
                pi = jax.tree.map(lambda leaf: leaf[t], pi)

            def one(s, k):
                return pi(s, key=step_keys(k, t)[0])

            return jax.vmap(one, out_axes=-1)(s, keys)

        return jax.vjp(act, theta)[1](-g / g.shape[-1])[0]

    return jax.lax.map(of_step, (jnp.arange(task.horizon), trajectory.s, g), batch_size=min(CHUNK, task.horizon))


def singular_values(A: Float[Array, "*batch n k"]) -> Float[Array, "*batch l"]:
    """Singular values of each matrix on its own: the largest and smallest stretch of one step.

    Args:
        A: Matrices, shape [*batch, n, k].

    Returns:
        The singular values, decreasing, shape [*batch, min(n, k)].
    """
    return jnp.linalg.svd(A, compute_uv=False)


def eigenvalues(A: Float[Array, "*batch n n"]) -> np.ndarray:
    """Eigenvalues of each matrix on its own, computed on the host.

    Args:
        A: Matrices, shape [*batch, n, n].

    Returns:
        The eigenvalues [*batch, n], complex, largest modulus first; NaN for a matrix that is not finite.

    >>> import jax.numpy as jnp
    >>> abs(eigenvalues(jnp.array([[0.0, 1.0], [-4.0, 0.0]]))).round(6).tolist()
    [2.0, 2.0]
    """
    matrices = np.asarray(A)
    fine = np.all(np.isfinite(matrices), axis=(-1, -2), keepdims=True)
    values = np.linalg.eigvals(np.where(fine, matrices, 0.0)).astype(np.result_type(matrices.dtype, np.complex64))
    values = np.take_along_axis(values, np.argsort(-np.abs(values), axis=-1, kind="stable"), axis=-1)
    return np.where(fine[..., 0], values, np.nan)


def spectral_radius(A: Float[Array, "*batch n n"]) -> np.ndarray:
    """Largest modulus of the eigenvalues of each matrix on its own, computed on the host.

    Args:
        A: Matrices, shape [*batch, n, n].

    Returns:
        The radii, shape [*batch].
    """
    return np.abs(eigenvalues(A)[..., 0])


def _without_memory(policy: Policy | Stateful) -> Policy:
    if is_stateful(policy):
        raise TypeError(f"a policy with a memory ({type(policy).__name__}) has no gain K_t = dpi/ds in the state alone")
    return cast(Policy, policy)
