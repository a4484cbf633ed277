"""Schedules, and what the solver inside is given at each stage."""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmbrl import ILQR, Affine, Continuation, GaussNewton, Linear, OptaxSolver, Sequential, plans, solve, tasks
from diffmbrl.core import restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.wrappers.continuation import DISCOUNTS, SHARES
from diffmbrl.planners.batch import Status
from tests.problems import bent

KEY = jax.random.key(0)
TASK = bent(horizon=6)
ADAM = OptaxSolver(optax.adam, learning_rate=0.1)

close = partial(np.testing.assert_allclose, rtol=1e-6)


class Recorder(eqx.Module):
    """Does nothing, and reports what it was given: how many updates it has made since `init`, and the weights' sum."""

    kind: ClassVar[str] = "policy"

    def init(self, policy: Any, task: Any) -> Any:
        return jnp.zeros((), jnp.int32)

    on_objective_change = restart

    def update(self, policy: Any, carry: Any, task: Any, s0: Any, *, key: Any) -> Any:
        TRACES.append(1)
        J = jnp.sum(task.weights * (1 + jnp.arange(task.horizon + 1, dtype=task.weights.dtype)))
        info = Info(
            J, jnp.ones(()), jnp.array(True), jnp.zeros(()), carry, jnp.zeros((), jnp.int32), count_evaluations()
        )
        return policy, carry + 1, info


TRACES: list[int] = []


def run(solver: Continuation, updates: int, task: Any = TASK) -> Info:
    """The recorder's infos over so many updates, by one compiled update."""
    update = jax.jit(lambda carry, task: solver.update(policy, carry, task, task.starts(KEY, 2), key=None))
    policy, carry, infos = Linear.zeros(task), solver.init(Linear.zeros(task), task), []
    for _ in range(updates):
        _, carry, info = update(carry, task)
        infos.append(info)
    return jax.tree.map(lambda *xs: np.stack(xs), *infos)


def test_weights_of_the_stages():
    solver = Continuation(Recorder(), discounts=[0.5, 0.9, 1.0], lengths=[1, 1, 1], horizons=[2, 4, 7])
    t = np.arange(7)
    close(solver.weights(TASK, 0), 0.5**t * (t < 2))
    close(solver.weights(TASK, 1), 0.9**t * (t < 4))
    # The last stage, with the terminal reward, is the task itself.
    np.testing.assert_array_equal(solver.weights(TASK, 2), TASK.weights)
    # On top of the task's own weights.
    own = eqx.tree_at(lambda task: task.weights, TASK, jnp.linspace(1, 2, 7))
    close(solver.weights(own, 0), np.linspace(1, 2, 7) * 0.5**t * (t < 2))
    np.testing.assert_array_equal(solver.weights(own, 2), own.weights)


def test_stages_follow_each_other_with_a_fresh_solver_in_one_trace():
    solver = Continuation(Recorder(), discounts=[0.5, 0.9, 1.0], lengths=[2, 3, 1])
    TRACES.clear()
    info = run(solver, 9)
    assert len(TRACES) == 1
    stage = np.asarray([0, 0, 1, 1, 1, 2, 2, 2, 2])  # the last goes on for as long as it is asked
    t = np.arange(7)
    close(info.J, [np.sum(DISCOUNT**t * (1 + t)) for DISCOUNT in np.asarray([0.5, 0.9, 1.0])[stage]])
    np.testing.assert_array_equal(info.inner_iterations, [0, 1, 0, 1, 2, 0, 1, 2, 3])


def test_a_stage_starts_from_the_last_ones_policy():
    """And with a fresh optimiser: two stages of the same objective are two runs, one after the other."""
    s0, policy = TASK.starts(KEY, 3), Linear.zeros(TASK)
    continued, _ = solve(Continuation(ADAM, discounts=[1.0, 1.0], lengths=[3, 4]), policy, TASK, s0, None, 7)
    half, _ = solve(ADAM, policy, TASK, s0, None, 3)
    restarted, _ = solve(ADAM, half, TASK, s0, None, 4)
    straight, _ = solve(ADAM, policy, TASK, s0, None, 7)
    jax.tree.map(close, continued, restarted)
    assert np.abs(continued.K - straight.K).max() > 1e-3


def test_the_default_schedule():
    solver = Continuation.discounted(ADAM, 100)
    close(solver.discounts, DISCOUNTS)
    assert solver.lengths.tolist() == [10, 16, 16, 16, 42]
    assert sum(SHARES) == pytest.approx(1) and len(SHARES) == len(DISCOUNTS) and DISCOUNTS[-1] == 1
    np.testing.assert_array_equal(solver.weights(TASK, 4), TASK.weights)


@given(st.integers(5, 3000))
def test_the_default_schedule_covers_all_updates(steps):
    lengths = np.asarray(Continuation.discounted(ADAM, steps).lengths)
    assert lengths.sum() == steps and lengths.min() >= 1
    # Every stage has its share, to rounding, and the last one is reached.
    assert np.all(np.abs(lengths[:-1] - steps * np.asarray(SHARES[:-1])) <= 1)


