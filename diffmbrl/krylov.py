r"""Krylov spaces of a symmetric operator given by its products.

One basis serves every damping: for $V N V^\top = U \mathrm{diag}(\rho) U^\top$ (tridiagonal), the minimiser over the space of
$g^\top d + \tfrac12 d^\top (N + \lambda I) d$ is $d = -V^\top U (\rho + \lambda)^{-1} U^\top e_1 |g|$. In exact arithmetic
that is what k iterations of conjugate gradients give for that damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Spectral(NamedTuple):
    r"""A symmetric operator and a vector g in (a subspace of) its eigenvectors: steps for any damping are then cheap."""

    vectors: Float[Array, "k P"]  # orthonormal rows
    ritz: Float[Array, " k"]  # eigenvalues or Ritz values, as they are
    values: Float[Array, " k"]  # the same as steps use them: none negative for a safe one
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
    return Spectral(dot(U.T, V), ritz, ritz, norm * U[0], jnp.asarray(rank, jnp.int32))


class Truncated(NamedTuple):
    """Where conjugate gradients ended, and why."""

    step: Float[Array, " P"]
    predicted: Float[Array, ""]  # decrease of the model, -(g'd + d'Nd / 2)
    products: Int[Array, ""]  # operator products spent, one an iteration
    residual: Float[Array, ""]  # |N d + g| / |g|
    negative: Bool[Array, ""]  # it met a direction without positive curvature
    boundary: Bool[Array, ""]  # it ended on the boundary of the trust region


def conjugate_gradients(
    product: Callable[[Float[Array, " P"]], Float[Array, " P"]],
    g: Float[Array, " P"],
    *,
    radius: Float[Array, ""] | float = jnp.inf,
    tolerance: Float[Array, ""] | float = 1e-5,
    iterations: int = 100,
) -> Truncated:
    r"""Minimise $g^\top d + \tfrac12 d^\top N d$ over $|d| \le$ `radius`, by Steihaug's truncated conjugate gradients.

    From d = 0 until the residual is `tolerance` of |g|, or the boundary is crossed, or a direction has no positive curvature:
    that is followed to the boundary, or not at all where the radius is infinite. Under `vmap` members that have ended wait,
    untouched, for the others. A product that is not finite ends it at the last finite step, with a residual of NaN.

    Reference: Steihaug 1983; Nocedal and Wright, Numerical Optimization, algorithm 7.2.

    >>> import jax.numpy as jnp
    >>> found = conjugate_gradients(lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([1.0, 1.0]))
    >>> [round(float(x), 4) for x in found.step], int(found.products)
    ([-1.0, -0.5], 2)
    """
    radius, tolerance = (jnp.asarray(x, g.dtype) for x in (radius, tolerance))
    norm = jnp.linalg.norm(g)
    no = jnp.zeros((), bool)

    def going(state):
        i, _, _, _, r, _, _, ended = state
        return (i < iterations) & ~ended & (jnp.linalg.norm(r) > tolerance * norm)

    def step(state):
        i, d, Nd, p, r, *_ = state
        Np = product(p)
        finite = jnp.all(jnp.isfinite(Np))
        curvature, squared = p @ Np, r @ r
        negative = finite & (curvature <= 0)
        alpha = squared / jnp.where(curvature > 0, curvature, 1.0)
        crossing = finite & (negative | (jnp.linalg.norm(d + alpha * p) >= radius))
        reach = jnp.where(jnp.isfinite(radius), _to_boundary(d, p, radius), 0.0)
        length = jnp.where(crossing, reach, jnp.where(finite, alpha, 0.0)).astype(g.dtype)
        along = jnp.where(finite, Np, jnp.zeros_like(Np))
        d, Nd = d + length * p, Nd + length * along
        # The residual of an operator that is not finite is not either: it is reported, not hidden.
        new = r + length * along + jnp.where(finite, 0.0, jnp.nan).astype(g.dtype)
        p = -new + (new @ new) / jnp.where(squared > 0, squared, 1.0) * p
        return i + 1, d, Nd, p, new, negative, crossing & jnp.isfinite(radius), crossing | ~finite

    zero = jnp.zeros_like(g)
    start = (jnp.zeros((), jnp.int32), zero, zero, -g, g, no, no, no)
    i, d, Nd, _, r, negative, boundary, _ = jax.lax.while_loop(going, step, start)
    residual = jnp.linalg.norm(r) / jnp.where(norm > 0, norm, 1.0)
    return Truncated(d, -(g @ d + 0.5 * d @ Nd), i, residual, negative, boundary)


def _to_boundary(d: Float[Array, " P"], p: Float[Array, " P"], radius: Float[Array, ""]) -> Float[Array, ""]:
    """The positive root of |d + tau p| = radius, without cancellation."""
    a, b, c = p @ p, d @ p, jnp.maximum(radius**2 - d @ d, 0)
    root = jnp.sqrt(b**2 + a * c)
    return jnp.where(b > 0, c / jnp.maximum(b + root, jnp.finfo(d.dtype).tiny), (root - b) / jnp.where(a > 0, a, 1.0))
