"""Multiple shooting on problems with known answers: Riccati's, dense KKT systems, first-order conditions by hand."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trajectory_problems import problem
from diffmbrl import ILQR, Affine, Constraints, MultipleShooting, OpenLoop, episode_return, solve, tasks
from diffmbrl.core import Task
from diffmbrl.diagnostics.spectrum import in_double
from tests.problems import LINEAR, bent, changed, matrices, riccati


def start() -> jax.Array:
    return jnp.asarray([0.9, -0.3], float)


@jax.jit
def run(solver, plan, task, s0, updates):
    """So many updates: plan, carry, the last report and the returns and merits on the way."""

    def step(i, state):
        plan, carry, info, J = state
        plan, carry, info = solver.update(plan, carry, task, s0, key=None)
        return plan, carry, info, J.at[i].set(jnp.stack([info.J, info.merit]), mode="drop")

    carry = solver.init(plan, task)
    info = jax.eval_shape(lambda: solver.update(plan, carry, task, s0, key=None)[2])
    info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)
    return jax.lax.fori_loop(0, updates, step, (plan, carry, info, jnp.full((100, 2), jnp.nan, plan.a.dtype)))


def shooting(**options) -> Any:
    return in_double(MultipleShooting(**options))


def scattered(task: Task, seed: int = 0, scale: float = 1.0) -> Affine:
    """States that no dynamics follow, and actions."""
    rng, rest = np.random.default_rng(seed), Affine.zeros(task)
    return Affine(rest.K, *(x + scale * jnp.asarray(rng.normal(size=x.shape)) for x in (rest.a, rest.s)))


def constrained(task: Task, **functions: Any) -> Task:
    return eqx.tree_at(lambda t: t.constraints, task, Constraints(**functions), is_leaf=lambda x: x is None)


def limited(task: Task, high: float) -> Task:
    limit = jnp.full(task.m, high)
    return eqx.tree_at(lambda t: (t.a_low, t.a_high), task, (-limit, limit))


class Below(eqx.Module):
    """s[index] <= at, as a constraint of a step or of the end."""

    at: Any
    index: int = eqx.field(static=True, default=1)

    def __call__(self, s, a=None):
        return s[self.index, None] - self.at


class At(eqx.Module):
    goal: Any

    def __call__(self, s):
        return s - self.goal


@pytest.mark.parametrize("name, horizon", [("unstable 3x1", 5), ("unstable 3x1", 1), ("unstable 12x4", 20)])
def test_one_update_from_scattered_states_is_riccatis_optimum(name, horizon, x64):
    task = LINEAR[name](horizon)
    s0 = jnp.asarray(np.random.default_rng(1).normal(size=task.n))
    plan, _, info, J = run(shooting(), scattered(task), task, s0, 2)
    # The second update is measured where the first led, and finds nothing to do.
    np.testing.assert_allclose(J[1], [riccati(task).J(s0)] * 2, rtol=1e-9)
    np.testing.assert_allclose(plan.K, riccati(task).K, rtol=1e-7, atol=1e-8)
    assert info.gradient_norm < 1e-8 * (1 + np.abs(J[0, 0]))
    assert info.violation == 0


def gaps(plan, task, s0):
    after = jax.vmap(task.dynamics)(plan.s, plan.a)
    return np.concatenate([(s0 - plan.s[0])[None], after[:-1] - plan.s[1:]])


def test_a_step_leaves_the_same_share_of_every_gap(x64):
    """And it is the share that the step length says, whatever the dynamics."""
    task = changed(bent(), scale=3.0)
    shares = []
    for seed in range(6):
        plan, s0 = scattered(task, seed, scale=4.0), start()
        for _ in range(3):
            before = gaps(plan, task, s0)
            moved, _, info, _ = run(shooting(armijo=0.8), plan, task, s0, 1)
            after = gaps(moved, task, s0)
            share = np.sum(after * before) / max(np.sum(before**2), 1e-30)
            np.testing.assert_allclose(after, share * before, atol=1e-12)
            if info.accepted and np.abs(before).max() > 1e-9:
                shares.append(share)
                # Gains are kept for a plan that visits its states.
                assert np.any(moved.K) == (share < 1e-9)
            plan = moved
    lengths = np.log2(1 / (1 - np.asarray(shares)))
    np.testing.assert_allclose(lengths, np.round(lengths), atol=1e-9)
    assert np.max(lengths) > 0.5 and np.min(lengths) < 0.5  # of both kinds


def test_the_merit_is_the_return_once_no_gap_is_left(x64):
    task = bent()
    _, _, info, J = run(shooting(), scattered(task), task, start(), 40)
    assert abs(J[0, 0] - J[0, 1]) > 0.1
    np.testing.assert_allclose(*J[39], rtol=1e-12)
    assert info.gradient_norm < 1e-6


def test_a_plan_without_gaps_is_never_made_worse(x64):
    task, s0 = bent(), start()
    for seed in range(3):
        actions = scattered(task, seed).a
        states = jax.lax.scan(lambda s, a: (task.dynamics(s, a), s), s0, actions)[1]
        plan = Affine(Affine.zeros(task).K, actions, states)
        *_, J = run(shooting(), plan, task, s0, 60)
        assert np.all(np.diff(J[:60, 0]) >= 0)
        np.testing.assert_allclose(J[0, 0], episode_return(plan, task, s0), rtol=1e-12)
        assert J[59, 0] > J[0, 0]


def test_it_reaches_ilqrs_optimum(x64):
    task, s0 = bent(), start()
    plan, *_ = run(shooting(), Affine.zeros(task), task, s0, 60)
    other, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 60)
    np.testing.assert_allclose(episode_return(plan, task, s0), episode_return(other, task, s0), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name, updates", [("pendulum", 100), ("cart-pole", 400), ("quadrotor", 40)])
def test_on_the_systems_of_the_benchmark_it_reaches_ilqrs_optimum(name, updates, x64):
    task = problem(name, 100)
    s0 = task.initial(jax.random.key(0))
    rest, goal = Affine.zeros(task), task.reward.goal
    wanted = solve(in_double(ILQR()), rest, task, s0, None, updates)[1].info.J[-1]
    straight = Affine(rest.K, rest.a, s0 + (goal - s0) * jnp.linspace(0, 1, 100)[:, None])
    for plan in [rest, straight]:
        J = solve(shooting(), plan, task, s0, None, updates)[1].info.J[-1]
        # A straight line may lead to another optimum, and a better one.
        assert wanted - J <= 1e-6 * abs(wanted)


# Constraints.


def test_equality_constraints_on_a_linear_quadratic_task_are_the_dense_kkt_system(x64):
    """The last state given: min a' M a / 2 + g' a with C a = b, by numpy."""
    task, T = tasks.lqr(horizon=10), 10
    goal, s0 = np.asarray([0.5, -0.2]), np.asarray([1.0, 0.3])
    A, B, Q, R, Q_T = matrices(task)
    powers = [np.linalg.matrix_power(A, t) for t in range(T + 1)]
    respond = np.zeros((T + 1, 2, T))
    for t in range(T + 1):
        for i in range(t):
            respond[t, :, i] = (powers[t - 1 - i] @ B)[:, 0]
    weights = [Q] * T + [Q_T]
    M = sum(L.T @ W @ L for L, W in zip(respond, weights, strict=True)) + R[0, 0] * np.eye(T)
    g = sum(L.T @ W @ P @ s0 for L, W, P in zip(respond, weights, powers, strict=True))
    C, b = respond[T], goal - powers[T] @ s0
    system = np.block([[M, C.T], [C, np.zeros((2, 2))]])
    solution = np.linalg.solve(system, np.concatenate([-g, b]))

    bound = constrained(task, final_equality=At(jnp.asarray(goal)))
    plan, carry, info, _ = run(shooting(), Affine.zeros(task), bound, jnp.asarray(s0), 30)
    np.testing.assert_allclose(plan.a[:, 0], solution[:T], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(carry.multipliers.final_equality, solution[T:], rtol=1e-5, atol=1e-6)
    assert info.violation < 1e-8 and info.gradient_norm < 1e-6


def test_limits_of_actions_satisfy_the_first_order_conditions(x64):
    task, s0 = limited(bent(), 0.5), start()
    plan, carry, info, _ = run(shooting(), Affine.zeros(task), task, s0, 80)
    g = np.asarray(jax.jit(jax.grad(lambda a: episode_return(OpenLoop(a), task, s0)))(plan.a))[:, 0]
    a = np.asarray(plan.a)[:, 0]
    low, high = np.asarray(carry.multipliers.inequality).T
    at_low, at_high = a < -0.5 + 1e-7, a > 0.5 - 1e-7
    assert 0 < (at_low | at_high).sum() < task.horizon
    assert np.abs(a).max() < 0.5 + 1e-8 and info.violation < 1e-8 and info.gradient_norm < 1e-6
    np.testing.assert_allclose(high - low, g, atol=1e-6)  # what more action would gain, held by the limit alone
    assert np.all(low >= 0) and np.all(high >= 0)
    np.testing.assert_array_equal(low[~at_low], 0)
    np.testing.assert_array_equal(high[~at_high], 0)
    assert (low + high)[at_low | at_high].min() > 0


@pytest.fixture(scope="module")
def walled():
    """The bent task with a bound on the speed at every step and one on the angle at the end: (task, bounds)."""
    with jax.enable_x64(True):
        task = constrained(bent(), inequality=Below(jnp.asarray(0.35), 1), final_inequality=Below(jnp.asarray(-0.1), 0))
        return task, run(shooting(), scattered(task, 3), task, -start(), 80)


def test_inequalities_on_states_are_met_and_their_multipliers_are_prices(walled, x64):
    task, (plan, carry, info, _) = walled
    assert info.violation < 1e-8 and info.gradient_norm < 1e-6
    room = 0.35 - plan.s[:, 1]
    mu = np.asarray(carry.multipliers.inequality)[:, 0]
    end = np.asarray(carry.multipliers.final_inequality)
    assert np.all(mu >= 0) and np.all(end >= 0) and (mu > 1e-3).any()
    np.testing.assert_allclose(mu * room, 0, atol=1e-8)
    # A little more room at every step earns the sum of the multipliers.
    eps = 1e-4
    more = [
        run(
            shooting(),
            plan,
            eqx.tree_at(lambda t: t.constraints.inequality.at, task, jnp.asarray(0.35 + sign * eps)),
            -start(),
            60,
        )[3][59, 0]
        for sign in (1, -1)
    ]
    np.testing.assert_allclose((more[0] - more[1]) / (2 * eps), mu.sum(), rtol=1e-3)


def test_what_cannot_be_met_is_reported(walled, x64):
    """A speed that the start already exceeds: nothing is hidden, and nothing breaks."""
    task = eqx.tree_at(lambda t: t.constraints.inequality.at, walled[0], jnp.asarray(-1.0))
    plan, carry, info, _ = run(shooting(), Affine.zeros(task), task, -start(), 100)
    assert info.violation >= 1.3 - 1e-12 and info.gradient_norm > 1 and np.isfinite(info.J)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((plan, carry)) if x is not carry.unmet)
    broken = eqx.tree_at(lambda t: t.constraints.inequality.at, task, jnp.asarray(jnp.nan))
    kept, _, info, _ = run(shooting(), plan, broken, -start(), 1)
    assert not info.accepted and info.nonfinite > 0 and info.violation == np.inf
    np.testing.assert_array_equal(kept.a, plan.a)


class Scalar(eqx.Module):
    def __call__(self, s, a):
        return s[0]


def test_clear_errors():
    task = bent()
    rest = Affine.zeros(task)
    with pytest.raises(TypeError, match=r"improves an Affine plan, such as Affine.zeros\(task\); got OpenLoop"):
        MultipleShooting().init(OpenLoop.zeros(task), task)
    with pytest.raises(ValueError, match="episodes of task 'bent' can end"):
        MultipleShooting().init(rest, bent(ends=True))
    with pytest.raises(ValueError, match=r"the equality of task 'bent' has shape \[\]; expected one axis \[k\]"):
        MultipleShooting().init(rest, constrained(task, equality=Scalar()))
    wrong = eqx.tree_at(lambda t: t.constraints, task, Scalar(), is_leaf=lambda x: x is None)
    with pytest.raises(TypeError, match=r"task.constraints must be Constraints or None, got Scalar"):
        MultipleShooting().init(rest, wrong)
