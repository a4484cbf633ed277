"""MPC through a learned ensemble: settings, planners, seeds; models, rewards and episodes that are not as they should be."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import DDP, ILQR, MultipleShooting, OptaxSolver, Sampling, Shooting, rollout, tasks
from diffmbrl.agents import Agent, MPCAgent, System, learn
from diffmbrl.agents.collect import collect_steps, reset_places
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.models import TS1, Ensemble, GaussianDynamics, NetworkDynamics, Training, TSInfinity
from diffmbrl.planners import CEM, MPC, MPPI, ArgMax, Coloured, Normal, Receding, Uniform
from tests.problems import replaced, same_tree, some_slow

KEYS = jax.random.split(jax.random.key(0), 2)
TASK = tasks.cartpole_balance(horizon=12)
WORLD = EnsembleTrainer(Training(epochs=3, batch=32), members=3, elites=2, hidden=(8,), model=NetworkDynamics.init)
SIZES: dict[str, Any] = {"world": WORLD, "horizon": 5, "first": 2, "warmup": 24, "every": 12}
CARTS = Sampling(CEM(elites=4), samples=16, particles=4)


def agent(planner: Any = None, task: Any = TASK, **options: Any) -> MPCAgent:
    return MPCAgent(task, planner, **(SIZES | options))


@cache
def learned():
    return learn(agent(), TASK, KEYS, real_steps=60, evaluations=2, evaluate_every=10)


def test_the_contract():
    made, found = agent(), learned()
    assert isinstance(made, Agent)
    assert [int(x) for x in found.buffer.size] == [60, 60]
    for record in found.records[1:]:
        for name in ("model_error", "disagreement", "model_rejected"):
            assert record[name].shape == (2,) and np.all(np.isfinite(record[name])), name
        assert not record["refused"].any() and not record["rejected"].any()
        assert record["cpu_seconds"] > 0
    # Its episodes go on over the boundaries of iterations, and are the task's.
    lengths = np.diff(np.flatnonzero(np.asarray(found.buffer.rows.last[0, 24:])))
    assert np.all(lengths == TASK.horizon)
    # What it says it plans on is what it plans on: the elites.
    carry = jax.tree.map(lambda x: x[0], found.carry)
    [planned] = [x for x in jax.tree.leaves(made.best(carry, TASK), is_leaf=is_ensemble) if is_ensemble(x)]
    same_tree(planned, made.model(carry, TASK))
    assert made.model(carry, TASK).size == 2


def is_ensemble(x: Any) -> bool:
    return isinstance(x, Ensemble)


@pytest.mark.slow
def test_equal_seeds_are_equal_and_different_ones_differ():
    found = learned()
    again = learn(agent(), TASK, KEYS, real_steps=60, evaluations=2, evaluate_every=10)
    same_tree(again.carry, found.carry, rtol=0, atol=0)
    same_tree(again.buffer.rows, found.buffer.rows, rtol=0, atol=0)
    a = np.asarray(found.buffer.rows.a)
    assert np.abs(a[0] - a[1]).max() > 0.1
    # Alone, a seed sees the same random actions, and plans that agree to rounding.
    alone = learn(agent(), TASK, KEYS[1:], real_steps=36)
    np.testing.assert_array_equal(alone.buffer.rows.a[0, :24], a[1, :24])
    np.testing.assert_allclose(alone.buffer.rows.a[0, 24:36], a[1, 24:36], rtol=1e-2, atol=1e-2)


# Model-based RL 0.5, 1.0 and 1.5.


def test_the_three_versions_are_settings_of_one_program():
    versions = {"0.5": agent(fits=1), "1.0": agent(hold=5), "1.5": agent()}
    assert len({jax.tree.structure(x) for x in versions.values()}) == 1
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in versions.values()]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.slow
def test_version_half_fits_once():
    once = learn(agent(fits=1), TASK, KEYS, real_steps=60)
    first = learn(agent(), TASK, KEYS, real_steps=36)
    same_tree(once.carry.members, first.carry.members, rtol=1e-5, atol=1e-6)
    assert once.carry.updates.tolist() == [3, 3]
    moved = [np.abs(np.asarray(x - y)).max() for x, y in leaves(once.carry.elites, learned().carry.elites)]
    assert max(moved) > 1e-3
    # The model that is kept is judged by steps that it has not seen.
    errors = [float(record["model_error"][0]) for record in once.records[1:]]
    assert np.all(np.isfinite(errors)) and errors[1] != errors[0]


def leaves(one: Any, other: Any):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


def test_version_one_follows_its_plans_to_their_end():
    """Between two plans it does what the plan says, whatever the state; version 1.5 does not."""
    task = replaced(TASK, dynamics=Ensemble(jax.tree.map(lambda x: x[None], TASK.dynamics)))
    s0, H = jnp.asarray([0.5, 0.1, 0.0, 0.0]), 4
    plant = tasks.noisy(TASK, std=0.2)

    def actions(hold, plant, key):
        mpc = MPC.init(CARTS, task, horizon=H, iterations=2, hold=hold, window=Receding(), key=jax.random.key(1))
        return np.asarray(jax.jit(rollout)(mpc, plant, s0, key).a)

    one, other = (actions(H, plant, key) for key in KEYS)
    np.testing.assert_array_equal(one[1:H], follow_on(task, s0, H, KEYS[0])[1:])
    assert np.abs(one[H:] - other[H:]).max() > 0.1
    replanned = actions(1, plant, KEYS[0])
    np.testing.assert_array_equal(replanned[0], one[0])
    assert np.abs(replanned[1:H] - one[1:H]).max() > 1e-3


def follow_on(task, s0, H, key):
    """The actions of the first plan, by the planner itself, under the keys of an MPC's first step."""
    mpc = MPC.init(CARTS, task, horizon=H, iterations=2, hold=H, window=Receding(), key=jax.random.key(1))
    key_a, _ = jax.random.split(jax.random.fold_in(key, 0))
    _, memory = jax.jit(lambda mpc, s, key: mpc.step(mpc.start(TASK), s, key=key))(mpc, s0, key_a)
    return np.concatenate([memory.plan.a[:1] * 0, memory.plan.a[: H - 1]])


