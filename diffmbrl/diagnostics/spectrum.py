r"""Eigenvalues of the Hessian, Gauss-Newton and Fisher matrices of a policy, from their products.

`of` says which: `curvature.gauss_newton` (the default), `curvature.hessian`, `curvature.fisher`, or any function of (policy,
task, s0, key) whose result has a `product` and a `gradient`. Up to `DENSE` parameters the matrix is formed and everything is
exact; beyond, by Lanczos with full re-orthogonalisation. All in float64, whatever the precision of the run. Of a matrix that is
not finite everything is NaN.

Reference: Golub and Van Loan, chapter 10 (Lanczos); Golub and Meurant 2010 (quadrature); Ubaru, Chen and Saad 2017, and
Ghorbani, Krishnan and Xiao 2019 (spectral density by stochastic Lanczos quadrature).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.krylov import lanczos

DENSE = 1500  # parameters up to which the whole matrix is formed
RANK = 100  # Lanczos steps beyond that
COLUMNS = 64  # of a matrix, formed at a time
SINGULAR = 1e-16  # the smallest share of the largest eigenvalue that float64 tells from 0


class Extremes(NamedTuple):
    """The ends of a spectrum."""

    largest: float
    smallest: float  # algebraically: negative for an indefinite matrix
    errors: tuple[float, float]  # |N v - lambda v| of both: an eigenvalue lies within; 0 where the matrix was formed
    condition: float  # largest over smallest modulus, at most 1e16


class Density(NamedTuple):
    """A spectral density as weighted points, one row a probe; each row's weights sum to 1."""

    nodes: Float[np.ndarray, "probes k"]
    weights: Float[np.ndarray, "probes k"]


def eigenvalues(
    policy: Any, task: Task, s0: State, key: PRNGKeyArray | None = None, *, of: Callable = gauss_newton
) -> Float[np.ndarray, " k"]:
    """Eigenvalues, decreasing: all of them up to 1500 parameters, else the Ritz values of 100 Lanczos steps from the gradient.

    Ritz values from the gradient are of the directions that a step can use; the outer ones are eigenvalues.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> eigenvalues(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (3,)
    """
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        if _size(policy) <= DENSE:
            return _of_matrix(of, policy, task, s0, key)[::-1]
        return np.asarray(_ritz(of, policy, task, s0, key, RANK))[::-1]


def extremes(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    of: Callable = gauss_newton,
    rank: int = RANK,
    seed: int = 0,
) -> Extremes:
    """Largest and smallest eigenvalue, and the condition number; beyond 1500 parameters by `rank` Lanczos steps.

    Lanczos starts from a random vector, since the gradient may have no part in an extreme direction. It comes upon the ends
    from within: of a semidefinite matrix the condition number is then a lower bound. Of an indefinite one it is NaN, unknown:
    Ritz values near zero say nothing. Two more products tell the errors.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> from diffmbrl.second_order.curvature import hessian
    >>> task = tasks.lqr(horizon=10)
    >>> found = extremes(Linear.zeros(task), task, task.starts(jax.random.key(0), 4), of=hessian)
    >>> found.largest > found.smallest > 0
    True
    """
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        if _size(policy) <= DENSE:
            values = _of_matrix(of, policy, task, s0, key)
            return Extremes(float(values[-1]), float(values[0]), (0.0, 0.0), _condition(values))
        ritz, kept, errors = _ends(of, policy, task, s0, key, jax.random.key(seed), rank)
    values = np.sort(np.asarray(ritz)[np.asarray(kept)])
    largest, smallest = float(values[-1]), float(values[0])
    condition = float("nan") if smallest < -1e-12 * largest else _condition(values)
    return Extremes(largest, smallest, (float(errors[0]), float(errors[1])), condition)


