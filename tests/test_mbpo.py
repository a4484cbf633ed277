"""The model as a simulator: branches against the dynamics they are made of, mixtures, schedules, and what is broken."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.agents import (
    MBPO,
    PPO,
    SAC,
    EnsembleTrainer,
    Growing,
    OffPolicy,
    OffPolicyPractice,
    OnPolicy,
    OnPolicyPractice,
    imagine,
    learn,
)
from diffmbrl.agents.collect import RandomActions
from diffmbrl.agents.registry import make_agent
from diffmbrl.models import NetworkDynamics, Training
from diffmbrl.models.buffer import Buffer, Transition, flat
from diffmbrl.tasks.cartpole import CartPole

KEY = jax.random.key(0)
TASK = tasks.cartpole_continuous(horizon=30)
WORLD = EnsembleTrainer(
    training=Training(epochs=2, batch=16), members=2, elites=1, hidden=(8,), model=NetworkDynamics.init
)
SMALL = MBPO(
    SAC(hidden=(8,)),
    WORLD,
    practice=OffPolicyPractice(updates=4, rounds=2, batch=16, branches=4, steps=3),
    warmup=40,
    every=20,
)


def filled(task, count=50, capacity=64, spread=0.05, r=1.0):
    s = spread * jax.random.normal(KEY, (count, task.n))
    no = jnp.zeros(count, bool)
    rows = Transition(s, jnp.zeros((count, task.m)), jnp.full(count, r), s, no, no)
    return Buffer.empty(task, capacity).add(rows, jnp.zeros(count, jnp.int32), jnp.arange(count, dtype=jnp.int32))


def carts(*masses):
    """Cart-poles of several masses, as members of an ensemble."""
    made = [CartPole(m_c=m) for m in masses]
    return jax.tree.map(lambda *x: jnp.stack(x), *made)


def imagined(members, *, branches=6, steps=8, length=3, task=TASK, buffer=None, key=KEY):
    buffer = filled(task) if buffer is None else buffer
    return jax.jit(
        lambda members, length: imagine(
            RandomActions(task), task, members, buffer, key, branches=branches, steps=steps, length=length
        )
    )(members, length)


def test_branches_are_rollouts_of_their_members_from_real_states():
    buffer = filled(TASK)
    rows, keep = imagined(carts(1.0, 3.0), buffer=buffer)
    assert rows.a.shape == (6, 8, 1) and np.all(keep)
    # The first half of the branches is the first member's.
    for mass, part in [(1.0, slice(0, 3)), (3.0, slice(3, 6))]:
        s_next = jax.vmap(jax.vmap(CartPole(m_c=mass)))(rows.s[part], rows.a[part])
        np.testing.assert_allclose(rows.s_next[part], s_next, rtol=1e-5, atol=1e-6)
    done = jax.vmap(jax.vmap(TASK.done))(rows.s_next)
    np.testing.assert_array_equal(rows.done, done)
    np.testing.assert_array_equal(rows.r, 1)
    # A branch goes on from its last state, for three steps or to its end; then another begins at a state of the buffer.
    last, seen = np.asarray(rows.last), np.asarray(buffer.rows.s[:50])
    for i in range(6):
        age = 0
        for t in range(8):
            if age == 0:
                assert (seen == np.asarray(rows.s[i, t])).all(axis=1).any()
            else:
                np.testing.assert_array_equal(rows.s[i, t], rows.s_next[i, t - 1])
            age += 1
            assert last[i, t] == (bool(done[i, t]) or age == 3)
            age = 0 if last[i, t] else age
    assert len(np.unique(rows.s[:, 0, 0])) > 3


def test_the_length_is_traced_and_the_end_of_the_task_ends_a_branch():
    rows, _ = imagined(carts(1.0), length=100, steps=60, branches=4)
    assert np.any(rows.done) and np.array_equal(rows.done, rows.last)
    with pytest.raises(ValueError, match="branches must be at least one for each of 2 members, got 1"):
        imagined(carts(1.0, 2.0), branches=1)


def test_what_the_model_makes_non_finite_is_not_kept_and_ends_its_branch():
    members = carts(1.0, 1.0)
    members = eqx.tree_at(lambda f: f.m_p, members, jnp.asarray([0.3, jnp.nan]))
    rows, keep = imagined(members, length=5)
    np.testing.assert_array_equal(keep, np.repeat([True, False], 3)[:, None] * np.ones(8, bool))
    assert np.all(rows.last[3:]) and np.all(np.isfinite(rows.s))


@pytest.mark.slow
def test_an_empty_buffer_is_an_error_and_one_smaller_than_a_batch_is_not():
    empty = Buffer.empty(TASK, 8)
    with pytest.raises(ValueError, match="the buffer is empty"):
        imagine(RandomActions(TASK), TASK, carts(1.0), empty, KEY, branches=2, steps=2, length=1)
    carry = SMALL.init(TASK, KEY)
    few = filled(TASK, count=3, capacity=8)
    after, said = jax.jit(lambda *x: SMALL.update(*x))(carry, TASK, few, few.sample(KEY, 4), KEY)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((after, said)))


def test_rows_are_real_with_the_probability_given():
    buffer = filled(TASK, r=7.0)
    rows, keep = flat(imagined(carts(1.0)))
    for share in (0.0, 0.3, 1.0):
        real = np.asarray(OffPolicyPractice(batch=5000, real=share).mixed(rows, keep, buffer, KEY).r) == 7
        assert abs(real.mean() - share) < (0.03 if 0 < share < 1 else 1e-9)
    # A row that is not kept has a real one in its place.
    practice = OffPolicyPractice(batch=100, real=0.0)
    batch = practice.mixed(rows, jnp.zeros_like(keep), buffer, KEY)
    np.testing.assert_array_equal(batch.r, 7)


def test_the_schedule():
    length = Growing(low=1.0, high=15.0, begin=20.0, end=100.0)
    found = [int(length(jnp.asarray(k))) for k in (0, 20, 60, 100, 10_000)]
    assert found == [1, 1, 8, 15, 15]


def test_branches_are_long_where_a_fall_ends_them_and_short_where_nothing_does():
    lengths = {task.name: make_agent("mbpo", task).length for task in (TASK, tasks.cartpole_balance())}
    assert {name: int(length(jnp.asarray(0))) for name, length in lengths.items()} == {
        "cartpole-continuous": 200,
        "cartpole-balance": 20,
    }


class Explodes(eqx.Module):
    """A model whose every prediction is infinite."""

    inner: NetworkDynamics

    @classmethod
    def init(cls, task, *, key, hidden):
        return cls(NetworkDynamics.init(task, key=key, hidden=hidden))

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, s, a, *, key=None):
        return jnp.full_like(s, jnp.inf)


def test_a_model_that_explodes_is_counted_and_the_learner_learns_from_real_rows(monkeypatch):
    carry = SMALL.init(TASK, KEY)

    def fit(self, members, buffer, key):
        return members, Explodes(members), {}

    monkeypatch.setattr(EnsembleTrainer, "fit", fit)
    after, said = jax.jit(lambda *x: SMALL.update(*x))(carry, TASK, filled(TASK), filled(TASK).sample(KEY, 4), KEY)
    assert said["imagined_rejected"] == 2 * 4 * 3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    assert not np.array_equal(after.learner.actor.weights[0], carry.learner.actor.weights[0])


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: OffPolicyPractice(updates=10, rounds=3), r"updates \(10\) must be a multiple of rounds \(3\)"),
        (lambda: OffPolicyPractice(batch=0), "batch must be a whole number of at least 1, got 0"),
        (lambda: OnPolicyPractice(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: make_agent("mbpo", TASK, {"length": -3}), "length must be at least 1 step of the model, got -3"),
        (lambda: EnsembleTrainer(members=3, elites=4), "elites must be at most the number of members, 3; got 4"),
    ],
)
def test_sizes(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize(
    "agent, words",
    [
        (MBPO(SAC(hidden=(8,)), practice=OnPolicyPractice()), r"SAC learns from transitions \[N\], not from streams"),
        (
            MBPO(PPO(hidden=(8,)), practice=OffPolicyPractice()),
            r"PPO learns from its own streams .* \[N, h\], not .* \[256\]",
        ),
        (OffPolicy(PPO(hidden=(8,))), r"PPO learns from its own streams .* \[N, h\], not .* \[256\]"),
        (OnPolicy(SAC(hidden=(8,))), r"SAC learns from transitions \[N\], not from streams of steps \[4, 16\]"),
    ],
)
def test_a_learner_is_told_which_practice_is_its_own(agent, words):
    buffer = filled(TASK)
    fresh = jax.tree.map(lambda x: jnp.broadcast_to(x[:16], (4, *x[:16].shape)), buffer.rows)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: agent.update(agent.init(TASK, KEY), TASK, buffer, fresh, KEY))


@pytest.mark.slow
def test_mbpo_balances_the_cart_pole():
    """Within 500 real steps, of which mbrl-lib explores 5000; see `python -m benchmarks mbpo`."""
    task = tasks.cartpole_continuous()
    learned = learn(make_agent("mbpo", task), task, KEY[None], real_steps=500, evaluations=4)
    assert max(record["evaluation"].mean() for record in learned.records[1:]) == 200
