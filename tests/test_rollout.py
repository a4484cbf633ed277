"""Rollouts against a Python loop, their gradients after an episode's end, rematerialisation, keys and error messages."""

from functools import partial
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import (
    Affine,
    Gaussian,
    Linear,
    Neural,
    OpenLoop,
    episode_return,
    episode_returns,
    mean_return,
    rollout,
    rollouts,
    tasks,
)
from diffmbrl.core import Box, Task
from diffmbrl.rollout import returns, step_keys, terminal_reward


class Noisy(eqx.Module):
    """s' = rate * s + a + .1 * noise."""

    rate: Any = eqx.field(default_factory=lambda: jnp.asarray(0.9, float))

    def __call__(self, s, a, *, key=None):
        noise = 0.0 if key is None else 0.1 * jax.random.normal(key, s.shape, s.dtype)
        return self.rate * s + a + noise


class Quadratic(eqx.Module):
    def __call__(self, s, a):
        return -(s @ s + a @ a)


class QuadraticTerminal(eqx.Module):
    def __call__(self, s):
        return -3 * (s @ s)


def noisy(horizon=7):
    return Task(
        name="noisy", dynamics=Noisy(), reward=Quadratic(), terminal=QuadraticTerminal(), initial=Box([-1.0], [1.0]),
        a_low=[-jnp.inf], a_high=[jnp.inf], horizon=horizon, dt=0.1,
    )  # fmt: skip


def loop(policy, task, s, key=None):
    """The rollout's definition, in Python."""
    states, actions, rewards = [], [], []
    for t in range(task.horizon):
        key_a, key_s = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, t))
        a = policy(s, key=key_a)
        states, actions, rewards = [*states, s], [*actions, a], [*rewards, task.reward(s, a)]
        s = task.dynamics(s, a, key=key_s)
    weights = np.asarray(task.weights)
    J = sum(w * float(r) for w, r in zip(weights[:-1], rewards, strict=True)) + weights[-1] * float(task.terminal(s))
    return jnp.stack(states), jnp.stack(actions), jnp.stack(rewards), s, J


@pytest.mark.parametrize("key", [None, jax.random.key(3)], ids=["mean", "noise"])
def test_scan_is_the_python_loop(key):
    task = noisy()
    task = eqx.tree_at(lambda t: t.weights, task, 0.9 ** jnp.arange(8).astype(float))
    policy = Gaussian.around(Linear(jnp.asarray([[-0.5]]), jnp.asarray([0.1])), task, std=0.3)
    s0 = jnp.asarray([0.7])
    s, a, r, s_T, J = loop(policy, task, s0, key)
    trajectory = jax.jit(rollout)(policy, task, s0, key)
    for given, wanted in [(trajectory.s, s), (trajectory.a, a), (trajectory.r, r), (trajectory.s_T, s_T)]:
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-7)
    assert trajectory.alive.all()
    assert trajectory.alive.shape == (task.horizon + 1,)
    np.testing.assert_allclose(returns(trajectory, task), J, rtol=1e-5)
    np.testing.assert_allclose(episode_return(policy, task, s0, key), J, rtol=1e-5)


def test_network_on_a_nonlinear_task_is_the_python_loop(x64):
    task = tasks.cartpole_balance(horizon=5)
    policy = Neural.init(task, hidden=[4], key=jax.random.key(0))
    s0 = task.initial(jax.random.key(1))
    assert episode_return(policy, task, s0) == pytest.approx(loop(policy, task, s0)[-1], rel=1e-12)


def test_plans_use_the_slice_of_each_step():
    task = noisy(4)
    a = jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
    trajectory = rollout(OpenLoop(a), task, jnp.zeros(1))
    np.testing.assert_array_equal(trajectory.a, a)
    K = -0.1 * a[:, None]
    followed = rollout(Affine(K, a, trajectory.s), task, jnp.ones(1))
    np.testing.assert_allclose(followed.a[:, 0], a[:, 0] + K[:, 0, 0] * (followed.s - trajectory.s)[:, 0], rtol=1e-6)


