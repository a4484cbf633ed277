"""The spectrum is the matrix's: dense, by Lanczos and as a density."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import Gaussian, Neural, OpenLoop, tasks
from diffmbrl.diagnostics import (
    curvature_eigenvalues,
    extreme_eigenvalues,
    in_double,
    smooth_density,
    spectral_density,
    spectrum,
)
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import fisher, gauss_newton, hessian
from diffmbrl.second_order.dense import dense
from tests.problems import bent, changed, some_slow

KEY = jax.random.key(0)
TASK = bent()
POLICY = Gaussian.around(Neural.init(TASK, hidden=[4], key=KEY), TASK, std=0.3)
S0 = TASK.starts(KEY, 3)
MATRICES = [gauss_newton, hessian, fisher]


@cache
def formed(of: Callable) -> np.ndarray:
    """The whole matrix in float64, by other means where there are any: jax.hessian of -J, the sum G'MG."""
    with jax.enable_x64(True):
        policy, task, s0 = in_double((POLICY, TASK, S0))
        theta, unravel = ravel_pytree(policy)
        if of is hessian:
            return np.asarray(jax.jit(jax.hessian(lambda x: -mean_return(unravel(x), task, s0)))(theta))
        if of is gauss_newton:
            return np.asarray(jax.jit(lambda: dense(gauss_newton(policy, task, s0), policy, task))())
        return np.asarray(jax.jit(lambda: jax.vmap(of(policy, task, s0).product)(jnp.eye(theta.size)))())


@pytest.mark.parametrize("of", some_slow(MATRICES, *MATRICES[1:]))
def test_eigenvalues_are_the_matrixs_in_float64_whatever_the_run_is_in(of: Callable) -> None:
    values, wanted = curvature_eigenvalues(POLICY, TASK, S0, of=of), np.linalg.eigvalsh(formed(of))[::-1]
    assert values.dtype == np.float64 and values.shape == wanted.shape
    np.testing.assert_allclose(values, wanted, rtol=1e-9, atol=1e-12 * wanted[0])
    assert np.all(np.diff(values) <= 0)
    found = extreme_eigenvalues(POLICY, TASK, S0, of=of)
    assert (found.largest, found.smallest, found.errors) == (values[0], values[-1], (0.0, 0.0))
    size = np.abs(values)
    assert found.condition == pytest.approx(size.max() / max(size.min(), 1e-16 * size.max()))


def test_small_eigenvalues_are_told_from_rounding_as_float32_would_not() -> None:
    values = curvature_eigenvalues(POLICY, TASK, S0)
    assert 0 < values[6] < 1e-4 * values[0]


@pytest.mark.parametrize("of", some_slow(MATRICES, *MATRICES[1:]))
def test_beyond_a_size_lanczos_finds_the_ends_and_says_how_well(of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = np.linalg.eigvalsh(formed(of))
    monkeypatch.setattr(spectrum, "DENSE", 1)
    found = extreme_eigenvalues(POLICY, TASK, S0, of=of, rank=16)
    # An eigenvalue lies within the residual of each Ritz value, and the ends are met from within.
    for value, error, end in [
        (found.largest, found.errors[0], wanted[-1]),
        (found.smallest, found.errors[1], wanted[0]),
    ]:
        assert np.abs(wanted - value).min() <= error + 1e-12 * wanted[-1]
        assert abs(value - end) <= 1e-3 * wanted[-1]
    assert np.isnan(found.condition) == (of is hessian)
    if of is not hessian:
        assert 1e3 < found.condition <= 1.001e16
    ritz = curvature_eigenvalues(POLICY, TASK, S0, of=of)
    np.testing.assert_allclose(ritz[0], wanted[-1], rtol=1e-3)


def test_ritz_values_are_as_many_as_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "DENSE", 1)
    monkeypatch.setattr(spectrum, "RANK", 4)
    ritz = curvature_eigenvalues(POLICY, TASK, S0)
    assert ritz.shape == (4,) and ritz[0] == pytest.approx(np.linalg.eigvalsh(formed(gauss_newton))[-1], rel=1e-2)


@pytest.mark.slow
def test_a_space_that_closes_early_leaves_no_ritz_value_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's M on LQR is positive definite; of a space of more dimensions than it has distinct eigenvalues, zeros remain."""
    task = tasks.lqr(horizon=6)
    plan, s0 = OpenLoop.zeros(task), task.starts(KEY, 1)
    wanted = curvature_eigenvalues(plan, task, s0)
    monkeypatch.setattr(spectrum, "DENSE", 1)
    found = extreme_eigenvalues(plan, task, s0)
    np.testing.assert_allclose([found.largest, found.smallest], wanted[[0, -1]], rtol=1e-9)
    assert found.condition == pytest.approx(wanted[0] / wanted[-1], rel=1e-6)


@pytest.mark.parametrize("of", MATRICES)
def test_quadrature_is_exact_for_powers_below_twice_its_rank(of: Callable) -> None:
    N = formed(of)
    found = spectral_density(POLICY, TASK, S0, of=of, probes=3, rank=4, seed=7)
    assert found.nodes.shape == found.weights.shape == (3, 4)
    with jax.enable_x64(True):
        signs = np.asarray(jax.random.rademacher(jax.random.key(7), (3, len(N)), float))
    power = signs
    for p in range(8):
        exact = np.sum(signs * power, axis=1) / len(N)
        np.testing.assert_allclose(
            np.sum(found.weights * found.nodes**p, axis=1), exact, rtol=1e-8, atol=1e-8 * np.abs(N).max() ** p
        )
        power = power @ N


def test_a_smoothed_density_integrates_to_one_and_peaks_at_its_nodes() -> None:
    found = spectrum.SpectralDensity(np.array([[0.0, 2.0], [0.0, 1.0]]), np.array([[0.75, 0.25], [0.5, 0.5]]))
    x = np.linspace(-2, 4, 6001)
    y = smooth_density(found, x, width=0.1)
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-6)
    wanted = [mass / (0.1 * np.sqrt(2 * np.pi)) for mass in (0.625, 0.25, 0.125)]
    np.testing.assert_allclose(y[[2000, 3000, 4000]], wanted, rtol=1e-6)


def test_what_is_not_finite_is_nan_and_bad_input_is_named() -> None:
    task = changed(bent(), kink=100.0)
    policy, s0 = Neural.init(task, hidden=[3], key=KEY), task.starts(KEY, 2)
    assert np.isnan(curvature_eigenvalues(policy, task, s0, of=hessian)).all()
    assert np.isnan(extreme_eigenvalues(policy, task, s0, of=hessian).condition)
    with pytest.raises(ValueError, match="probes and rank must be at least 1, got 0 and 5"):
        spectral_density(POLICY, TASK, S0, probes=0, rank=5)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        smooth_density(spectrum.SpectralDensity(np.zeros((1, 1)), np.ones((1, 1))), np.zeros(1), 0.0)
    with pytest.raises(TypeError, match="needs a Gaussian policy"):
        curvature_eigenvalues(policy, task, s0, of=fisher)
