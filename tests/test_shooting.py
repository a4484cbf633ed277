"""Gradient shooting: the optimum, its limits and its several starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, Affine, OpenLoop, OptaxSolver, episode_return, solve, tasks
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.planners import Projection, Shooting, Tanh
from tests.problems import bent, optimal_actions, riccati, same

KEY = jax.random.key(0)
LBFGS = OptaxSolver(optax.lbfgs, memory_size=10)
ADAM = OptaxSolver(optax.adam, learning_rate=0.1)


def test_the_optimum_of_a_linear_quadratic_task():
    task, s0 = tasks.lqr(horizon=12), jnp.asarray([1.0, -0.5])
    plan, history = solve(Shooting(LBFGS), OpenLoop.zeros(task), task, s0, None, 40)
    same(episode_return(plan, task, s0), riccati(task).J(s0), rtol=1e-5)
    np.testing.assert_allclose(plan.a, optimal_actions(task, s0), atol=5e-3)
    assert history.info.gradient_norm[-1] < 1e-3 * history.info.gradient_norm[0]


@pytest.mark.slow
def test_it_reaches_ilqrs_optimum(x64):
    """On the task where iLQR, DDP and multiple shooting agree (test_ilqr.py, test_multiple_shooting.py)."""
    task, s0 = bent(horizon=8), jnp.asarray([0.9, -0.3])
    plan, _ = solve(in_double(Shooting(LBFGS)), OpenLoop.zeros(task), task, s0, None, 200, tolerance=1e-7)
    best, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 200, tolerance=1e-7)
    np.testing.assert_allclose(episode_return(plan, task, s0), episode_return(best, task, s0), rtol=1e-12)
    assert np.linalg.norm(jax.grad(episode_return)(plan, task, s0).a) < 1e-6


def test_one_start_is_descend_on_the_plan():
    task, s0 = tasks.lqr(horizon=6), jnp.asarray([1.0, -0.5])
    plan, history = solve(Shooting(ADAM), OpenLoop.zeros(task), task, s0, None, 5)
    alone, other = solve(ADAM, OpenLoop.zeros(task), task, s0[None], None, 5)
    same(plan.a, alone.a, rtol=1e-5)
    same(history.info.J, other.info.J, rtol=1e-5)
    same(history.info.gradient_norm, other.info.gradient_norm, rtol=1e-4)
    assert np.array_equal(history.info.work.vjp, other.info.work.vjp)


@pytest.mark.parametrize(
    "rule, limits", [pytest.param(LBFGS, Tanh(), marks=pytest.mark.slow), (LBFGS, Projection()), (ADAM, Projection())]
)
def test_limits_are_kept_and_reached(rule, limits):
    """Gymnasium's pendulum one step after rest: the torque belongs on its limit."""
    task, s0 = tasks.pendulum(horizon=8), jnp.asarray([1.0, 0.0])
    plan, history = solve(Shooting(rule, limits=limits), OpenLoop.zeros(task), task, s0, None, 30)
    assert np.all(np.abs(plan.a) <= 2) and np.abs(plan.a[0, 0]) > 1.9
    bang = OpenLoop(jnp.full((8, 1), -2.0))
    assert episode_return(plan, task, s0) >= episode_return(bang, task, s0) - 0.01 * abs(episode_return(bang, task, s0))
    assert not history.info.nonfinite.any()


@pytest.mark.parametrize("limits", [Tanh(), Projection()])
def test_variables_are_the_inverse_of_actions(limits):
    low, high = jnp.asarray([-1.0, -jnp.inf]), jnp.asarray([3.0, jnp.inf])
    a = jnp.asarray([[0.5, 7.0], [-0.9, -2.0], [2.5, 0.0]])
    same(limits.actions(limits.variables(a, low, high), low, high), a, rtol=1e-5)
    beyond = limits.actions(limits.variables(jnp.asarray([[4.0, 4.0]]), low, high), low, high)
    assert 2.99 < float(beyond[0, 0]) <= 3.0 and float(beyond[0, 1]) == 4.0


@pytest.mark.slow
def test_several_starts_find_what_one_does_not():
    """From rest at the bottom, where the gradient in the torque vanishes with the angle."""
    task, s0 = tasks.pendulum_swingup(horizon=40), jnp.asarray([jnp.pi - 1e-3, 0.0])
    returns = {}
    for starts in (1, 8):
        plan, _ = solve(Shooting(ADAM, starts=starts, spread=0.5), OpenLoop.zeros(task), task, s0, KEY, 60)
        returns[starts] = float(episode_return(plan, task, s0))
    assert returns[8] > returns[1] + 0.05, returns


@pytest.mark.slow
def test_the_plan_given_is_one_of_the_starts():
    task, s0 = tasks.lqr(horizon=6), jnp.asarray([1.0, -0.5])
    best = OpenLoop(jnp.asarray(optimal_actions(task, s0), jnp.float32))
    shooting = Shooting(OptaxSolver(optax.sgd, learning_rate=1e-3), starts=4, spread=3.0)
    plan, _, info = shooting.update(best, shooting.init(best, task), task, s0, key=KEY)
    same(info.J, riccati(task).J(s0), rtol=1e-5)
    np.testing.assert_allclose(plan.a, best.a, atol=1e-3)


def test_a_plan_moved_on_and_its_sequences_agree():
    task, s0 = tasks.pendulum(horizon=6), jnp.asarray([0.3, 0.0])
    shooting = Shooting(ADAM, starts=3)
    plan = Affine.zeros(task)
    plan, carry, _ = shooting.update(plan, shooting.init(plan, task), task, s0, key=KEY)
    assert isinstance(plan, Affine) and carry.z.shape == (3, 6, 1)
    moved = shooting.shift(carry)
    shifted = OpenLoop(jnp.concatenate([plan.a[1:], plan.a[-1:]]))
    same(moved.z[:, :-1], carry.z[:, 1:])
    same(Tanh().actions(moved.z[moved.best], task.a_low, task.a_high), shifted.a, rtol=1e-6)


def test_wrong_arguments():
    task = tasks.lqr(horizon=4)
    plan = OpenLoop.zeros(task)
    with pytest.raises(TypeError, match=r"descend must be a rule on a gradient.*got function"):
        Shooting(optax.adam)
    with pytest.raises(TypeError, match=r"limits must be Tanh\(\) or Projection\(\), got str"):
        Shooting(ADAM, limits="tanh")
    with pytest.raises(ValueError, match="starts must be at least 1, got 0"):
        Shooting(ADAM, starts=0)
    with pytest.raises(ValueError, match="spread must be positive, got -1"):
        Shooting(ADAM, spread=-1.0)
    with pytest.raises(ValueError, match="particles must be at least 1"):
        Shooting(ADAM, particles=0)
    several = Shooting(ADAM, starts=3)
    with pytest.raises(ValueError, match="Shooting draws 2 of its starts: give it a key, not None"):
        several.update(plan, several.init(plan, task), task, jnp.ones(2), key=None)
    with pytest.raises(TypeError, match="Shooting improves a plan"):
        several.init(task, task)
