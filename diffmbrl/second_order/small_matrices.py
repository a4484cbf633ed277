"""Products and solutions of tiny linear systems, written out as arithmetic; further axes follow the matrices' own two."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

SUMMED = 6  # largest inner dimension at which a product of stacked matrices is a sum of outer products
INLINE = 16  # largest dimension at which products and eliminations are written out as arithmetic


def matmul(X: Float[Array, "i j *batch"], Y: Float[Array, "j k *batch"]) -> Float[Array, "i k *batch"]:
    """Multiply matrices by arithmetic alone, which XLA fuses into a scan's step, unlike a tiny matrix product.

    Args:
        X: Left factors.
        Y: Right factors.

    Returns:
        The products X Y.

    Cost: Up to `SUMMED` terms, stacked trajectories take a sum of outer products, which runs along the stack (64 trajectories,
    n = 6: 9 times faster). Elsewhere a reduction: of a sum XLA would make one long expression for each entry, at n = 12 two
    to fourteen times slower.
    """
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,jk...->ik...", X, Y, precision="highest")
    if X.ndim > 2 and X.shape[1] <= SUMMED:
        return sum((X[:, j, None] * Y[j] for j in range(1, X.shape[1])), X[:, 0, None] * Y[0])
    return jnp.sum(X[:, :, None] * Y, axis=1)


def matvec(X: Float[Array, "i j *batch"], y: Float[Array, "j *batch"]) -> Float[Array, "i *batch"]:
    """Multiply matrices and vectors, as `matmul` does.

    Args:
        X: Matrices.
        y: Vectors.

    Returns:
        The products X y. For stacked trajectories a sum at any size (n = 12: 3 times faster).
    """
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,j...->i...", X, y, precision="highest")
    if X.ndim > 2:
        return sum((X[:, j] * y[j] for j in range(1, X.shape[1])), X[:, 0] * y[0])
    return jnp.sum(X * y, axis=1)


def transpose(X: Float[Array, "i j *batch"]) -> Float[Array, "j i *batch"]:
    """Swap the first two axes."""
    return jnp.swapaxes(X, 0, 1)


def eliminate(
    Q: Float[Array, "m m *batch"], R: Float[Array, "m k *batch"]
) -> tuple[Float[Array, "m k *batch"], Bool[Array, "*batch"]]:
    """Solve Q X = R for symmetric Q.

    Up to `INLINE` rows by Gauss-Jordan elimination without pivoting, which is stable for a positive definite Q: its pivots, the
    D of L D L', are then all positive. A call of LAPACK costs more than that arithmetic.

    Args:
        Q: Symmetric matrices.
        R: Right-hand sides, the columns.

    Returns:
        X = Q^-1 R, and whether Q is positive definite. X is void where it is not.
    """
    m = Q.shape[0]
    if m > INLINE:
        Q, R = (jnp.moveaxis(X, (0, 1), (-2, -1)) for X in (Q, R))
        factor = jnp.linalg.cholesky(Q)
        solution = jax.scipy.linalg.cho_solve((factor, True), R)
        return jnp.moveaxis(solution, (-2, -1), (0, 1)), jnp.all(jnp.isfinite(factor), axis=(-2, -1))
    rows = jnp.concatenate([Q, R], axis=1)
    # From numpy, so that it is a constant of the program: XLA would compute it in kernels of its own before the loop.
    index = np.arange(m).reshape(m, *(1,) * (rows.ndim - 1))
    positive = jnp.ones(Q.shape[2:], bool)
    for i in range(m):
        positive = positive & (rows[i, i] > 0)
        pivot_row = rows[i] / rows[i, i]
        rows = jnp.where(index == i, pivot_row, rows - rows[:, i : i + 1] * pivot_row)
    return rows[:, m:], positive