@given(st.integers(1, 200), st.integers(1, 120), st.integers(1, 30))
def test_growing_horizons_cover_all_updates_and_end_at_the_whole_task(steps, horizon, stages):
    solver = Continuation.growing(ILQR(), steps, horizon=horizon, stages=stages)
    lengths, horizons = np.asarray(solver.lengths), np.asarray(solver.horizons)
    assert lengths.sum() == steps and lengths.min() >= 1 and lengths.max() - lengths.min() <= 1
    assert len(lengths) == min(steps, horizon, stages)
    assert np.all(np.diff(horizons) > 0) and horizons[0] >= 1
    # Evenly: each within a step of its share.
    shares = horizon * np.arange(1, len(horizons) + 1) / len(horizons)
    assert np.all(np.abs(horizons[:-1] - shares[:-1]) <= 1)
    # The last includes the terminal reward, the others do not.
    assert horizons[-1] == horizon + 1 and np.all(horizons[:-1] <= horizon)
    assert np.all(solver.discounts == 1)


@pytest.mark.parametrize("steps", [1, 3, 20, 50])
def test_growing_ends_with_the_exact_objective(steps):
    solver = Continuation.growing(Recorder(), steps, horizon=6)
    info = run(solver, steps)
    close(info.J[-1], np.sum(np.arange(1, 8)))
    assert np.all(np.diff(info.J) >= 0)
    assert steps == 1 or info.J[0] < info.J[-1]


class Rising(eqx.Module):
    """Does nothing, and reports returns from a list, whatever the stage."""

    returns: Any
    kind: ClassVar[str] = "policy"

    def init(self, policy: Any, task: Any) -> Any:
        return ()

    on_objective_change = restart

    def update(self, policy: Any, carry: Any, task: Any, s0: Any, *, key: Any) -> Any:
        # Each update takes the next, by the number of updates that the policy's bias counts.
        now = self.returns[policy.b[0].astype(jnp.int32)]
        info = Info(now, task.weights[1], *(jnp.zeros(()),) * 2, *(jnp.zeros((), jnp.int32),) * 2, count_evaluations())
        return eqx.tree_at(lambda p: p.b, policy, policy.b + 1), carry, info


def discounts_along(solver: Continuation, updates: int) -> list[float]:
    policy, s0 = Linear.zeros(TASK), TASK.starts(KEY, 2)
    update = jax.jit(lambda policy, carry: solver.update(policy, carry, TASK, s0, key=None))
    carry, seen = solver.init(policy, TASK), []
    for _ in range(updates):
        policy, carry, info = update(policy, carry)
        seen.append(round(float(info.gradient_norm), 3))
    return seen


def test_a_stage_ends_when_progress_does():
    """Looked at every 2 updates: returns that rise by a tenth keep it, those that do not end it, its length does anyhow."""
    returns = [-10.0, -9.5, -9.0, -8.9, -8.9, -8.9, -8.9, -8.0, -7.0, -6.0, -5.0, -4.0]
    schedule = {"discounts": [0.5, 0.7, 1.0], "lengths": [7, 2, 1], "tolerance": 0.1, "patience": 2}
    seen = discounts_along(Continuation(Rising(jnp.asarray(returns)), **schedule), 11)
    # 10% of 10 were gained from update 0 to 2, not of 9 from 2 to 4; the next stage may last until 9 updates in all.
    assert seen == [0.5] * 5 + [0.7] * 4 + [1.0] * 2
    steady = discounts_along(Continuation(Rising(-(0.8 ** jnp.arange(12.0))), **schedule), 11)
    assert steady == [0.5] * 7 + [0.7] * 2 + [1.0] * 2
    assert (
        discounts_along(Continuation(Rising(jnp.asarray(returns)), **(schedule | {"tolerance": -jnp.inf})), 11)
        == steady
    )


@pytest.mark.parametrize("radius, stages", [(0.9, [0, 1, 2, 2]), (1.02, [0, 1, 1, 1]), (1.5, [0, 0, 0, 0])])
def test_a_discount_is_entered_as_soon_as_the_growth_allows(radius, stages):
    """Without control, s' = radius s: the next discount times the radius squared must be at most kappa = 1."""
    task = tasks.linear.linear_quadratic(
        radius * jnp.eye(2), jnp.eye(2)[:, :1], jnp.eye(2), jnp.eye(1), jnp.eye(2), horizon=100, dt=1.0
    )
    solver = Continuation(Recorder(), discounts=[0.8, 0.95, 1.0], lengths=[10, 10, 1], kappa=1.0)
    info = run(solver, 4, task)
    t = np.arange(101)
    close(info.J, [np.sum(np.asarray([0.8, 0.95, 1.0])[k] ** t * (1 + t)) for k in stages], rtol=1e-4)
    assert info.work.sequential[0] == 2


