"""Gymnasium's environments as real systems: equal to the equations where these are known, and refused where they do not fit."""

import io
import json
import sys
from typing import Any

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from diffmbrl import tasks
from diffmbrl.agents import HostSystem, RandomAgent, System, WithLearnedReward, learn, learnable, with_learned_reward
from diffmbrl.agents.collect import Acting, Real
from diffmbrl.agents.registry import make_agent
from diffmbrl.jobs.configs import LearnConfig, RunOptions
from diffmbrl.jobs.learn import race_agents, restore_agent
from diffmbrl.models import EndModel, RewardModel
from diffmbrl.policies import Neural
from diffmbrl.report import summary_text
from diffmbrl.rollout import episode_return
from diffmbrl.runs import read_metrics
from diffmbrl.tasks.adapters.gymnasium import KNOWN, NotGiven, environment
from tests.problems import of

KEYS = jax.random.split(jax.random.key(0), 2)
ZEROS = jnp.zeros(2, jnp.int32)


def pendulum(**options) -> HostSystem:
    return HostSystem(*environment("Pendulum-v1", **options))


def collected(system, agent, *, count, steps, role="policy"):
    carries = jax.vmap(lambda key: agent.init(system.view, key))(KEYS)
    who = Acting(agent, system.view, role)
    places = system.begin(who, carries, KEYS, count, ZEROS)
    after, found = system.collect(who, carries, places, KEYS, steps=steps)
    return carries, after, jax.tree.map(np.asarray, found)


class Acts(RandomAgent):
    """Its policy is a network, a different one for each seed."""

    def init(self, task, key):
        return Neural.init(task, hidden=(8,), key=key)

    def policy(self, carry, task):
        return carry

    best = policy


class Watched(eqx.Module):
    """The pendulum's equations, of what Gymnasium shows of it."""

    inner: eqx.Module

    def __call__(self, s, a, *, key=None):
        angle, rate = self.inner(jnp.stack([jnp.arctan2(s[1], s[0]), s[2]]), a)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), rate])


def test_the_pendulum_is_the_task_written_analytically():
    system = pendulum(horizon=30, given=["reward", "end"])
    carries, after, found = collected(system, Acts(), count=2, steps=60)
    truth = Watched(tasks.pendulum().dynamics)
    s, a, r, s_next, done, last = found.steps
    flat = lambda x: jnp.asarray(x.reshape(-1, x.shape[-1]))  # noqa: E731
    np.testing.assert_allclose(jax.vmap(truth)(flat(s), flat(a)), flat(s_next), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(system.view.reward)(flat(s), flat(a)), r.ravel(), rtol=1e-4, atol=1e-4)
    assert not done.any() and (last == (found.t == 29)).all() and found.keep.all()  # the clock ends no task
    np.testing.assert_array_equal(after.episode, 4 + np.broadcast_to(np.arange(2), (2, 2)))
    assert found.episode[0, 1].tolist() == [1] * 30 + [3] * 30
    inside = ~last[:, :, :-1]
    np.testing.assert_array_equal(s[:, :, 1:][inside], s_next[:, :, :-1][inside])
    # A whole episode of a policy is its rollout on the task.
    task = eqx.tree_at(lambda t: t.dynamics, system.view, truth)
    for seed in range(2):
        policy = jax.tree.map(lambda x, seed=seed: x[seed], carries)
        J = episode_return(policy, task, jnp.asarray(s[seed, 0, 0]))
        np.testing.assert_allclose(found.J[seed, 0, 29], J, rtol=1e-3)


def test_both_systems_are_real():
    assert isinstance(pendulum(), Real) and isinstance(System(tasks.lqr()), Real)


@pytest.mark.slow
def test_runs_repeat_and_evaluations_have_the_same_starts():
    system, agent = pendulum(horizon=20), RandomAgent(warmup=20, every=20)
    learned = learn(agent, system, KEYS, real_steps=60, evaluations=2)
    again = learn(agent, system, KEYS, real_steps=60, evaluations=2)
    for x, y in zip(jax.tree.leaves(learned.buffer), jax.tree.leaves(again.buffer), strict=True):
        np.testing.assert_array_equal(x, y)
    first, last = learned.records[0], learned.records[-1]
    np.testing.assert_array_equal(first["evaluation"], last["evaluation"])
    assert len(np.unique(first["evaluation"])) == 4
    alone = learn(agent, system, KEYS[1:], real_steps=60)
    np.testing.assert_array_equal(alone.buffer.rows.a[0], learned.buffer.rows.a[1])
    np.testing.assert_array_equal(alone.buffer.rows.s[0], learned.buffer.rows.s[1])


