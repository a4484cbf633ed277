"""Receding-horizon control: against Riccati's feedback, the open-loop optimum, a hand-written loop; faults and bad input."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import (
    ILQR,
    MPC,
    Affine,
    Continuation,
    OpenLoop,
    OptaxSolver,
    control,
    episode_return,
    episode_returns,
    mean_return,
    rollout,
    rollouts,
    solve,
    tasks,
)
from diffmbrl.core import is_stateful, restart
from diffmbrl.jobs.batch.policies import _evaluate
from diffmbrl.planners import Damping, Ending, Predicted, Receding, Unaware, act
from diffmbrl.planners.mpc import planning_task, shifted
from diffmbrl.tasks.transforms.plant import Delayed, delayed, noisy
from tests.problems import bent, changed, optimal_actions, riccati, same, same_tree

follow = jax.jit(rollout)
earn = jax.jit(episode_return)
earn_all = jax.jit(episode_returns)
watch = jax.jit(control)


def linear(horizon: int = 12) -> Any:
    return tasks.lqr(horizon=horizon)


class Fresh(ILQR):
    """Without the damping of the step before: at the optimum no update is accepted, and each raises it."""

    def shift(self, carry):
        return jnp.zeros_like(carry)


# Known answers.


@pytest.mark.parametrize("horizon", [12, pytest.param(15, marks=pytest.mark.slow)])
def test_to_the_end_of_a_linear_task_it_is_riccatis_feedback(horizon, x64):
    task = linear()
    s0 = task.initial(jax.random.key(0))
    mpc = MPC.init(Fresh(), task, horizon=horizon)
    same(follow(mpc, task, s0).a, optimal_actions(task, s0), rtol=1e-7, atol=1e-7)
    # Off the plan too: on a plant pushed about by noise, each action is K_t s_t.
    plant = noisy(task, std=0.3)
    trajectory = follow(mpc, plant, s0, jax.random.key(1))
    same(trajectory.a, np.einsum("tmn,tn->tm", riccati(task).K, trajectory.s), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_short_window_on_a_linear_task_is_its_first_gain(x64):
    task, H = linear(), 4
    s0 = task.initial(jax.random.key(0))
    trajectory = follow(MPC.init(Fresh(), task, horizon=H, window=Receding()), task, s0)
    K = riccati(linear(H)).K[0]
    same(trajectory.a, trajectory.s @ K.T, rtol=1e-7, atol=1e-7)
    # That knows the end from H steps before it on.
    trajectory = follow(MPC.init(Fresh(), task, horizon=H), task, s0)
    last = riccati(linear(H)).K
    same(trajectory.a[-H:], np.einsum("tmn,tn->tm", last, trajectory.s[-H:]), rtol=1e-6, atol=1e-6)


def test_its_value_takes_the_place_of_the_terminal_reward(x64):
    """With the cost to go at the window's end, one step ahead is enough."""
    task = linear()
    s0 = task.initial(jax.random.key(0))
    P = jnp.asarray(riccati(linear(400)).P)
    window = Ending(value=eqx.tree_at(lambda t: t.Q, task.terminal, P))
    trajectory = follow(MPC.init(Fresh(), task, horizon=1, window=window), task, s0)
    K = riccati(linear(400)).K[0]
    same(trajectory.a[:-1], trajectory.s[:-1] @ K.T, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_converged_on_its_own_model_it_follows_the_open_loop_optimum(x64):
    task = bent(horizon=10)
    s0 = jnp.array([1.0, 0.3])
    plan, _ = solve(ILQR(), Affine.zeros(task), task, s0, None, 60, tolerance=1e-10)
    trajectory = follow(MPC.init(ILQR(), task, horizon=10, first=60, iterations=8), task, s0)
    same(trajectory.a, follow(plan, task, s0).a, rtol=1e-5, atol=1e-6)


def test_weights_are_those_of_the_task_it_is_evaluated_on(x64):
    task = linear()
    weights = 0.8 ** jnp.arange(13.0)
    discounted = eqx.tree_at(lambda t: t.weights, task, weights)
    s0 = task.initial(jax.random.key(0))
    same(
        follow(MPC.init(ILQR(), task, horizon=12), discounted, s0).a,
        optimal_actions(discounted, s0),
        rtol=1e-6,
        atol=1e-6,
    )


# Plants that differ from the model.


@pytest.mark.slow
def test_it_beats_the_open_loop_plan_where_the_model_is_wrong():
    model = tasks.cartpole_balance(horizon=60)
    plant = tasks.cartpole_balance(horizon=60, m_c=1.3, l=0.6)
    s0 = 0.3 * model.starts(jax.random.key(3), 3)
    planner, longer = Continuation.growing(ILQR(), 40, horizon=30), Continuation.growing(ILQR(), 60, horizon=60)
    inside, outside = tasks.squashed(model), tasks.squashed(plant)

    @jax.jit
    def open_loop(s):
        plan = Affine.zeros(inside)
        start = (plan, longer.init(plan, inside))
        plan = jax.lax.fori_loop(0, 60, lambda i, x: longer.update(*x, inside, s, key=None)[:2], start)[0]
        return episode_return(OpenLoop(rollout(plan, inside, s).a), outside, s)

    closed = earn_all(MPC.init(planner, model, horizon=30, first=40), plant, s0)
    cut = jax.vmap(open_loop)(s0)
    assert np.all(np.asarray(closed) > np.asarray(cut)), (closed, cut)
    assert float(jnp.mean(closed)) > -1


def test_a_late_plant_is_the_loop_shifted_by_hand(x64):
    task, d = bent(), 2
    plant = delayed(task, steps=d)
    s = jnp.array([0.7, -0.2])
    K = jnp.array([[0.4, -0.3]])

    class Feedback(eqx.Module):
        K: Any

        def __call__(self, state, *, key=None):
            return self.K @ state.s

    trajectory = follow(Feedback(K), plant, Delayed(s, jnp.zeros((d, 1))))
    queue, states, earned = [jnp.zeros(1)] * d, [], []
    for _ in range(task.horizon):
        states.append(s)
        queue.append(K @ s)
        arrives = queue.pop(0)
        earned.append(task.reward(s, arrives))
        s = task.dynamics(s, arrives)
    same(trajectory.s.s, jnp.stack(states))
    same(trajectory.r, jnp.stack(earned))


def test_predicting_through_a_delay_it_is_the_optimum_of_the_late_plant(x64):
    """From the first action that arrives on, each is Riccati's gain on the state that it arrives in."""
    task, d = linear(), 3
    plant = delayed(task, steps=d)
    s0 = plant.initial(jax.random.key(0))
    knowing = MPC.init(Fresh(), task, horizon=12, seen=Predicted(task.dynamics))
    trajectory = follow(knowing, plant, s0)
    same(
        trajectory.s.queue[d:, 0],
        np.einsum("tmn,tn->tm", riccati(task).K[d:], trajectory.s.s[d:]),
        rtol=1e-6,
        atol=1e-6,
    )
    unaware = MPC.init(Fresh(), task, horizon=12, seen=Unaware())
    assert earn(unaware, plant, s0) < earn(knowing, plant, s0) - 1e-3


@pytest.mark.slow
def test_noise_follows_the_key():
    plant, mpc = noisy(bent(), std=0.1), MPC.init(ILQR(), bent(), horizon=4)
    s0 = jnp.array([0.7, -0.2])
    runs = [follow(mpc, plant, s0, key).s for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)]
    same(runs[0], runs[1])
    assert np.abs(np.asarray(runs[0] - runs[2])).max() > 1e-2
    same(runs[3], follow(mpc, bent(), s0).s)
    widths = jnp.array([0.0, 0.1])
    push = noisy(bent(), std=widths).dynamics(s0, jnp.zeros(1), key=jax.random.key(0))
    assert float(push[0]) == pytest.approx(float(bent().dynamics(s0, jnp.zeros(1))[0]), abs=1e-6)


