"""Sampling planners: what is drawn, what is learned from it, and the optimum that it comes to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffmbrl import ILQR, Affine, Linear, OpenLoop, episode_return, solve, tasks
from diffmbrl.planners import (
    CEM,
    MPPI,
    ArgMax,
    Coloured,
    EffectiveSize,
    Normal,
    Sampling,
    TruncatedNormal,
    Uniform,
    plan_returns,
)
from diffmbrl.planners.refit import weights
from tests.problems import bent, changed, optimal_actions, riccati, same

KEY = jax.random.key(0)
DRAWS = {"even": Uniform(), "normal": Normal(), "truncated": TruncatedNormal(), "coloured": Coloured(2.0)}
J = jnp.asarray([1.0, 3.0, -jnp.inf, 2.0, -5.0])
SEQUENCES = jnp.asarray([10.0, 20.0, 1e6, 40.0, -7.0])[:, None, None] * jnp.ones((5, 3, 1))
NONE = jnp.zeros((3, 1)), jnp.ones((3, 1))


# Draws.


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_within_the_limits_and_follows_its_key(name):
    low, high = jnp.asarray([-0.5, -jnp.inf]), jnp.asarray([1.0, jnp.inf])
    mean, std = jnp.asarray([0.9, 3.0]) * jnp.ones((6, 2)), jnp.asarray([0.7, 0.1]) * jnp.ones((6, 2))
    drawn = jax.jit(lambda key: DRAWS[name](key, 500, mean, std, low, high))
    a, other = drawn(KEY), drawn(jax.random.key(1))
    assert a.shape == (500, 6, 2) and np.all(np.isfinite(a))
    assert np.all((a[..., 0] >= -0.5) & (a[..., 0] <= 1.0))
    assert not np.any(a[..., 1] == other[..., 1])
    # An action without limits is drawn around its mean.
    np.testing.assert_allclose(np.mean(a[..., 1]), 3.0, atol=0.02)


def test_the_moments_of_the_truncated_normal():
    mean, std, low, high = 0.9, 0.7, -0.5, 1.0
    drawn = TruncatedNormal()(
        KEY, 100_000, jnp.full((1, 1), mean), jnp.full((1, 1), std), jnp.asarray([low]), jnp.asarray([high])
    )
    known = scipy.stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    np.testing.assert_allclose(np.mean(drawn), known.mean(), atol=4e-3)
    np.testing.assert_allclose(np.std(drawn), known.std(), atol=4e-3)
    assert np.mean(drawn == high) < 1e-3  # no heap on the limit, as cutting would make: .44


def test_a_deviation_of_nothing_draws_the_mean():
    for draw in (Normal(), TruncatedNormal(), Coloured(1.0)):
        drawn = draw(KEY, 3, 0.5 * jnp.ones((4, 1)), jnp.zeros((4, 1)), -jnp.ones(1), jnp.ones(1))
        np.testing.assert_allclose(drawn, 0.5, rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0])
def test_the_spectrum_of_coloured_noise_falls_as_it_says(exponent):
    T = 64
    white = jax.random.normal(KEY, (4000, T, 1))
    coloured = np.asarray(Coloured(exponent).filter(white))[..., 0]
    power = np.mean(np.abs(np.fft.rfft(coloured, axis=1)) ** 2, axis=0)[1:]
    slope = np.polyfit(np.log(np.arange(1, T // 2 + 1)), np.log(power), 1)[0]
    np.testing.assert_allclose(slope, -exponent, atol=0.05)
    np.testing.assert_allclose(np.std(coloured, axis=0), 1.0, atol=0.06)
    if exponent == 0:
        np.testing.assert_allclose(coloured, white[..., 0], atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 5])
def test_coloured_noise_of_short_horizons_has_its_deviation(T):
    coloured = Coloured(2.0).filter(jax.random.normal(KEY, (20_000, T, 1)))
    assert coloured.shape == (20_000, T, 1)
    np.testing.assert_allclose(np.std(coloured, axis=0), 1.0, atol=0.03)


# What is learned.


def test_the_best_is_the_mean():
    mean, std = ArgMax()(*NONE, SEQUENCES, J)
    same(mean, 20.0 * np.ones((3, 1)))
    same(std, NONE[1])


def test_elites_are_the_best_and_finite():
    mean, std = CEM(elites=2, momentum=0.0)(*NONE, SEQUENCES, J)
    same(mean, 30.0 * np.ones((3, 1)), rtol=1e-6)
    same(std, np.std([20.0, 40.0], ddof=1) * np.ones((3, 1)), rtol=1e-6)
    # More elites than finite returns: what is not finite is none.
    mean, _ = CEM(elites=5, momentum=0.0)(*NONE, SEQUENCES, J)
    same(mean, np.mean([10.0, 20.0, 40.0, -7.0]) * np.ones((3, 1)), rtol=1e-6)
    mean, std = CEM(elites=1, momentum=0.5)(jnp.ones((3, 1)), 2 * jnp.ones((3, 1)), SEQUENCES, J)
    same(mean, 10.5 * np.ones((3, 1)), rtol=1e-6)
    same(std, np.sqrt(2.0) * np.ones((3, 1)), rtol=1e-6)


def test_temperature_goes_from_the_best_to_the_mean_of_all():
    finite = SEQUENCES[jnp.isfinite(J)], J[jnp.isfinite(J)]
    cold, _ = MPPI(1e-3)(*NONE, SEQUENCES, J)
    hot, std = MPPI(1e6)(*NONE, *finite)
    same(cold, 20.0 * np.ones((3, 1)), rtol=1e-6)
    same(hot, np.mean([10.0, 20.0, 40.0, -7.0]) * np.ones((3, 1)), rtol=1e-4)
    same(std, NONE[1])
    warm, _ = MPPI(2.0)(*NONE, SEQUENCES, J)
    w = np.exp(np.asarray([1.0, 3.0, 2.0, -5.0]) / 2)
    same(warm, np.sum(w * np.asarray([10.0, 20.0, 40.0, -7.0])) / np.sum(w) * np.ones((3, 1)), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_the_temperature_of_an_effective_size(scale):
    returns = scale * jax.random.normal(KEY, (100,))
    for size in (1.5, 10.0, 60.0):
        w = weights(returns, EffectiveSize(size)(returns))
        np.testing.assert_allclose(1 / np.sum(np.asarray(w) ** 2), size, rtol=1e-2)


@pytest.mark.parametrize("returns", [jnp.zeros(4), jnp.asarray([1.0, -jnp.inf, -jnp.inf]), jnp.asarray([2.0])])
def test_an_effective_size_that_cannot_be_had_gives_finite_weights(returns):
    w = weights(returns, EffectiveSize(10.0)(returns))
    assert np.all(np.isfinite(w))
    np.testing.assert_allclose(np.sum(w), 1.0, rtol=1e-6)
    assert np.all(w[np.isneginf(returns)] == 0)


# Scores.


def test_a_return_that_is_not_finite_scores_worst_and_is_counted():
    task = changed(bent(), kink=0.1)
    a = jnp.stack([jnp.zeros((8, 1)), jnp.full((8, 1), jnp.nan), jnp.full((8, 1), jnp.inf), jnp.ones((8, 1))])
    s0 = jnp.asarray([0.3, 0.0])
    found, nonfinite = plan_returns(a, task, s0, None)
    assert int(nonfinite) == 2 and np.isneginf(found[1]) and np.isneginf(found[2])
    same(found[0], episode_return(OpenLoop(a[0]), task, s0), rtol=1e-6)


# The optimum.

PLANNERS = {
    "cem": (Sampling(CEM(elites=26), samples=256, std=1.0), 40, 1e-5),
    "icem": (Sampling(CEM(elites=26), draw=Coloured(1.0), samples=256, keep=8, std=1.0), 40, 1e-2),
    "mppi": (Sampling(MPPI(), draw=Normal(), samples=256, std=0.5), 40, 3e-3),
    "mppi, one temperature": (Sampling(MPPI(1e-3), draw=Normal(), samples=256, std=0.5), 40, 1e-2),
    "predictive sampling": (Sampling(ArgMax(), draw=Normal(), samples=256, std=0.3), 40, 3e-2),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_the_optimum_of_a_linear_quadratic_task(name):
    planner, steps, gap = PLANNERS[name]
    task, s0 = tasks.lqr(horizon=12), jnp.asarray([1.0, -0.5])
    plan, history = solve(planner, OpenLoop.zeros(task), task, s0, KEY, steps)
    best = riccati(task).J(s0)
    rest = float(history.info.J[0])
    assert best - gap * (best - rest) <= float(episode_return(plan, task, s0)) <= best + 1e-6
    assert np.all(np.diff(history.info.J) >= -1e-6)
    if name == "cem":
        np.testing.assert_allclose(plan.a, optimal_actions(task, s0), atol=0.02)


def test_random_shooting_is_the_best_of_all_that_it_drew():
    task, s0 = tasks.pendulum(horizon=3), jnp.asarray([0.5, 0.0])
    planner = Sampling(ArgMax(), draw=Uniform(), samples=50)
    rest = OpenLoop.zeros(task)
    plan, carry, info = planner.update(rest, planner.init(rest, task), task, s0, key=KEY)
    drawn = Uniform()(jax.random.fold_in(KEY, 3), 49, *NONE, task.a_low, task.a_high)
    returns = jax.vmap(lambda a: episode_return(OpenLoop(a), task, s0))(jnp.concatenate([jnp.zeros((1, 3, 1)), drawn]))
    same(episode_return(plan, task, s0), jnp.max(returns), rtol=1e-6)
    same(carry.mean, plan.a)
    assert bool(info.accepted) and int(info.work.forward) == 3 * 52 and int(info.work.sequential) == 2


@pytest.mark.parametrize("name", DRAWS)
def test_limits_are_kept_and_used(name):
    task = tasks.pendulum(horizon=10)
    s0 = jnp.asarray([2.0, 0.0])
    planner = Sampling(CEM(elites=6), draw=DRAWS[name], samples=64, keep=2)
    beyond = OpenLoop(jnp.full((10, 1), 5.0))
    for start in (OpenLoop.zeros(task), beyond):
        plan, _, _ = jax.jit(planner.update.__func__)(planner, start, planner.init(start, task), task, s0, key=KEY)
        assert np.all((plan.a >= -2) & (plan.a <= 2)) and np.abs(plan.a).max() > 0.5


def test_one_step_is_a_horizon():
    task, s0 = tasks.lqr(horizon=1), jnp.asarray([0.1, 0.1])
    plan, _ = solve(PLANNERS["icem"][0], OpenLoop.zeros(task), task, s0, KEY, 30)
    np.testing.assert_allclose(episode_return(plan, task, s0), riccati(task).J(s0), rtol=1e-3)


def test_keys_and_updates_differ():
    task, s0 = tasks.lqr(horizon=6), jnp.asarray([1.0, 1.0])
    planner = Sampling(samples=16, std=1.0)
    one, other = (solve(planner, OpenLoop.zeros(task), task, s0, jax.random.key(k), 1)[0].a for k in (0, 1))
    assert not np.any(one == other)
    again, _ = solve(planner, OpenLoop.zeros(task), task, s0, jax.random.key(0), 1)
    same(again.a, one)


def test_a_plan_with_feedback_starts_it_and_loses_its_gains():
    task, s0 = tasks.lqr(horizon=12), jnp.asarray([1.0, -0.5])
    best, _ = solve(ILQR(), Affine.zeros(task), task, s0, None, 2)
    plan, history = solve(Sampling(samples=32, std=0.1), best, task, s0, KEY, 2)
    assert isinstance(plan, Affine) and not np.any(plan.K)
    same(history.info.J[0], riccati(task).J(s0), rtol=1e-5)
    same(episode_return(plan, task, s0), riccati(task).J(s0), rtol=1e-5)


def test_the_search_moves_on_with_a_receding_horizon():
    task = tasks.pendulum(horizon=4)
    planner = Sampling(CEM(elites=4), samples=32, keep=2)
    plan = OpenLoop.zeros(task)
    plan, carry, _ = planner.update(plan, planner.init(plan, task), task, jnp.ones(2), key=KEY)
    moved = planner.shift(carry)
    same(moved.mean, np.concatenate([carry.mean[1:], carry.mean[-1:]]))
    same(moved.elites[1], np.concatenate([carry.elites[1, 1:], carry.elites[1, -1:]]))
    same(moved.std, np.ones((4, 1)))
    assert not np.any(carry.std == 1)
    # Many lanes at once.
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), carry)
    same(planner.shift(lanes).elites[1], moved.elites)


def test_elites_are_kept_best_first():
    task, s0 = tasks.pendulum(horizon=4), jnp.ones(2)
    planner = Sampling(CEM(elites=4), samples=32, keep=3)
    plan = OpenLoop.zeros(task)
    _, carry, _ = planner.update(plan, planner.init(plan, task), task, s0, key=KEY)
    returns = np.asarray([episode_return(OpenLoop(a), task, s0) for a in carry.elites])
    assert np.all(np.diff(returns) <= 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sampling(samples=1), "samples must be at least 2 more than the 0 kept"),
        (lambda: Sampling(samples=9, keep=8), "samples must be at least 2 more than the 8 kept.*got 9"),
        (lambda: Sampling(CEM(elites=65), samples=64), "elites must be at most samples = 64, got 65"),
        (lambda: CEM(elites=0), "elites must be at least 1, got 0"),
        (lambda: CEM(elites=1, momentum=1.0), r"momentum must lie in \[0, 1\), got 1"),
        (lambda: MPPI(0.0), "temperature must be positive, got 0"),
        (lambda: MPPI(float("nan")), "temperature must be positive, got nan"),
        (lambda: EffectiveSize(0.5), "an effective size is at least 1 sample, got 0.5"),
        (lambda: Sampling(std=-1.0), "share and std must be positive, got 0.25 and -1.0"),
        (lambda: Sampling(particles=0), "particles must be at least 1"),
        (
            lambda: Sampling().init(OpenLoop.zeros(tasks.lqr()), tasks.lqr()),
            r"no limits on some action.*Sampling\(std=",
        ),
    ],
)
def test_a_wrong_setting(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_argument():
    task, s0 = tasks.pendulum(horizon=4), jnp.ones(2)
    planner, plan = Sampling(samples=8), OpenLoop.zeros(task)
    with pytest.raises(ValueError, match="Sampling draws its samples: give it a key, not None"):
        planner.update(plan, planner.init(plan, task), task, s0, key=None)
    with pytest.raises(TypeError, match=r"Sampling improves a plan, such as OpenLoop\.zeros\(task\); got Linear"):
        planner.init(Linear.zeros(task), task)
    with pytest.raises(ValueError, match=r"actions of shape \[5, 1\]; task 'pendulum' takes \[T, m\] = \[4, 1\]"):
        planner.init(OpenLoop.zeros(tasks.pendulum(horizon=5)), task)
