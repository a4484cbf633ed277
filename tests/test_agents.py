"""What every agent promises: traced once, types kept, seeds that differ and repeat, bad rewards, episodes over at once."""

from functools import cache
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import tasks
from diffmbrl.agents import Agent, System, learn
from diffmbrl.agents.collect import collect_steps, reset_places
from diffmbrl.agents.learn import Learned
from diffmbrl.agents.registry import AGENTS as REGISTERED
from diffmbrl.core import is_plan
from diffmbrl.models.buffer import Buffer
from tests.agents import AGENTS, Row

KEYS = jax.random.split(jax.random.key(0), 2)
each = pytest.mark.parametrize("row", AGENTS, ids=[row.name for row in AGENTS])
ran = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in AGENTS]
)


class Spiked(eqx.Module):
    """A reward that is NaN beyond a rate of rotation."""

    inner: Any
    most: jax.Array

    def __call__(self, s, a):
        return jnp.where(jnp.abs(s[1]) > self.most, jnp.nan, self.inner(s, a))


class Over(eqx.Module):
    """Every episode is over before it begins."""

    def __call__(self, s):
        return s[0] > -jnp.inf


def task(most: float = jnp.inf) -> Any:
    """Reward not finite beyond `most`; the same structure for all."""
    plain = tasks.pendulum(horizon=10)
    return eqx.tree_at(lambda t: t.reward, plain, Spiked(plain.reward, jnp.asarray(most, plain.a_low.dtype)))


@cache
def learned(row: Row, *, alone: bool = False, most: float = np.inf) -> Learned:
    """Of both seeds, or the second alone."""
    keys = KEYS[1:] if alone else KEYS
    return learn(row.make(task()), task(most), keys, real_steps=row.real_steps, evaluations=2)


def lane(row: Row, system: System, key: Any) -> tuple[Any, ...]:
    """What an update is given, as shapes: agent, carry, task, buffer, the latest steps, a key; in the task's precision."""
    dtype = system.view.weights.dtype
    agent = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, row.make(system.view)
    )

    def draw(agent, system, key):
        carry = agent.init(system.view, key)
        policy = agent.policy(carry, system.view)
        places = reset_places(policy, system, key, agent.environments)
        steps = collect_steps(policy, system, places, key, steps=agent.every // agent.environments)[1].steps
        return carry, steps

    buffer = jax.eval_shape(lambda: Buffer.empty(system.view, row.real_steps))
    carry, steps = jax.eval_shape(draw, agent, system, key)
    return agent, carry, system.view, buffer, steps, key


def test_every_agent_has_a_row():
    assert {row.name for row in AGENTS} == set(REGISTERED)


@each
def test_it_is_an_agent_of_arrays(row):
    agent = row.make(task())
    assert isinstance(agent, Agent)
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(agent))
    assert agent.warmup >= agent.every >= 1 and agent.every % agent.environments == 0


@ran
def test_another_value_of_a_hyperparameter_traces_nothing(row):
    """All leaves at once: a sweep is a vmap, and a new value does not compile."""
    agent, *rest = lane(row, System(task()), jax.random.key(0))
    chex.clear_trace_counter()  # which counts all rows' functions as one
    traced = jax.jit(chex.assert_max_traces(lambda agent, *rest: agent.update(*rest), n=1))
    traced.eval_shape(agent, *rest)
    other = jax.tree.map(lambda x: x + jnp.ones((), x.dtype) if jnp.issubdtype(x.dtype, jnp.number) else x, agent)
    traced.eval_shape(other, *rest)


@each
def test_what_is_learned_keeps_its_type(row):
    """Of the task's precision, in both of them, and as it was before the update."""
    agent, carry, *rest = lane(row, System(task()), jax.random.key(0))
    after, said = jax.eval_shape(agent.update, carry, *rest)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [(x.shape, x.dtype) for x in jax.tree.leaves(carry)]
    assert jax.tree.structure(after) == jax.tree.structure(carry)
    assert all(x.shape == () for x in said.values()) and "refused" not in said


@ran
def test_in_double_precision(row, x64):
    agent, carry, *rest = lane(row, System(task()), jax.random.key(0))
    after, said = jax.eval_shape(agent.update, carry, *rest)
    floats = [x.dtype for x in jax.tree.leaves((carry, after, said)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) <= {jnp.dtype(jnp.float64)}


@each
def test_its_policies_act_again_and_again(row):
    agent, carry, view, *_ = lane(row, System(task()), jax.random.key(0))
    for part in (agent.first, agent.policy, agent.best):
        assert not is_plan(jax.eval_shape(part, carry, view))
    shown = jax.eval_shape(lambda carry: agent.model(carry, view), carry) is not None
    assert shown == row.model
    if shown:
        s, a = view.state_shape, jax.ShapeDtypeStruct((view.m,), view.a_low.dtype)
        step = jax.eval_shape(lambda carry, s, a: agent.model(carry, view)(s, a, key=jax.random.key(0)), carry, s, a)
        assert step == s


@pytest.mark.slow  # test_resume has an agent whose second run is the first to the bit
@ran
def test_equal_seeds_are_equal(row):
    one = learned(row)
    two = learn(row.make(task()), task(), KEYS, real_steps=row.real_steps, evaluations=2)
    for x, y in zip(leaves((one.carry, one.buffer)), leaves((two.carry, two.buffer)), strict=True):
        np.testing.assert_array_equal(x, y)


@ran
def test_other_seeds_are_not_equal(row):
    a = np.asarray(learned(row).buffer.rows.a)
    assert not np.array_equal(a[0], a[1])


@ran
def test_beside_other_seeds_as_alone(row):
    both, one = learned(row), learned(row, alone=True)
    for x, y in zip(leaves((both.carry, both.buffer)), leaves((one.carry, one.buffer)), strict=True):
        np.testing.assert_allclose(x[1], y[0], rtol=row.tolerance, atol=row.tolerance)
    final = [run.records[-1]["evaluation"] for run in (both, one)]
    np.testing.assert_allclose(final[0][1], final[1][0], rtol=row.tolerance, atol=row.tolerance)


@ran
def test_a_reward_that_is_not_finite_is_rejected_and_counted(row):
    """The pendulum of the first steps turns at 2.5 rad/s now and then. What is kept is finite, and of what is learned whatever
    was so at first: a solver may begin with a number that it does not know yet."""
    run = learned(row, most=2.5)
    rejected = sum(record["rejected"] for record in run.records)
    assert (rejected > 0).all()
    taken = run.records[-1]["real_steps"]
    np.testing.assert_array_equal(rejected + np.asarray(run.buffer.added), [taken, taken])
    assert all(np.isfinite(x).all() for x in leaves(run.buffer))
    agent = row.make(task())
    begun = jax.jit(lambda view, key: agent.init(view, key))(System(task()).view, KEYS[0])
    for x, x0 in zip(leaves(run.carry), leaves(begun), strict=True):
        assert np.isfinite(x[:, np.isfinite(x0)]).all()


@ran
def test_episodes_that_are_over_at_once_are_refused(row):
    over = eqx.tree_at(lambda t: t.done, task(), Over(), is_leaf=lambda x: x is None)
    with pytest.raises(ValueError, match=r"none is usable|ended in the middle of its starts"):
        learn(row.make(over), over, KEYS, real_steps=row.real_steps)


def leaves(tree: Any) -> list[np.ndarray]:
    """Its arrays; keys as their numbers."""
    found = jax.tree.leaves(tree)
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in found]
