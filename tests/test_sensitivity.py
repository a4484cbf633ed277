"""The spread of a closed loop under noise, against its simulation and the matrix M, and the weights drawn from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmbrl import ILQR, Continuation, GaussNewton, Linear, Neural, OpenLoop, mean_return, tasks
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.sensitivity import growth, sensitivity, trust
from tests.problems import LINEAR, bent, changed, matrices, same, some_slow

KEY = jax.random.key(5)

measured = jax.jit(sensitivity)


@pytest.mark.parametrize(
    "name", some_slow(["double integrator", "unstable 3x1", "stable 12x4"], "double integrator", "stable 12x4")
)
def test_on_a_linear_system_it_is_the_variance_of_the_cost(name, x64):
    task = LINEAR[name](8)
    A, B, Q, R, Q_T = matrices(task)
    K = 0.1 * np.random.default_rng(0).normal(size=(task.m, task.n))
    m = measured(Linear(jnp.asarray(K), jnp.zeros(task.m)), task, task.starts(KEY, 2))
    h = np.where(np.isfinite(task.a_high), (task.a_high - task.a_low) / 2, 1.0)
    spread, wanted = np.zeros((task.n, task.n)), []
    for t in range(1, 9):
        spread = (A + B @ K) @ spread @ (A + B @ K).T + (B * h) @ (B * h).T
        wanted.append(np.trace((Q + K.T @ R @ K if t < 8 else Q_T) @ spread))
    same(m[:, 0], wanted)
    same(m[:, 1], wanted)  # the same from every start


@pytest.mark.parametrize("name", ["unstable 3x1", "stable 12x4"])
def test_growth_is_that_of_the_power_of_the_closed_loop(name, x64):
    task = LINEAR[name](60)
    A, B, *_ = matrices(task)
    K = 0.05 * np.random.default_rng(1).normal(size=(task.m, task.n))
    rho = jax.jit(growth)(Linear(jnp.asarray(K), jnp.zeros(task.m)), task, task.starts(KEY, 2))
    power = np.linalg.matrix_power(A + B @ K, 60) / np.sqrt(task.n)
    same(rho, [np.linalg.norm(power) ** (1 / 60)] * 2)


def test_growth_does_not_overflow():
    task = LINEAR["unstable 3x1"](4000)  # 1.1^4000 is 1e165
    rho = jax.jit(growth)(Linear.zeros(task), task, task.starts(KEY, 1))
    np.testing.assert_allclose(rho, 1.1, rtol=1e-2)


def test_its_sum_is_a_trace_of_m(x64):
    """M of a plan without feedback, less the actions' own curvature, is what noise in the actions costs."""
    task = bent(horizon=6)
    s0 = task.starts(KEY, 1)
    plan = OpenLoop(0.3 * jax.random.normal(KEY, (6, 1)))

    @jax.jit
    def trace_and_own(plan):
        model = gauss_newton(plan, task, s0)
        return jnp.trace(dense(model, plan, task)), jnp.sum(model.linearization.H[:, 2, 2])

    trace, own = trace_and_own(plan)
    same(jnp.sum(measured(plan, task, s0)), trace - own)


def test_failures_grow():
    """On the cart-pole without control, starts near the top and far from it: both fall, one much later."""
    task = tasks.cartpole_balance(horizon=40)
    s0 = jnp.asarray([[0.0, 1e-4, 0.0, 0.0], [0.0, 0.6, 0.0, 0.5]])
    m = np.asarray(measured(Linear.zeros(task), task, s0))
    assert m[-2, 0] > 1e3 * m[4, 0]
    assert np.all(np.isfinite(m))


columns = st.lists(st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4), min_size=3, max_size=7)


@given(columns, st.floats(1.0, 100.0))
def test_properties_of_trust(m, bound):
    m = np.asarray(m, np.float32).T  # [T, B]
    w = np.asarray(trust(jnp.asarray(m), jnp.float32(bound)))
    assert w.shape == (m.shape[1], m.shape[0] + 1)
    assert np.all((w > 0) & (w <= 1)) and np.all(w[:, 0] == 1)
    assert np.all(np.diff(w, axis=1) <= 0)  # distrust never turns back
    peak = np.maximum.accumulate(m, axis=0)[:-1]
    usual = np.median(peak[-1])
    # No step is left with more than the bound, and no start below it is touched.
    assert np.all(w[:, 1:-1].T * peak <= bound * usual * (1 + 1e-5))
    assert np.all(w[peak[-1] <= bound * usual * (1 - 1e-5)] == 1)
    np.testing.assert_array_equal(w[:, -1], w[:, -2])
    # Without units.
    np.testing.assert_allclose(trust(jnp.asarray(m * 1000), jnp.float32(bound)), w, rtol=1e-4)
    # Whatever the order of the starts.
    np.testing.assert_allclose(trust(jnp.asarray(m[:, ::-1]), jnp.float32(bound)), w[::-1])