def test_weights_are_weights():
    task = noisy(3)
    trajectory = rollout(Linear(jnp.asarray([[-0.5]]), jnp.zeros(1)), task, jnp.ones(1))
    r, phi = np.asarray(trajectory.r), float(task.terminal(trajectory.s_T))
    for weights in ([1, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 3], [0.5, 0.25, 0.125, 4]):
        weighted = eqx.tree_at(lambda t: t.weights, task, jnp.asarray(weights, float))
        assert returns(trajectory, weighted) == pytest.approx(float(r @ weights[:-1] + weights[-1] * phi), rel=1e-6)


def test_batches_are_loops_over_starts():
    task = noisy()
    policy = Gaussian.around(Linear(jnp.asarray([[-0.5]]), jnp.zeros(1)), task, std=0.3)
    s0 = task.starts(jax.random.key(0), 3)
    key = jax.random.key(1)
    each = [rollout(policy, task, s, k) for s, k in zip(s0, jax.random.split(key, 3), strict=True)]
    batch = rollouts(policy, task, s0, key)
    jax.tree.map(lambda x, *xs: np.testing.assert_allclose(x, jnp.stack(xs), rtol=1e-5, atol=1e-6), batch, *each)
    J = jnp.stack([returns(trajectory, task) for trajectory in each])
    np.testing.assert_allclose(episode_returns(policy, task, s0, key), J, rtol=1e-5)
    np.testing.assert_allclose(mean_return(policy, task, s0, key), J.mean(), rtol=1e-5)


def test_keys():
    task = noisy(50)
    policy = Gaussian.around(Linear.zeros(task), task, std=0.3)
    run = jax.jit(rollouts)
    s0 = jnp.zeros((2, 1))
    one, again = run(policy, task, s0, jax.random.key(0)), run(policy, task, s0, jax.random.key(0))
    np.testing.assert_array_equal(one.s, again.s)
    assert not np.any(np.isclose(one.a, run(policy, task, s0, jax.random.key(1)).a))
    # No number twice: not over time, not over starts, not between policy and dynamics.
    noise_s = (jnp.concatenate([one.s[:, 1:], one.s_T[:, None]], axis=1) - 0.9 * one.s - one.a) / 0.1
    noise = np.concatenate([np.ravel(one.a) / 0.3, np.ravel(noise_s)])
    assert np.unique(np.round(noise, 4)).size > 0.98 * noise.size
    assert noise.std() == pytest.approx(1, abs=0.2)
    assert not np.any(run(policy, task, s0, None).a)


# A pytree of states.


class Oscillator(eqx.Module):
    """Positions and velocities under different names and shapes."""

    def __call__(self, s, a, *, key=None):
        v = s["v"] + 0.1 * (a - s["x"]["q"].sum())
        return {"x": {"q": s["x"]["q"] + 0.1 * v}, "v": v}


class OscillatorReward(eqx.Module):
    def __call__(self, s, a):
        return -(s["x"]["q"] @ s["x"]["q"] + s["v"] @ s["v"] + 0.1 * a @ a)


class OscillatorStart(eqx.Module):
    def __call__(self, key):
        return {"x": {"q": jax.random.normal(key, (2,), float)}, "v": jnp.zeros(1, float)}


class OscillatorFeatures(eqx.Module):
    def __call__(self, s):
        return jnp.concatenate([s["x"]["q"], s["v"]])


