"""Exponents of linear systems are log-moduli, a pendulum's come in pairs; the crossover is where two curves cross."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, tasks
from diffmbrl.diagnostics import (
    closed_loop_exponents,
    crossover_horizon,
    jacobians,
    lyapunov_exponents,
    mean_exponents,
    products,
)
from diffmbrl.tasks.double_pendulum import DoublePendulum
from tests.problems import bent, same

KEY = jax.random.key(0)
measured = jax.jit(lyapunov_exponents)


def linear(seed: int, n: int) -> np.ndarray:
    """Moduli at least 3% apart, or equal as a pair's."""
    return np.random.default_rng(seed).normal(size=(n, n))


@pytest.mark.parametrize("seed, n", [(0, 2), (1, 3), (3, 4), (5, 5), (8, 6)])
@pytest.mark.parametrize("dt", [1.0, 0.05])
def test_exponents_of_a_linear_system_are_its_log_moduli(seed: int, n: int, dt: float, x64: None) -> None:
    A = linear(seed, n)
    found = measured(jnp.tile(A, (2000, 1, 1)), dt)
    wanted = np.sort(np.log(np.abs(np.linalg.eigvals(A))))[::-1] / dt
    np.testing.assert_allclose(found.values, wanted, atol=1e-6)
    # The error estimate covers what is left, and the plain average is far behind.
    assert (np.abs(found.values - wanted) <= 3 * found.error + 1e-9 / dt).all()
    assert found.running.shape == (2000, n)
    assert 1e-6 < np.abs(found.running[-1] - wanted).max() * dt < 1e-2


def test_running_averages_are_of_the_growth_up_to_each_step(x64: None) -> None:
    A = jnp.diag(jnp.array([2.0, 2.0])) * jnp.arange(1.0, 101.0)[:, None, None]
    running = measured(A, 0.5).running
    same(running[:, 0], np.cumsum(np.log(2 * np.arange(1, 101))) / (0.5 * np.arange(1, 101)))


def test_steps_after_the_end_do_not_count(x64: None) -> None:
    A = jax.random.normal(KEY, (300, 3, 3))
    whole = measured(A[:200], 0.1)
    held = A.at[200:].set(jnp.eye(3))
    found = measured(held, 0.1, jnp.arange(300) < 200)
    same(found.values, whole.values)
    same(found.error, whole.error)
    same(found.running[:200], whole.running)
    same(found.running[-1], whole.running[-1])


def test_a_singular_jacobian_makes_the_last_exponent_minus_infinity(x64: None) -> None:
    A = jnp.tile(jnp.diag(jnp.array([1.5, 1.2])), (200, 1, 1)).at[100].set(jnp.diag(jnp.array([1.5, 0.0])))
    found = mean_exponents(products(A, jnp.eye(2)).growth, 1.0)
    np.testing.assert_allclose(found.values, [np.log(1.5), -np.inf], atol=1e-9)
    assert np.isfinite(found.running[99]).all() and found.running[-1, 1] == -np.inf


def test_of_a_closed_loop_per_second_of_its_task(x64: None) -> None:
    task = tasks.lqr(horizon=2000)
    policy = Linear(jnp.array([[-2.0, -1.0]]), jnp.zeros(1))
    A = np.asarray(task.dynamics.A + task.dynamics.B @ policy.K)
    found = jax.jit(closed_loop_exponents)(policy, task, task.starts(KEY, 2))
    wanted = np.sort(np.log(np.abs(np.linalg.eigvals(A))))[::-1] / task.dt
    np.testing.assert_allclose(found.values, np.tile(wanted, (2, 1)), atol=1e-6)


