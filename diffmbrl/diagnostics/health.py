r"""Measurements of a policy's gradient on a task, horizon by horizon; `verdict.py` interprets them.

Every horizon is a `prefix` of one task, so one compiled program measures all of them. Measurements are made in float64; the
float32 ones start from the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, State, Stateful, Task
from diffmbrl.diagnostics.bias import BiasTest, bias_test
from diffmbrl.diagnostics.differences import difference_error
from diffmbrl.diagnostics.jacobians import contributions, jacobians
from diffmbrl.diagnostics.products import log_singular_values, products
from diffmbrl.diagnostics.sample_statistics import SampleStatistics, gradient_samples, sample_statistics
from diffmbrl.gradients import BPTT, LikelihoodRatio, Smoothed
from diffmbrl.gradients.likelihood_ratio import LeaveOneOut
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.krylov import lanczos
from diffmbrl.solve.nonfinite import locate
from diffmbrl.tasks.transforms.prefix import Seeing, prefix, prefix_start
from diffmbrl.tasks.transforms.refined import refined

LEAST = 64  # smallest number of starts
NOISY = 16  # starts of the smoothed estimators, each with a sixteenth of the samples
FEW = 32  # starts of measurements without statistics: differences, refinement, contributions, growth
CURVED = 8  # starts of the Gauss-Newton matrix
RANK = 30  # dimension of its Krylov space
ROUNDING = 1e-13  # Ritz values below this share of the largest are rounding
EARLY = 0.1  # the first steps, as a share of the horizon


Tree = TypeVar("Tree")


class Health(NamedTuple):
    """Measurements of a gradient at K horizons; those that could not be made are NaN.

    Args:
        horizons: The horizons in steps, shape [K].
        J: Mean return over the starts, without noise.
        norms: Norm of each sample's gradient, without noise, shape [K, N].
        plain: Statistics of these gradients, which differ in their starts alone.
        pathwise: Statistics of BPTT on the return smoothed by noise on the actions.
        score: Statistics of the likelihood ratio on the same return, with the same starts and noise.
        bias: Test of `pathwise` against `score`.
        difference: Relative error against central differences.
        refinement: Relative change of the gradient when the integrator's step is halved.
        float32: Relative error of the float32 gradient; infinite if it is not finite.
        overflow: Number of samples whose float32 gradient is not finite.
        condition: Largest over smallest Ritz value of the Gauss-Newton matrix, a lower bound of its condition number.
        curvature: The largest Ritz value.
        growth: Growth of perturbations in the closed loop per step: exp of the mean log of sigma_1(Phi)^(1/T).
        early: Share of the gradient's contributions that come from the first tenth of the steps.
        contributions: Norm of each step's part of dJ/dtheta, shape [K, T].
        std: Standard deviation of the noise on the actions, in half widths of their limits.
        where: Description of the first value that is not finite in float32; None if all are finite.
    """

    horizons: Int[np.ndarray, " K"]
    J: Float[np.ndarray, " K"]
    norms: Float[np.ndarray, "K N"]
    plain: SampleStatistics
    pathwise: SampleStatistics
    score: SampleStatistics
    bias: BiasTest
    difference: Float[np.ndarray, " K"]
    refinement: Float[np.ndarray, " K"]
    float32: Float[np.ndarray, " K"]
    overflow: Int[np.ndarray, " K"]
    condition: Float[np.ndarray, " K"]
    curvature: Float[np.ndarray, " K"]
    growth: Float[np.ndarray, " K"]
    early: Float[np.ndarray, " K"]
    contributions: Float[np.ndarray, "K T"]
    std: float
    where: str | None


def gradient_health(
    task: Task,
    policy: Policy | Stateful,
    horizons: Sequence[int],
    *,
    key: PRNGKeyArray,
    starts: int = 512,
    std: float = 0.1,
    progress: Callable[[int], None] = lambda count: None,
) -> Health:
    """Measure the health of a policy's gradient at several horizons: noise, bias, precision, growth, curvature.

    Args:
        task: The task, with a horizon of at least the longest one measured.
        policy: A policy of the state alone.
        horizons: The horizons in steps, increasing.
        key: Key of the starts, the noise and the random directions.
        starts: Number of start states, with one sample each; at least 64.
        std: Standard deviation of the smoothed estimators' noise, in half widths of the action limits (see `Smoothed`).
        progress: Function called with the number of horizons done after each.

    Returns:
        The measurements, which `verdict` interprets.

    Raises:
        ValueError: For horizons that are not increasing whole numbers from 1 to the task's own, fewer than 64 starts, a `std`
            that is not positive, and a plan or a policy with a memory.

    Cost: for each horizon, about ten gradients of `starts` rollouts over the longest; one compilation. Memory: three gradients
    for each start.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> health = gradient_health(task, Linear.zeros(task), [5, 20], key=jax.random.key(0), starts=64)
    >>> bool(np.all(health.float32 < 1e-3)), health.where
    (True, None)
    """
    check_health_arguments(task.horizon, horizons, starts, std)
    Seeing(policy)
    key_starts, key_noise, key_directions = jax.random.split(key, 3)
    s0 = task.starts(key_starts, starts)
    single = _in(jnp.float32, (policy, task, s0))
    with jax.enable_x64(True):
        double = _in(jnp.float64, single)
        finer = refined(double[1])
        growth = np.asarray(_growth(*double[:2], _first(double[2], FEW), jnp.asarray(horizons) - 1))
    rows, errors = [], []
    for count, T in enumerate(horizons, start=1):
        length = jnp.asarray(T, jnp.int32)
        with jax.enable_x64(False):
            g32 = np.asarray(_single(*single, length), np.float64)
        with jax.enable_x64(True):
            noise = jax.random.fold_in(key_noise, T)
            row, g64 = _double(*double, finer, length, jnp.float64(std), noise, key_directions)
            rows.append(jax.tree.map(np.asarray, row))
            errors.append(_error(g32, np.asarray(g64)))
        progress(count)
    row = jax.tree.map(lambda *x: np.stack(x), *rows)
    float32, overflow = (np.array(x) for x in zip(*errors, strict=True))
    where = None
    if overflow.any():
        with jax.enable_x64(False):
            where = locate(*single)
    return Health(
        horizons=np.asarray(horizons), float32=float32, overflow=overflow, growth=growth, std=std, where=where, **row
    )


def check_health_arguments(longest: int, horizons: Sequence[int], starts: int, std: float) -> None:
    """Raise `ValueError` for arguments of `gradient_health` that are out of range."""
    if len(horizons) == 0:
        raise ValueError("horizons needs at least one number of steps")
    for T in horizons:
        if not isinstance(T, int | np.integer) or T < 1:
            raise ValueError(f"a horizon must be a whole number of at least 1, got {T!r}")
    given = " ".join(map(str, horizons))
    if len(set(horizons)) != len(horizons):
        raise ValueError(f"each horizon can be named once, got {given}")
    if list(horizons) != sorted(horizons):
        raise ValueError(f"horizons must increase, got {given}")
    if horizons[-1] > longest:
        raise ValueError(
            f"the task ends after {longest} steps: make it with horizon={horizons[-1]} to measure longer horizons"
        )
    if starts < LEAST:
        raise ValueError(f"starts must be at least {LEAST}, one sample each, got {starts}")
    if not (np.isfinite(std) and std > 0):
        raise ValueError(f"std must be a finite positive number, got {std:g}")


@jax.jit
def _double(policy, task, s0, finer, length, std, key_noise, key_directions):
    """One horizon's measurements in float64, and the gradient of each start [N, P]."""
    pi, short = Seeing(policy), prefix(task, length)
    s0 = jax.vmap(lambda s: prefix_start(s, length))(s0)
    few, curved = _first(s0, FEW), _first(s0, CURVED)
    J, plain = gradient_samples(BPTT(), pi, short, s0, None)
    # With copies of a few starts, the other copies of a start are its leave-one-out baseline, the best one possible.
    copies = plain.shape[0] // NOISY
    repeated = jax.tree.map(lambda x: jnp.repeat(x[:NOISY], copies, axis=0), s0)
    score_function = LikelihoodRatio(baseline=LeaveOneOut())
    pathwise, score = (
        gradient_samples(Smoothed(inner, std=std), pi, short, repeated, key_noise, size=copies)[1]
        for inner in (BPTT(), score_function)
    )
    gradient = jnp.mean(plain[:FEW], axis=0)
    refinement = jnp.full((), jnp.nan)
    if finer is not None:
        other = ravel_pytree(BPTT()(pi, prefix(finer, length), few, None)[1])[0]
        refinement = jnp.linalg.norm(gradient - other) / jnp.linalg.norm(other)
    model = gauss_newton(pi, short, curved)
    ritz = lanczos(model.product, model.gradient, RANK).values
    top = jnp.max(ritz)
    parts = jnp.linalg.norm(contributions(pi, short, few), axis=1)[:-1]
    # The early steps are at least one.
    t = jnp.arange(parts.shape[0], dtype=length.dtype)
    early = t < jnp.maximum(1, (EARLY * length.astype(parts.dtype)).astype(t.dtype))
    row = {
        "J": jnp.mean(J),
        "norms": jnp.linalg.norm(plain, axis=1),
        "plain": sample_statistics(plain),
        "pathwise": sample_statistics(pathwise),
        "score": sample_statistics(score),
        "bias": bias_test(pathwise, score),
        "difference": difference_error(pi, short, few, gradient, key_directions),
        "refinement": refinement,
        "condition": top / jnp.min(jnp.where(ritz > ROUNDING * top, ritz, jnp.inf)),
        "curvature": top,
        "early": jnp.sum(jnp.where(early, parts, 0.0)) / jnp.sum(parts),
        "contributions": jnp.where(t < length, parts, jnp.nan),
    }
    return row, plain