def density(
    policy: Any,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    of: Callable = gauss_newton,
    probes: int = 8,
    rank: int = RANK,
    seed: int = 0,
) -> Density:
    r"""The density of eigenvalues, $\frac1P \sum_i \delta(\lambda - \lambda_i)$, by stochastic Lanczos quadrature.

    From random signs v, `rank` Lanczos steps give nodes (Ritz values) and weights (the squared parts of v) with which
    $\sum_j w_j \rho_j^p = v^\top N^p v / P$ for all powers $p < 2\,\mathrm{rank}$, whose mean over v is $\mathrm{tr}\,N^p / P$.
    Cost: `probes` times `rank` products, and memory for `rank` vectors. Raises: `ValueError` if one of them is below 1.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> found = density(Linear.zeros(task), task, task.starts(jax.random.key(0), 4), probes=2)
    >>> found.nodes.shape, found.weights.sum(1).round(6).tolist()
    ((2, 3), [1.0, 1.0])
    """
    if min(probes, rank) < 1:
        raise ValueError(f"probes and rank must be at least 1, got {probes} and {rank}")
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        return Density(
            *(np.asarray(x) for x in _quadrature(of, policy, task, s0, key, jax.random.key(seed), probes, rank))
        )


def smoothed(found: Density, at: Float[np.ndarray, " x"], width: float) -> Float[np.ndarray, " x"]:
    """A density's value at points, each node spread by a normal distribution of standard deviation `width`.

    Raises: `ValueError` if the width is not positive.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width!r}")
    z = (np.asarray(at, float)[:, None, None] - found.nodes) / width
    return np.sum(found.weights * np.exp(-(z**2) / 2), axis=(1, 2)) / (len(found.nodes) * width * np.sqrt(2 * np.pi))


def in_double(tree: Any) -> Any:
    """Every float leaf in float64; call it where x64 is enabled."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _size(policy: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def _condition(values: np.ndarray) -> float:
    size = np.abs(values)
    return float(size.max() / max(size.min(), SINGULAR * size.max())) if size.max() > 0 else float("nan")


@partial(jax.jit, static_argnums=0)
def _formed(of: Callable, policy: Any, task: Task, s0: State, key: Any) -> Array:
    model = of(policy, task, s0, key)
    if of is gauss_newton:
        return dense(model, policy, task, key)
    columns = jnp.eye(model.gradient.size, dtype=model.gradient.dtype)
    N = jax.lax.map(model.product, columns, batch_size=COLUMNS)
    return (N + N.T) / 2


def _of_matrix(of: Callable, policy: Any, task: Task, s0: State, key: Any) -> np.ndarray:
    """Increasing; NaN for a matrix that is not finite."""
    N = np.asarray(_formed(of, policy, task, s0, key))
    return np.linalg.eigvalsh(N) if np.isfinite(N).all() else np.full(len(N), np.nan)


@partial(jax.jit, static_argnums=(0, 5))
def _ritz(of: Callable, policy: Any, task: Task, s0: State, key: Any, rank: int) -> Array:
    model = of(policy, task, s0, key)
    return lanczos(model.product, model.gradient, rank).ritz


@partial(jax.jit, static_argnums=(0, 6))
def _ends(of: Callable, policy: Any, task: Task, s0: State, key: Any, probe: Array, rank: int):
    """Ritz values, which of them are of vectors at all, and the residuals of the largest and the smallest."""
    model = of(policy, task, s0, key)
    v = jax.random.normal(probe, model.gradient.shape, model.gradient.dtype)
    space = lanczos(model.product, v, rank)
    # A space that closed early leaves zero vectors, with Ritz values of zero.
    kept = jnp.linalg.norm(space.vectors, axis=1) > 0.5

    def residual(i):
        v = space.vectors[i]
        return jnp.linalg.norm(model.product(v) - space.ritz[i] * v)

    largest = jnp.argmax(jnp.where(kept, space.ritz, -jnp.inf))
    smallest = jnp.argmin(jnp.where(kept, space.ritz, jnp.inf))
    return space.ritz, kept, (residual(largest), residual(smallest))


@partial(jax.jit, static_argnums=(0, 6, 7))
def _quadrature(of: Callable, policy: Any, task: Task, s0: State, key: Any, probe: Array, probes: int, rank: int):
    model = of(policy, task, s0, key)
    signs = jax.random.rademacher(probe, (probes, model.gradient.size), model.gradient.dtype)

    def one(v):
        space = lanczos(model.product, v, rank)
        return space.ritz, jnp.square(space.coefficients) / v.size

    return jax.lax.map(one, signs)
