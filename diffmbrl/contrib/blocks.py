r"""The diagonal and blocks of the Gauss-Newton matrix N = G' M G: what a preconditioner is made of.

* The diagonal exactly: $N_{jj} = \tfrac1B\sum_{i,t} x_{tj}^\top H_t x_{tj}$, $x_{tj}$ the response of (s, a) to parameter j.
* The diagonal from random signs u: with $N = J^\top J$, $J = H^{1/2} L G / \sqrt B$,
  $$E[(J^\top u)_j^2] = N_{jj}\quad\text{for } u \in \{-1, 1\},$$
  half a product a sample, never negative, with a relative standard deviation of at most $\sqrt{2 / \mathrm{samples}}$ whatever
  lies beside the diagonal; $E[v \circ N v]$ has the diagonal too, with an error as large as the rest of its row.
* The block of each leaf of the policy, exactly, as the diagonal.
* Kronecker factors of each layer of a network. With $\tilde x$ a layer's input and 1, and R the derivative of the action in its
  output, its block is $\tfrac1B\sum_i\sum_{t,t'} \tilde x_t \tilde x_{t'}^\top \otimes R_t^\top M_{tt'} R_{t'}$. Kept are the
  blocks of M on its diagonal, $Q_t = H_{ww} + B_t^\top V_{t+1} B_t$ with V the policy's own cost to go, and of their sum the
  nearest product in one step from the identity,
  $$\Omega \otimes \Gamma,\quad \Gamma = \tfrac1B\sum_{i,t} R^\top Q R,\quad
  \Omega = \frac{\sum \mathrm{tr}(R^\top Q R)\,\tilde x \tilde x^\top}{\sum \mathrm{tr}(R^\top Q R)},$$
  which has the trace of that sum; with the weights left out it is K-FAC's. What couples the time steps, all of it that a layer
  sees through its slow inputs, the bias above all, is left out.

Reference: Chapelle and Erhan 2011 (the diagonal by random signs); Martens and Grosse 2015, section 3 (the factors);
Van Loan and Pitsianis 1993 (the nearest product).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.policies import Neural, squash
from diffmbrl.second_order.curvature import CurvatureModel, Vector
from diffmbrl.second_order.dense import push_all
from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.riccati import adjoint, closed_loop
from diffmbrl.second_order.small_matrices import matmul


def diagonal(model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None = None) -> Vector:
    """The diagonal of N, by pushing all columns of G through the closed loop at once: `dense` without P^2."""

    def add(total, X, H):
        return total + jnp.sum(X * _matmul(H, X), axis=(0, 1))

    return push_all(add, jnp.zeros_like(model.gradient), model, model.linearization, policy, key) / model.g.shape[-1]


def signed_diagonal(model: CurvatureModel, key: PRNGKeyArray, samples: int) -> Vector:
    """An unbiased estimate of the diagonal of N, the mean of so many squares: never negative.

    Raises: `ValueError` if there are no samples.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    lin, K = model.linearization, model.K
    n, batch = lin.c_s.shape[1], model.g.shape[-1]
    roots = _root(jnp.concatenate([lin.H, jnp.zeros_like(lin.H[:1]).at[0, :n, :n].set(lin.H_T)]))

    def square(key):
        u = jax.random.rademacher(key, (roots.shape[0], roots.shape[2], batch), roots.dtype)
        y = jnp.sum(roots * u[:, None], axis=2)
        return batch * model.pull(adjoint(lin.A, lin.B, K, y[:-1, :n], y[:-1, n:], y[-1, :n])) ** 2

    return jnp.mean(jax.vmap(square)(jax.random.split(key, samples)), axis=0)


