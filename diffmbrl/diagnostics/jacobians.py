r"""Jacobians along rollouts, and where in time the gradient comes from.

$$\frac{dJ}{d\theta} = \sum_t G_t^\top \frac{dJ}{da_t},\qquad
\frac{dJ}{da_t} = w_t r_a + B_t^\top \sum_{\tau > t} \Phi_{\tau,t+1}^\top (w_\tau r_s + K_\tau^\top w_\tau r_a),\qquad
\Phi_{\tau,t} = \prod_{k=t}^{\tau-1} (A_k + B_k K_k)$$

with the gradient of $w_T \phi$ for the rewards' at $\tau = T$. Exploding and vanishing gradients are those of the products
$\Phi$ of closed-loop Jacobians: `products.py` has their singular values, radii and eigenvalues. The one-step ones below do not
predict them.

>>> import jax
>>> from diffmbrl import Neural, tasks
>>> from diffmbrl.diagnostics.products import log_singular_values, products
>>> task = tasks.pendulum(horizon=50)
>>> found = jacobians(Neural.init(task, key=jax.random.key(0)), task, task.starts(jax.random.key(1), 4))
>>> jax.vmap(lambda A: log_singular_values(products(A)))(found.loop).shape
(4, 50, 2)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task, is_plan, is_stateful
from diffmbrl.rollout import split_keys, step_keys
from diffmbrl.second_order.curvature import linearize_rollouts
from diffmbrl.second_order.riccati import adjoint

CHUNK = 64  # time steps whose contributions are computed at once


class Jacobians(NamedTuple):
    """Derivatives along a batch of rollouts. After the end of an episode A is the identity, all else 0."""

    A: Float[Array, "B T n n"]  # df/ds
    B: Float[Array, "B T n m"]  # df/da
    K: Float[Array, "B T m n"]  # dpi/ds
    dJ_da: Float[Array, "B T m"]  # of each rollout's own return, through the closed loop
    alive: Bool[Array, "B T1"]

    @property
    def loop(self) -> Float[Array, "B T n n"]:
        """The closed loop's, A + B K."""
        return self.A + jnp.matmul(self.B, self.K, precision="highest")


def jacobians(policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Jacobians:
    """A_t, B_t, K_t and dJ/da_t along the rollouts from `s0` [B, ...], all time steps at once; for policies and plans.

    States that are not flat are flattened. `key` is the rollouts': noise is linearised as it was drawn. One start is a batch
    of one. Cost: a rollout, n + m tangents of f and m cotangents of pi a step, and one adjoint recursion.
    Raises: `TypeError` for a policy with a memory, whose loop is not in the state alone, and for states that are not float.
    """
    _refuse_memory(policy)
    _, trajectory, lin, K = linearize_rollouts(policy, task, s0, key)
    g = adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)
    A, B, K, g = (jnp.moveaxis(x, -1, 0) for x in (lin.A, lin.B, K, g))
    return Jacobians(A, B, K, -g, trajectory.alive.T)


def contributions(policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None) -> Float[Array, "T P"]:
    r"""Each time step's part of the gradient of the mean return, $\frac1B \sum_i G_{i,t}^\top \, dJ_i/da_{i,t}$.

    The rows sum to dJ/dtheta, in the order of `ravel_pytree(policy)`. Of a plan, row t is zero outside the plan's slice t.
    Cost: `jacobians`, and one cotangent of pi for each step and start. Raises: as `jacobians`.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> contributions(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (10, 3)
    """
    _refuse_memory(policy)
    _, trajectory, lin, K = linearize_rollouts(policy, task, s0, key)
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
    """Of each matrix by itself, decreasing: a step's largest and smallest stretch."""
    return jnp.linalg.svd(A, compute_uv=False)


def eigenvalues(A: Float[Array, "*batch n n"]) -> np.ndarray:
    """Of each matrix by itself [*batch, n], complex, largest modulus first; on the host. NaN for one that is not finite.

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
    """Largest modulus of the eigenvalues of each matrix by itself [*batch]; on the host."""
    return np.abs(eigenvalues(A)[..., 0])


def _refuse_memory(policy: Any) -> None:
    if is_stateful(policy):
        raise TypeError(f"a policy with a memory ({type(policy).__name__}) has no gain K_t = dpi/ds in the state alone")