def test_an_infinite_bound_trusts_everything_and_what_is_not_finite_is_not_trusted():
    m = jnp.asarray([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, jnp.inf, jnp.nan], [1.0, 2.0, jnp.inf, jnp.nan]])
    np.testing.assert_array_equal(trust(m, jnp.float32(jnp.inf)), np.ones((4, 4)))
    finite = np.asarray(trust(m[:, jnp.asarray([0, 1, 0, 1, 3, 2])], jnp.float32(10.0)))
    np.testing.assert_array_equal(finite[:4], np.ones((4, 4)))
    np.testing.assert_array_equal(finite[4:], [[1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(
        trust(jnp.zeros((3, 2)), jnp.float32(1.0)), np.ones((2, 4))
    )  # a reward without curvature
    np.testing.assert_array_equal(trust(jnp.ones((1, 2)), jnp.float32(1.0)), np.ones((2, 2)))  # a single step


@pytest.mark.slow
def test_a_trusting_stage_is_its_weights():
    """An update of a trusting Gauss-Newton is Gauss-Newton's with those weights over time; in the last stage the task's own."""
    task = bent(horizon=8)
    s0 = task.starts(KEY, 5)
    policy = Neural.init(task, hidden=[4], key=KEY)
    solver = Continuation(GaussNewton(), discounts=[0.9, 1.0], lengths=[1, 1], trusts=[1.0, jnp.inf])
    one = jax.jit(lambda p, c: solver.update(p, c, task, s0, key=None))
    moved, carry, info = one(policy, solver.init(policy, task))
    weights = 0.9 ** jnp.arange(9.0) * trust(measured(policy, task, s0), jnp.float32(1.0))
    assert weights.shape == (5, 9) and np.min(weights / 0.9 ** jnp.arange(9.0)) < 0.9
    weighted = changed(task, weights=weights)
    plain = GaussNewton()
    wanted, _, plain_info = jax.jit(lambda task: plain.update(policy, plain.init(policy, task), task, s0, key=None))(
        weighted
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), moved, wanted)
    np.testing.assert_allclose(info.J, plain_info.J, rtol=1e-5)
    assert info.work.sequential == plain_info.work.sequential + 2 and info.work.jvp > plain_info.work.jvp
    _, _, last = one(moved, carry)
    np.testing.assert_allclose(last.J, jax.jit(mean_return)(moved, task, s0), rtol=1e-5)


def test_the_start_that_fails_is_the_one_distrusted():
    """A linear policy that holds the pole from near the top, and one start from where no force can save it."""
    task = tasks.cartpole_balance(horizon=60)
    policy = Linear(jnp.asarray([[2.0, 40.0, 4.0, 9.0]]), jnp.zeros(1))
    held = task.starts(KEY, 10) * 0.2
    s0 = jnp.concatenate([held, jnp.asarray([[0.0, 1.5, 0.0, 6.0]])])
    w = np.asarray(trust(measured(policy, task, s0), jnp.float32(10.0)))
    assert float(jax.jit(mean_return)(policy, task, held)) > -1
    np.testing.assert_array_equal(w[:10], np.ones((10, 61)))
    assert w[10, -1] < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"trusts": [1.0]}, "trusts needs one bound of at least 1 for each of 2 stages"),
        ({"trusts": [1.0, 0.5]}, "trusts needs one bound of at least 1"),
        ({"trusts": [1.0, float("nan")]}, "trusts needs one bound of at least 1"),
    ],
)
def test_bad_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        Continuation(GaussNewton(), discounts=[0.9, 1.0], lengths=[1, 1], **arguments)


def test_a_plan_has_no_other_starts_to_compare():
    with pytest.raises(ValueError, match="a plan has only one: use horizons"):
        Continuation(ILQR(), discounts=[1.0], lengths=[1], trusts=[10.0])
    with pytest.raises(ValueError, match="6 stages need at least 6 updates, got 5"):
        Continuation.trusted(GaussNewton(), 5, horizon=100)
    assert sum(Continuation.trusted(GaussNewton(), 6, horizon=100).lengths.tolist()) == 6


@pytest.mark.parametrize("T", [4, 50, 100, 400])
def test_no_more_is_left_of_the_terminal_reward_over_a_short_horizon(T):
    first, *_, last = Continuation.trusted(GaussNewton(), 60, horizon=T).discounts.tolist()
    assert last == 1.0
    np.testing.assert_allclose(first, 0.9 if T >= 100 else 0.9 ** (100 / T), rtol=1e-6)
    assert first**T <= 0.9**100 * (1 + 1e-5)


@pytest.mark.parametrize("T", [100, 400])
def test_from_a_hundred_steps_on_the_discounts_of_trust_are_the_same(T):
    made = Continuation.trusted(GaussNewton(), 60, horizon=T)
    np.testing.assert_array_equal(made.discounts, np.asarray([0.9, 0.95, 0.98, 1, 1, 1], made.discounts.dtype))


def test_the_schedule_of_a_trained_policy_is_the_whole_task_and_then_that_of_trust():
    resumed = Continuation.resumed(GaussNewton(), 140, horizon=60)
    trusted = Continuation.trusted(GaussNewton(), 100, horizon=60)
    for name in ("discounts", "trusts", "lengths"):
        np.testing.assert_array_equal(getattr(resumed, name)[2:], getattr(trusted, name))
    assert resumed.discounts[:2].tolist() == [1, 1] and resumed.trusts[:2].tolist() == [30, np.inf]
    assert resumed.lengths[:2].tolist() == [20, 20] and resumed.tolerance == -np.inf  # no stage ends early
    assert Continuation.resumed(GaussNewton(), 8, horizon=100).lengths.tolist() == [1] * 8
    with pytest.raises(ValueError, match="8 stages need at least 8 updates, got 7"):
        Continuation.resumed(GaussNewton(), 7, horizon=100)
