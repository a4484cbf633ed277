r"""The Gauss-Newton matrix of a policy and its square root, formed by one pass over time."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, Task, is_plan
from diffmbrl.rollout import split_keys
from diffmbrl.second_order.curvature import CurvatureModel, action_at
from diffmbrl.second_order.linearize import Linearization

Total = TypeVar("Total")
_matmul = partial(jnp.matmul, precision="highest")


def dense(model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None = None) -> Float[Array, "P P"]:
    r"""Form the Gauss-Newton matrix N by pushing all P columns of G through the closed loop at once.

    $$S_{t+1} = A_t S_t + B_t (K_t S_t + G_t),\qquad N = \tfrac1B\sum_{i,t} X_t^\top H_t X_t,\quad X_t = (S_t, K_t S_t + G_t)$$

    Args:
        model: Gauss-Newton model of the policy.
        policy: Policy or plan of which it is the model.
        task: Task.
        key: Key with which the model was built.

    Returns:
        The symmetric matrix N.

    Cost: B T (n + m) P^2 flops in matrix products of depth B (n + m), in one pass over time; memory B (n + m) P.

    >>> from diffmbrl import Linear, tasks
    >>> from diffmbrl.second_order import gauss_newton
    >>> task = tasks.lqr(horizon=5)
    >>> policy, s0 = Linear.zeros(task), task.starts(jax.random.key(0), 2)
    >>> dense(gauss_newton(policy, task, s0), policy, task).shape
    (3, 3)
    """

    def add(N, X, H):
        HX = _matmul(H, X)
        return N + _matmul(X.reshape(-1, X.shape[-1]).T, HX.reshape(-1, X.shape[-1]))

    P = model.gradient.size
    N = push_all(add, jnp.zeros((P, P), model.gradient.dtype), model, model.linearization, policy, key)
    return (N + N.T) / (2 * model.g.shape[-1])


def square_root(
    model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None = None
) -> Float[Array, "P P"]:
    r"""Form an upper triangular R with $R^\top R = N$ from the rows $H_t^{1/2} X_t / \sqrt B$ of `dense`, without forming N.

    Args:
        model: Gauss-Newton model of the policy.
        policy: Policy or plan of which it is the model.
        task: Task.
        key: Key with which the model was built.

    Returns:
        The triangular factor R.

    Cost: A QR factorisation of P + B (n + m) rows for each time step.
    """
    lin = model.linearization
    n = lin.c_s.shape[1]
    H = jnp.concatenate([lin.H, jnp.zeros_like(lin.H[:1]).at[0, :n, :n].set(lin.H_T)])
    values, vectors = jnp.linalg.eigh(jnp.moveaxis(H, -1, 1))
    roots = jnp.moveaxis(jnp.sqrt(jnp.maximum(values, 0))[..., None] * jnp.swapaxes(vectors, -1, -2), 1, -1)

    def add(R, X, root):
        rows = _matmul(root, X).reshape(-1, X.shape[-1])
        return jnp.linalg.qr(jnp.concatenate([R, rows]), mode="r")

    P = model.gradient.size
    lin = lin._replace(H=roots[:-1], H_T=roots[-1, :, :n])
    R = push_all(add, jnp.zeros((P, P), model.gradient.dtype), model, lin, policy, key)
    return R / jnp.sqrt(jnp.asarray(model.g.shape[-1], R.dtype))


def push_all(
    add: Callable[[Total, Array, Array], Total],
    total: Total,
    model: CurvatureModel,
    lin: Linearization,
    policy: Policy,
    key: PRNGKeyArray | None,
) -> Total:
    """Push all columns of G through the closed loop at once, and accumulate over time.

    Args:
        add: `add(total, X_t, H_t) -> total`, with X_t of shape [B, n + m, P] and H_t [B, n + m, n + m]; for s_T the part of
            the state.
        total: Initial value.
        model: Gauss-Newton model of the policy.
        lin: Derivatives along the rollouts, whose H is passed to `add`.
        policy: Policy or plan of which it is the model.
        key: Key with which the model was built.

    Returns:
        The last value.
    """
    theta, unravel = ravel_pytree(policy)
    s = model.trajectory.s
    T, n, batch = lin.c_s.shape
    keys = None if key is None else split_keys(key, jax.tree.map(lambda x: x[0], s))

    def step(carry, x):
        S, total = carry
        t, s_t, *matrices = x
        A, B, K, H = (jnp.moveaxis(matrix, -1, 0) for matrix in matrices)
        if is_plan(policy):
            # Only slice t of the plan acts at t; its columns keep their place among all P.
            G = jax.vmap(lambda s, k: jax.jacrev(lambda v: action_at(_slice(unravel(v), t), s, k, t))(theta))(s_t, keys)
        else:
            G = jax.vmap(lambda s, k: jax.jacrev(lambda v: action_at(unravel(v), s, k, t))(theta))(s_t, keys)
        a = _matmul(K, S) + G
        return (_matmul(A, S) + _matmul(B, a), add(total, jnp.concatenate([S, a], axis=1), H)), None

    start = (jnp.zeros((batch, n, theta.size), theta.dtype), total)
    (S, total), _ = jax.lax.scan(step, start, (jnp.arange(T), s, lin.A, lin.B, model.K, lin.H))
    return add(total, S, jnp.moveaxis(lin.H_T, -1, 0))


def _slice(plan: Policy, t: Int[Array, ""]) -> Policy:
    return jax.tree.map(lambda x: x[t], plan)