def oscillator(horizon=4):
    return Task(
        name="oscillator", dynamics=Oscillator(), reward=OscillatorReward(), initial=OscillatorStart(),
        features=OscillatorFeatures(), a_low=[-1.0], a_high=[1.0], horizon=horizon, dt=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("init", [lambda task: Neural.init(task, key=jax.random.key(0)), Linear.zeros, Affine.zeros])
def test_states_are_pytrees(init):
    task = oscillator()
    policy = init(task)
    assert task.n == 3
    trajectory = rollouts(policy, task, task.starts(jax.random.key(0), 5))
    assert jax.tree.map(lambda x: x.shape, trajectory.s) == {"x": {"q": (5, 4, 2)}, "v": (5, 4, 1)}
    assert jax.tree.map(lambda x: x.shape, trajectory.s_T) == {"x": {"q": (5, 2)}, "v": (5, 1)}
    s0 = jax.tree.map(lambda x: x[0, 0], trajectory.s)
    s, a = s0, None
    for t in range(4):
        np.testing.assert_allclose(trajectory.s["v"][0, t], s["v"], rtol=1e-5, atol=1e-7)
        a = jax.tree.map(lambda x, t=t: x[t], policy)(s) if type(policy) is Affine else policy(s)
        s = task.dynamics(s, a)
    np.testing.assert_allclose(trajectory.s_T["x"]["q"][0], s["x"]["q"], rtol=1e-5)


# The end of an episode. `root` is NaN, and its derivative at 1 infinite, wherever the episode has ended.


def root(s):
    return jnp.sqrt(1 - s)


class Fragile(eqx.Module):
    """s' = s + .25 + .1 a sqrt(1 - s)."""

    drift: Any = eqx.field(default_factory=lambda: jnp.asarray(0.25, float))

    def __call__(self, s, a, *, key=None):
        return s + self.drift + 0.1 * a * root(s)


class FragilePolicy(eqx.Module):
    gain: Any = eqx.field(default_factory=lambda: jnp.asarray(0.5, float))

    def __call__(self, s, *, key=None):
        return self.gain * root(s)


class FragileReward(eqx.Module):
    scale: Any = eqx.field(default_factory=lambda: jnp.asarray(2.0, float))

    def __call__(self, s, a):
        return jnp.sum(self.scale * root(s) - a**2)


class FragileTerminal(eqx.Module):
    """Undefined past the end, and with no derivative at 0 either: a norm."""

    scale: Any = eqx.field(default_factory=lambda: jnp.asarray(0.8, float))

    def __call__(self, s):
        return jnp.sum(root(s)) + jnp.linalg.norm(self.scale * s)


class AtLeastOne(eqx.Module):
    def __call__(self, s):
        return s[0] >= 1


def fragile(horizon=8):
    return Task(
        name="fragile", dynamics=Fragile(), reward=FragileReward(), terminal=FragileTerminal(),
        initial=Box([0.0], [0.5]), done=AtLeastOne(), a_low=[-1.0], a_high=[1.0], horizon=horizon, dt=0.1,
    )  # fmt: skip


def until_the_end(policy, task, s):
    """J by a Python loop that evaluates nothing after the end, and the number of steps made."""
    J = 0.0
    for t in range(task.horizon):
        a = policy(s)
        J += task.weights[t] * task.reward(s, a)
        s = task.dynamics(s, a)
        if task.done(s):
            return J, t + 1, s
    return J + task.weights[-1] * task.terminal(s), task.horizon, s


def test_after_the_end_states_are_held_and_nothing_is_earned():
    task, policy = fragile(), FragilePolicy()
    J, steps, last = until_the_end(policy, task, jnp.asarray([0.1]))
    assert 1 < steps < task.horizon
    trajectory = rollout(policy, task, jnp.asarray([0.1]))
    np.testing.assert_array_equal(trajectory.alive, np.arange(9) < steps)
    np.testing.assert_allclose(trajectory.s[steps:], np.broadcast_to(last, (8 - steps, 1)), rtol=1e-6)
    np.testing.assert_allclose(trajectory.s_T, last, rtol=1e-6)
    assert not np.any(trajectory.r[steps:])
    assert np.all(np.asarray(trajectory.r[:steps]) != 0)
    # The terminal reward, undefined here, is not earned.
    assert returns(trajectory, task) == pytest.approx(float(J), rel=1e-5)
    assert episode_return(policy, task, jnp.asarray([0.1])) == pytest.approx(float(J), rel=1e-5)


def test_the_clock_is_not_an_end():
    task, policy = fragile(2), FragilePolicy()
    J, steps, last = until_the_end(policy, task, jnp.asarray([0.1]))
    assert steps == 2
    assert float(task.terminal(last)) > 0.1
    assert episode_return(policy, task, jnp.asarray([0.1])) == pytest.approx(float(J), rel=1e-5)


def test_a_start_that_has_ended_earns_nothing():
    trajectory = rollout(Linear(jnp.ones((1, 1)), jnp.zeros(1)), fragile(), jnp.asarray([1.5]))
    assert not trajectory.alive.any()
    assert not np.any(trajectory.r)
    np.testing.assert_array_equal(trajectory.s, np.full((8, 1), 1.5, np.float32))


@pytest.mark.parametrize("remat", [None, 1, 3])
def test_no_nan_from_after_the_end_reaches_a_gradient(remat, x64):
    task, policy, s0 = fragile(), FragilePolicy(), jnp.asarray([0.1])

    def J(f, *arguments):
        policy, parts, s0 = arguments
        return f(policy, eqx.tree_at(lambda t: (t.dynamics, t.reward, t.terminal), task, parts), s0)

    arguments = (policy, (task.dynamics, task.reward, task.terminal), s0)
    every = (0, 1, 2)
    true = jax.grad(lambda *x: J(lambda *y: until_the_end(*y)[0], *x), every)(*arguments)
    for f in (lambda *y: episode_return(*y, remat=remat), lambda *y: returns(rollout(*y, remat=remat), y[1])):
        gradient = jax.jit(jax.grad(lambda *x, f=f: J(f, *x), every))(*arguments)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), gradient, true)