def test_an_episode_that_ends_counts_until_then(x64: None) -> None:
    task = bent(horizon=60, ends=True)
    policy, s0 = Linear(jnp.array([[0.1, -0.2]]), jnp.zeros(1)), jnp.array([[0.01, 0.0], [0.3, 0.1]])
    found = jax.jit(closed_loop_exponents)(policy, task, s0)
    loops = jax.jit(jacobians)(policy, task, s0)
    lengths = np.asarray(loops.alive[:, :-1]).sum(1)
    assert 5 < lengths[1] < lengths[0] < 60
    for i, length in enumerate(lengths):
        alone = measured(loops.loop[i, :length], task.dt)
        same(found.values[i], alone.values)
        same(found.running[i, -1], alone.running[-1])


@pytest.mark.slow
def test_a_double_pendulums_exponents_converge_and_come_in_pairs(x64: None) -> None:
    """A Hamiltonian flow's: +-; two are zero, of time and energy."""
    f = DoublePendulum(1.0, 1.0, 1.0, 1.0, 9.81, dt=0.01)
    rest = jnp.zeros(2)

    @jax.jit
    def run(s):
        states = jax.lax.scan(lambda s, _: (f(s, rest), s), s, None, length=60_000)[1]
        return lyapunov_exponents(jax.vmap(jax.jacfwd(lambda s: f(s, rest)))(states), 0.01)

    chaotic, regular = (run(jnp.array([angle, 1.0 if angle < 2 else 0.1, 0.0, 0.0])) for angle in (1.6, np.pi - 0.15))
    same(chaotic.values, -chaotic.values[::-1], rtol=0, atol=2e-3)
    assert float(chaotic.values[0]) > 10 * float(chaotic.error[0]) > 0
    assert abs(float(chaotic.values[1])) < 0.05 * float(chaotic.values[0])
    # It settles: the second half of the time moves the average little.
    half, whole = chaotic.running[30_000, 0], chaotic.running[-1, 0]
    assert abs(float(whole - half)) < 0.1 * float(whole)
    assert np.abs(regular.values).max() < 0.02 * float(chaotic.values[0])


# Crossover.


def test_curves_that_cross_once_cross_there() -> None:
    T = np.array([10.0, 20, 40, 80])
    # Powers of T are straight lines in logarithms: T^3 / 1e4 meets 3 T^.5 where T^2.5 = 3e4.
    assert crossover_horizon(T, T**3 / 1e4, 3 * T**0.5) == pytest.approx(3e4**0.4)


@pytest.mark.parametrize(
    "pathwise, score, wanted",
    [
        ([2, 3, 4], [1, 1, 1], 10.0),
        ([0.1, 0.2, 1.0], [1, 1, 1], np.inf),
        ([4, 0.25, 4], [1, 1, 1], np.sqrt(20 * 40)),  # the last crossing, beyond which it stays
        ([0.5, 0.5, np.inf], [1, 1, 1], 40.0),
        ([0.0, 4, 4], [1, 1, 1], 20.0),
        ([np.inf, np.inf, np.inf], [1, 1, 1], 10.0),
        ([1, 1, 1], [1, np.inf, np.inf], np.inf),
    ],
)
def test_crossovers_at_the_edges(pathwise: list, score: list, wanted: float) -> None:
    assert crossover_horizon([10, 20, 40], pathwise, score) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "horizons, pathwise, score, message",
    [
        ([10, 20], [1.0], [1.0, 2.0], r"the same length, got \[2\], \[1\], \[2\]"),
        ([20, 10], [1.0, 2.0], [1.0, 2.0], "horizons must be positive and increase"),
        ([0, 10], [1.0, 2.0], [1.0, 2.0], "horizons must be positive and increase"),
        ([10, 20], [1.0, -2.0], [1.0, 2.0], "pathwise variance must be at least 0, got -2.0 at horizon 20"),
        ([10, 20], [1.0, 2.0], [np.nan, 2.0], "score-function variance must be at least 0, got nan at horizon 10"),
    ],
)
def test_a_crossover_of_bad_input_says_what_is_wrong(horizons: list, pathwise: list, score: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crossover_horizon(horizons, pathwise, score)
