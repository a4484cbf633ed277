"""Products and solves of tiny matrices, written out as arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SUMMED = 6  # products of stacked matrices with at most so many terms an entry are sums of outer products
INLINE = 16  # dimensions up to which tiny matrix products and eliminations are written out as arithmetic


def matmul(X: Float[Array, "i j *batch"], Y: Float[Array, "j k *batch"]) -> Float[Array, "i k *batch"]:
    """X Y as arithmetic alone, which fuses into a scan's step where a tiny matrix product does not.

    Of stacked trajectories a sum of few outer products, which runs along the stack (64 of them, T = 100: `spread` of the planar
    quadrotor, n = 6, 9 times faster). Of one, or of many products, a reduction: of the sum XLA makes one long expression for
    each entry there, at n = 12 two to fourteen times slower.
    """
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,jk...->ik...", X, Y, precision="highest")
    if X.ndim > 2 and X.shape[1] <= SUMMED:
        return sum((X[:, j, None] * Y[j] for j in range(1, X.shape[1])), X[:, 0, None] * Y[0])
    return jnp.sum(X[:, :, None] * Y, axis=1)


def matvec(X: Float[Array, "i j *batch"], y: Float[Array, "j *batch"]) -> Float[Array, "i *batch"]:
    """X y, likewise, with any axes after both; of stacked trajectories a sum at any size (n = 12: 3 times faster)."""
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,j...->i...", X, y, precision="highest")
    if X.ndim > 2:
        return sum((X[:, j] * y[j] for j in range(1, X.shape[1])), X[:, 0] * y[0])
    return jnp.sum(X * y, axis=1)


def transpose(X: Float[Array, "i j *batch"]) -> Float[Array, "j i *batch"]:
    return jnp.swapaxes(X, 0, 1)


def eliminate(Q: Float[Array, "m m *batch"], R: Float[Array, "m k *batch"]) -> tuple[Array, Array]:
    """Q^-1 R for a symmetric Q, and whether Q is positive definite, with any axes after the matrices' two.

    Small systems by Gauss-Jordan elimination without pivoting, stable for a positive definite matrix, whose pivots are then
    all positive (they are the D of L D L'): plain arithmetic, where LAPACK's call alone costs more than the work.
    """
    m = Q.shape[0]
    if m > INLINE:
        Q, R = (jnp.moveaxis(X, (0, 1), (-2, -1)) for X in (Q, R))
        factor = jnp.linalg.cholesky(Q)
        solution = jax.scipy.linalg.cho_solve((factor, True), R)
        return jnp.moveaxis(solution, (-2, -1), (0, 1)), jnp.all(jnp.isfinite(factor), axis=(-2, -1))
    rows = jnp.concatenate([Q, R], axis=1)
    # Of numpy, a constant of the program: XLA would compute it in kernels of their own before the loop.
    index = np.arange(m).reshape(m, *(1,) * (rows.ndim - 1))
    positive = jnp.ones(Q.shape[2:], bool)
    for i in range(m):
        positive = positive & (rows[i, i] > 0)
        pivot_row = rows[i] / rows[i, i]
        rows = jnp.where(index == i, pivot_row, rows - rows[:, i : i + 1] * pivot_row)
    return rows[:, m:], positive
