"""The loop of collecting and updating: steps, ends, seeds, what is not finite, and what an agent may not know."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.agents import RandomActions, RandomAgent, System, learn
from diffmbrl.agents.collect import collect_steps, reset_places
from diffmbrl.policies import Neural, OpenLoop
from diffmbrl.rollout import episode_return

KEYS = jax.random.split(jax.random.key(0), 2)


class Done(eqx.Module):
    """An episode ends beyond a bound."""

    bound: Any

    def __call__(self, s):
        return jnp.abs(s[0]) > self.bound


def ending(bound: float, horizon: int = 20):
    return eqx.tree_at(
        lambda t: t.done, tasks.lqr(horizon=horizon), Done(jnp.asarray(bound)), is_leaf=lambda x: x is None
    )


def test_a_collected_episode_is_a_rollout():
    task = tasks.cartpole_balance(horizon=15)
    system, policy = System(task), Neural.init(task, key=jax.random.key(1))
    places = reset_places(policy, system, jax.random.key(2), 3)
    after, found = collect_steps(policy, system, places, jax.random.key(3), steps=15)
    ended = np.asarray(found.steps.last)
    for i in range(3):
        first = int(np.argmax(ended[i]))
        J = episode_return(policy, task, jax.tree.map(lambda x, i=i: x[i], places.s))
        np.testing.assert_allclose(found.J[i, first], J, rtol=1e-5)
    assert after.episode.tolist() == (np.arange(3) + 3 * ended.sum(1)).tolist()


def test_episodes_end_at_the_bound_and_at_the_clock():
    task = ending(1.0)
    system = System(task)
    policy = RandomActions(task)
    places = reset_places(policy, system, jax.random.key(2), 4)
    _, found = collect_steps(policy, system, places, jax.random.key(3), steps=60)
    x, done = np.asarray(found.steps.s_next)[..., 0], np.asarray(found.steps.done)
    over = np.asarray(found.t) == 19
    assert (done == (np.abs(x) > 1)).all()
    assert (np.asarray(found.steps.last) == (done | over | ~np.asarray(found.keep))).all()
    # Within an episode one step begins where the one before ended.
    s, s_next = np.asarray(found.steps.s), np.asarray(found.steps.s_next)
    inside = ~np.asarray(found.steps.last)[:, :-1]
    assert (s[:, 1:][inside] == s_next[:, :-1][inside]).all()


def test_an_episode_that_is_over_at_once_leaves_no_step():
    with pytest.raises(ValueError, match="none is usable"):
        learn(RandomAgent(), ending(-1.0), KEYS, real_steps=200)


def test_what_is_not_finite_is_not_kept_and_counted():
    class Reward(eqx.Module):
        def __call__(self, s, a):
            return jnp.where(a[0] > 0, jnp.nan, -jnp.sum(s**2))

    task = eqx.tree_at(lambda t: t.reward, tasks.lqr(horizon=10), Reward())
    learned = learn(RandomAgent(every=50), task, KEYS, real_steps=200)
    rejected = sum(record["rejected"] for record in learned.records)
    assert (rejected > 0).all()
    np.testing.assert_array_equal(rejected + learned.buffer.size, [200, 200])
    for buffer in (jax.tree.map(lambda x, i=i: x[i], learned.buffer) for i in range(2)):
        assert np.isfinite(np.asarray(buffer.sample(jax.random.key(0), 200).r)).all()


class Walks(RandomAgent):
    """Its carry counts updates and turns NaN at the third; its actions are what the carry says."""

    def init(self, task, key):
        return jnp.zeros(())

    def update(self, carry, task, buffer, fresh, key):
        return jnp.where(carry == 2, jnp.nan, carry + 1), {"updates": carry}


def test_an_update_that_is_not_finite_is_refused_and_counted():
    learned = learn(Walks(warmup=10, every=10), tasks.lqr(), KEYS, real_steps=60)
    assert [record["refused"].tolist() for record in learned.records[1:]] == [[0, 0], [0, 0], [1, 1], [1, 1], [1, 1]]
    assert learned.carry.tolist() == [2, 2]


@pytest.mark.slow
def test_seeds_differ_and_equal_seeds_are_equal():
    task, agent = tasks.pendulum(horizon=20), RandomAgent(warmup=20, every=20)
    both = learn(agent, task, KEYS, real_steps=60, evaluations=3)
    again = learn(agent, task, KEYS, real_steps=60, evaluations=3)
    for x, y in zip(jax.tree.leaves(both.buffer), jax.tree.leaves(again.buffer), strict=True):
        np.testing.assert_array_equal(x, y)
    a = np.asarray(both.buffer.rows.a)
    assert not np.array_equal(a[0], a[1])
    alone = learn(agent, task, KEYS[1:], real_steps=60, evaluations=3)
    np.testing.assert_array_equal(np.asarray(alone.buffer.rows.a[0]), a[1])
    np.testing.assert_allclose(alone.records[-1]["evaluation"][0], both.records[-1]["evaluation"][1], rtol=1e-5)


def test_an_agent_cannot_call_the_true_dynamics():
    class Peeks(RandomAgent):
        def update(self, carry, task, buffer, fresh, key):
            task.dynamics(buffer.rows.s[0], buffer.rows.a[0])
            return carry, {}

    with pytest.raises(TypeError, match="an agent does not know the true dynamics"):
        learn(Peeks(), tasks.lqr(), KEYS, real_steps=200)


def test_a_sensor_shows_the_agent_something_else():
    class Biased(eqx.Module):
        def __call__(self, s, key):
            return s + 10

    task = tasks.lqr(horizon=10)
    learned = learn(RandomAgent(warmup=20, every=20), System(task, sensor=Biased()), KEYS, real_steps=40)
    assert (np.asarray(learned.buffer.rows.s)[:, :, 0] > 5).all()
    plain = learn(RandomAgent(warmup=20, every=20), task, KEYS, real_steps=40)
    np.testing.assert_allclose(plain.buffer.rows.r, learned.buffer.rows.r, rtol=1e-5)  # two programs


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        (RandomAgent(), {"real_steps": 50}, "real_steps .50."),
        (RandomAgent(warmup=50), {"real_steps": 500}, "warmup .50 steps. must be at least every"),
        (RandomAgent(warmup=0), {"real_steps": 50}, "warmup .* got 0"),
        (RandomAgent(environments=7), {"real_steps": 500}, "multiple of environments"),
        (RandomAgent(), {"real_steps": 500, "evaluations": -1}, "evaluations .* got -1"),
    ],
)
def test_bad_sizes(agent, options, message):
    with pytest.raises(ValueError, match=message):
        learn(agent, tasks.lqr(), KEYS, **options)


def test_bad_keys_and_policies():
    with pytest.raises(ValueError, match=r"keys must be an array"):
        learn(RandomAgent(), tasks.lqr(), jax.random.key(0), real_steps=200)
    task = tasks.lqr()
    with pytest.raises(TypeError, match="OpenLoop"):
        reset_places(OpenLoop.zeros(task), System(task), jax.random.key(0), 2)