@pytest.mark.parametrize("hold", [0, 6])
def test_a_plan_is_held_for_at_most_its_length(hold):
    with pytest.raises(ValueError, match=f"hold must be from 1 to the 5 steps of a plan, got {hold}"):
        agent(hold=hold)


# Planners.

PLANNERS = {
    "ilqr, limits in the plant": (ILQR(), None),
    "ilqr, limits in the sweep": (None, None),
    "ddp": (DDP(), None),
    "multiple shooting": (MultipleShooting(), None),
    "random shooting": (Sampling(ArgMax(), draw=Uniform(), samples=8), TS1()),
    "cem on gaussians": (CARTS, TSInfinity()),
    "icem": (Sampling(CEM(elites=4), draw=Coloured(1.0), samples=16, keep=2), None),
    "mppi": (Sampling(MPPI(), draw=Normal(), samples=16), None),
    "adam": (Shooting(OptaxSolver(optax.adam, learning_rate=0.1), particles=4, starts=2), TSInfinity()),
    "l-bfgs": (Shooting(OptaxSolver(optax.lbfgs, memory_size=3)), None),
}


# Of each kind one: by derivatives and drawn, through networks and through Gaussians.
THROUGH = {"ilqr, limits in the sweep", "cem on gaussians"}


@pytest.mark.parametrize("name", some_slow(PLANNERS, *(set(PLANNERS) - THROUGH)))
def test_every_planner_acts_through_the_ensemble(name):
    planner, propagation = PLANNERS[name]
    gaussians = EnsembleTrainer(WORLD.training, members=3, elites=2, hidden=(8,), model=GaussianDynamics.init)
    world = gaussians if name.endswith("gaussians") else WORLD
    made = agent(planner, world=world, propagation=propagation, noise=0.1)
    system = System(TASK)

    @jax.jit
    def act(made, key):
        carry = made.init(system.view, key)
        policy = made.policy(carry, system.view)
        return collect_steps(policy, system, reset_places(policy, system, key, 2), key, steps=3)[1]

    found = act(made, KEYS[0])
    assert np.all(found.keep)
    a = np.asarray(found.steps.a)
    assert np.all(np.isfinite(a)) and np.all(np.abs(a) <= 10) and np.ptp(a) > 0