class Counts(eqx.Module):
    """A policy with a memory, that acts by how many steps its episode is old."""

    is_stateful = True
    unit: jax.Array

    def start(self, task):
        return jnp.zeros((), jnp.int32)

    def step(self, memory, s, *, key=None):
        return memory.astype(self.unit.dtype)[None] * self.unit, memory + 1


class Remembers(RandomAgent):
    def policy(self, carry, task) -> Any:
        return Counts(jnp.float32(0.1))


def test_a_memory_begins_with_its_episode():
    _, _, found = collected(pendulum(horizon=7), Remembers(), count=2, steps=20)
    np.testing.assert_allclose(found.steps.a[..., 0], 0.1 * found.t, rtol=1e-6)
    assert found.t.max() == 6


class Line(gymnasium.Env):
    """A place on a line, which ends beyond 1; `spoils` says what is not finite beyond .5."""

    observation_space, action_space = Box(-np.inf, np.inf, (1,)), Box(-0.3, 0.3, (1,))
    dt, metadata = 0.1, {}

    def __init__(self, spoils=""):
        self.spoils, self.actions = spoils, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-0.4, 0.4)
        return np.array([self.x]), {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.x += float(action[0])
        bad = abs(self.x) > 0.5
        seen = np.nan if self.spoils == "observation" and bad else self.x
        reward = np.inf if self.spoils == "reward" and bad else self.x
        return np.array([seen]), reward, abs(self.x) > 1, False, {}


@pytest.mark.parametrize("spoils", ["observation", "reward"])
def test_what_is_not_finite_is_not_kept_and_counted(spoils):
    system = HostSystem(*environment(lambda: Line(spoils), horizon=20))
    learned = learn(RandomAgent(every=50), system, KEYS, real_steps=200, evaluations=2)
    rejected = sum(record["rejected"] for record in learned.records)
    assert (rejected > 0).all()
    np.testing.assert_array_equal(rejected + learned.buffer.size, [200, 200])
    assert np.isfinite(np.asarray(learned.buffer.rows.s_next)).all()
    assert np.isnan(np.concatenate([record["returns"].ravel() for record in learned.records])).any()


class Spoilt(RandomAgent):
    """Its policy has no finite action where the place is positive."""

    def policy(self, carry, task) -> Any:
        return lambda s, key=None: jnp.where(s > 0, jnp.nan, 0.01)


def test_an_action_that_is_not_finite_is_not_taken():
    _, _, found = collected(HostSystem(*environment(Line, horizon=20)), Spoilt(), count=3, steps=40)
    bad = ~np.isfinite(found.steps.a[..., 0])
    assert bad.any() and (~found.keep == bad).all() and found.steps.last[bad].all()


def test_an_end_and_a_time_limit_are_told_apart():
    system = HostSystem(*environment(Line, horizon=6))
    _, _, found = collected(system, RandomAgent(), count=4, steps=60, role="first")
    beyond = np.abs(found.steps.s_next[..., 0]) > 1
    assert beyond.any() and (found.steps.done == beyond).all()
    assert (found.steps.last == (beyond | (found.t == 5))).all() and (found.t == 5).any()
    np.testing.assert_allclose(np.abs(found.steps.a).max(), 0.3, atol=0.02)


@pytest.mark.slow
def test_reward_and_end_are_learned_from_the_steps():
    plain = tasks.cartpole_continuous(horizon=50)
    blank = eqx.tree_at(
        lambda t: (t.reward, t.done),
        tasks.lqr(horizon=50),
        (NotGiven("reward"), NotGiven("end")),
        is_leaf=lambda x: x is None,
    )
    assert isinstance(with_learned_reward(RandomAgent(), plain), RandomAgent)
    system = HostSystem(*environment(Line, horizon=20))
    with pytest.raises(TypeError, match="the reward of this system is not given"):
        system.view.reward(jnp.zeros(1), jnp.zeros(1))
    view = learnable(system.view)
    assert isinstance(view.reward, RewardModel) and isinstance(view.done, EndModel)
    assert isinstance(learnable(blank).done, EndModel)
    agent = with_learned_reward(RandomAgent(warmup=300, every=100), view)
    assert isinstance(agent, WithLearnedReward)
    learned = learn(agent, HostSystem(system.make, view), KEYS, real_steps=500)
    assert (learned.records[-1]["reward_error"] < 0.05).all()
    models = jax.tree.map(lambda x: x[0, 0], learned.carry.models)
    rows = jax.tree.map(lambda x: x[0, :400], learned.buffer.rows)
    # The reward is where the step leads: what a function of state and action can say of it.
    np.testing.assert_allclose(jax.vmap(models["reward"])(rows.s, rows.a), rows.r, atol=0.15)
    assert np.mean(jax.vmap(models["end"])(rows.s_next) == rows.done) > 0.98 and rows.done.any()


@pytest.mark.slow
def test_a_planner_plans_with_the_reward_as_it_is_learned():
    """The agent has a reward of its own, which its plans are for: it is the fitted one too."""
    system = pendulum(horizon=20)
    view = learnable(system.view)
    options = {"warmup": 20, "every": 20, "seconds": 0.2, "members": 2, "units": 8}
    agent = with_learned_reward(make_agent("mpc", view, options), view)
    learned = learn(agent, HostSystem(system.make, view), KEYS, real_steps=60, evaluations=1)
    carry = jax.tree.map(lambda x: x[0], learned.carry)
    planned = agent.best(carry, view).model.reward
    fitted = jax.tree.map(lambda x: x[0], carry.models["reward"])
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(planned), jax.tree.leaves(fitted), strict=True))
    assert not np.array_equal(jax.tree.leaves(planned)[0], jax.tree.leaves(view.reward)[0])
    assert np.isfinite(learned.records[-1]["evaluation"]).all()


