r"""The diagonal and blocks of the Gauss-Newton matrix N = G' M G, for preconditioners.

* The diagonal exactly: $N_{jj} = \tfrac1B\sum_{i,t} x_{tj}^\top H_t x_{tj}$, $x_{tj}$ the response of (s, a) to parameter j.
* The diagonal from random signs u: with $N = J^\top J$, $J = H^{1/2} L G / \sqrt B$,
  $$E[(J^\top u)_j^2] = N_{jj}\quad\text{for } u \in \{-1, 1\},$$
  half a product for each sample, never negative, with a relative standard deviation of at most $\sqrt{2 / \mathrm{samples}}$
  for every matrix; $E[v \circ N v]$ is the diagonal too, with an error as large as the rest of its row.
* The block of each leaf of the policy exactly, by the same pass over time.
* Kronecker factors of each layer of a network. With $\tilde x$ a layer's input and 1, and R the derivative of the action in its
  output, its block is $\tfrac1B\sum_i\sum_{t,t'} \tilde x_t \tilde x_{t'}^\top \otimes R_t^\top M_{tt'} R_{t'}$. The
  approximation uses the blocks of M on its diagonal, $Q_t = H_{ww} + B_t^\top V_{t+1} B_t$ with V the policy's own cost to go,
  and the product nearest to their sum in one step from the identity,
  $$\Omega \otimes \Gamma,\quad \Gamma = \tfrac1B\sum_{i,t} R^\top Q R,\quad
  \Omega = \frac{\sum \mathrm{tr}(R^\top Q R)\,\tilde x \tilde x^\top}{\sum \mathrm{tr}(R^\top Q R)},$$
  which has the trace of that sum; without the weights it is K-FAC's. It leaves out the coupling of the time steps, which a
  layer sees through its slow inputs, above all the bias.

Reference: Chapelle and Erhan 2011 (the diagonal by random signs); Martens and Grosse 2015, section 3 (the factors);
Van Loan and Pitsianis 1993 (the nearest product).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, Task
from diffmbrl.policies import Neural, squash
from diffmbrl.second_order.curvature import CurvatureModel, Vector
from diffmbrl.second_order.dense import push_all
from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.riccati import adjoint, closed_loop
from diffmbrl.second_order.small_matrices import matmul


def diagonal(model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None = None) -> Vector:
    """The diagonal of N, by pushing all columns of G through the closed loop at once: `dense` without memory P^2.

    Args:
        model: Gauss-Newton model of the policy.
        policy: Policy or plan of which it is the model.
        task: Task.
        key: Key with which the model was built.

    Returns:
        The diagonal.
    """

    def add(total, X, H):
        return total + jnp.sum(X * _matmul(H, X), axis=(0, 1))

    return push_all(add, jnp.zeros_like(model.gradient), model, model.linearization, policy, key) / model.g.shape[-1]


def signed_diagonal(model: CurvatureModel, key: PRNGKeyArray, samples: int) -> Vector:
    """Estimate the diagonal of N by a mean of squares: unbiased, and never negative.

    Args:
        model: Gauss-Newton model of the policy.
        key: Key of the random signs.
        samples: Number of sign vectors.

    Returns:
        The estimate.

    Raises:
        ValueError: If `samples` is below 1.
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
    model: CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None = None, *, largest: int = 512
) -> tuple[Array, ...]:
    """The blocks of N on its diagonal, one for each leaf of the policy.

    Args:
        model: Gauss-Newton model of the policy.
        policy: Policy or plan of which it is the model.
        task: Task.
        key: Key with which the model was built.
        largest: Size of the largest leaf with a block.

    Returns:
        In the order of the leaves, the block [k, k], or the diagonal [k] of a larger leaf.
    """
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
    r"""The blocks of M on its diagonal, $Q_t = H_{ww} + B_t^\top V_{t+1} B_t$, with V the cost to go under the policy.

    Args:
        lin: Derivatives along the rollouts.
        K: Gains of the policy.

    Returns:
        The blocks.
    """
    n = K.shape[2]
    loop = closed_loop(lin, K)

    def step(V, x):
        A, B, H = x
        At, Bt = jnp.swapaxes(A, 0, 1), jnp.swapaxes(B, 0, 1)
        return H[:n, :n] + matmul(At, matmul(V, A)), H[n:, n:] + matmul(Bt, matmul(V, B))

    return jax.lax.scan(step, loop.H_T, (loop.A, loop.B, loop.H), reverse=True)[1]


def kronecker_factors(
    model: CurvatureModel, policy: Policy, task: Task
) -> list[tuple[Float[Array, "i i"], Float[Array, "o o"]]]:
    """Kronecker factors of each layer of a network.

    Args:
        model: Gauss-Newton model of the policy.
        policy: Neural policy of which it is the model.
        task: Task.

    Returns:
        Omega and Gamma of each layer: the factors of its inputs, with a 1 appended, and of its outputs.

    Raises:
        TypeError: If the policy is not `Neural`.
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
    """C with C C' = H for positive semidefinite H: Cholesky's, column by column, without the pivots that are rounding."""
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
