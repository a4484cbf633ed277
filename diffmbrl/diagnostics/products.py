r"""Long products of matrices, $\Phi_t = A_{t-1} \cdots A_1 A_0$, without forming them.

A product of hundreds of Jacobians overflows, and long before that its small singular values are lost in the rounding of its
large ones. Here it is factored as

$$\Phi_t = Q_t\,\mathrm{diag}(e^{l_t})\,R_t\,Q_0^\top$$

with Q orthogonal, R upper triangular with rows of length 1, and logarithms l: one QR factorisation a step,
$A_t Q_t = Q_{t+1} r_t$, and a product of triangular factors row by row. From these factors follow:
* `growth`, $\log |\mathrm{diag}\, r_t|$: its sums over time, divided by time, tend to Lyapunov exponents (`lyapunov.py`). They
  are not singular values: from those of the product their sums differ by an offset that does not shrink with time;
* `log_singular_values`: the true ones, by one-sided Jacobi rotations on rows whose scales stay logarithms;
* `log_spectral_radius` of every $\Phi_t$, and `log_eigenvalues` of the last: by LAPACK on the factors without their scale.

Accuracy: the results are exact for factors $A_t + E_t$ with $|E_t|$ a few roundings of $|A_t|$. If the directions that grow
most stay the same, log singular values have an error of 1e-13 times T in float64, however far apart they are. If they change
on the way (one direction grows while another shrinks, and then the reverse), the product itself depends on the last digit of
its factors, and so does the result of any method.

Reference: Bojanczyk, Ewerbring, Luk, Van Dooren 1991 (the product SVD); Stewart 1997 (graded products); Demmel and Veselic 1992
(Jacobi's relative accuracy); Golub and Van Loan, section 7.7 (products' eigenvalues).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SWEEPS = 30  # of Jacobi rotations at most; five to eight are usual
PASSES = 30  # over the factors for eigenvalues; a ratio of neighbouring moduli of .3 is then resolved


class Products(NamedTuple):
    r"""Factors of matrix products: $\Phi_t = Q_t\,\mathrm{diag}(e^{l_t})\,R_t\,Q_0^\top$ for t = 1 to T.

    Args:
        Q: Orthogonal, shape [T, n, n].
        logs: Logarithms l_t of the scales, shape [T, n].
        R: Upper triangular with rows of length 1, shape [T, n, n].
        growth: log |diag r_t| of each step, shape [T, n].
        frame: The first frame Q_0, shape [n, n].
    """

    Q: Float[Array, "T n n"]
    logs: Float[Array, "T n"]
    R: Float[Array, "T n n"]
    growth: Float[Array, "T n"]
    frame: Float[Array, "n n"]


def products(A: Float[Array, "T n n"], frame: Float[Array, "n n"] | None = None) -> Products:
    """Factor all products A_t-1 ... A_1 A_0 without forming them.

    Args:
        A: The matrices A_0 to A_{T-1}, shape [T, n, n]. From one that is not finite on, all results are NaN; a singular one
            makes logarithms of -inf.
        frame: Orthonormal columns Q_0, shape [n, n]. By default a fixed frame in general position, since a column of the
            identity could stay in an invariant subspace.

    Returns:
        The factors of the products for t = 1 to T.

    Cost: one QR factorisation and three products of n x n matrices for each step.

    >>> import jax.numpy as jnp
    >>> found = products(jnp.tile(jnp.diag(jnp.array([10.0, 0.1])), (100, 1, 1)))
    >>> [round(float(x)) for x in log_singular_values(found)[-1] / jnp.log(10.0)]
    [100, -100]
    """
    n = A.shape[-1]
    Q_0 = general_frame(n, A.dtype) if frame is None else frame

    def step(carry, A):
        Q, logs, R = carry
        Q, r = jnp.linalg.qr(_matmul(A, Q))
        r = jnp.triu(r)
        logs, R = _times(r, logs, R)
        return (Q, logs, R), (Q, logs, R, jnp.log(jnp.abs(jnp.diagonal(r))))

    start = (Q_0, jnp.zeros(n, A.dtype), jnp.eye(n, dtype=A.dtype))
    _, (Q, logs, R, growth) = jax.lax.scan(step, start, A)
    return Products(Q, logs, R, growth, Q_0)


def general_frame(n: int, dtype: jnp.dtype) -> Float[Array, "n n"]:
    """A fixed orthogonal matrix in general position."""
    return jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n), dtype))[0]


def log_singular_values(found: Products) -> Float[Array, "T n"]:
    r"""Logarithms of the singular values of the products, $\log \sigma_i(\Phi_t)$, by one-sided Jacobi rotations.

    Rows $e^{l_i} R_i$ are rotated in pairs until they are orthogonal; their lengths are then the singular values. A rotation
    depends only on $e^{l_j - l_i}$, whose underflow is harmless, and no number is as large as $\Phi$.

    Args:
        found: The factors of `products`.

    Returns:
        The logarithms, decreasing, shape [T, n].

    Cost: five to eight sweeps of n^2 / 2 rotations of rows, for all t at once.
    """
    if found.logs.shape[-1] == 1:  # There is no pair to rotate.
        return found.logs
    return jax.vmap(_jacobi)(found.logs, found.R)


def log_spectral_radius(found: Products) -> np.ndarray:
    r"""Logarithms of the spectral radii of the products, $\log \max_i |\lambda_i(\Phi_t)|$, computed on the host.

    LAPACK is applied to $Q_0^\top Q_t\,\mathrm{diag}(e^{l_t - \max l_t})\,R_t$, which is similar to $\Phi_t$ up to scale. A
    radius below 1e-14 times the largest singular value is rounding.

    Args:
        found: The factors of `products`, with or without a batch axis.

    Returns:
        The logarithms, shape [*batch, T]; NaN where the product is not finite.
    """
    Q, logs, R, _, Q_0 = (np.asarray(x) for x in found)
    top = np.max(logs, axis=-1)
    scale = np.where(np.isfinite(top), top, 0.0)
    M = np.swapaxes(Q_0, -1, -2)[..., None, :, :] @ Q @ (np.exp(logs - scale[..., None])[..., None] * R)
    fine = np.all(np.isfinite(M), axis=(-1, -2), keepdims=True)
    radius = np.abs(np.linalg.eigvals(np.where(fine, M, 0.0))).max(axis=-1)
    with np.errstate(divide="ignore"):
        return np.where(fine[..., 0, 0], np.log(radius) + scale, np.nan)


def log_eigenvalues(A: Float[Array, "T n n"]) -> tuple[np.ndarray, np.ndarray]:
    r"""Eigenvalues of the whole product $\Phi_T$ as $\log |\lambda_i|$ and $\arg \lambda_i$, computed on the host.

    Orthogonal iteration on $\Phi_T$, with repeated passes over the factors, leads to its real Schur form, whose diagonal blocks
    hold eigenvalues of similar modulus. Each block is scaled on its own, so all are found, however far apart.

    Args:
        A: The matrices A_0 to A_{T-1}, shape [T, n, n].

    Returns:
        The logarithms of the moduli, decreasing, and the angles in radians, shape [n] each.

    Raises:
        ValueError: If the product is not finite.

    Cost: `PASSES` times that of `products`.

    >>> import jax.numpy as jnp
    >>> modulus, angle = log_eigenvalues(jnp.tile(jnp.array([[0.0, -2.0], [2.0, 0.0]]), (501, 1, 1)))
    >>> (modulus / 501 / jnp.log(2.0)).round(3).tolist(), (abs(angle) / jnp.pi).round(3).tolist()
    ([1.0, 1.0], [0.5, 0.5])
    """
    found = _schur(A)
    Q, logs, R, _, Q_0 = (np.asarray(x) for x in found)
    Q, logs, R = Q[-1], logs[-1], R[-1]
    if not np.isfinite(R).all() or np.isnan(logs).any():
        raise ValueError(
            "the product of the Jacobians is not finite, since a factor is not; diffmbrl.solve.nonfinite.locate finds the first"
        )
    U = Q_0.T @ Q
    negligible = 1e3 * len(logs) * np.finfo(U.dtype).eps
    ends = [i for i in range(1, len(logs)) if np.abs(U[i:, :i]).max() < negligible]
    moduli, angles = [], []
    for a, b in zip([0, *ends], [*ends, len(logs)], strict=True):
        scale = logs[a:b].max() if np.isfinite(logs[a:b].max()) else 0.0
        values = np.linalg.eigvals(U[a:b, a:b] @ (np.exp(logs[a:b] - scale)[:, None] * R[a:b, a:b]))
        with np.errstate(divide="ignore"):
            moduli.append(np.log(np.abs(values)) + scale)
        angles.append(np.angle(values))
    moduli, angles = np.concatenate(moduli), np.concatenate(angles)
    order = np.argsort(-moduli, kind="stable")
    return moduli[order], angles[order]


@jax.jit
def _schur(A: Array) -> Products:
    def once(Q, A):
        return jnp.linalg.qr(_matmul(A, Q))[0], None

    n = A.shape[-1]
    frame = jax.lax.fori_loop(0, PASSES, lambda _, Q: jax.lax.scan(once, Q, A)[0], general_frame(n, A.dtype))
    return products(A, frame)


def _times(r: Array, logs: Array, R: Array) -> tuple[Array, Array]:
    """r diag(e^logs) R as logarithms and rows of length 1."""
    entries = logs + jnp.log(jnp.abs(r))
    top = jnp.max(entries, axis=1)
    scale = jnp.where(top == -jnp.inf, 0.0, top)
    rows = _matmul(jnp.sign(r) * jnp.exp(entries - scale[:, None]), R)
    length = jnp.linalg.norm(rows, axis=1)
    return scale + jnp.log(length), rows / jnp.where(length == 0, 1.0, length)[:, None]


def _jacobi(logs: Float[Array, " n"], R: Float[Array, "n n"]) -> Float[Array, " n"]:
    n = logs.shape[0]
    rows, columns = (jnp.asarray(x) for x in np.triu_indices(n, 1))
    tolerance = n * jnp.finfo(logs.dtype).eps

    def rotate(k, state):
        logs, R, worst = state
        i, j = rows[k], columns[k]
        i, j = jnp.where(logs[i] >= logs[j], i, j), jnp.where(logs[i] >= logs[j], j, i)
        x, y = R[i], R[j]
        cosine = jnp.vdot(x, y, precision="highest")
        ratio = jnp.where(logs[j] == -jnp.inf, 0.0, jnp.exp(logs[j] - logs[i]))
        # The tangent of the rotation is ratio * tau; only tau and ratio^2 tau multiply rows of length 1.
        gap = (1 - ratio) * (1 + ratio)
        below = gap + jnp.sqrt(gap**2 + 4 * (ratio * cosine) ** 2)
        tau = jnp.where(cosine == 0, 0.0, 2 * cosine / jnp.where(cosine == 0, 1.0, below))
        c = 1 / jnp.sqrt(1 + (ratio * tau) ** 2)
        x, y = c * (x + ratio**2 * tau * y), c * (y - tau * x)
        pair = jnp.stack([x, y])
        length = jnp.linalg.norm(pair, axis=1)
        both = jnp.stack([i, j])
        logs = logs.at[both].add(jnp.log(length))
        R = R.at[both].set(pair / jnp.where(length == 0, 1.0, length)[:, None])
        return logs, R, jnp.maximum(worst, jnp.abs(cosine))

    def sweep(state):
        logs, R, _, count = state
        logs, R, worst = jax.lax.fori_loop(0, len(rows), rotate, (logs, R, jnp.zeros((), logs.dtype)))
        return logs, R, worst, count + 1

    start = (logs, R, jnp.ones((), logs.dtype), jnp.zeros((), jnp.int32))
    logs = jax.lax.while_loop(lambda s: (s[2] > tolerance) & (s[3] < SWEEPS), sweep, start)[0]
    return -jnp.sort(-logs)


def _matmul(X: Array, Y: Array) -> Array:
    return jnp.matmul(X, Y, precision="highest")