def test_a_gaussian_ensemble_is_planned_through_at_its_mean_by_what_does_not_draw():
    world = EnsembleTrainer(Training(epochs=2), members=2, elites=2, hidden=(8,), model=GaussianDynamics.init)
    assert agent(world=world).mpc.key is None
    assert agent(CARTS, world=world, propagation=TS1()).mpc.key is not None


# What is not as it should be.


@pytest.mark.slow
def test_models_that_become_non_finite_are_rejected_and_counted():
    world = EnsembleTrainer(
        Training(epochs=3, learning_rate=1e30), members=2, elites=2, hidden=(8,), model=NetworkDynamics.init
    )
    found = learn(agent(world=world), TASK, KEYS, real_steps=60)
    assert all(np.all(record["model_rejected"] == 2) for record in found.records[1:])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found.carry.members))
    assert np.all(np.isfinite(found.buffer.rows.a))


def test_a_planner_on_a_model_that_is_not_finite_keeps_its_plan():
    """Its plan of resting actions, in every planner: not the actions of whichever sequence met the NaN last."""
    system = System(TASK)
    for planner in (None, CARTS):
        made = agent(planner)
        carry = made.init(system.view, KEYS[0])
        carry = carry._replace(elites=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), carry.elites))
        a, memory = jax.jit(lambda m, c: m.best(c, TASK).step(m.best(c, TASK).start(TASK), jnp.ones(4), key=KEYS[0]))(
            made, carry
        )
        assert np.all(a == 0) and memory.info.nonfinite > 0


class NaNBeyond(eqx.Module):
    """A reward that is not a number in part of the states."""

    inner: Any

    def __call__(self, s, a):
        return jnp.where(s[0] > 0.3, jnp.nan, self.inner(s, a))


def test_steps_with_rewards_of_nan_are_left_out_and_counted():
    task = replaced(TASK, reward=NaNBeyond(TASK.reward))
    found = learn(agent(CARTS, task, propagation=TSInfinity()), task, KEYS, real_steps=60)
    rejected = sum(record["rejected"] for record in found.records)
    assert np.all(rejected > 0)
    assert found.buffer.size.tolist() == (60 - rejected).tolist()
    for seed in range(2):
        rows = jax.tree.map(lambda x, seed=seed: x[seed, : int(found.buffer.size[seed])], found.buffer.rows)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(rows))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found.carry.members))


@pytest.mark.slow
def test_episodes_of_one_step_are_episodes():
    task = replaced(TASK, done=Always())
    with pytest.raises(ValueError, match="none is usable"):
        learn(agent(CARTS, task), task, KEYS, real_steps=36)
    short = tasks.cartpole_balance(horizon=1)
    found = learn(agent(task=short), short, KEYS, real_steps=48)
    assert np.all(found.buffer.rows.last) and np.all(np.isfinite(found.records[-1]["returns"]))


class Always(eqx.Module):
    def __call__(self, s):
        return jnp.ones((), bool)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"noise": -0.1}, ValueError, "noise must not be negative, got -0.1"),
        ({"fits": 0}, ValueError, "fits must be at least 1, got 0"),
        ({"planner": OptaxSolver(optax.sgd, learning_rate=0.1)}, TypeError, "kind 'plan'.*got OptaxSolver"),
        ({"horizon": 0}, ValueError, "horizon must be a whole number of at least 1, got 0"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        agent(**options)


@pytest.mark.slow
def test_ilqr_with_a_soft_margin_balances_within_300_steps():
    task = tasks.cartpole_continuous()
    made = MPCAgent(tasks.soft_margin(task), horizon=50, window=Receding())
    found = learn(made, task, KEYS[:1], real_steps=300, evaluations=4, evaluate_every=100)
    assert np.nanmax(found.records[-1]["returns"]) == 200
    assert np.all(found.records[-1]["evaluation"] == 200)
