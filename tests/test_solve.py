"""The loop: why it stops, what it returns, and what it refuses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, Affine, Continuation, GaussNewton, Linear, Neural, OpenLoop, OptaxSolver, solve, tasks
from diffmbrl.core import Box, Task
from diffmbrl.solve.loop import CHUNK
from tests.problems import bent, changed, riccati

KEY = jax.random.key(0)
SGD = OptaxSolver(optax.sgd, learning_rate=1e-2)


@pytest.fixture(scope="module")
def problem():
    task = bent(horizon=5)
    return Linear.zeros(task), task, task.starts(KEY, 3)


def test_history(problem):
    """More updates than one look's, so that chunks are put together."""
    steps = CHUNK + 10
    policy, history = solve(SGD, *problem, None, steps)
    assert (history.updates, history.stop) == (steps, f"{steps} updates")
    assert all(isinstance(x, np.ndarray) and x.shape == (steps,) for x in jax.tree.leaves(history.info))
    assert history.seconds > 0 and history.compile_seconds > 0
    # Every row is filled.
    assert np.all(history.info.gradient_norm > 0) and np.all(history.info.work.forward == 2 * 3 * 5)
    assert np.all(np.diff(history.info.J) > 0)
    again, _ = solve(SGD, *problem, None, steps)
    jax.tree.map(np.testing.assert_array_equal, policy, again)


def test_one_update_more_is_one_update_more(problem):
    runs = [solve(SGD, *problem, None, steps) for steps in (5, 6)]
    np.testing.assert_array_equal(runs[0][1].info.J, runs[1][1].info.J[:5])
    assert runs[1][1].updates == 6


def test_each_update_has_noise_of_its_own(problem):
    policy, task, s0 = problem
    task = changed(task, noise=0.5)
    frozen = OptaxSolver(optax.sgd, learning_rate=0.0)
    _, history = solve(frozen, policy, task, s0, jax.random.key(1), 4)
    assert len(set(history.info.J.tolist())) == 4
    _, again = solve(frozen, policy, task, s0, jax.random.key(1), 4)
    np.testing.assert_array_equal(history.info.J, again.info.J)
    _, other = solve(frozen, policy, task, s0, jax.random.key(2), 4)
    assert history.info.J[0] != other.info.J[0]
    _, silent = solve(frozen, policy, task, s0, None, 4)
    assert len(set(silent.info.J.tolist())) == 1


def test_a_budget_of_seconds(problem):
    _, history = solve(SGD, *problem, None, 10_000, seconds=1e-9)
    assert history.updates == 1
    assert history.stop == "budget of 1e-09 s after 1 updates"


def test_a_tolerance(problem):
    policy, task, s0 = problem
    norm = solve(SGD, policy, task, s0, None, 20)[1].info.gradient_norm
    tolerance = float(norm[10]) * 1.0001
    _, history = solve(SGD, policy, task, s0, None, 20, tolerance=tolerance)
    assert history.updates == 1 + int(np.argmax(norm <= tolerance)) == len(history.info.J)
    assert history.stop.startswith("converged: gradient norm ")
    assert history.stop.endswith(f"is at most {tolerance:g}")
    assert history.info.gradient_norm[-1] <= tolerance < history.info.gradient_norm[-2]


def test_a_planner(problem):
    task = tasks.lqr(horizon=5)
    s0 = task.initial(KEY)
    plan, history = solve(ILQR(), Affine.zeros(task), task, s0, None, 3, tolerance=1e-4)
    assert history.stop.startswith("converged")
    np.testing.assert_allclose(history.info.J[-1], riccati(task).J(s0), rtol=1e-5)
    assert plan.K.shape == (5, 1, 2)


# What is not finite.


class Cliff(eqx.Module):
    """s' = s + a + step, NaN past the edge."""

    edge: Any = eqx.field(default_factory=lambda: jnp.asarray(2.5, float))

    def __call__(self, s, a, *, key=None):
        s = s + a + 1
        return jnp.where(s < self.edge, s, jnp.nan)


class Squares(eqx.Module):
    log: bool = eqx.field(static=True, default=False)

    def __call__(self, s, a):
        return jnp.log(2.5 - s[0]) - a @ a if self.log else -s @ s - a @ a


