r"""Krylov spaces of a symmetric operator given by its products.

One basis serves every damping: for $V N V^\top = U \mathrm{diag}(\rho) U^\top$ (tridiagonal), the minimiser over the space of
$g^\top d + \tfrac12 d^\top (N + \lambda I) d$ is $d = -V^\top U (\rho + \lambda)^{-1} U^\top e_1 |g|$. In exact arithmetic
that is what k iterations of conjugate gradients give for that damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Spectral(NamedTuple):
    r"""A symmetric operator and a vector g in (a subspace of) its eigenvectors: steps for any damping are then cheap."""

    vectors: Float[Array, "k P"]  # orthonormal rows
    values: Float[Array, " k"]  # eigenvalues or Ritz values
    coefficients: Float[Array, " k"]  # g in the basis
    products: Int[Array, ""]  # operator products spent

    def step(self, damping: Float[Array, ""]) -> tuple[Float[Array, " P"], Float[Array, ""]]:
        r"""$d = -(N + \lambda I)^{-1} g$ in the subspace, and the decrease $-(g^\top d + \tfrac12 d^\top N d)$ it predicts."""
        y = -self.coefficients / (self.values + damping)
        predicted = -(self.coefficients @ y + 0.5 * y @ (self.values * y))
        return y @ self.vectors, predicted


def lanczos(product: Callable[[Float[Array, " P"]], Float[Array, " P"]], g: Float[Array, " P"], rank: int) -> Spectral:
    r"""The Krylov space of dimension `rank` from g, by Lanczos with full re-orthogonalisation, twice.

    When the space closes early (or g = 0), the remaining basis vectors are zero and carry no weight; nothing is raised.
    Cost: `rank` products and 4 P rank^2 flops.

    Reference: Golub and Van Loan, Matrix Computations, section 10.3.

    >>> import jax.numpy as jnp
    >>> space = lanczos(lambda v: jnp.array([1.0, 2.0, 3.0]) * v, jnp.ones(3), 3)
    >>> [round(float(x), 4) for x in space.values]
    [1.0, 2.0, 3.0]
    """
    rank = min(rank, g.shape[0])
    norm = jnp.linalg.norm(g)
    tiny = jnp.finfo(g.dtype).tiny
    dot = lambda X, y: jnp.matmul(X, y, precision="highest")  # noqa: E731

    def step(i, state):
        V, alpha, beta, v, top = state
        V = V.at[i].set(v)
        w = product(v)
        alpha = alpha.at[i].set(v @ w)
        for _ in range(2):
            w = w - dot(V.T, dot(V, w))
        length = jnp.linalg.norm(w)
        top = jnp.maximum(top, jnp.abs(alpha[i]) + length)
        # Below rounding of the operator's own size, w is noise: the space is invariant.
        closed = length <= 10 * jnp.finfo(g.dtype).eps * top
        v = jnp.where(closed, 0.0, w / jnp.where(closed, 1.0, length))
        return V, alpha, beta.at[i].set(jnp.where(closed, 0.0, length)), v, top

    zeros = jnp.zeros(rank, g.dtype)
    start = (jnp.zeros((rank, g.shape[0]), g.dtype), zeros, zeros, g / jnp.maximum(norm, tiny), jnp.zeros((), g.dtype))
    V, alpha, beta, _, _ = jax.lax.fori_loop(0, rank, step, start)
    ritz, U = jnp.linalg.eigh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))
    return Spectral(dot(U.T, V), ritz, norm * U[0], jnp.asarray(rank, jnp.int32))