def leaf_blocks(
    model: CurvatureModel, policy: Any, task: Task, key: PRNGKeyArray | None = None, *, largest: int = 512
) -> tuple[Array, ...]:
    """The block [k, k] of N for each leaf of the policy in their order, the diagonal [k] of one with more than `largest`."""
    sizes = [leaf.size for leaf in jax.tree.leaves(policy)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def add(totals, X, H):
        HX = _matmul(H, X)
        rows, weighed = (Y.reshape(-1, Y.shape[-1]) for Y in (X, HX))
        return tuple(
            total
            + (_matmul(rows[:, span].T, weighed[:, span]) if total.ndim == 2 else jnp.sum((X * HX)[..., span], (0, 1)))
            for total, span in zip(totals, spans, strict=True)
        )

    start = tuple(jnp.zeros((size, size) if size <= largest else (size,), model.gradient.dtype) for size in sizes)
    totals = push_all(add, start, model, model.linearization, policy, key)
    return tuple((N + N.T) / (2 * model.g.shape[-1]) if N.ndim == 2 else N / model.g.shape[-1] for N in totals)


def action_curvature(lin: Linearization, K: Float[Array, "T m n B"]) -> Float[Array, "T m m B"]:
    r"""The blocks of M on its diagonal, $Q_t = H_{ww} + B_t^\top V_{t+1} B_t$, with V the cost to go under the policy."""
    n = K.shape[2]
    loop = closed_loop(lin, K)

    def step(V, x):
        A, B, H = x
        At, Bt = jnp.swapaxes(A, 0, 1), jnp.swapaxes(B, 0, 1)
        return H[:n, :n] + matmul(At, matmul(V, A)), H[n:, n:] + matmul(Bt, matmul(V, B))

    return jax.lax.scan(step, loop.H_T, (loop.A, loop.B, loop.H), reverse=True)[1]


def kronecker_factors(
    model: CurvatureModel, policy: Any, task: Task
) -> list[tuple[Float[Array, "i i"], Float[Array, "o o"]]]:
    """Omega and Gamma of each layer: of its inputs with a 1 behind them, and of its outputs.

    Raises: `TypeError` for a policy that is not `Neural`.
    """
    if not isinstance(policy, Neural):
        raise TypeError(
            f"Kronecker factors need a Neural policy; got {type(policy).__name__}: take Jacobi or LeafBlocks"
        )
    net, low, high = policy.net, np.asarray(policy.low), np.asarray(policy.high)

    def layers(s):
        """Every layer's input and the derivative of the action in its output, [m, out]."""

        def act(shifts):
            x, inputs = policy.features(s), []
            for i, (W, b, shift) in enumerate(zip(net.weights, net.biases, shifts, strict=True)):
                inputs.append(jnp.append(x, jnp.ones((), x.dtype)))
                x = W @ x + b + shift
                x = net.activation(x) if i + 1 < len(net.weights) else x
            return squash(x, low, high), inputs

        return jax.jacrev(act, has_aux=True)([jnp.zeros_like(b) for b in net.biases])

    Q = jnp.moveaxis(action_curvature(model.linearization, model.K), -1, 1)
    factors = []
    for R, x in zip(*jax.vmap(jax.vmap(layers))(model.trajectory.s), strict=True):
        S = _matmul(jnp.swapaxes(R, -1, -2), _matmul(Q, R))
        outputs = jnp.sum(S, axis=(0, 1)) / model.g.shape[-1]
        weights = jnp.trace(S, axis1=-2, axis2=-1)
        whole = jnp.sum(weights)
        rows = x.reshape(-1, x.shape[-1])
        inputs = _matmul(rows.T * weights.ravel(), rows) / jnp.where(whole > 0, whole, 1.0)
        factors.append((inputs, (outputs + outputs.T) / 2))
    return factors


def _root(H: Float[Array, "T d d B"]) -> Float[Array, "T d d B"]:
    """C with C C' = H, positive semidefinite: Cholesky's, column by column, passing over pivots that are rounding."""
    least = H.shape[1] * jnp.finfo(H.dtype).eps * jnp.diagonal(H, axis1=1, axis2=2)
    columns = []
    for j in range(H.shape[1]):
        pivot = H[:, j, j]
        found = pivot > least[..., j]
        column = jnp.where(found[:, None], H[:, :, j] / jnp.sqrt(jnp.where(found, pivot, 1.0))[:, None], 0.0)
        H = H - column[:, :, None] * column[:, None, :]
        columns.append(column)
    return jnp.stack(columns, axis=2)


def _matmul(X: Array, Y: Array) -> Array:
    return jnp.matmul(X, Y, precision="highest")