class Gain(eqx.Module):
    """The action is undefined beyond a state of 1.5."""

    theta: Any

    def __call__(self, s, *, key=None):
        return self.theta * jnp.sqrt(1.5 - s)


class Last(eqx.Module):
    def __call__(self, s):
        return jnp.log(1.5 - s[0])


def walk(**parts: Any) -> Task:
    parts = {"dynamics": Cliff(), "reward": Squares()} | parts
    return Task(name="walk", initial=Box([0.0], [0.0]), a_low=[-jnp.inf], a_high=[jnp.inf], horizon=4, dt=1.0, **parts)


S0 = jnp.asarray([[-3.0], [0.0]])  # the second start reaches the edge


STILL = Linear(jnp.zeros((1, 1)), jnp.zeros(1))
FAR = Cliff(jnp.asarray(9.0))


@pytest.mark.parametrize(
    "task, policy, where",
    [
        pytest.param(walk(), STILL, "s[3] of start 1", id="state"),
        pytest.param(walk(dynamics=FAR), Gain(jnp.zeros(1)), "a[2] of start 1", id="action"),
        pytest.param(walk(dynamics=FAR, reward=Squares(True)), STILL, "r[3] of start 1", id="reward"),
        pytest.param(
            walk(dynamics=Cliff(jnp.asarray(3.5)), terminal=Last()), STILL, "s[4] of start 1", id="last state"
        ),
        pytest.param(walk(dynamics=FAR, terminal=Last()), STILL, "the return", id="terminal reward"),
    ],
)
def test_the_tensor_and_the_step_are_named(task, policy, where):
    kept, history = solve(SGD, policy, task, S0, None, 5)
    assert history.stop.startswith(f"nonfinite: {where}"), history.stop
    assert history.stop.endswith("(update 1)")
    assert history.updates == 1 and not history.info.accepted[0] and history.info.nonfinite[0] == 1
    jax.tree.map(np.testing.assert_array_equal, kept, policy)


def test_so_they_are_for_a_planner():
    task = walk()
    _, history = solve(ILQR(), Affine.zeros(task), task, S0[1], None, 5)
    assert history.stop == "nonfinite: s[3] of start 0 (update 1)"


class Onwards(eqx.Module):
    def __call__(self, s, a):
        return s[0]


@pytest.mark.parametrize("rate", [1.0, 1e-2, 2e-3, 2e-4])
def test_a_run_that_walks_off_a_cliff_returns_its_last_finite_policy(rate):
    """The reward lies beyond the edge; it is reached after few updates or many, at whatever place among the chunks."""
    task = walk(dynamics=FAR, reward=Onwards())
    solver = OptaxSolver(optax.sgd, learning_rate=rate)
    policy, history = solve(solver, STILL, task, S0, None, 2000)
    assert history.stop.startswith("nonfinite: s[") and history.stop.endswith(f"(update {history.updates})")
    assert np.all(np.isfinite(history.info.J[:-1])) and not np.isfinite(history.info.J[-1])
    assert np.all(np.diff(history.info.J[:-1]) > 0)
    _, after = solve(solver, policy, task, S0, None, 1)
    # The one before the update that failed.
    np.testing.assert_allclose(after.info.J[0], history.info.J[-2], rtol=1e-6)
    assert rate == 1.0 or history.updates > 3


# What is refused.


@pytest.fixture(scope="module")
def lqr():
    return tasks.lqr(horizon=5)