def test_a_batch_of_ended_and_living_has_finite_gradients(x64):
    task, policy = fragile(3), FragilePolicy()
    s0 = jnp.asarray([[0.0], [0.1], [0.6], [0.99]])
    gradient = jax.grad(mean_return)(policy, task, s0).gain
    each = [jax.grad(lambda pi, s=s: until_the_end(pi, task, s)[0])(policy).gain for s in s0]
    assert {until_the_end(policy, task, s)[1] for s in s0} == {1, 2, 3}
    assert gradient == pytest.approx(float(jnp.mean(jnp.stack(each))), rel=1e-10)


# Rematerialisation.


def test_remat_changes_neither_value_nor_gradient(x64):
    task, policy = noisy(7), Linear(jnp.asarray([[-0.5]]), jnp.asarray([0.1]))
    s0, key = jnp.asarray([0.4]), jax.random.key(0)

    @partial(jax.jit, static_argnums=0)
    def everything(remat):
        J, gradient = jax.value_and_grad(lambda pi: episode_return(pi, task, s0, key, remat=remat))(policy)
        return J, gradient, rollout(policy, task, s0, key, remat=remat)

    plain = everything(None)
    for remat in (1, 3, 10):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), everything(remat), plain)


def test_remat_of_a_plan_and_segments_save_memory():
    task = tasks.cartpole_balance(horizon=400)
    plan, s0 = OpenLoop.zeros(task), jnp.zeros(4)

    def memory(remat):
        gradient = jax.jit(jax.grad(lambda plan: episode_return(plan, task, s0, remat=remat)))
        return gradient(plan).a, gradient.lower(plan).compile().memory_analysis().temp_size_in_bytes

    (plain, most), (segments, least) = memory(None), memory(20)
    np.testing.assert_allclose(segments, plain, rtol=1e-4, atol=1e-5)
    assert least < most / 5


# Errors name the value and the way out.


class Returns(eqx.Module):
    """A policy, reward or dynamics that returns one thing, whatever it is given."""

    result: Any

    def __call__(self, *_, key=None):
        return self.result


def replaced(**fields):
    task = noisy(5)
    return eqx.tree_at(lambda t: [getattr(t, name) for name in fields], task, list(fields.values()))