@jax.jit
def _single(policy, task, s0, length):
    s0 = jax.vmap(lambda s: prefix_start(s, length))(s0)
    return gradient_samples(BPTT(), Seeing(policy), prefix(task, length), s0, None)[1]


@jax.jit
def _growth(policy, task, s0, last):
    def one(loop):
        found = products(loop)
        picked = found._replace(**{name: getattr(found, name)[last] for name in ("Q", "logs", "R", "growth")})
        return log_singular_values(picked)[:, 0]

    logs = jax.vmap(one)(jacobians(policy, task, s0).loop)
    return jnp.exp(jnp.mean(logs, axis=0) / (last + 1).astype(logs.dtype))


def _error(single: np.ndarray, double: np.ndarray) -> tuple[float, int]:
    """Relative error of the mean float32 gradient, and the number of samples that are not finite."""
    bad = int(np.sum(~np.isfinite(single).all(axis=1)))
    if bad:
        return float("inf"), bad
    true = double.mean(axis=0)
    error = np.linalg.norm(single.mean(axis=0) - true)
    return 0.0 if error == 0 else float(error / np.linalg.norm(true)) if true.any() else float("inf"), 0


def _in(dtype: DTypeLike, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _first(s0: State, count: int) -> State:
    return jax.tree.map(lambda x: x[:count], s0)
