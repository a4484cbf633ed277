r"""Krylov spaces of a symmetric operator given by its products.

One basis serves every damping: for $V N V^\top = U \mathrm{diag}(\rho) U^\top$ (tridiagonal), the minimiser over the space of
$g^\top d + \tfrac12 d^\top (N + \lambda I) d$ is $d = -V^\top U (\rho + \lambda)^{-1} U^\top e_1 |g|$. In exact arithmetic
this is the result of k iterations of conjugate gradients for that damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Spectral(NamedTuple):
    r"""A symmetric operator and a vector g in a basis of eigenvectors or Ritz vectors, in which every damping is cheap.

    Args:
        vectors: Orthonormal rows; in the metric of a preconditioner, if there is one.
        ritz: Eigenvalues or Ritz values.
        values: The same as steps use them, none negative for a step downhill.
        coefficients: g in the basis.
        products: Number of operator products spent.
    """

    vectors: Float[Array, "k P"]
    ritz: Float[Array, " k"]
    values: Float[Array, " k"]
    coefficients: Float[Array, " k"]
    products: Int[Array, ""]

    def step(self, damping: Float[Array, ""]) -> tuple[Float[Array, " P"], Float[Array, ""]]:
        r"""Step $d = -(N + \lambda I)^{-1} g$ in the subspace.

        Args:
            damping: lambda.

        Returns:
            The step, and the decrease $-(g^\top d + \tfrac12 d^\top N d)$ that it predicts.
        """
        y = -self.coefficients / (self.values + damping)
        predicted = -(self.coefficients @ y + 0.5 * y @ (self.values * y))
        return y @ self.vectors, predicted


def lanczos(product: Callable[[Float[Array, " P"]], Float[Array, " P"]], g: Float[Array, " P"], rank: int) -> Spectral:
    r"""Build the Krylov space of an operator from g, by Lanczos with two full re-orthogonalisations.

    If the space closes early, or g = 0, the remaining basis vectors are zero and carry no weight.

    Args:
        product: Product of the symmetric operator with a vector.
        g: First vector, not normalised.
        rank: Dimension of the space, at most P.

    Returns:
        Ritz vectors and Ritz values.

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
        # Below the rounding of the operator's own size w is noise: the space is invariant.
        closed = length <= 10 * jnp.finfo(g.dtype).eps * top
        v = jnp.where(closed, 0.0, w / jnp.where(closed, 1.0, length))
        return V, alpha, beta.at[i].set(jnp.where(closed, 0.0, length)), v, top

    zeros = jnp.zeros(rank, g.dtype)
    start = (jnp.zeros((rank, g.shape[0]), g.dtype), zeros, zeros, g / jnp.maximum(norm, tiny), jnp.zeros((), g.dtype))
    V, alpha, beta, _, _ = jax.lax.fori_loop(0, rank, step, start)
    ritz, U = jnp.linalg.eigh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))
    return Spectral(dot(U.T, V), ritz, ritz, norm * U[0], jnp.asarray(rank, jnp.int32))


def eigen(N: Float[Array, "P P"], g: Float[Array, " P"]) -> Spectral:
    r"""Decompose a symmetric matrix into all its eigenvectors.

    Args:
        N: Matrix; its symmetric part is decomposed.
        g: Vector to express in the eigenvectors.

    Returns:
        Eigenvectors, eigenvalues, and g in them.

    Cost: 9 P^3 flops.

    >>> import jax.numpy as jnp
    >>> space = eigen(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.ones(2))
    >>> [round(float(x), 4) for x in space.values]
    [1.0, 3.0]
    """
    values, vectors = jnp.linalg.eigh((N + N.T) / 2)
    coefficients = jnp.matmul(vectors.T, g, precision="highest")
    return Spectral(vectors.T, values, values, coefficients, jnp.asarray(g.shape[0], jnp.int32))


class TruncatedCG(NamedTuple):
    """Result of truncated conjugate gradients.

    Args:
        step: Step d.
        predicted: Decrease of the model, -(g'd + d'Nd / 2).
        products: Number of operator products spent, one for each iteration.
        residual: |N d + g| / |g|.
        negative: Whether a direction had no positive curvature.
        boundary: Whether the step ends on the boundary of the trust region.
        length: Length of the step in the norm of the trust region.
    """

    step: Float[Array, " P"]
    predicted: Float[Array, ""]
    products: Int[Array, ""]
    residual: Float[Array, ""]
    negative: Bool[Array, ""]
    boundary: Bool[Array, ""]
    length: Float[Array, ""]


