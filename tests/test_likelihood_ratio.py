"""The score-function gradient against closed forms: its mean, its variance, and the bias that each baseline states.

Means are judged by z-tests over 40,000 independent calls, each of 4 starts, with fixed keys: 10 estimators of 5 numbers
each must stay within 4.5 standard errors, so for right estimators the chance of a false alarm is below 50 * 6.8e-6 = 3.4e-4
(for normal means, which those of so many calls are).
"""

from functools import cache
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Gaussian, Linear, OpenLoop, tasks
from diffmbrl.core import Box, Identity, Task, reweighted
from diffmbrl.gradients import (
    BPTT,
    LeaveOneOut,
    LikelihoodRatio,
    LinearBaseline,
    MeanBaseline,
    NoBaseline,
    RewardToGo,
    Smoothed,
    TotalReturn,
    ValueBaseline,
)
from diffmbrl.rollout import episode_returns, rollouts
from tests.problems import bent, changed, gaussian_return, same, same_tree, some_slow, z_scores

KEY = jax.random.key(0)
CALLS, STARTS, BOUND = 40_000, 4, 4.5


class Minus(eqx.Module):
    """A critic that is not the value, but like it: minus the square of the state."""

    def __call__(self, s):
        return -0.5 * jnp.sum(s**2)


UNBIASED = {
    "pathwise": BPTT(),
    "episode": LikelihoodRatio(TotalReturn()),
    "episode, leave-one-out": LikelihoodRatio(TotalReturn(), LeaveOneOut()),
    "episode, fitted": LikelihoodRatio(TotalReturn(), LinearBaseline()),
    "reward to go": LikelihoodRatio(RewardToGo()),
    "reward to go, leave-one-out": LikelihoodRatio(RewardToGo(), LeaveOneOut()),
    "reward to go, fitted": LikelihoodRatio(RewardToGo(), LinearBaseline()),
    "reward to go, critic": LikelihoodRatio(RewardToGo(), ValueBaseline(Minus())),
}
SHRUNK = {
    "episode, mean": LikelihoodRatio(TotalReturn(), MeanBaseline()),
    "reward to go, mean": LikelihoodRatio(RewardToGo(), MeanBaseline()),
}


def problem():
    """The double integrator over five steps, discounted, from four starts."""
    task = tasks.lqr(horizon=5, dt=0.5)
    task = reweighted(task, 0.9 ** jnp.arange(6.0))
    policy = Gaussian(Linear(jnp.array([[-0.4, -0.6]]), jnp.array([0.3])), jnp.log(jnp.array([0.5])))
    return task, policy, task.starts(jax.random.key(1), STARTS)


def flat(policy):
    """[K, b, log_std] with whatever axes lead."""
    parts = policy.mean.K[..., 0, :], policy.mean.b, policy.log_std
    return np.concatenate([np.asarray(x, np.float64) for x in parts], axis=-1)


@cache
def exact():
    task, policy, s0 = problem()

    def J(pi):
        return jnp.mean(jax.vmap(lambda s: gaussian_return(task, pi.mean.K, pi.mean.b, jnp.exp(pi.log_std), s))(s0))

    return float(J(policy)), flat(jax.grad(J)(policy))


@cache
def calls(name):
    """J [calls] and gradients [calls, 4] of an estimator, each call with a key of its own; the same keys for all."""
    task, policy, s0 = problem()
    estimator = (UNBIASED | SHRUNK)[name]
    keys = jax.random.split(KEY, CALLS)
    J, gradient = jax.jit(jax.vmap(lambda key: estimator(policy, task, s0, key)))(keys)
    return np.asarray(J), flat(gradient)


@pytest.mark.parametrize("name", some_slow(UNBIASED, "pathwise", "episode, fitted", "episode, leave-one-out"))
def test_an_unbiased_estimator_is_the_exact_gradient_on_average(name):
    J, gradient = exact()
    found, gradients = calls(name)
    assert np.abs(z_scores(found, J)).max() < BOUND
    assert np.abs(z_scores(gradients, gradient)).max() < BOUND
    # The test can tell: a bias of a sixth of the gradient would be seen.
    assert BOUND * np.linalg.norm(gradients.std(0) / np.sqrt(CALLS)) < np.linalg.norm(gradient) / 6


