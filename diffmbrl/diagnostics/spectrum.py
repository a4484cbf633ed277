r"""Eigenvalues of the Hessian, Gauss-Newton and Fisher matrices of a policy, from their products.

`of` selects the matrix: `curvature.gauss_newton` (the default), `curvature.hessian`, `curvature.fisher`, or any function of
(policy, task, s0, key) whose result has a `product` and a `gradient`. Up to `DENSE` parameters the matrix is formed and the
results are exact; beyond, they come from Lanczos with full re-orthogonalisation. All computations are in float64, whatever the
precision of the run. For a matrix that is not finite all results are NaN.

Reference: Golub and Van Loan, chapter 10 (Lanczos); Golub and Meurant 2010 (quadrature); Ubaru, Chen and Saad 2017, and
Ghorbani, Krishnan and Xiao 2019 (spectral density by stochastic Lanczos quadrature).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.krylov import lanczos

DENSE = 1500  # parameters up to which the whole matrix is formed
RANK = 100  # Lanczos steps beyond that
COLUMNS = 64  # columns of a matrix formed at a time
SINGULAR = 1e-16  # smallest share of the largest eigenvalue that float64 distinguishes from 0


Tree = TypeVar("Tree")


class ExtremeEigenvalues(NamedTuple):
    """The ends of a spectrum.

    Args:
        largest: The largest eigenvalue.
        smallest: The smallest eigenvalue, negative for an indefinite matrix.
        errors: Residuals |N v - lambda v| of both, within which an eigenvalue lies; 0 if the matrix was formed.
        condition: Largest over smallest modulus, at most 1e16.
    """

    largest: float
    smallest: float
    errors: tuple[float, float]
    condition: float


class SpectralDensity(NamedTuple):
    """A spectral density as weighted points.

    Args:
        nodes: Positions of the points, one row for each probe, shape [probes, k].
        weights: Their weights, which sum to 1 in each row.
    """

    nodes: Float[np.ndarray, "probes k"]
    weights: Float[np.ndarray, "probes k"]


def curvature_eigenvalues(
    policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None = None, *, of: Callable = gauss_newton
) -> Float[np.ndarray, " k"]:
    """Eigenvalues of a curvature matrix of the mean return.

    Beyond 1500 parameters they are the Ritz values of 100 Lanczos steps from the gradient, which describe the directions that a
    step can use; the outer ones are eigenvalues.

    Args:
        policy: The policy or plan, with P parameters.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the rollouts' noise; None for no noise.
        of: The matrix: `gauss_newton`, `hessian`, `fisher`, or a function like them.

    Returns:
        The eigenvalues, decreasing, shape [P] or [100].

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> curvature_eigenvalues(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (3,)
    """
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        if _size(policy) <= DENSE:
            return _of_matrix(of, policy, task, s0, key)[::-1]
        return np.asarray(_ritz(of, policy, task, s0, key, RANK))[::-1]


def extreme_eigenvalues(
    policy: Policy,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    of: Callable = gauss_newton,
    rank: int = RANK,
    seed: int = 0,
) -> ExtremeEigenvalues:
    """Largest and smallest eigenvalue and condition number of a curvature matrix of the mean return.

    Beyond 1500 parameters they come from Lanczos, which approaches both ends from within: the condition number of a
    semidefinite matrix is then a lower bound, and that of an indefinite one NaN, since Ritz values near zero are arbitrary.

    Args:
        policy: The policy or plan, with P parameters.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the rollouts' noise; None for no noise.
        of: The matrix: `gauss_newton`, `hessian`, `fisher`, or a function like them.
        rank: Number of Lanczos steps, from a random vector, since the gradient may have no part in an extreme direction.
        seed: Seed of that vector.

    Returns:
        The ends of the spectrum, with their errors.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> from diffmbrl.second_order.curvature import hessian
    >>> task = tasks.lqr(horizon=10)
    >>> found = extreme_eigenvalues(Linear.zeros(task), task, task.starts(jax.random.key(0), 4), of=hessian)
    >>> found.largest > found.smallest > 0
    True
    """
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        if _size(policy) <= DENSE:
            values = _of_matrix(of, policy, task, s0, key)
            return ExtremeEigenvalues(float(values[-1]), float(values[0]), (0.0, 0.0), _condition(values))
        ritz, kept, errors = _ends(of, policy, task, s0, key, jax.random.key(seed), rank)
    values = np.sort(np.asarray(ritz)[np.asarray(kept)])
    largest, smallest = float(values[-1]), float(values[0])
    condition = float("nan") if smallest < -1e-12 * largest else _condition(values)
    return ExtremeEigenvalues(largest, smallest, (float(errors[0]), float(errors[1])), condition)


def spectral_density(
    policy: Policy,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    of: Callable = gauss_newton,
    probes: int = 8,
    rank: int = RANK,
    seed: int = 0,
) -> SpectralDensity:
    r"""Density of the eigenvalues, $\frac1P \sum_i \delta(\lambda - \lambda_i)$, by stochastic Lanczos quadrature.

    From random signs v, Lanczos gives nodes $\rho_j$ (Ritz values) and weights $w_j$ (the squared parts of v) such that
    $\sum_j w_j \rho_j^p = v^\top N^p v / P$ for all powers $p < 2\,\mathrm{rank}$, whose mean over v is $\mathrm{tr}\,N^p / P$.

    Args:
        policy: The policy or plan, with P parameters.
        task: The task.
        s0: Start states, shape [B, ...].
        key: Key of the rollouts' noise; None for no noise.
        of: The matrix: `gauss_newton`, `hessian`, `fisher`, or a function like them.
        probes: Number of random vectors v.
        rank: Number of Lanczos steps from each.
        seed: Seed of the random vectors.

    Returns:
        The density as weighted points, one row for each probe.

    Raises:
        ValueError: If `probes` or `rank` is below 1.

    Cost: `probes` times `rank` products, and memory for `rank` vectors.

    >>> import jax
    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> found = spectral_density(Linear.zeros(task), task, task.starts(jax.random.key(0), 4), probes=2)
    >>> found.nodes.shape, found.weights.sum(1).round(6).tolist()
    ((2, 3), [1.0, 1.0])
    """
    if min(probes, rank) < 1:
        raise ValueError(f"probes and rank must be at least 1, got {probes} and {rank}")
    with jax.enable_x64(True):
        policy, task, s0 = in_double((policy, task, s0))
        return SpectralDensity(
            *(np.asarray(x) for x in _quadrature(of, policy, task, s0, key, jax.random.key(seed), probes, rank))
        )


def smooth_density(found: SpectralDensity, at: Float[np.ndarray, " x"], width: float) -> Float[np.ndarray, " x"]:
    """Values of a spectral density whose points are spread by a normal distribution.

    Args:
        found: The density.
        at: Positions at which it is evaluated, shape [x].
        width: Standard deviation of the normal distribution.

    Returns:
        The values, shape [x].

    Raises:
        ValueError: If the width is not positive.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width!r}")
    z = (np.asarray(at, float)[:, None, None] - found.nodes) / width
    return np.sum(found.weights * np.exp(-(z**2) / 2), axis=(1, 2)) / (len(found.nodes) * width * np.sqrt(2 * np.pi))