def test_around_a_planner_it_plans():
    task = tasks.lqr(horizon=6)
    s0 = task.initial(KEY)
    plan, history = solve(Continuation.growing(ILQR(), 6, horizon=6, stages=3), Affine.zeros(task), task, s0, None, 6)
    exact, _ = solve(ILQR(), Affine.zeros(task), task, s0, None, 2)
    assert history.updates == 6
    np.testing.assert_allclose(plan.a, exact.a, rtol=1e-4, atol=1e-5)
    assert ILQR().kind == Continuation.growing(ILQR(), 6, horizon=6).kind == "plan"
    assert Continuation.discounted(GaussNewton(), 6).kind == "policy"


def test_around_another_continuation():
    inner = Continuation(Recorder(), discounts=[0.5, 1.0], lengths=[1, 1])
    info = run(Continuation(inner, discounts=[1.0, 1.0], lengths=[3, 3], horizons=[3, 10]), 6)
    t = np.arange(7)
    halves = [np.sum(0.5**t * (1 + t) * (t < h)) for h in (3, 7)]
    wholes = [np.sum((1.0 + t) * (t < h)) for h in (3, 7)]
    close(info.J, [halves[0], wholes[0], wholes[0], halves[1], wholes[1], wholes[1]])


def test_schedules_are_lanes():
    """Their values are leaves: a sweep over discounts is a `vmap`."""
    solvers = [Continuation(Recorder(), discounts=[first, 1.0], lengths=[1, 1]) for first in (0.5, 0.9)]
    lanes = jax.tree.map(lambda *xs: jnp.stack(xs), *solvers)
    weights = jax.vmap(lambda solver: solver.weights(TASK, 0))(lanes)
    close(weights, [0.5 ** np.arange(7), 0.9 ** np.arange(7)])


@pytest.mark.parametrize(
    "schedule, message",
    [
        ({"discounts": [], "lengths": []}, "at least one; got 0, 0 and 0"),
        (
            {"discounts": [0.9, 1.0], "lengths": [1]},
            "as many discounts as lengths .and horizons., at least one; got 2, 1 and 2",
        ),
        ({"discounts": [1.0], "lengths": [1], "horizons": [1, 2]}, "got 1, 1 and 2"),
        ({"discounts": [0.0, 1.0], "lengths": [1, 1]}, r"discounts must lie in \(0, 1\], got \[0.0, 1.0\]"),
        ({"discounts": [1.5], "lengths": [1]}, r"discounts must lie in \(0, 1\], got \[1.5\]"),
        ({"discounts": [float("nan")], "lengths": [1]}, r"discounts must lie in \(0, 1\], got \[nan\]"),
        ({"discounts": [1.0], "lengths": [0]}, r"at least one update and one step, got lengths \[0\]"),
        ({"discounts": [1.0], "lengths": [1], "horizons": [0]}, r"and horizons \[0\]"),
        ({"discounts": [1.0], "lengths": [1], "kappa": 0.0}, "kappa must be positive, got 0.0"),
        ({"discounts": [1.0], "lengths": [1], "patience": 0}, "patience must be at least 1 update, got 0"),
    ],
)
def test_bad_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        Continuation(ADAM, **schedule)


def test_fewer_updates_than_stages():
    with pytest.raises(ValueError, match="5 stages need at least 5 updates, got 4"):
        Continuation.discounted(ADAM, 4)
    assert Continuation.discounted(ADAM, 5).lengths.tolist() == [1] * 5


def test_no_change_is_convergence_in_the_last_stage_alone():
    """The recorder's J is that of its stage: from one update to the next nothing changes, but at the two ends of stages."""
    solver = Continuation(Recorder(), discounts=[0.5, 0.9, 1.0], lengths=[3, 3, 3])
    _, history = solve(solver, Linear.zeros(TASK), TASK, TASK.starts(KEY, 2), None, 20, relative=1e-3)
    assert history.stop == "converged: relative change of J 0 is at most 0.001" and history.updates == 8


@pytest.mark.parametrize("by", [{"tolerance": 1e-2}, {"relative": 1e-3}])
def test_plans_converge_in_the_last_stage_alone(by):
    """Of the first stage, one step, the gradient at resting actions is exactly 0. That is no end."""
    task = tasks.pendulum_swingup(horizon=10)
    s0 = task.starts(KEY, 2)
    solver = Continuation.growing(ILQR(), 60, horizon=10, stages=10)
    found = plans(solver, task, s0, steps=100, **({"relative": 0.0} | by))
    assert set(found.status.tolist()) <= {Status.GRADIENT, Status.RELATIVE} and np.all(found.iterations > 54)
    _, history = solve(solver, Affine.zeros(task), task, s0[0], None, 100, **by)
    assert "converged" in history.stop and history.updates == found.iterations[0]
    assert history.info.gradient_norm[0] == 0
    assert history.info.final.tolist() == [False] * 54 + [True] * (history.updates - 54)


def test_what_is_final_of_nested_schedules():
    inner = Continuation(Recorder(), discounts=[0.5, 1.0], lengths=[1, 1])
    assert run(Continuation(inner, discounts=[0.9, 1.0], lengths=[3, 2]), 6).final.tolist() == [False] * 4 + [True] * 2
    assert run(Sequential(Recorder(), inner, updates=2), 5).final.tolist() == [False] * 3 + [True] * 2
