"""Evolution strategies against closed forms: means by z-tests, as in test_likelihood_ratio; ranks by hand."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, OpenLoop, tasks
from diffmbrl.gradients import CentredRanks, Evolution
from diffmbrl.rollout import episode_return
from tests.problems import gaussian_return, z_scores

KEY = jax.random.key(0)
BOUND = 4.5  # for 25 numbers in all: a false alarm in 6,000


def test_it_is_the_exact_gradient_of_a_quadratic_on_average():
    # J is quadratic in the plan, so its smoothing only adds a constant, and F's gradient is J's for any std.
    task = tasks.lqr(horizon=5, dt=0.5)
    a = jnp.array([[0.5], [-1.0], [0.3], [0.0], [0.2]])
    s = task.initial(jax.random.key(1))
    K, quiet = jnp.zeros((1, 2)), jnp.zeros(1)
    expected = jax.grad(lambda a: gaussian_return(task, K, a, quiet, s))(a)
    curvature = jax.hessian(lambda a: gaussian_return(task, K, a[:, None], quiet, s))(a[:, 0])
    N = 20_000
    for std in (0.1, 1.0):
        J, gradient = jax.jit(lambda *x, std=std: Evolution(std=std).samples(*x))(
            OpenLoop(a), task, jnp.tile(s, (N, 1)), KEY
        )
        assert np.abs(z_scores(gradient.a, expected)).max() < BOUND
        F = gaussian_return(task, K, a, quiet, s) + std**2 * jnp.trace(curvature) / 2
        assert np.abs(z_scores(J, F)) < BOUND
        # (g'e) e has the covariance |g|^2 I + g g', for every std: antithetic pairs cancel the curvature.
        g, x = np.ravel(expected), np.asarray(gradient.a, np.float64)[..., 0]
        variance = g @ g + g**2
        assert np.abs(z_scores((x - g) ** 2, variance)).max() < BOUND


class Ending(eqx.Module):
    """An increasing function of the position at the end."""

    steep: bool = eqx.field(static=True)

    def __call__(self, s):
        return jnp.exp(3 * s[0]) if self.steep else s[0]


def test_ranks_are_the_same_for_any_increasing_function_and_point_up_the_gradient(x64):
    task = tasks.lqr(horizon=4)
    task = eqx.tree_at(lambda t: (t.reward.Q, t.reward.R), task, (jnp.zeros((2, 2)), jnp.zeros((1, 1))))
    linear, steep = (eqx.tree_at(lambda t: t.terminal, task, Ending(steep)) for steep in (False, True))
    plan, s0 = OpenLoop(jnp.zeros((4, 1))), jnp.zeros((20_000, 2))
    ranked = Evolution(std=0.3, shaping=CentredRanks())
    _, gradient = ranked.samples(plan, linear, s0, KEY)
    _, again = ranked.samples(plan, steep, s0, KEY)
    np.testing.assert_allclose(gradient.a, again.a, atol=1e-9)
    up = jax.grad(lambda plan: episode_return(plan, linear, s0[0]))(plan).a[:, 0]
    up = np.asarray(up / jnp.linalg.norm(up))
    # Ranks of 2B normal returns, c = Phi(z) - 1/2, give (2 z c(z)) / (2 sigma) along the gradient: 1 / (2 sqrt(pi) sigma).
    along = np.asarray(gradient.a)[..., 0] @ up
    np.testing.assert_allclose(along.mean(), 1 / (2 * np.sqrt(np.pi) * 0.3), rtol=0.03)
    across = np.asarray(gradient.a)[..., 0] - along[:, None] * up
    assert np.abs(z_scores(across @ np.linalg.svd(up[None])[2][1:].T, 0.0)).max() < BOUND


def test_ranks_by_hand():
    ranks = CentredRanks()(jnp.array([[3.0, jnp.nan, 1e9], [3.0, -jnp.inf, -2.0]]))
    np.testing.assert_allclose(ranks, jnp.array([[0.2, -0.4, 0.5], [0.2, -0.4, -0.1]]), atol=1e-6)
    assert not CentredRanks()(jnp.ones((2, 3))).any()


def test_both_of_a_pair_see_the_same_noise_and_starts():
    # Where the parameters do not matter, a pair's difference is exactly zero.
    task = tasks.noisy(tasks.lqr(horizon=5), std=0.5)
    still = eqx.tree_at(lambda t: (t.dynamics.inner.B, t.reward.R), task, (jnp.zeros((2, 1)), jnp.zeros((1, 1))))
    J, gradient = Evolution(std=0.1).samples(Linear.zeros(task), still, task.starts(KEY, 6), KEY)
    assert not gradient.K.any() and len(set(np.asarray(J).tolist())) == 6


class Integral(eqx.Module):
    """A policy with a memory: integral feedback of the position."""

    gain: jax.Array
    is_stateful: ClassVar[bool] = True

    def start(self, task):
        return jnp.zeros(())

    def step(self, memory, s, *, key=None):
        memory = memory + s[0]
        return self.gain * memory, memory


def test_a_policy_with_a_memory(x64):
    # With one parameter and one small pair the difference is the derivative times e^2.
    task, policy = tasks.lqr(horizon=4), Integral(jnp.array([-0.5]))
    s0 = task.starts(KEY, 3)
    _, gradient = Evolution(std=1e-5).samples(policy, task, s0, KEY)
    exact = jax.vmap(lambda s: jax.grad(episode_return)(policy, task, s))(s0).gain
    assert (gradient.gain / exact > 0).all()
    _, again = Evolution(std=2e-5).samples(policy, task, s0, KEY)
    np.testing.assert_allclose(again.gain, gradient.gain, rtol=1e-4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"std must be positive, got 0\.0"):
        Evolution(std=0.0)
    task = tasks.lqr(horizon=2)
    with pytest.raises(ValueError, match="noise needs a key"):
        Evolution(std=0.1)(Linear.zeros(task), task, task.starts(KEY, 2), None)