def in_double(tree: Tree) -> Tree:
    """Convert every float leaf of a pytree to float64; for use where x64 is enabled.

    Args:
        tree: Any pytree of arrays.

    Returns:
        The same pytree in float64.
    """
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _size(policy: Policy) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def _condition(values: np.ndarray) -> float:
    size = np.abs(values)
    return float(size.max() / max(size.min(), SINGULAR * size.max())) if size.max() > 0 else float("nan")


@partial(jax.jit, static_argnums=0)
def _formed(of: Callable, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> Array:
    model = of(policy, task, s0, key)
    if of is gauss_newton:
        return dense(model, policy, task, key)
    columns = jnp.eye(model.gradient.size, dtype=model.gradient.dtype)
    N = jax.lax.map(model.product, columns, batch_size=COLUMNS)
    return (N + N.T) / 2


def _of_matrix(of: Callable, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None) -> np.ndarray:
    """The eigenvalues, increasing; NaN for a matrix that is not finite."""
    N = np.asarray(_formed(of, policy, task, s0, key))
    return np.linalg.eigvalsh(N) if np.isfinite(N).all() else np.full(len(N), np.nan)


@partial(jax.jit, static_argnums=(0, 5))
def _ritz(of: Callable, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None, rank: int) -> Array:
    model = of(policy, task, s0, key)
    return lanczos(model.product, model.gradient, rank).ritz


@partial(jax.jit, static_argnums=(0, 6))
def _ends(of: Callable, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None, probe: Array, rank: int):
    """Ritz values, whether each has a vector, and the residuals of the largest and the smallest."""
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
def _quadrature(
    of: Callable, policy: Policy, task: Task, s0: State, key: PRNGKeyArray | None, probe: Array, probes: int, rank: int
) -> tuple[Array, Array]:
    model = of(policy, task, s0, key)
    signs = jax.random.rademacher(probe, (probes, model.gradient.size), model.gradient.dtype)

    def one(v):
        space = lanczos(model.product, v, rank)
        return space.ritz, jnp.square(space.coefficients) / v.size

    return jax.lax.map(one, signs)