# The contract.


@pytest.mark.slow
def test_many_are_as_one_at_a_time(x64):
    task = tasks.pendulum_swingup(horizon=8)
    mpc = MPC.init(ILQR(), task, horizon=6, iterations=2)
    s0 = task.starts(jax.random.key(0), 3)
    together = jax.jit(rollouts)(mpc, task, s0)
    one = [follow(mpc, task, s) for s in s0]
    same_tree(together, jax.tree.map(lambda *x: jnp.stack(x), *one), rtol=1e-6, atol=1e-6)
    same(earn_all(mpc, task, s0), jnp.stack([earn(mpc, task, s) for s in s0]), rtol=1e-6, atol=1e-6)
    same(jax.jit(mean_return)(mpc, task, s0), jnp.mean(earn_all(mpc, task, s0)), rtol=1e-5)


def test_one_trace_for_all_steps_and_numbers():
    traces = []

    class Counting(eqx.Module):
        inner: Any

        @property
        def kind(self):
            return "plan"

        def init(self, policy, task):
            return self.inner.init(policy, task)

        on_objective_change = restart

        @property
        def keeps_limits(self):
            return self.inner.keeps_limits

        def first_plan(self, task):
            return self.inner.first_plan(task)

        def shift(self, carry):
            return self.inner.shift(carry)

        def update(self, *arguments, key):
            traces.append(key)
            return self.inner.update(*arguments, key=key)

    for mass, iterations in [(0.8, 1), (1.1, 3)]:
        task = changed(bent(), mass=mass)
        mpc = MPC.init(Counting(ILQR(damping=Damping(factor=3.0 + mass))), task, horizon=5, iterations=iterations)
        memory, s = jax.jit(lambda m, t: m.start(t))(mpc, task), jnp.array([0.4, 0.1])
        for _ in range(4):
            a, memory = act(mpc, memory, s)
            s = task.dynamics(s, a)
        follow(mpc, task, s)
    assert len(traces) == 1


