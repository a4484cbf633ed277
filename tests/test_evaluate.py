"""How models are judged: errors over steps, coverage, Jacobians; by cases with known answers."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from diffmbrl import tasks
from diffmbrl.models import Ensemble, GaussianDynamics, RecurrentDynamics
from diffmbrl.models.evaluate import coverage, jacobian_error, model_jacobians, predictive_moments, step_errors

KEY = jax.random.key(0)


class Off(eqx.Module):
    """The plant, and a constant beside it."""

    inner: eqx.Module
    by: jax.Array

    def __call__(self, s, a, *, key=None):
        return self.inner(s, a) + self.by


class Plain(eqx.Module):
    """Mean 0 and a fixed deviation."""

    mean: jax.Array
    std: jax.Array

    def __call__(self, s, a, *, key=None):
        return self.moments(s, a)[0]

    def moments(self, s, a):
        return jnp.broadcast_to(self.mean, s.shape), jnp.broadcast_to(self.std, s.shape)


def windows(task, count=5, steps=3):
    a = jax.random.normal(KEY, (count, steps, task.m))

    def follow(s, a):
        return jax.lax.scan(lambda s, a: (task.dynamics(s, a), task.dynamics(s, a)), s, a)[1]

    s0 = task.starts(KEY, count)
    return jnp.concatenate([s0[:, None], jax.vmap(follow)(s0, a)], axis=1), a


def test_errors_grow_as_a_constant_does_through_the_plant():
    task, by = tasks.lqr(), jnp.asarray([0.1, -0.2])
    s, a = windows(task)
    scale = jnp.asarray([2.0, 0.5])
    A, off, expected = np.asarray(task.dynamics.A), np.zeros(2), []
    for _ in range(3):
        off = A @ off + np.asarray(by)
        expected.append(np.sqrt(np.mean((off / scale) ** 2)))
    np.testing.assert_allclose(step_errors(Off(task.dynamics, by), s, a, scale), expected, rtol=1e-4)
    # A state variable without a scale is left out.
    only = step_errors(Off(task.dynamics, by), s, a, scale.at[1].set(0))
    np.testing.assert_allclose(only[0], 0.05, rtol=1e-4)


def test_a_model_with_a_memory_keeps_it_over_the_steps():
    task = tasks.lqr()
    s, a = windows(task, count=1)
    f = RecurrentDynamics.init(task, hidden=4, key=KEY)
    state, expected = f.start(s[0, 0]), []
    for t in range(3):
        state = f(state, a[0, t])
        expected.append(np.sqrt(np.mean((state.s - s[0, t + 1]) ** 2)))
    np.testing.assert_allclose(step_errors(f, s, a, jnp.ones(2)), expected, rtol=1e-4)
    assert model_jacobians(f, s[0, 0], a[0, 0]).shape == (2, 3)


def test_intervals_cover_what_they_say():
    """The true noise, half of it, and members that differ: the mixture's moments by their definition."""
    s, a = jnp.zeros((20_000, 2)), jnp.zeros((20_000, 1))
    s_next = 0.3 * jax.random.normal(KEY, s.shape)
    levels = jnp.asarray([0.5, 0.8, 0.95])
    zero = jnp.zeros(())
    np.testing.assert_allclose(coverage(Plain(zero, zero + 0.3), s, a, s_next, levels)[:, 0], levels, atol=0.015)
    half = coverage(Plain(zero, zero + 0.15), s, a, s_next, levels)
    np.testing.assert_allclose(half[:, 1], 2 * norm.cdf(norm.ppf((1 + levels) / 2) / 2) - 1, atol=0.015)
    members = Plain(jnp.asarray([-0.2, 0.2]), jnp.asarray([0.1, 0.3]))
    mean, std = predictive_moments(Ensemble(members), s[0], a[0])
    np.testing.assert_allclose(mean, 0, atol=1e-7)
    np.testing.assert_allclose(std, np.sqrt((0.1**2 + 0.3**2) / 2 + 0.2**2), rtol=1e-5)


def test_the_jacobian_error_is_a_share_of_what_there_is_to_know(x64):
    task = tasks.lqr()
    s, a = task.starts(KEY, 4), jnp.zeros((4, 1))
    scale = jnp.asarray([1.0, 2.0, 0.5])
    assert jacobian_error(task.dynamics, task.dynamics, s, a, scale) == 0
    A, B = np.asarray(task.dynamics.A), np.asarray(task.dynamics.B)
    stays = eqx.tree_at(lambda f: (f.A, f.B), task.dynamics, (jnp.eye(2), jnp.zeros((2, 1))))
    np.testing.assert_allclose(jacobian_error(stays, task.dynamics, s, a, scale), 1, rtol=1e-12)
    more = eqx.tree_at(lambda f: f.A, task.dynamics, task.dynamics.A.at[0, 1].add(0.1))
    D = np.diag(1 / scale[:2])
    true = D @ (np.hstack([A, B]) - np.eye(2, 3)) @ np.diag(scale)
    np.testing.assert_allclose(
        jacobian_error(more, task.dynamics, s, a, scale), 0.1 * 2.0 / np.linalg.norm(true), rtol=1e-10
    )


def test_a_network_has_the_jacobian_of_differences(x64):
    task = tasks.cartpole_balance()
    f = GaussianDynamics.init(task, hidden=[5], output_scale=1.0, key=KEY)
    s, a, h = task.initial(KEY), jnp.ones(1), 1e-6
    F = np.asarray(model_jacobians(f, s, a))
    for i, e in enumerate(np.eye(5)):
        e = jnp.asarray(h * e)
        column = (f(s + e[:4], a + e[4:]) - f(s - e[:4], a - e[4:])) / (2 * h)
        np.testing.assert_allclose(F[:, i], column, atol=1e-6)