@pytest.mark.parametrize(
    "solver, make, shape, message",
    [
        (SGD, Linear.zeros, (3, 4), r"s0 has shape \[3, 4\]; OptaxSolver on task 'lqr' takes \[B, 2\] \(task.starts\("),
        (SGD, Linear.zeros, (2,), r"s0 has shape \[2\]; OptaxSolver on task 'lqr' takes \[B, 2\]"),
        (GaussNewton(), Linear.zeros, (2, 3, 2), r"s0 has shape \[2, 3, 2\]; GaussNewton on task 'lqr' takes \[B, 2\]"),
        (ILQR(), Affine.zeros, (3, 2), r"s0 has shape \[3, 2\]; ILQR on task 'lqr' takes \[2\] \(one start; vmap for many\)"),
        (
            Continuation.growing(ILQR(), 5, horizon=5), Affine.zeros, (3, 2),
            r"s0 has shape \[3, 2\]; Continuation on task 'lqr' takes \[2\] \(one start",
        ),
    ],
)  # fmt: skip
def test_starts_of_the_wrong_shape(solver, make, shape, message, lqr):
    with pytest.raises(ValueError, match=message):
        solve(solver, make(lqr), lqr, jnp.ones(shape), None, 5)


@pytest.mark.parametrize("make", [Linear.zeros, lambda task: Neural.init(task, key=KEY)])
def test_a_planner_needs_a_plan(make, lqr):
    policy = make(lqr)
    with pytest.raises(
        TypeError, match=f"ILQR improves a plan, such as Affine.zeros.task.; got {type(policy).__name__}"
    ):
        solve(ILQR(), policy, lqr, lqr.initial(KEY), None, 5)


def test_ilqr_needs_feedback_in_its_plan(lqr):
    with pytest.raises(TypeError, match=r"ILQR improves an Affine plan, such as Affine.zeros\(task\); got OpenLoop"):
        solve(ILQR(), OpenLoop.zeros(lqr), lqr, lqr.initial(KEY), None, 5)


@pytest.mark.parametrize("steps", [0, -3])
def test_at_least_one_update(steps, lqr):
    with pytest.raises(ValueError, match=f"steps must be a whole number of at least 1, got {steps}"):
        solve(SGD, Linear.zeros(lqr), lqr, lqr.starts(KEY, 2), None, steps)


def test_a_parameter_that_is_not_finite_is_named():
    task = tasks.cartpole_balance(horizon=5)
    policy, s0 = Linear.zeros(task), task.starts(KEY, 2)
    lost = eqx.tree_at(lambda t: t.dynamics.m_p, task, jnp.asarray(jnp.nan))
    for arguments, name in [
        ((policy, lost, s0), r"task\.dynamics\.m_p"),
        ((eqx.tree_at(lambda p: p.K, policy, policy.K.at[0, 1].set(jnp.inf)), task, s0), r"policy\.K"),
        ((policy, task, s0.at[1, 2].set(jnp.nan)), "s0"),
    ]:
        with pytest.raises(ValueError, match=f"{name} is not finite; every parameter must be a finite number"):
            solve(SGD, *arguments, None, 5)


class Indifferent(eqx.Module):
    def __call__(self, s, a):
        return -s[0]


class Deaf(eqx.Module):
    def __call__(self, s, a, *, key=None):
        return 0.9 * s


@pytest.mark.parametrize("solver", [SGD, GaussNewton(), ILQR()], ids=["sgd", "gauss-newton", "ilqr"])
def test_a_task_that_ignores_its_actions_is_refused_with_the_reason(solver):
    task = walk(dynamics=Deaf(), reward=Indifferent())
    policy = Affine.zeros(task) if solver.kind == "plan" else Linear(jnp.zeros((1, 1)), jnp.zeros(1))
    s0 = S0[0] if solver.kind == "plan" else S0
    with pytest.raises(
        ValueError, match="the reward of task 'walk' has no gradient in the action within its horizon of 4"
    ):
        solve(solver, policy, task, s0, None, 5)


def test_a_policy_at_an_optimum_is_not_refused(lqr):
    """Its gradient is exactly zero at the origin, but the actions count."""
    _, history = solve(SGD, Linear.zeros(lqr), lqr, jnp.zeros((2, 2)), None, 5)
    assert history.stop == "converged: gradient norm 0 is at most 0"


def test_a_policy_of_the_wrong_size(lqr):
    wrong = Linear(jnp.zeros((2, 2)), jnp.zeros(2))
    with pytest.raises(
        ValueError, match=r"the policy returned an action of shape \[2\]; task 'lqr' takes \[m\] = \[1\]"
    ):
        solve(SGD, wrong, lqr, lqr.starts(KEY, 2), None, 5)