@pytest.mark.parametrize("name", SHRUNK)
def test_the_mean_as_a_baseline_shrinks_the_gradient_by_one_in_b(name):
    _, gradient = exact()
    _, gradients = calls(name)
    assert np.abs(z_scores(gradients, (1 - 1 / STARTS) * gradient)).max() < BOUND
    assert np.abs(z_scores(gradients, gradient)).max() > BOUND
    others = calls(name.replace("mean", "leave-one-out"))[1]
    np.testing.assert_allclose(gradients * STARTS / (STARTS - 1), others, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_less_noise_less_variance():
    """In one batch of 2,000 starts: what was earned before, and what others and the state predict, is noise."""
    task, policy, _ = problem()
    s0 = task.starts(jax.random.key(2), 2000)
    names = ["episode", "reward to go", "reward to go, leave-one-out", "reward to go, fitted"]
    samples = [
        flat(jax.jit(lambda *x, name=name: UNBIASED[name].samples(*x)[1])(policy, task, s0, KEY)) for name in names
    ]
    variances = [x.var(0).sum() for x in samples]
    assert all(after < 0.8 * before for before, after in pairwise(variances)), variances


def test_a_fit_to_few_starts_adds_variance():
    # Eight coefficients from two starts of five steps: unbiased all the same (above), but worse than no baseline.
    assert calls("reward to go, fitted")[1].var(0).sum() > calls("reward to go")[1].var(0).sum()


class OneStep(eqx.Module):
    """s' = s; the reward is the action's square, or a step in it."""

    def __call__(self, s, a, *, key=None):
        return s


class Parabola(eqx.Module):
    def __call__(self, s, a):
        return -jnp.sum(a**2) / 2


class Heaviside(eqx.Module):
    def __call__(self, s, a):
        return jnp.where(a[0] >= 0, 1.0, 0.0).astype(a.dtype)


def one_step(reward):
    return Task(
        name="one step", dynamics=OneStep(), reward=reward, initial=Box([0.0], [0.0]), features=Identity(),
        a_low=[-jnp.inf], a_high=[jnp.inf], horizon=1, dt=1.0,
    )  # fmt: skip


@pytest.mark.slow
def test_the_variance_in_one_step_is_its_closed_form():
    # g = -a^2/2 eps / sigma with a = theta + sigma eps, and the moments of a normal number up to the sixth.
    theta, sigma, N = 0.7, 0.3, 400_000
    policy = Gaussian(OpenLoop(jnp.full((1, 1), theta)), jnp.full((1, 1), np.log(sigma)))
    task = one_step(Parabola())
    _, gradient = LikelihoodRatio().samples(policy, task, jnp.zeros((N, 1)), KEY)
    g = np.asarray(gradient.mean.a, np.float64).ravel()
    variance = (theta**4 + 18 * theta**2 * sigma**2 + 15 * sigma**4) / (4 * sigma**2) - theta**2
    assert np.abs(z_scores(g, -theta)) < BOUND
    assert np.abs(z_scores((g + theta) ** 2, variance)) < BOUND
    # The pathwise one's: -a, whose variance is sigma^2.
    _, pathwise = BPTT().samples(policy, task, jnp.zeros((N, 1)), KEY)
    p = np.asarray(pathwise.mean.a, np.float64).ravel()
    assert np.abs(z_scores((p + theta) ** 2, sigma**2)) < BOUND


def test_of_a_step_the_pathwise_gradient_is_exactly_zero_and_the_score_functions_is_right():
    theta, sigma = 0.1, 0.2
    plan, task = OpenLoop(jnp.full((1, 1), theta)), one_step(Heaviside())
    s0 = jnp.zeros((100_000, 1))
    _, pathwise = Smoothed(BPTT(), std=sigma).samples(plan, task, s0, KEY)
    assert not np.any(pathwise.a)
    J, gradient = Smoothed(LikelihoodRatio(baseline=LeaveOneOut()), std=sigma).samples(plan, task, s0, KEY)
    z = theta / sigma
    assert np.abs(z_scores(J, jax.scipy.stats.norm.cdf(z))) < BOUND
    assert np.abs(z_scores(gradient.a, jax.scipy.stats.norm.pdf(z) / sigma)) < BOUND


@pytest.mark.parametrize(
    "credit",
    [pytest.param(TotalReturn(), marks=pytest.mark.slow, id="episode"), pytest.param(RewardToGo(), id="reward to go")],
)
def test_it_is_the_sum_over_steps_of_score_times_credit(credit, x64):
    # With weights for each start, episodes that end, noise in the dynamics: against a loop.
    weights = jnp.linspace(0.5, 1.0, 6)[:, None] * 0.9 ** jnp.arange(9.0)
    task = changed(bent(ends=True), weights=weights, noise=0.3)
    policy = Gaussian(Linear(jnp.array([[0.6, -0.8]]), jnp.array([0.2])), jnp.log(jnp.array([0.4])))
    s0 = task.starts(KEY, 6)
    J, gradient = jax.jit(lambda *x: LikelihoodRatio(credit).samples(*x))(policy, task, s0, KEY)
    same(J, episode_returns(policy, task, s0, KEY))
    paths = rollouts(policy, task, s0, KEY)
    assert 0 < paths.alive[:, -1].sum() < 6
    score = jax.jit(jax.grad(lambda pi, s, a: pi.log_prob(s, a)))
    for i in range(6):
        tau, w = jax.tree.map(lambda x, i=i: x[i], paths), weights[i]
        phi = w[-1] * task.terminal(tau.s_T) if tau.alive[-1] else 0.0
        total = jax.tree.map(jnp.zeros_like, policy)
        for t in range(8):
            if tau.alive[t]:
                first = 0 if isinstance(credit, TotalReturn) else t
                R = w[first:-1] @ tau.r[first:] + phi
                total = jax.tree.map(lambda x, g, R=R: x + R * g, total, score(policy, tau.s[t], tau.a[t]))
        same_tree(jax.tree.map(lambda x, i=i: x[i], gradient), total)


class Undefined(eqx.Module):
    """A linear policy that is not a number beyond an angle of 1.3, where episodes end."""

    K: jax.Array

    def __call__(self, s, *, key=None):
        return self.K @ s * jnp.sqrt(jnp.where(jnp.abs(s[0]) > 1.3, -1.0, 1.0))


def test_a_policy_is_not_asked_after_the_end():
    task = bent(ends=True)
    policy = Gaussian(Undefined(jnp.array([[0.6, -0.8]])), jnp.zeros(1))
    s0 = task.starts(KEY, 6)
    alive = rollouts(policy, task, s0, KEY).alive
    assert alive[:, 0].all() and not alive[:, -1].all()
    for baseline in (NoBaseline(), LeaveOneOut(), LinearBaseline()):
        _, gradient = LikelihoodRatio(baseline=baseline)(policy, task, s0, KEY)
        assert jnp.isfinite(gradient.mean.K).all()


def test_a_return_within_the_regressors_span_leaves_no_variance(x64):
    # A reward of squares of the state: what is left is what the noise on the action adds.
    task = tasks.lqr(horizon=1)
    policy = Gaussian(OpenLoop(jnp.zeros((1, 1))), jnp.full((1, 1), jnp.log(1e-4)))
    s0 = task.starts(KEY, 64)
    task = eqx.tree_at(lambda t: t.terminal.Q, task, jnp.zeros((2, 2)))
    none = LikelihoodRatio()(policy, task, s0, KEY)[1].mean.a
    fitted = LikelihoodRatio(baseline=LinearBaseline(ridge=1e-12))(policy, task, s0, KEY)[1].mean.a
    assert jnp.linalg.norm(fitted) < 1e-6 * jnp.linalg.norm(none)


def test_what_it_cannot_do_is_refused():
    task = tasks.lqr(horizon=2)
    policy = Linear.zeros(task)
    noisy = Gaussian.around(policy, task, std=0.1)
    with pytest.raises(ValueError, match=r"Linear has no log_prob\(s, a\)"):
        LikelihoodRatio()(policy, task, task.starts(KEY, 2), KEY)
    with pytest.raises(ValueError, match="noise needs a key"):
        LikelihoodRatio()(noisy, task, task.starts(KEY, 2), None)
    with pytest.raises(ValueError, match="leave-one-out needs at least 2 starts, got 1"):
        LikelihoodRatio(baseline=LeaveOneOut())(noisy, task, task.starts(KEY, 1), KEY)
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        LinearBaseline(folds=1)
    with pytest.raises(ValueError, match="weights must have shape"):
        LikelihoodRatio()(noisy, reweighted(task, jnp.ones((3, 3))), task.starts(KEY, 2), KEY)


@pytest.mark.parametrize("plan", some_slow([False, True], True))
def test_many_states_go_through_the_policy_a_few_steps_at_a_time(plan, x64):
    # Of 100 starts, 3 of 8 steps at a time: the last turn has 2.
    task = changed(bent(ends=True), noise=0.3)
    mean = OpenLoop(0.1 * jnp.arange(8.0)[:, None]) if plan else Linear(jnp.array([[0.6, -0.8]]), jnp.array([0.2]))
    policy, s0 = Gaussian.around(mean, task, std=0.4), task.starts(KEY, 100)
    estimator = LikelihoodRatio(baseline=LeaveOneOut())
    found, (J, gradients) = jax.jit(lambda *x: (estimator(*x), estimator.samples(*x)))(policy, task, s0, KEY)
    same_tree(found, (J.mean(), jax.tree.map(lambda x: x.mean(0), gradients)))
