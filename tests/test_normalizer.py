"""What learned models see and say: statistics, angles, what never changes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.models import GaussianDynamics, NetworkDynamics, Normalizer, particles
from diffmbrl.models.buffer import Transition
from diffmbrl.tasks.registry import TASKS
from tests.problems import same, some_slow

KEY = jax.random.key(0)
ANGLES = {
    "pendulum": [0],
    "pendulum-swingup": [0],
    "cartpole-balance": [1],
    "cartpole-swingup": [1],
    "pets-cartpole": [1],
    "quadrotor2d": [2],
    "acrobot": [0, 1],
    "double-pendulum": [0, 1],
    "reacher": [0, 1],
    "car": [2],
    "quadrotor": [3, 4, 5],
    "quadrotor-waypoint": [3, 4, 5],
    "brax-inverted-double-pendulum": [1, 2],
    "brax-reacher": [0, 1],
}


def rows(task, count=50, key=KEY):
    s = task.starts(key, count)
    a = jax.random.normal(jax.random.fold_in(key, 1), (count, task.m))
    return s, a, jax.vmap(task.dynamics)(s, a)


def fitted(normalizer, s, a, s_next, data):
    none = jnp.zeros(len(s), bool)
    return normalizer.fitted(Transition(s, a, jnp.zeros(len(s)), s_next, none, none), data)


# Without angles, with one, with two, and of a body that turns.
ANGLED = {"lqr", "pendulum", "cartpole-swingup", "acrobot", "quadrotor2d", "pets-cartpole"}


@pytest.mark.parametrize("name", some_slow(TASKS, *(set(TASKS) - ANGLED)))
def test_angles_are_what_the_features_see_as_angles(name):
    turn = jax.jit(lambda task: Normalizer.init(task).turn)(tasks.make(name))  # parameters of the features are traced
    assert list(np.flatnonzero(turn)) == ANGLES.get(name, [])
    np.testing.assert_allclose(turn[turn > 0], 2 * np.pi, rtol=1e-6)


def test_statistics_are_those_of_the_rows_that_are_data():
    task = tasks.cartpole_balance()
    s, a, s_next = rows(task)
    data = jnp.arange(50) < 30
    spoiled = jnp.where(data[:, None], s, jnp.nan)
    units = fitted(Normalizer.init(task), spoiled, a, s_next, data)
    z = jnp.concatenate([jax.vmap(task.features)(s), a], axis=1)[:30]
    np.testing.assert_allclose(units.mean, np.mean(z, axis=0), atol=1e-5)
    np.testing.assert_allclose(units.std, np.std(z, axis=0), rtol=1e-4)
    np.testing.assert_allclose(units.scale, np.sqrt(np.mean((s_next - s)[:30] ** 2, axis=0)), rtol=1e-5)
    inputs = jax.vmap(units.inputs)(s[:30], a[:30])
    np.testing.assert_allclose(np.mean(inputs, axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(inputs, axis=0), 1, rtol=1e-4)


def test_a_step_by_the_target_is_the_next_state():
    task = tasks.cartpole_balance()
    s, a, s_next = rows(task)
    units = fitted(Normalizer.init(task), s, a, s_next, jnp.ones(50, bool))
    again = jax.vmap(lambda s, s_next: units.step(s, units.target(s, s_next)))(s, s_next)
    np.testing.assert_allclose(again, s_next, atol=1e-5)
    y = jax.vmap(units.target)(s, s_next)
    np.testing.assert_allclose(np.mean(y**2, axis=0), 1, rtol=1e-4)


@pytest.mark.parametrize("kind", [NetworkDynamics, GaussianDynamics])
def test_a_plant_that_counts_turns_or_wraps_is_the_same_to_a_model(kind):
    task = tasks.pendulum()
    f = kind.init(task, hidden=[5], output_scale=1.0, key=KEY)
    s, a = jnp.array([3.0, 6.0]), jnp.ones(1)
    s_next = task.dynamics(s, a)
    assert s_next[0] > np.pi
    turn = jnp.array([2 * jnp.pi, 0.0])
    for k in (-3, -1, 0, 2):
        np.testing.assert_allclose(f.loss(s, a, s_next + k * turn), f.loss(s, a, s_next), rtol=1e-4)
        np.testing.assert_allclose(f.loss(s + k * turn, a, s_next), f.loss(s, a, s_next), rtol=1e-4)
        np.testing.assert_allclose(f(s + k * turn, a), f(s, a) + k * turn, rtol=1e-4)


@pytest.mark.parametrize("kind", [NetworkDynamics, GaussianDynamics])
def test_what_never_changed_is_kept(kind):
    """The reacher's target is part of its state and rests."""
    task = tasks.reacher()
    s, a, s_next = rows(task)
    f = kind.init(task, hidden=[5], output_scale=1.0, key=KEY)
    normalizer = fitted(f.normalizer, s, a, s_next, jnp.ones(50, bool))
    assert list(np.asarray(normalizer.varies)) == [True] * 4 + [False] * 2
    f = eqx.tree_at(lambda f: f.normalizer, f, normalizer)
    same(f(s[0], a[0], key=KEY)[4:], s[0, 4:])
    assert np.all(f(s[0], a[0])[:4] != s[0, :4])
    # It costs nothing, whatever the network says of it.
    last = f.net.biases[-1]
    other = eqx.tree_at(lambda f: f.net.biases[-1], f, last.at[4:6].add(7.0))
    same(f.loss(s[0], a[0], s_next[0]), other.loss(s[0], a[0], s_next[0]), rtol=1e-6)


def test_an_input_that_never_varied_is_divided_by_one():
    task = tasks.lqr()
    s = jnp.full((1000, 2), 0.1)
    units = fitted(Normalizer.init(task), s, jnp.zeros((1000, 1)), s, jnp.ones(1000, bool))
    same(units.std, np.ones(3))
    same(units.target(s[0], s[0]), np.zeros(2))
    np.testing.assert_allclose(units.inputs(s[0] + 1, jnp.zeros(1)), [1, 1, 0], rtol=1e-4)


def test_one_step_back_is_the_short_way_and_differentiable():
    normalizer = Normalizer.init(tasks.pendulum())
    gap = normalizer.difference(jnp.array([-3.0, 0.0]), jnp.array([3.0, 9.0]))
    np.testing.assert_allclose(gap, [6 - 2 * np.pi, 9.0], rtol=1e-5)
    D = jax.jacfwd(normalizer.difference)(jnp.array([-3.0, 0.0]), jnp.array([3.0, 9.0]))
    same(D, -np.eye(2))


def test_states_and_features_must_be_flat():
    with pytest.raises(ValueError, match=r"a network takes flat states \[n\]; task 'lqr' has \[4, 2\]"):
        Normalizer.init(particles(tasks.lqr(), 4))
    task = eqx.tree_at(lambda t: t.features, tasks.lqr(), Square())
    with pytest.raises(ValueError, match=r"features of task 'lqr' have shape \[2, 2\]; expected one axis"):
        Normalizer.init(task)


class Square(eqx.Module):
    def __call__(self, s):
        return jnp.outer(s, s)


def test_no_leaf_is_weakly_typed():
    """One that is would be strong after training, and all that takes the model compiled anew."""
    model = GaussianDynamics.init(tasks.pendulum(), hidden=[4], key=KEY)
    assert not any(x.weak_type for x in jax.tree.leaves(model))