def conjugate_gradients(
    product: Callable[[Float[Array, " P"]], Float[Array, " P"]],
    g: Float[Array, " P"],
    *,
    radius: Float[Array, ""] | float = jnp.inf,
    tolerance: Float[Array, ""] | float = 1e-5,
    iterations: int = 100,
    preconditioner: Callable[[Float[Array, " P"]], Float[Array, " P"]] | None = None,
) -> TruncatedCG:
    r"""Minimise $g^\top d + \tfrac12 d^\top N d$ over $|d|_P \le$ `radius`, by Steihaug's truncated conjugate gradients.

    A direction without positive curvature is followed to the boundary, or not at all if the radius is infinite. Under `vmap`
    members that have ended wait unchanged for the others.

    Args:
        product: Product of the symmetric operator with a vector. One that is not finite ends the iterations at the last finite
            step, with a residual of NaN.
        g: Gradient at d = 0.
        radius: Radius of the trust region.
        tolerance: Residual, relative to |g|, at which the iterations end.
        iterations: Largest number of iterations.
        preconditioner: $v \mapsto P^{-1} v$ of a positive definite P, in whose norm $|d|_P = \sqrt{d^\top P d}$ the radius
            then is; P itself is not needed. None is the identity.

    Returns:
        The step, and why the iterations ended.

    Cost: One product for each iteration.

    Reference: Steihaug 1983; Nocedal and Wright, Numerical Optimization, algorithms 7.2 and 5.3 (preconditioned).

    >>> import jax.numpy as jnp
    >>> found = conjugate_gradients(lambda v: jnp.array([1.0, 2.0]) * v, jnp.array([1.0, 1.0]))
    >>> [round(float(x), 4) for x in found.step], int(found.products)
    ([-1.0, -0.5], 2)
    """
    radius, tolerance = (jnp.asarray(x, g.dtype) for x in (radius, tolerance))
    inverse = (lambda v: v) if preconditioner is None else preconditioner
    norm = jnp.linalg.norm(g)
    no = jnp.zeros((), bool)

    def going(state):
        i, *_, ended = state
        return (i < iterations) & ~ended

    # Computed once, not in `going`: there it might round to the other side, and under `vmap` a waiting member would then keep
    # the loop running forever.
    def solved(r):
        return ~(jnp.linalg.norm(r) > tolerance * norm)

    def step(state):
        i, d, Nd, Pd, p, Pp, r, squared, *_ = state
        Np = product(p)
        finite = jnp.all(jnp.isfinite(Np))
        curvature = p @ Np
        negative = finite & (curvature <= 0)
        alpha = squared / jnp.where(curvature > 0, curvature, 1.0)
        crossing = finite & (negative | (_norm(d + alpha * p, Pd + alpha * Pp) >= radius))
        reach = jnp.where(jnp.isfinite(radius), _to_boundary(p @ Pp, d @ Pp, radius**2 - d @ Pd), 0.0)
        length = jnp.where(crossing, reach, jnp.where(finite, alpha, 0.0)).astype(g.dtype)
        along = jnp.where(finite, Np, jnp.zeros_like(Np))
        d, Nd, Pd = d + length * p, Nd + length * along, Pd + length * Pp
        # The residual of an operator that is not finite is NaN: reported, not hidden.
        new = r + length * along + jnp.where(finite, 0.0, jnp.nan).astype(g.dtype)
        z = inverse(new)
        shorter = new @ z
        beta = shorter / jnp.where(squared > 0, squared, 1.0)
        p, Pp = -z + beta * p, -new + beta * Pp  # P p without P: from P z = r
        ended = crossing | ~finite | solved(new)
        return i + 1, d, Nd, Pd, p, Pp, new, shorter, negative, crossing & jnp.isfinite(radius), ended

    zero, z = jnp.zeros_like(g), inverse(g)
    start = (jnp.zeros((), jnp.int32), zero, zero, zero, -z, -g, g, g @ z, no, no, solved(g))
    i, d, Nd, Pd, _, _, r, _, negative, boundary, _ = jax.lax.while_loop(going, step, start)
    residual = jnp.linalg.norm(r) / jnp.where(norm > 0, norm, 1.0)
    return TruncatedCG(d, -(g @ d + 0.5 * d @ Nd), i, residual, negative, boundary, _norm(d, Pd))


def _norm(d: Float[Array, " P"], Pd: Float[Array, " P"]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.maximum(d @ Pd, 0))


def _to_boundary(a: Float[Array, ""], b: Float[Array, ""], c: Float[Array, ""]) -> Float[Array, ""]:
    """The positive root of a tau^2 + 2 b tau = c, without cancellation: |d + tau p| reaches a radius."""
    c = jnp.maximum(c, 0)
    root = jnp.sqrt(b**2 + a * c)
    return jnp.where(b > 0, c / jnp.maximum(b + root, jnp.finfo(c.dtype).tiny), (root - b) / jnp.where(a > 0, a, 1.0))