@pytest.mark.slow
def test_the_controllers_loop_from_python_is_the_scan(x64):
    task = bent()
    mpc = MPC.init(ILQR(), task, horizon=4)
    s = jnp.array([0.7, -0.2])
    trajectory, memory = follow(mpc, task, s), mpc.start(task)
    for t in range(task.horizon):
        a, memory = act(mpc, memory, s)
        same(a, trajectory.a[t])
        s = task.dynamics(s, a)
    assert int(memory.t) == task.horizon


def test_it_reports_every_step():
    task = bent()
    s0 = jnp.array([0.7, -0.2])
    trajectory, info = watch(MPC.init(ILQR(), task, horizon=4, iterations=2, first=5), task, s0)
    assert info.J.shape == (8,) and np.isfinite(info.J).all() and info.nonfinite.sum() == 0
    same_tree(trajectory, follow(MPC.init(ILQR(), task, horizon=4, iterations=2, first=5), task, s0))
    # Five updates in the first step, two in the others: the work says so.
    assert int(info.work.jvp[0]) * 2 == int(info.work.jvp[1]) * 5


def test_limits_are_kept_and_lanes_evaluate_it():
    task = tasks.cartpole_balance(horizon=10)
    mpc = MPC.init(ILQR(), task, horizon=8)
    s0 = task.starts(jax.random.key(0), 4)
    a = jax.jit(rollouts)(mpc, task, s0).a
    assert float(jnp.max(jnp.abs(a))) <= 10
    policies = jax.tree.map(lambda x: x[None], mpc)
    train, test, success = _evaluate(policies, task, s0[None], s0)
    same(train[0], jnp.mean(earn_all(mpc, task, s0)), rtol=1e-5)
    same(train, test, rtol=1e-5)
    assert success.shape == (1,)


def test_a_window_beyond_an_episodes_end_of_its_own():
    task = bent(ends=True)
    trajectory, _ = watch(MPC.init(ILQR(), task, horizon=5), task, jnp.array([1.2, 2.0]))
    assert not bool(trajectory.alive[-1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((trajectory.s, trajectory.a, trajectory.r)))


def test_dtype_is_kept(x64):
    task = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, bent(horizon=3)
    )
    mpc = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        MPC.init(ILQR(), task, horizon=2),
    )
    trajectory = follow(mpc, task, jnp.zeros(2, jnp.float32))
    assert trajectory.a.dtype == jnp.float32 and trajectory.r.dtype == jnp.float32


