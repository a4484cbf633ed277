"""Mixtures of pathwise and score-function gradients: exact means, known weights, and what becomes of them at a step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

from diffmbrl import Gaussian, Linear, OpenLoop, tasks
from diffmbrl.core import Box, Task, reweighted
from diffmbrl.gradients import (
    BPTT,
    Agreement,
    AlphaOrder,
    DiscontinuityTested,
    Explained,
    InverseVariance,
    InverseVariancePerStep,
    LeaveOneOut,
    LikelihoodRatio,
    Smoothed,
    TotalPropagation,
    branch,
)
from diffmbrl.gradients.alpha_order import accuracy, bernstein, bias_bound, chebyshev, normal
from diffmbrl.gradients.mixing import exchange, fold_moments, inverse_variance, minimum_variance, mix
from experiments.mixing import Bounded, Follows, Map
from tests.problems import bent, changed

KEY = jax.random.key(0)
SCORE = LikelihoodRatio(baseline=LeaveOneOut())


def all_pathwise(v_x, v_y, c):
    return jnp.ones_like(v_x)


def all_score(v_x, v_y, c):
    return jnp.zeros_like(v_x)


def flat(tree):
    return ravel_pytree(tree)[0]


def jit_samples(estimator, *arguments):
    return jax.jit(lambda *x: estimator.samples(*x))(*arguments)


# A linear system, a linear policy with noise, quadratic rewards: the expected return is a closed form in theta.


def linear_gaussian(horizon=5):
    task = tasks.lqr(horizon=horizon)
    policy = Gaussian(Linear(jnp.array([[-0.6, -0.9]]), jnp.array([0.1])), jnp.log(jnp.array([0.5])))
    return task, policy


def expected_return(policy, task, s0):
    """By the recursion of mean and covariance."""
    A, B, Q, R, Q_T = (task.dynamics.A, task.dynamics.B, task.reward.Q, task.reward.R, task.terminal.Q)
    K, b, noise = policy.mean.K, policy.mean.b, jnp.diag(jnp.exp(2 * policy.log_std))

    def cost(mean, covariance, Q):
        return 0.5 * (mean @ Q @ mean + jnp.trace(Q @ covariance))

    def one(s):
        mean, covariance, J = s, jnp.zeros((2, 2)), 0.0
        for _ in range(task.horizon):
            J = J - cost(mean, covariance, Q) - cost(K @ mean + b, K @ covariance @ K.T + noise, R)
            mean = A @ mean + B @ (K @ mean + b)
            covariance = (A + B @ K) @ covariance @ (A + B @ K).T + B @ noise @ B.T
        return J - cost(mean, covariance, Q_T)

    return jnp.mean(jax.vmap(one)(s0))


UNBIASED = {
    "per parameter": InverseVariance(folds=2),
    "per parameter, covariance": InverseVariance(weigh=minimum_variance, folds=2),
    "per step": InverseVariancePerStep(folds=2),
    "total propagation": TotalPropagation(folds=2),
    "alpha-order": AlphaOrder(gamma=0.3, folds=2),
    "tested, explained": DiscontinuityTested(folds=2),
    "tested, agreement": DiscontinuityTested(Agreement(), folds=2),
}
CALLS = 3000
# 28 two-sided tests, each at 3e-5: a false alarm in one of a thousand test runs, if the keys were new each time.
Z = 4.17


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(
            made, id=name, marks=[pytest.mark.slow] * (name in ("per parameter, covariance", "tested, explained"))
        )
        for name, made in UNBIASED.items()
    ],
)
def test_mean_is_the_gradient_of_a_linear_gaussian_system(estimator):
    task, policy = linear_gaussian()
    s0 = task.starts(KEY, 8)
    exact = flat(jax.grad(expected_return)(policy, task, s0))
    keys = jax.random.split(jax.random.key(1), CALLS)
    found = np.asarray(jax.jit(jax.vmap(lambda k: flat(estimator(policy, task, s0, k)[1])))(keys), np.float64)
    z = (found.mean(0) - exact) / (found.std(0, ddof=1) / np.sqrt(CALLS))
    assert np.all(np.abs(z) < Z), z


@pytest.mark.slow
def test_weights_that_know_their_samples_bias_the_mean():
    """The price of `folds = 1`: of the order of 1/B, many standard errors here, and small beside the spread of one call."""
    task, policy = linear_gaussian()
    s0 = task.starts(KEY, 4)
    exact = flat(jax.grad(expected_return)(policy, task, s0))
    keys = jax.random.split(jax.random.key(1), 4 * CALLS)
    found = np.asarray(jax.jit(jax.vmap(lambda k: flat(InverseVariance()(policy, task, s0, k)[1])))(keys), np.float64)
    off, spread = np.abs(found.mean(0) - exact), found.std(0, ddof=1)
    assert np.max(off / spread) * np.sqrt(len(found)) > Z
    assert np.max(off / spread) < 0.3


# Every mixture is one of its parts at a weight of 0 or 1.


def ending():
    """A nonlinear task with noise of its own, in which some episodes end."""
    return changed(bent(ends=True), noise=0.3)


@pytest.mark.parametrize(
    "kind", [Linear.zeros, pytest.param(OpenLoop.zeros, marks=pytest.mark.slow)], ids=["policy", "plan"]
)
def test_weights_of_one_and_zero_give_the_parts(kind):
    task = ending()
    policy = Gaussian.around(jax.tree.map(lambda x: x + 0.3, kind(task)), task, std=0.4)
    s0 = task.starts(KEY, 6)
    for weigh, part in ((all_pathwise, BPTT()), (all_score, SCORE)):
        J_of_part, wanted = jit_samples(part, policy, task, s0, KEY)
        for mixture in (InverseVariance, InverseVariancePerStep, TotalPropagation):
            J, found = jit_samples(mixture(weigh=weigh), policy, task, s0, KEY)
            np.testing.assert_allclose(J, J_of_part, rtol=1e-5, atol=1e-5)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(y))))


def test_folds_lend_each_other_their_weights():
    x, y = (jax.random.normal(k, (6, 2)) for k in jax.random.split(KEY))
    halves = np.asarray(x).reshape(2, 3, 2)
    np.testing.assert_allclose(fold_moments(x, y, 2)[0], halves.var(1, ddof=1), rtol=1e-5)
    k = jnp.array([[0.0], [1.0]])
    np.testing.assert_array_equal(mix(exchange(k), x, y), jnp.concatenate([x[:3], y[3:]]))
    np.testing.assert_allclose(exchange(jnp.array([[0.0], [0.3], [0.9]])), [[0.6], [0.45], [0.15]], rtol=1e-6)
    np.testing.assert_allclose(exchange(jnp.array([0.4])), [0.4])


# The weights themselves.


def test_optimal_weights_of_two_normals():
    """Against the least variance on a grid of weights, for known moments and for estimated ones."""
    v_x, v_y, c = 2.0, 0.5, 0.4
    k = np.linspace(0, 1, 100001)
    for covariance, weigh in ((0.0, inverse_variance), (c, minimum_variance)):
        variance = k**2 * v_x + (1 - k) ** 2 * v_y + 2 * k * (1 - k) * covariance
        found = weigh(*(jnp.asarray(z) for z in (v_x, v_y, covariance)))
        np.testing.assert_allclose(found, k[variance.argmin()], atol=1e-5)
    drawn = np.random.default_rng(0).multivariate_normal([1, 1], [[v_x, c], [c, v_y]], 4000).astype(np.float32)
    estimated = fold_moments(jnp.asarray(drawn[:, 0]), jnp.asarray(drawn[:, 1]), 1)
    np.testing.assert_allclose(np.ravel(estimated), [v_x, v_y, c], rtol=0.15)
    np.testing.assert_allclose(np.ravel(estimated), np.cov(drawn.T)[[0, 1, 0], [0, 1, 1]], rtol=1e-4)


def test_an_overflow_has_no_weight_and_does_not_enter():
    x, y = jnp.array([jnp.inf, 1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    k = inverse_variance(*fold_moments(x, y, 1))
    np.testing.assert_array_equal(k, [0.0])
    np.testing.assert_array_equal(mix(k, x, y), y)
    # One in the score function is not hidden.
    assert not bool(jnp.all(jnp.isfinite(mix(inverse_variance(*fold_moments(y, x, 1)), y, x))))
    np.testing.assert_array_equal(inverse_variance(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())), 0.5)


def test_alpha_is_bounded_free_and_monotone():
    task, policy = linear_gaussian()
    s0 = task.starts(KEY, 16)

    @jax.jit
    def alpha(gamma, delta):
        return AlphaOrder(gamma=gamma, delta=delta).alpha(policy, task, s0, KEY)

    gammas = jnp.array([0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, jnp.inf])
    found = np.array([alpha(gamma, jnp.array(0.05)) for gamma in gammas])
    assert found[0] == 0 and np.all(np.diff(found) >= 0) and np.all((found >= 0) & (found <= 1))
    pathwise, score = (
        np.asarray(jax.vmap(flat)(jit_samples(e, policy, task, s0, KEY)[1]), np.float64) for e in (BPTT(), SCORE)
    )
    v_x, v_y = (x.var(0, ddof=1).sum() for x in (pathwise, score))
    np.testing.assert_allclose(found[-1], v_y / (v_x + v_y), rtol=1e-4)
    # In between, the bound binds, with the published radius of Chebyshev's inequality.
    distance = np.linalg.norm(pathwise.mean(0) - score.mean(0))
    np.testing.assert_allclose(found[2], 1e-2 / (distance + np.sqrt(v_y / (16 * 0.05))), rtol=1e-4)
    # More confidence, a larger radius, less of the pathwise estimate: the right way round.
    deltas = np.array([alpha(jnp.array(1e-2), jnp.array(d)) for d in (0.01, 0.05, 0.5)])
    assert np.all(np.diff(deltas) > 0)


@pytest.mark.parametrize("radius", [chebyshev, normal, bernstein])
def test_radii_hold_as_often_as_they_say(radius):
    """Of skewed samples, whose mean leaves the radius in at most delta of the cases, and falls with their number."""
    delta = jnp.array(0.1)
    draws = jax.random.exponential(KEY, (2000, 40, 3)) - 1
    radii = jax.vmap(lambda y: radius(y, delta))(draws)
    outside = jnp.mean((jnp.linalg.norm(draws.mean(1), axis=-1) > radii).astype(float))
    assert outside < 0.1
    assert radius(draws[0], delta) < radius(draws[0], jnp.array(0.01))
    assert jax.vmap(lambda y: radius(y, delta))(draws.reshape(-1, 400, 3)).mean() < radii.mean()


def test_bounds_keep_what_they_promise():
    gamma, distance, epsilon = (jnp.asarray(x) for x in (2.0, 3.0, 0.5))
    assert bias_bound(gamma, distance, epsilon) * (distance + epsilon) == pytest.approx(2.0)
    assert accuracy(gamma, distance, epsilon) * distance + epsilon == pytest.approx(2.0)
    assert accuracy(gamma, distance, jnp.array(2.5)) == 0


def unlimited(**parts):
    """A task with one state and one action."""
    box, none = Box(-jnp.ones(1), jnp.ones(1)), jnp.full(1, jnp.inf)
    return Task(name="one", initial=box, a_low=-none, a_high=none, dt=1.0, **parts)


# The step: one action with noise, rewarded where it is not negative.


class Step(eqx.Module):
    width: float | None = eqx.field(static=True, default=None)

    def __call__(self, s, a):
        one, zero = jnp.ones((), a.dtype), jnp.zeros((), a.dtype)
        return jnp.where(a[0] >= 0, one, zero) if self.width is None else branch(a[0], one, zero, width=self.width)


class Still(eqx.Module):
    def __call__(self, s, a, *, key=None):
        return s


THETA, SIGMA = 0.1, 0.2


def heaviside(width=None, count=256):
    task = unlimited(dynamics=Still(), reward=Step(width), horizon=1)
    return OpenLoop(jnp.array([[THETA]])), task, task.starts(KEY, count), KEY


def at_step(estimator, **choices):
    """The estimate of dJ/dtheta."""
    return jax.jit(lambda *x: Smoothed(estimator, std=SIGMA)(*x)[1])(*heaviside(**choices)).a.item()


@pytest.mark.slow
def test_at_a_step_what_claims_to_be_robust_is_the_score_function():
    score = at_step(SCORE)
    assert abs(score - scipy.stats.norm.pdf(THETA, 0, SIGMA)) < 0.5  # nearly four standard errors
    assert at_step(BPTT()) == 0
    # Inverse variance makes no such claim: an estimate that is wrong without variance has all the weight.
    for mixture in (InverseVariance(), InverseVariancePerStep(), TotalPropagation(), AlphaOrder(gamma=jnp.inf)):
        assert at_step(mixture) == 0
    for test in (Explained(), Agreement()):
        np.testing.assert_allclose(at_step(DiscontinuityTested(test)), score, rtol=1e-5)
    np.testing.assert_allclose(at_step(AlphaOrder(gamma=0.0)), score, rtol=1e-5)
    assert 0 < score - at_step(AlphaOrder(gamma=0.1)) <= 0.1


def test_branches_average_to_the_smoothed_step():
    """Exact values, and a pathwise mean that is the density with both variances, 4.5 standard errors from the true one."""
    width, count = 0.1, 20000
    policy, task, s0, key = heaviside(width, count)
    hard = heaviside(None, count)[1]
    estimator = Smoothed(BPTT(), std=SIGMA)
    J, each = jit_samples(estimator, policy, task, s0, key)
    np.testing.assert_array_equal(J, jit_samples(estimator, policy, hard, s0, key)[0])
    each = np.asarray(each.a, np.float64).ravel()
    error = each.std() / np.sqrt(count)
    blurred, true = (scipy.stats.norm.pdf(THETA, 0, s) for s in (np.hypot(SIGMA, width), SIGMA))
    assert abs(each.mean() - blurred) < 4.5 * error < abs(true - blurred)


def test_a_branch_has_the_derivatives_of_both_sides(x64):
    def average(c, h=0.3):
        share = scipy.stats.norm.cdf(c / h)
        return share * np.sin(c) + (1 - share) * c**2

    def f(c):
        return branch(c, jnp.sin(c), c**2, width=0.3)

    for c in (-2.0, -0.2, 0.0, 0.4):
        assert f(c) == (np.sin(c) if c >= 0 else c**2)
        np.testing.assert_allclose(jax.grad(f)(c), (average(c + 1e-6) - average(c - 1e-6)) / 2e-6, rtol=1e-6)
    # Far from the switch it is the taken side's derivative.
    assert jax.grad(lambda c: branch(c, jnp.sin(c), 3 * c, width=0.01))(-1.0) == 3.0


def test_tests_are_right_about_smooth_systems():
    """At level .01, of 400 batches of a linear return, where the inequality is an equality, and of a curved one."""
    task, policy = linear_gaussian(horizon=3)
    s0 = task.starts(KEY, 64)
    for test in (Explained(), Agreement()):
        estimator = DiscontinuityTested(test)
        smooth = jax.jit(jax.vmap(lambda k, e=estimator: e.smooth(policy, task, s0, k).all()))
        alarms = 1 - float(smooth(jax.random.split(KEY, 400)).mean())
        assert alarms <= 0.03, (test, alarms)


class Walk(eqx.Module):
    def __call__(self, s, a, *, key=None):
        return s + 0.1 * a


class Effort(eqx.Module):
    def __call__(self, s, a):
        return -0.1 * (a[0] ** 2 + s[0] ** 2)


class Prize(eqx.Module):
    """For ending where s is not negative."""

    size: jax.Array

    def __call__(self, s):
        return jnp.where(s[0] >= 0, self.size, jnp.zeros_like(self.size))


@pytest.mark.slow
def test_what_has_no_gradient_is_found_late_in_a_rollout():
    """The jump comes at the end of ten steps of noise: variance shows it, the score function is too noisy to."""
    task = unlimited(dynamics=Walk(), reward=Effort(), terminal=Prize(jnp.array(1.0)), horizon=10)
    policy = Gaussian.around(Linear.zeros(task), task, std=0.5)

    def found(test):
        def one(size, key):
            given = eqx.tree_at(lambda t: t.terminal.size, task, size)
            return 1 - DiscontinuityTested(test).smooth(policy, given, task.starts(key, 64) / 3, key).mean()

        run = jax.jit(lambda size: jnp.mean(jax.vmap(lambda k: one(size, k))(jax.random.split(KEY, 100))))
        return [float(run(size)) for size in (0.0, 1.0)]

    no, yes = found(Explained())
    assert no <= 0.03 and yes > 0.95
    assert found(Agreement())[1] < 0.2


@pytest.mark.slow
def test_total_propagation_varies_least_where_chaos_comes_through_the_policy():
    task = unlimited(dynamics=Follows(), reward=Bounded(), horizon=20)
    policy, keys = Map(jnp.array([1.5, 2.0])), jax.random.split(KEY, 64)

    def variances(estimator):
        def call(weights, key):
            s0 = task.starts(jax.random.fold_in(key, 0), 64)
            return flat(Smoothed(estimator, std=0.2)(policy, reweighted(task, weights), s0, key)[1])

        run = jax.jit(lambda w: jnp.sum(jnp.var(jax.vmap(lambda k: call(w, k))(keys), axis=0)))
        return [float(run((jnp.arange(21) < T).astype(jnp.float32))) for T in (5, 20)]

    pathwise, score, mixed, per_step, total = (
        variances(e) for e in (BPTT(), SCORE, InverseVariance(), InverseVariancePerStep(), TotalPropagation())
    )
    # At T = 5 both are of use, and every mixture is better than either; at T = 20 the pathwise gradient has exploded, and what
    # total propagation hands on has not.
    assert max(mixed[0], per_step[0], total[0]) < 0.8 * min(pathwise[0], score[0])
    assert pathwise[1] > 1e6 * score[1]
    assert total[1] < 0.85 * min(score[1], mixed[1], per_step[1])


class Density(eqx.Module):
    """A policy with a density, but no standard deviation to its name."""

    inner: Gaussian

    def log_prob(self, s, a):
        return self.inner.log_prob(s, a)

    def __call__(self, s, *, key=None):
        return self.inner(s, key=key)


def test_bad_input():
    task, policy = linear_gaussian()
    s0 = task.starts(KEY, 6)
    with pytest.raises(ValueError, match="noise needs a key"):
        TotalPropagation()(policy, task, s0, None)
    with pytest.raises(ValueError, match="Linear has no log_prob"):
        InverseVariance()(policy.mean, task, s0, KEY)
    with pytest.raises(ValueError, match="6 starts cannot be divided into 4 folds"):
        InverseVariancePerStep(folds=4)(policy, task, s0, KEY)
    with pytest.raises(ValueError, match="gamma must not be negative, got -1"):
        AlphaOrder(gamma=-1.0)
    with pytest.raises(ValueError, match=r"delta, a probability of failure, must lie in \(0, 1\), got 1"):
        AlphaOrder(delta=1.0)
    with pytest.raises(ValueError, match="width must be positive"):
        branch(0.0, 1.0, 0.0, width=0.0)
    with pytest.raises(ValueError, match="same structure, shapes and dtypes"):
        branch(0.0, jnp.zeros(2), jnp.zeros(3), width=0.1)
    with pytest.raises(ValueError, match="the noise's size must be known, as Gaussian's log_std is; got Density"):
        jax.eval_shape(lambda: DiscontinuityTested()(Density(policy), task, s0, KEY))
