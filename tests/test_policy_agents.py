"""Agents that improve a policy through a learned model, and the hybrid that plans with it."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import (
    BPTT,
    CEM,
    ILQR,
    Gaussian,
    GaussNewton,
    LikelihoodRatio,
    Linear,
    Neural,
    OpenLoop,
    OptaxSolver,
    Sampling,
    ShortHorizon,
    Truncated,
    episode_return,
    episode_returns,
    rollout,
    tasks,
)
from diffmbrl.agents import learn
from diffmbrl.agents.bptt_agent import PolicyAgent, redrawn
from diffmbrl.agents.collect import Unknown
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.exploration import GaussianExploration
from diffmbrl.agents.hybrid import Hybrid, Proposed, ToCritic
from diffmbrl.models import TS1, NetworkDynamics, Training
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.optimizers.short_horizon.critic import Critic, inputs
from diffmbrl.planners.windows import Clocked, Ending

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 2)
TASK = tasks.pendulum_swingup(horizon=16)
WORLD = EnsembleTrainer(Training(epochs=3, batch=32), members=2, elites=2, hidden=(8,), model=NetworkDynamics.init)
POLICY = Neural.init(TASK, hidden=(8,), key=KEY)
ADAM = OptaxSolver(optax.adam, learning_rate=1e-2)
SHORT = ShortHorizon(ADAM, window=4, environments=8, hidden=(8,), epochs=1, batches=2)
SIZES = {"world": WORLD, "starts": 8, "updates": 2, "warmup": 32, "every": 16}

AGENTS = {
    "adam": lambda: PolicyAgent(ADAM, POLICY, **SIZES),
    "truncated": lambda: PolicyAgent(
        OptaxSolver(optax.adam, learning_rate=1e-2, gradient=BPTT(Truncated(4))), POLICY, horizon=8, **SIZES
    ),
    "score function": lambda: PolicyAgent(
        OptaxSolver(optax.adam, learning_rate=1e-2, gradient=LikelihoodRatio()),
        Gaussian.around(POLICY, TASK, std=0.3),
        propagation=TS1(),
        **SIZES,
    ),
    "gauss-newton": lambda: PolicyAgent(GaussNewton(), POLICY, horizon=8, **SIZES),
    "short horizon": lambda: PolicyAgent(SHORT, POLICY, **SIZES),
    "hybrid": lambda: Hybrid(
        TASK, PolicyAgent(SHORT, POLICY, **SIZES), Sampling(CEM(elites=4), samples=16, std=1.0), horizon=4, iterations=1
    ),
}
FAST = ("adam",)  # each run is a program of its own; test_agents.py has the contract for all rows
every_agent = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in AGENTS]
)


@cache
def run(name: str):
    return learn(AGENTS[name](), TASK, KEYS, real_steps=64, evaluations=2)


# The contract.


@every_agent
def test_a_run(name: str) -> None:
    learned = run(name)
    assert [record["real_steps"] for record in learned.records] == [32, 48, 64]
    for record in learned.records[1:]:
        assert record["refused"].tolist() == [0, 0] and record["rejected"].tolist() == [0, 0]
        assert record["nonfinite"].tolist() == [0, 0]
        for said in ("model_error", "disagreement", "J_model", "J_model_before", "accepted"):
            assert np.shape(record[said]) == (2,) and np.all(np.isfinite(record[said])), said
    assert learned.carry.updates.tolist() == [2, 2]
    assert np.all(np.isfinite(learned.records[-1]["evaluation"]))
    # Actions stay within the limits (here there are none), and the states are the plant's.
    rows = learned.buffer.rows
    s_next = jax.vmap(jax.vmap(TASK.dynamics))(rows.s[:, :64], rows.a[:, :64])
    np.testing.assert_allclose(s_next, rows.s_next[:, :64], rtol=1e-5, atol=1e-5)


@every_agent
def test_seeds_differ_and_equal_seeds_are_equal(name: str) -> None:
    learned = run(name)
    policies = jax.tree.leaves(learned.carry.policy)
    assert any(np.any(x[0] != x[1]) for x in policies)
    again = learn(AGENTS[name](), TASK, KEYS, real_steps=64, evaluations=2)
    jax.tree.map(np.testing.assert_array_equal, learned.carry.policy, again.carry.policy)
    np.testing.assert_array_equal(learned.records[-1]["evaluation"], again.records[-1]["evaluation"])


@pytest.mark.slow
def test_a_new_hyperparameter_does_not_recompile() -> None:
    carry, buffer = blank("adam"), filled()
    first, _ = improve(AGENTS["adam"](), carry, VIEW, buffer)
    programs = improve._cache_size()
    other = PolicyAgent(OptaxSolver(optax.adam, learning_rate=1e-3), POLICY, noise=0.3, fresh=0.5, **SIZES)
    second, _ = improve(other, carry, VIEW, buffer)
    assert improve._cache_size() == programs
    assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (first.policy, second.policy)), strict=True))


# Known answers.

VIEW = eqx.tree_at(lambda t: t.dynamics, TASK, Unknown())


def filled(size: int = 40, task=TASK, spoil: bool = False) -> Buffer:
    """Steps of random actions; spoilt, with states of the size of infinity."""
    key_s, key_a = jax.random.split(KEY)
    s = jax.random.normal(key_s, (size, task.n))
    a = jax.random.normal(key_a, (size, task.m))
    s_next = jax.vmap(task.dynamics)(s, a)
    no = jnp.zeros(size, bool)
    steps = Transition(s, a, jax.vmap(task.reward)(s, a), 1e30 * s_next if spoil else s_next, no, no)
    t = jnp.arange(size, dtype=jnp.int32)
    return Buffer.empty(task, 64).add(steps, jnp.zeros(size, jnp.int32), t)


def fresh_of(buffer: Buffer) -> Transition:
    return jax.tree.map(lambda x: x[None, :16], buffer.rows)


@jax.jit
def improve(agent, carry, task, buffer):
    return agent.update(carry, task, buffer, fresh_of(buffer), KEY)


@jax.jit
def step(solver, policy, carry, task, s0, key=KEY):
    return solver.update(policy, carry, task, s0, key=key)


def blank(name: str):
    return AGENTS[name]().init(VIEW, KEY)


class Known(EnsembleTrainer):
    """A world that knows: its one member is the true dynamics."""

    members: int = eqx.field(static=True, default=1)
    elites: int = eqx.field(static=True, default=1)

    def init(self, task, key):
        return jax.tree.map(lambda x: x[None], TASK.dynamics)

    def fit(self, members, buffer, key):
        return members, members, {}


def test_with_the_true_dynamics_it_is_the_solver_itself() -> None:
    """With a model that is the plant, starts of the task and one update: Adam on BPTT, as `solve` would make it."""
    sizes = SIZES | {"updates": 3, "world": Known()}
    agent = PolicyAgent(ADAM, POLICY, fresh=1.0, **sizes)
    carry, buffer = agent.init(VIEW, KEY), filled()
    learned, said = improve(agent, carry, VIEW, buffer)
    _, key_starts, key_solver = jax.random.split(KEY, 3)
    s0 = TASK.starts(jax.random.split(key_starts, 3)[1], 8)
    policy, state = carry.policy, carry.solver
    J = []
    for _ in range(3):
        policy, state, info = step(ADAM, policy, state, TASK, s0, key_solver)
        J.append(info.J)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), learned.policy, policy)
    np.testing.assert_allclose(said["J_model"], J[-1], rtol=1e-5)


@pytest.mark.slow
def test_on_a_linear_system_gauss_newton_finds_riccatis_gain_through_a_model_that_it_learned() -> None:
    """A linear policy on `lqr`, whose model is a network without hidden layers: the learned optimum is the true one."""
    task = tasks.lqr(horizon=20)
    world = EnsembleTrainer(
        Training(epochs=60, batch=32, patience=60, learning_rate=3e-2, bootstrap=False),
        members=1, elites=1, hidden=(), model=NetworkDynamics.init,
    )  # fmt: skip
    agent = PolicyAgent(
        GaussNewton(), Linear.zeros(task), world=world, fresh=1.0, starts=8, updates=6, warmup=200, every=100
    )
    learned = learn(agent, task, KEYS, real_steps=400, evaluations=16)
    direct = Linear.zeros(task)
    solver, s0 = GaussNewton(), task.starts(KEY, 32)
    state = solver.init(direct, task)
    for _ in range(10):
        direct, state, _ = step(solver, direct, state, task, s0)
    np.testing.assert_allclose(learned.carry.policy.K, np.stack([direct.K] * 2), rtol=0.05, atol=0.05)
    assert np.all(learned.records[-1]["model_error"] < 1e-4)


@pytest.mark.slow
def test_the_best_members_on_what_was_held_out_are_imagined_with() -> None:
    world = EnsembleTrainer(WORLD.training, members=3, elites=1, hidden=(8,), model=NetworkDynamics.init)
    agent, buffer = PolicyAgent(ADAM, POLICY, **(SIZES | {"world": world})), filled()
    carry = agent.init(VIEW, KEY)
    learned, _ = improve(agent, carry, VIEW, buffer)
    errors = [
        float(jnp.mean(jax.vmap(model.row_loss)(jax.tree.map(lambda x: x[:40], buffer.rows))))
        for model in (jax.tree.map(lambda x, e=e: x[e], learned.members) for e in range(3))
    ]
    held = [np.array_equal(learned.elites.net.weights[0][0], W) for W in learned.members.net.weights[0]]
    assert sum(held) == 1 and errors[held.index(True)] < max(errors)


def test_the_starts_are_the_buffers_and_the_tasks() -> None:
    buffer = filled()
    for share, of_task in [(0.0, False), (1.0, True)]:
        agent = PolicyAgent(ADAM, POLICY, fresh=share, **SIZES)
        s = np.asarray(agent._starts(VIEW, buffer, KEY))
        rows = {tuple(row) for row in np.asarray(buffer.rows.s[:40]).tolist()}
        assert all((tuple(row) in rows) != of_task for row in s.tolist())
        assert np.all(s[:, 1] == 0) == of_task  # the task's starts are at rest


def test_noise_is_of_the_half_width_and_within_the_limits() -> None:
    task = tasks.cartpole_balance()
    policy = GaussianExploration(Linear.zeros(task), jnp.array(0.2), task.a_low, task.a_high)
    a = np.asarray(jax.vmap(lambda k: policy(jnp.zeros(4), key=k))(jax.random.split(KEY, 4000)))
    np.testing.assert_allclose(a.std(), 0.2 * float(task.a_high[0]), rtol=0.05)
    assert np.all(np.asarray(policy(jnp.zeros(4))) == 0)
    wide = GaussianExploration(Linear.zeros(task), jnp.array(5.0), task.a_low, task.a_high)
    a = np.asarray(jax.vmap(lambda k: wide(jnp.zeros(4), key=k))(jax.random.split(KEY, 100)))
    assert np.all(np.abs(a) <= float(task.a_high[0])) and np.mean(np.abs(a) == float(task.a_high[0])) > 0.5


def test_networks_are_drawn_anew_at_their_scale() -> None:
    big = Neural.init(TASK, hidden=(400,), key=KEY)
    other = redrawn(Gaussian.around(big, TASK, std=0.1), jax.random.key(1))
    assert other.log_std == jnp.log(0.1)
    for W, V in zip(big.net.weights, other.mean.net.weights, strict=True):
        assert not np.any(W == V)
        np.testing.assert_allclose(np.std(V), np.std(W), rtol=0.2)
    same = Linear.zeros(TASK)
    jax.tree.map(np.testing.assert_array_equal, redrawn(same, KEY), same)


# The hybrid's pieces.


def test_a_proposal_is_where_the_search_begins_if_it_is_better() -> None:
    task = Ending().task(TASK, 8)
    s0 = Clocked(jnp.array([0.3, 0.0]), jnp.array(8.0))
    bad, good = OpenLoop(jnp.full((8, 1), 3.0)), Linear(jnp.array([[-6.0, -2.0]]), jnp.zeros(1))
    for plan, proposal, better in [
        (bad, good, True),
        (OpenLoop(rollout_of(good, task, s0)), Linear.zeros(TASK), False),
    ]:
        planner = Proposed(Sampling(CEM(elites=4), samples=16, std=1.0), proposal)
        found, _, info = step(planner, plan, planner.init(plan, task), task, s0)
        begun = rollout_of(proposal, task, s0) if better else plan.a
        np.testing.assert_allclose(info.J, episode_return(OpenLoop(begun), task, s0), rtol=1e-5)
        assert episode_return(found, task, s0) >= info.J - 1e-5


def rollout_of(policy, task, s0):
    from diffmbrl.agents.hybrid import _OnClock

    return rollout(_OnClock(policy), task, s0).a


def test_a_proposal_that_is_not_finite_is_not_taken() -> None:
    task = Ending().task(TASK, 8)
    s0, plan = Clocked(jnp.array([0.3, 0.0]), jnp.array(8.0)), OpenLoop(jnp.zeros((8, 1)))
    planner = Proposed(Sampling(CEM(elites=4), samples=16, std=1.0), Linear(jnp.full((1, 2), jnp.nan), jnp.zeros(1)))
    found, _, info = step(planner, plan, planner.init(plan, task), task, s0)
    assert np.all(np.isfinite(found.a)) and int(info.nonfinite) >= 1


def test_a_plan_ends_with_the_critics_value_or_with_the_episode() -> None:
    critic = Critic.init(TASK, hidden=(4,), key=KEY).rescaled(jnp.array(2.0), jnp.array(1.0))
    task = ToCritic(critic).task(TASK, 5)
    s = jnp.array([0.3, -0.2])
    for left, t in [(1.0, 15), (11.0, 5)]:
        expected = critic(inputs(TASK, s, jnp.array(t, jnp.int32)))
        np.testing.assert_allclose(task.terminal(Clocked(s, jnp.array(left))), expected, rtol=1e-6)
    np.testing.assert_allclose(task.terminal(Clocked(s, jnp.array(0.0))), TASK.terminal(s))
    weights = 0.5 ** jnp.arange(17.0)
    for t, last in [(3, 1.0), (11, 0.5**16), (14, 0.5**16)]:
        seen = ToCritic(critic).at(task, weights, jnp.array(t)).weights
        np.testing.assert_allclose(seen[-1], last)
        np.testing.assert_allclose(seen[0], 0.5**t)


def test_with_a_true_model_the_hybrid_acts_better_than_its_policy() -> None:
    agent = Hybrid(
        TASK,
        PolicyAgent(SHORT, POLICY, **(SIZES | {"world": Known()})),
        Sampling(CEM(elites=8), samples=64, std=2.0), horizon=8, iterations=3,
    )  # fmt: skip
    carry = agent.init(VIEW, KEY)
    s0 = TASK.starts(KEY, 8)

    @jax.jit
    def earned(carry, view):
        mpc = episode_returns(agent.best(carry, view), TASK, s0, KEY)
        return jnp.mean(mpc), jnp.mean(episode_returns(carry.policy, TASK, s0))

    planned, alone = earned(carry, VIEW)
    assert planned > alone + 0.1 * abs(alone)


# What goes wrong.


def test_an_empty_buffer_says_so() -> None:
    agent, empty = AGENTS["adam"](), Buffer.empty(TASK, 64)
    with pytest.raises(ValueError, match=r"empty|got 0"):
        agent.update(blank("adam"), VIEW, empty, fresh_of(empty), KEY)


def test_within_jit_an_empty_buffer_improves_nothing_and_is_counted() -> None:
    agent, empty = AGENTS["adam"](), Buffer.empty(TASK, 64)
    carry = blank("adam")
    learned, said = improve(agent, carry, VIEW, empty)
    jax.tree.map(np.testing.assert_array_equal, learned.policy, carry.policy)
    assert int(said["nonfinite"]) == agent.updates and float(said["accepted"]) == 0


@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gauss-newton", "short horizon"))]
)
def test_a_model_that_is_not_finite_leaves_the_policy_and_is_counted(name: str) -> None:
    agent, carry = AGENTS[name](), blank(name)
    spoilt = carry._replace(members=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), carry.members))
    learned, said = improve(agent, spoilt, VIEW, filled(spoil=True))
    jax.tree.map(np.testing.assert_array_equal, learned.policy, carry.policy)
    assert int(said["nonfinite"]) > 0 and int(said["model_rejected"]) == 2


class HalfBroken(eqx.Module):
    inner: eqx.Module

    def __call__(self, s, a):
        return jnp.where(s[1] > 0.02, jnp.nan, self.inner(s, a))


@pytest.mark.slow
def test_rewards_that_are_not_finite_are_rejected_and_counted() -> None:
    task = eqx.tree_at(lambda t: t.reward, TASK, HalfBroken(TASK.reward))
    learned = learn(AGENTS["adam"](), task, KEYS, real_steps=64)
    assert sum(record["rejected"] for record in learned.records).min() > 0
    assert sum(record["nonfinite"] for record in learned.records[1:]).min() > 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(learned.carry.policy))


@pytest.mark.parametrize(
    "bad, error, words",
    [
        ({"solver": ILQR()}, TypeError, "kind 'policy'.*got ILQR"),
        ({"starts": 0}, ValueError, "starts must be a whole number"),
        ({"updates": 0}, ValueError, "updates must be a whole number"),
        ({"horizon": 0}, ValueError, "horizon must be a whole number"),
        ({"fresh": 1.5}, ValueError, r"fresh must be a share of the starts, in \[0, 1\], got 1.5"),
        ({"noise": -0.1}, ValueError, "noise must not be negative"),
    ],
)
def test_bad_settings(bad: dict, error: type, words: str) -> None:
    solver = bad.pop("solver", ADAM)
    with pytest.raises(error, match=words):
        PolicyAgent(solver, POLICY, **(SIZES | bad))


def test_bad_hybrids_and_worlds() -> None:
    short = PolicyAgent(SHORT, POLICY, **SIZES)
    with pytest.raises(TypeError, match="ShortHorizon"):
        Hybrid(TASK, AGENTS["adam"]())
    with pytest.raises(TypeError, match=r"keeps the limits.*got ILQR"):
        Hybrid(TASK, short, ILQR())
    with pytest.raises(ValueError, match="horizon=None"):
        Hybrid(TASK, PolicyAgent(SHORT, POLICY, horizon=8, **SIZES))
    with pytest.raises(ValueError, match="iterations must be"):
        Hybrid(TASK, short, iterations=0)
    with pytest.raises(ValueError, match=r"no limits on some action.*std="):
        Hybrid(TASK, short)
    with pytest.raises(ValueError, match="elites must be at most"):
        EnsembleTrainer(members=2, elites=3)
    with pytest.raises(ValueError, match="members must be"):
        EnsembleTrainer(members=0, elites=0)
