"""Plans from many starts: the same as one by one, each with its own end."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trajectory_problems import problem
from diffmbrl import ILQR, Affine, GaussNewton, episode_return, plans, rollout, solve, tasks
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.planners import BoxConstrained, OneByOne, Status, Together
from tests.problems import bent, changed, same

KEY = jax.random.key(0)
SCHEDULES = {"one by one": OneByOne(), "together": Together(chunk=3, smallest=2)}
each_schedule = pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(made, id=name, marks=[pytest.mark.slow] * (name == "one by one"))
        for name, made in SCHEDULES.items()
    ],
)


@pytest.fixture
def swing(x64):
    """Starts of the bent task that take 6 to 12 updates."""
    task = bent(horizon=8)
    return task, in_double(ILQR()), task.starts(KEY, 5)


@each_schedule
def test_they_are_what_solve_finds_from_each_start(swing, schedule):
    task, planner, s0 = swing
    found = plans(planner, task, s0, steps=40, tolerance=1e-6, relative=0.0, schedule=schedule, values=True)
    assert found.ends() == {"gradient": 5}
    assert found.plan.K.shape == (5, 8, 1, 2)
    assert found.expansion.V.shape == (5, 9, 2, 2)
    for i in range(5):
        _, history = solve(planner, Affine.zeros(task), task, s0[i], None, 40, tolerance=1e-6)
        assert history.updates == found.iterations[i]
        same(found.J[i], history.info.J[-1])
        same(found.expansion.J[i, 0], found.J[i])
        np.testing.assert_allclose(found.gradient_norm[i], history.info.gradient_norm[-1], rtol=1e-3)
        plan = jax.tree.map(lambda x, i=i: x[i], found.plan)
        same(episode_return(plan, task, s0[i]), found.J[i])


def test_the_share_of_useful_work(swing):
    task, planner, s0 = swing
    found = [plans(planner, task, s0, steps=40, tolerance=1e-6, schedule=s) for s in (OneByOne(), Together(chunk=2))]
    assert found[0].useful == 1
    # Batches of eight for five starts, then for those that remain, in chunks of two.
    left, run = found[1].iterations.copy(), 0
    while left.any():
        run += 8 * min(left.max(), 2)
        left = np.maximum(left - 2, 0)
    same(found[1].useful, found[1].iterations.sum() / run)
    np.testing.assert_array_equal(found[0].iterations, found[1].iterations)


@each_schedule
def test_each_start_says_why_it_ended(swing, schedule):
    task, planner, s0 = swing

    def ends(**bounds):
        return plans(planner, task, s0, schedule=schedule, **bounds)

    found = ends(steps=2)
    assert set(found.status) == {Status.BUDGET} and set(found.iterations) == {2}
    assert ends(steps=100, relative=1e-4).ends() == {"relative": 5}
    assert ends(steps=100, tolerance=1e-4, relative=0.0).ends() == {"gradient": 5}
    stalled = ends(steps=200, relative=0.0)
    assert stalled.ends() == {"stalled": 5}
    # It was at the optimum long before.
    same(stalled.J, ends(steps=100, tolerance=1e-6).J)


@each_schedule
def test_what_is_not_finite_in_one_start_leaves_the_others_alone(swing, schedule):
    task, planner, s0 = swing
    clean = plans(planner, task, s0, steps=40, tolerance=1e-6, relative=0.0, schedule=schedule)
    found = plans(planner, task, s0.at[2, 0].set(jnp.inf), steps=40, tolerance=1e-6, relative=0.0, schedule=schedule)
    assert found.ends() == {"gradient": 4, "nonfinite": 1} and found.status[2] == Status.NONFINITE
    others = np.array([0, 1, 3, 4])
    same(found.J[others], clean.J[others])
    same(found.plan.a[others], clean.plan.a[others])
    same(found.plan.a[2], 0.0)


def test_each_start_goes_on_from_a_plan_of_its_own(swing):
    task, planner, s0 = swing
    half = plans(planner, task, s0, steps=2)
    whole = plans(planner, task, s0, steps=40, start=half.plan, tolerance=1e-6)
    again = plans(planner, task, s0, steps=40, tolerance=1e-6)
    assert np.all(whole.J >= half.J)
    np.testing.assert_allclose(whole.J, again.J, rtol=1e-9)
    one = jax.tree.map(lambda x: x[0], half.plan)
    assert np.all(
        jax.vmap(lambda s: episode_return(one, task, s))(s0) <= plans(planner, task, s0, steps=1, start=one).J
    )


def test_each_start_has_noise_of_its_own(swing):
    task, planner, s0 = swing
    noisy = changed(task, noise=0.3)
    same_start = jnp.tile(s0[:1], (3, 1))
    found = plans(planner, noisy, same_start, jax.random.key(1), steps=2)
    assert len(set(found.J.tolist())) == 3
    same(found.J, plans(planner, noisy, same_start, jax.random.key(1), steps=2, schedule=Together()).J)
    assert not np.any(found.J == plans(planner, noisy, same_start, jax.random.key(2), steps=2).J)


def test_limits_are_kept(x64):
    task = problem("pendulum", 20)
    task = eqx.tree_at(lambda t: (t.a_low, t.a_high), task, (-2 * jnp.ones(1), 2 * jnp.ones(1)))
    s0 = jnp.asarray([[0.0, 0.0], [0.5, -1.0]])
    found = plans(in_double(ILQR.with_limits(task)), task, s0, steps=60)
    assert isinstance(ILQR.with_limits(task).sweep, BoxConstrained)
    a = jax.vmap(lambda plan, s: rollout(plan, task, s).a)(found.plan, s0)
    assert np.all(np.abs(a) <= 2) and np.any(np.abs(a) == 2)


def test_what_is_refused():
    task = bent(horizon=5)
    s0 = task.starts(KEY, 3)
    with pytest.raises(ValueError, match=r"s0 has shape \[2\]; plans on task 'bent' takes a batch of starts"):
        plans(ILQR(), task, s0[0], steps=2)
    start = jax.tree.map(lambda x: jnp.stack([x, x]), Affine.zeros(task))
    with pytest.raises(ValueError, match=r"start has \[2\] plans for 3 starts; expected one for all, or one for each"):
        plans(ILQR(), task, s0, steps=2, start=start)
    with pytest.raises(
        TypeError, match=r"plans takes a planner, such as ILQR.*; GaussNewton improves policies: use solve"
    ):
        plans(GaussNewton(), task, s0, steps=2)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        plans(ILQR(), tasks.lqr(horizon=3), tasks.lqr(horizon=3).starts(KEY, 2), steps=0)
