"""Policies and plans: limits, noise, parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy import stats

from diffmbrl import Affine, Gaussian, Linear, Neural, OpenLoop, rollout, tasks
from diffmbrl.core import is_plan
from diffmbrl.policies import resting_action, squash

KEY = jax.random.key(0)

POLICIES = {
    "linear": Linear.zeros,
    "neural": lambda task: Neural.init(task, hidden=[5, 4], key=KEY),
    "gaussian": lambda task: Gaussian.around(Neural.init(task, hidden=[5], key=KEY), task, std=0.3),
    "open loop": OpenLoop.zeros,
    "affine": Affine.zeros,
}
PARAMETERS = {"linear": 5, "neural": 5 * 5 + 5 + 4 * 5 + 4 + 4 + 1, "gaussian": 5 * 5 + 5 + 5 + 1 + 1, "open loop": 7}
PARAMETERS["affine"] = 7 * (4 + 1 + 4)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_every_leaf_is_a_parameter(name, double):
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        task = tasks.cartpole_balance(horizon=7)
        policy = POLICIES[name](task)
        leaves = jax.tree.leaves(policy)
        assert all(isinstance(leaf, jax.Array) and leaf.dtype == dtype and not leaf.weak_type for leaf in leaves)
        theta, unravel = ravel_pytree(policy)
        assert theta.shape == (PARAMETERS[name],)
        again = unravel(theta)
        assert type(again) is type(policy)
        jax.tree.map(np.testing.assert_array_equal, again, policy)
        one = jax.tree.map(lambda x: x[0], policy) if is_plan(policy) else policy
        a = jax.jit(lambda pi, s: pi(s))(one, task.initial(KEY))
        assert a.shape == (1,)
        assert a.dtype == dtype


@pytest.mark.parametrize("name", POLICIES)
def test_only_plans_have_a_time_axis(name):
    policy = POLICIES[name](tasks.cartpole_balance(horizon=7))
    assert is_plan(policy) == (name in ("open loop", "affine"))
    if is_plan(policy):
        assert {leaf.shape[0] for leaf in jax.tree.leaves(policy)} == {7}


def test_linear():
    policy = Linear(jnp.asarray([[1.0, 2.0], [0.0, -1.0]]), jnp.asarray([0.5, 0.0]))
    np.testing.assert_allclose(policy(jnp.asarray([3.0, 4.0])), [11.5, -4])
    np.testing.assert_allclose(policy({"b": jnp.asarray(4.0), "a": jnp.asarray([3.0])}), [11.5, -4])


def test_affine_acts_on_the_deviation():
    plan = Affine(jnp.asarray([[1.0, 2.0]]), jnp.asarray([0.5]), jnp.asarray([1.0, -1.0]))
    np.testing.assert_allclose(plan(jnp.asarray([1.0, -1.0])), [0.5])
    np.testing.assert_allclose(plan(jnp.asarray([2.0, 2.0])), [7.5])
    np.testing.assert_allclose(plan({"x": jnp.asarray(2.0), "y": jnp.asarray(2.0)}), [7.5])


# Squashing.


@given(st.floats(-50, 50), st.floats(-20, 20), st.floats(0.1, 20))
def test_squash_stays_within_limits(z, low, width):
    high = low + width
    a = squash(jnp.asarray([z], float), np.asarray([low]), np.asarray([high]))
    assert low - 1e-5 <= a[0] <= high + 1e-5
    if abs(z) < 3:
        assert low < a[0] < high


def test_squash():
    limits = np.asarray([-1.0, 2.0, -np.inf]), np.asarray([3.0, 4.0, np.inf])
    np.testing.assert_allclose(squash(jnp.asarray([0.0, 0.0, 0.0]), *limits), [1, 3, 0])
    np.testing.assert_allclose(squash(jnp.asarray([50.0, -50.0, 50.0]), *limits), [3, 2, 50])
    z = jnp.asarray([0.3, -0.2, 1.5])
    np.testing.assert_allclose(squash(z, *limits), [1 + 2 * np.tanh(0.3), 3 + np.tanh(-0.2), 1.5], rtol=1e-6)
    np.testing.assert_allclose(jnp.diag(jax.jacobian(squash)(z * 0, *limits)), [2, 1, 1])
    unlimited = np.full(3, np.inf)
    assert squash(z, -unlimited, unlimited) is z
    assert np.all(np.isfinite(jax.jacobian(squash)(z * 100, *limits)))


def test_a_network_obeys_the_limits_of_its_task():
    task = tasks.quadrotor2d()
    starts = task.starts(KEY, 64)
    act = jax.jit(jax.vmap(lambda pi, s: pi(s), in_axes=(None, 0)))
    a = act(Neural.init(task, key=KEY, output_scale=100.0), starts)
    assert np.all((a >= task.a_low) & (a <= task.a_high))
    assert np.ptp(a) > 0.9 * float(task.a_high[0] - task.a_low[0])
    near = act(Neural.init(task, key=KEY, output_scale=1e-6), starts)
    np.testing.assert_allclose(near, np.broadcast_to(resting_action(task), near.shape), atol=1e-4)


def test_without_limits_there_is_no_squashing():
    task = tasks.lqr()
    policy = Neural.init(task, key=KEY, output_scale=1e3)
    s = jnp.asarray([0.5, -0.5])
    np.testing.assert_array_equal(policy(s), policy.net(s))
    assert abs(float(policy(s)[0])) > 10


def test_limits_on_one_side_are_refused():
    task = tasks.cartpole_balance()
    half = eqx.tree_at(lambda t: t.a_high, task, jnp.asarray([jnp.inf]))
    with pytest.raises(ValueError, match=r"limits an action on one side only: .*; limit both or none"):
        Neural.init(half, key=KEY)


def test_features_must_be_a_vector():
    task = eqx.tree_at(lambda t: t.features, tasks.cartpole_balance(), Square())
    with pytest.raises(ValueError, match=r"features of task 'cartpole-balance' have shape \[4, 4\]; expected one axis"):
        Neural.init(task, key=KEY)


class Square(eqx.Module):
    def __call__(self, s):
        return s[:, None] * s


def test_resting_action():
    quadrotor = tasks.quadrotor2d()
    np.testing.assert_allclose(resting_action(quadrotor), quadrotor.reward.hover * jnp.ones(2), rtol=1e-6)
    np.testing.assert_array_equal(resting_action(tasks.lqr()), [0])
    np.testing.assert_array_equal(OpenLoop.zeros(quadrotor).a, np.tile(resting_action(quadrotor), (100, 1)))
    np.testing.assert_array_equal(Affine.zeros(quadrotor).a, OpenLoop.zeros(quadrotor).a)


# Noise.


def test_gaussian_is_reparameterised():
    task = tasks.lqr()
    mean = Linear(jnp.asarray([[1.0, -1.0]]), jnp.asarray([0.2]))
    policy = Gaussian.around(mean, task, std=0.5)
    s = jnp.asarray([0.3, 0.1])
    np.testing.assert_array_equal(policy(s), mean(s))
    draws = jax.jit(jax.vmap(lambda key: policy(s, key=key)))(jax.random.split(KEY, 4096))
    assert draws.mean() == pytest.approx(float(mean(s)[0]), abs=0.03)
    assert draws.std() == pytest.approx(0.5, abs=0.02)
    # da/dmu = 1 and da/dlog(std) = a - mu, at fixed noise.
    gradient = jax.jit(jax.grad(lambda pi: pi(s, key=KEY)[0]))(policy)
    assert gradient.mean.b[0] == pytest.approx(1)
    assert gradient.log_std[0] == pytest.approx(float((policy(s, key=KEY) - mean(s))[0]), rel=1e-5)
    assert gradient.log_std[0] != 0


def test_log_prob_is_the_density_of_the_actions_drawn():
    task = tasks.quadrotor2d()
    policy = Gaussian.around(Linear.zeros(task), task, std=0.5)
    s, a = jnp.ones(6), jnp.asarray([0.3, -1.0])
    expected = stats.norm.logpdf(np.asarray(a), scale=0.5).sum()
    assert float(policy.log_prob(s, a)) == pytest.approx(expected, rel=1e-6)


def test_gaussian_around_a_plan_is_a_plan():
    task = tasks.lqr(horizon=4)
    noisy = Gaussian.around(OpenLoop.zeros(task), task, std=0.5)
    assert is_plan(noisy) and not is_plan(Gaussian.around(Linear.zeros(task), task, std=0.5))
    trajectory = rollout(noisy, task, jnp.ones(2), KEY)
    assert trajectory.a.shape == (4, 1) and np.ptp(trajectory.a) > 0
    np.testing.assert_array_equal(rollout(noisy, task, jnp.ones(2)).a, np.zeros((4, 1)))


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_gaussian_needs_a_positive_std(std):
    task = tasks.lqr()
    with pytest.raises(ValueError, match=f"std must be positive, got {std}"):
        Gaussian.around(Linear.zeros(task), task, std=std)


def test_seeds_are_a_vmap():
    task = tasks.cartpole_balance()
    policies = jax.vmap(lambda key: Neural.init(task, hidden=[3], key=key))(jax.random.split(KEY, 4))
    theta = jax.vmap(lambda policy: ravel_pytree(policy)[0])(policies)
    assert np.unique(theta[:, 0]).size == 4
    np.testing.assert_array_equal(jax.vmap(lambda policy: policy(jnp.ones(4)))(policies).shape, (4, 1))


class Scaled(eqx.Module):
    """Features with a parameter."""

    scale: jax.Array

    def __call__(self, s):
        return self.scale * s


def test_features_with_parameters_are_refused():
    task = eqx.tree_at(lambda t: t.features, tasks.lqr(), Scaled(jnp.ones(())))
    with pytest.raises(ValueError, match="features of task 'lqr' have 1 leaves, which would be learned"):
        Neural.init(task, key=KEY)