def test_inverted_pendulum_of_mujoco():
    pytest.importorskip("mujoco", reason="InvertedPendulum-v5 needs MuJoCo: the extra `gym`")
    pytest.importorskip("imageio", reason="Gymnasium's MuJoCo environments need imageio: the extra `gym`")
    system = HostSystem(*environment("InvertedPendulum-v5", given=["reward", "end"]))
    assert (system.view.n, system.view.m, system.horizon, system.view.dt) == (4, 1, 1000, 0.04)
    _, _, found = collected(system, RandomAgent(), count=2, steps=60, role="first")
    s, _, r, s_next, done, last = found.steps
    assert (
        done.any()
        and (done == last).all()
        and (done == jax.vmap(system.view.done)(s_next.reshape(-1, 4)).reshape(done.shape)).all()
    )
    assert (r[~done] == 1).all()
    np.testing.assert_allclose(s_next[..., 0] - s[..., 0], 0.04 * (s_next[..., 2] + s[..., 2]) / 2, atol=0.05)


SETTING = LearnConfig(
    task="gym:Pendulum-v1",
    agents=("random",),
    options={"warmup": 20, "every": 20},
    real_steps=60,
    budget=100.0,
    seeds=2,
    evaluations=2,
    horizon=10,
    parameters={"g": 9.0},
    noise=0.0,
    sensor_noise=0.0,
    key=0,
    x64=False,
    given=("end",),
)


def test_a_run_and_its_report(tmp_path):
    folder = race_agents(SETTING, RunOptions(out=tmp_path / "run", stream=io.StringIO()))
    records, _ = read_metrics(folder / "metrics.jsonl")
    assert [row["real_steps"] for row in of(records, "iteration")] == [20, 40, 60]
    assert of(records, "scene")[0]["state_names"] == list(KNOWN["Pendulum-v1"].states)
    assert "reward_error" in of(records, "iteration")[-1]["said"]
    assert json.loads((folder / "config.json").read_text())["given"] == ["end"]
    assert "random ends with a return" in summary_text(folder)
    assert "gym:Pendulum-v1" in (folder / "report.html").read_text()
    restored = restore_agent(folder)
    assert restored.system.view.done is None and isinstance(restored.agent, WithLearnedReward)
    assert restored.system.make().unwrapped.g == 9.0


class Wide(Line):
    observation_space = Dict({"x": Box(-1, 1, (1,))})


class Images(Line):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Whole(Line):
    action_space = Box(0, 3, (1,), np.int32)


class Timeless(Line):
    dt = None


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("CartPole-v1", {}, r"the action space of 'CartPole-v1' is Discrete\(2\): expected a Box"),
        (Wide, {"horizon": 5}, "the observation space of 'Wide' is Dict.*FlattenObservation"),
        (Images, {"horizon": 5}, r"has shape \[8, 8, 3\]: expected one axis; images are not for this"),
        (Whole, {"horizon": 5}, "is a Box of int32: expected floats"),
        (Line, {}, "'Line' has no time limit of its own: give a horizon"),
        (Line, {"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        (Timeless, {"horizon": 5}, "give dt"),
        (Line, {"horizon": 5, "given": ["reward"]}, "the reward of 'Line' cannot be given by name, only of: Pendulum-v1"),
        ("Pendulum-v1", {"given": ["rewrad"]}, "did you mean 'reward'"),
        ("Pendulum-v1", {"parameters": {"gravity": 9.8}}, "'Pendulum-v1' does not take gravity"),
        ("Pendlum-v1", {}, "Gymnasium does not make 'Pendlum-v1'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        environment(source, **options)


def _without():
    raise ModuleNotFoundError("No module named 'imageio'", name="imageio")


def test_without_what_it_needs(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"needs the package imageio: pip install 'diffmbrl\[gym\]'"):
        environment(_without)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffmbrl\[gym\]'"):
        environment("Pendulum-v1")