class Drawing(eqx.Module):
    """A planner that acts at random and needs a key."""

    @property
    def kind(self):
        return "plan"

    def init(self, policy, task):
        return jnp.zeros(())

    on_objective_change, keeps_limits = restart, False

    def first_plan(self, task):
        return OpenLoop.zeros(task)

    def shift(self, carry):
        return carry + 1

    def update(self, policy, carry, task, s0, *, key):
        if key is None:
            raise ValueError("a key is needed")
        info = jax.jit(partial(ILQR().update, key=None))(Affine.zeros(task), jnp.zeros(()), task, s0)[2]
        return OpenLoop(jax.random.normal(key, policy.a.shape)), carry, info


def test_a_planner_that_draws_has_fresh_keys_and_its_carry_is_shifted():
    task = bent()
    plan = OpenLoop.zeros(planning_task(ILQR(), task, 3))
    mpc = MPC.init(Drawing(), task, horizon=3, plan=plan, key=jax.random.key(0))
    s0 = jnp.array([0.4, 0.1])
    a, again, keyed = (np.asarray(follow(mpc, task, s0, key).a) for key in (None, None, jax.random.key(1)))
    assert np.unique(a).size == a.size
    np.testing.assert_array_equal(a, again)
    assert not np.any(a == keyed)
    memory = act(mpc, mpc.start(task), s0)[1]
    assert float(memory.carry) == 1
    # In a continuation too.
    assert float(Continuation.growing(Drawing(), 4, horizon=3).shift(
        Continuation.growing(Drawing(), 4, horizon=3).init(plan, planning_task(ILQR(), task, 3))).inner) == 1  # fmt: skip
    with pytest.raises(ValueError, match="a key is needed"):
        follow(MPC.init(Drawing(), task, horizon=3, plan=plan), task, s0)


def test_shifting_repeats_the_last_slice():
    same(shifted(OpenLoop(jnp.array([[1.0], [2.0], [3.0]]))).a[:, 0], [2, 3, 3])


# Bad input.


def test_bad_arguments():
    task = bent()
    with pytest.raises(TypeError, match="solver of kind 'plan', such as ILQR"):
        MPC.init(OptaxSolver(lambda learning_rate: None, learning_rate=0.1), task, horizon=3)
    with pytest.raises(ValueError, match="horizon must be a whole number of at least 1, got 0"):
        MPC.init(ILQR(), task, horizon=0)
    with pytest.raises(ValueError, match="iterations must be at least 1 update, got 0"):
        MPC.init(ILQR(), task, horizon=3, iterations=0)
    with pytest.raises(ValueError, match="first must be at least 1 update, got -1"):
        MPC.init(ILQR(), task, horizon=3, first=-1)
    with pytest.raises(ValueError, match="plan must be a plan of 3 steps"):
        MPC.init(ILQR(), task, horizon=3, plan=Affine.zeros(planning_task(ILQR(), task, 4)))
    with pytest.raises(ValueError, match="steps of delay must be a whole number of at least 1, got 0"):
        delayed(task, steps=0)
    with pytest.raises(ValueError, match="std of the noise must be finite and not negative, got -1"):
        noisy(task, std=-1.0)
    mpc = MPC.init(ILQR(), task, horizon=3)
    with pytest.raises(ValueError, match=r"one start: task\.weights must have shape"):
        rollout(mpc, eqx.tree_at(lambda t: t.weights, task, jnp.ones((2, 9))), jnp.zeros(2))
    assert is_stateful(mpc) and not is_stateful(OpenLoop.zeros(task))


def test_a_memory_that_acts_in_the_wrong_shape_is_refused():
    class Counter(eqx.Module):
        is_stateful = True

        def start(self, task):
            return jnp.zeros((), jnp.int32)

        def step(self, memory, s, *, key=None):
            return jnp.zeros(2), memory + 1

    with pytest.raises(ValueError, match=r"an action of shape \[2\]; task 'bent' takes \[m\] = \[1\]"):
        rollout(Counter(), bent(), jnp.zeros(2))