ERRORS = {
    "scalar action": ({"policy": Returns(jnp.float32(1))}, r"action of shape \[\]; task 'noisy' takes \[m\] = \[1\]"),
    "two actions": ({"policy": Returns(jnp.zeros(2))}, r"action of shape \[2\]; task 'noisy' takes \[m\] = \[1\]"),
    "vector reward": ({"task": {"reward": Returns(jnp.zeros(1))}}, r"reward of task 'noisy' has shape \[1\]"),
    "state of another shape": (
        {"task": {"dynamics": Returns(jnp.zeros(2))}},
        r"map a state float32\[1\] to float32\[2\]; expected the same",
    ),
    "state of another dtype": (
        {"task": {"dynamics": Returns(jnp.zeros(1, jnp.int32))}},
        r"map a state float32\[1\] to int32\[1\]; expected the same",
    ),
    "state of another structure": (
        {"task": {"dynamics": Returns((jnp.zeros(1), jnp.zeros(1)))}},
        r"map a state float32\[1\] to PyTreeDef\(\(\*, \*\)\) of float32\[1\], float32\[1\]",
    ),
    "plan too short": ({"policy": OpenLoop(jnp.zeros((4, 1)))}, r"the plan has \[4\] time steps; .* a horizon of 5"),
    "plan with torn time": (
        {"policy": eqx.tree_at(lambda plan: plan.s, Affine.zeros(noisy(5)), jnp.zeros((6, 1)))},
        r"the plan has \[5, 6\] time steps",
    ),
    "remat 0": ({"remat": 0}, r"remat must be None, 1 \(each step\) or a segment length, got 0"),
    "remat -3": ({"remat": -3}, "got -3"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("function", [rollout, episode_return])
def test_error(case, function):
    given, message = ERRORS[case]
    task = replaced(**given.get("task", {}))
    with pytest.raises(ValueError, match=message):
        function(given.get("policy", Linear.zeros(task)), task, jnp.zeros(1), remat=given.get("remat", 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"horizon": -5}, "got -5"),
        ({"dt": 0.0}, "dt must be a positive number of seconds, got 0.0"),
        ({"dt": float("nan")}, "got nan"),
        ({"a_low": [1.0]}, "a_low must lie below a_high"),
        ({"a_low": [float("nan")]}, "a_low must lie below a_high"),
        ({"a_low": [-1.0, -1.0]}, r"must both have shape \[m\], got \[2\] and \[1\]"),
        ({"a_low": -1.0, "a_high": 1.0}, r"must both have shape \[m\], got \[\] and \[\]"),
    ],
)
def test_a_task_refuses(fields, message):
    good = {
        "name": "bad", "dynamics": Noisy(), "reward": Quadratic(), "initial": Box([0.0], [1.0]),
        "a_low": [-1.0], "a_high": [1.0], "horizon": 5, "dt": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Task(**{**good, **fields})


def test_at_least_one_start():
    with pytest.raises(ValueError, match="starts must be at least 1, got 0"):
        noisy().starts(jax.random.key(0), 0)


def test_new_numbers_do_not_recompile():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def J(policy, task, s0, key):
        return mean_return(policy, task, s0, key)

    results = set()
    for m_p, discount, seed in [(0.3, 1.0, 0), (0.2, 1.0, 0), (0.3, 0.9, 0), (0.3, 1.0, 1)]:
        task = tasks.cartpole_balance(horizon=5, m_p=m_p)
        task = eqx.tree_at(lambda t: t.weights, task, discount ** jnp.arange(6).astype(float))
        policy = Neural.init(task, hidden=[4], key=jax.random.key(seed))
        results.add(float(J(policy, task, jnp.full((2, 4), 0.1), jax.random.key(seed))))
    assert len(results) == 4


def test_the_key_rule_is_to_fold_in_the_step_then_split():
    key = jax.random.key(5)
    first = jax.random.split(jax.random.fold_in(key, 3), 4)
    assert [bool(k == wanted) for k, wanted in zip(step_keys(key, 3, 4), first, strict=True)] == [True] * 4
    assert step_keys(None, 3) == (None, None)


def test_a_terminal_reward_that_is_not_earned_has_no_gradient():
    def earned(s, alive):
        return terminal_reward(lambda s: jnp.log(s[0]), s, jnp.asarray(alive), jnp.ones(1))

    value, gradient = jax.value_and_grad(earned)(jnp.zeros(1), False)
    assert value == 0 and gradient == 0
    assert jax.grad(earned)(jnp.full(1, 2.0), True) == 0.5
