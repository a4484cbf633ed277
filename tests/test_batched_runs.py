"""Many runs as one program are the same runs one at a time."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import (
    ILQR,
    Affine,
    GaussNewton,
    Neural,
    OptaxSolver,
    episode_returns,
    mean_return,
    rollouts,
    solve,
    tasks,
)
from diffmbrl.jobs.batch import BatchedPlanRuns, BatchedPolicyRuns, draw_starts, learning_curve
from diffmbrl.optimizers import Krylov
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.solve.loop import CHUNK
from diffmbrl.tasks import squashed
from tests.problems import some_slow

TASK = tasks.cartpole_balance(horizon=6)
HIDDEN, SEEDS, STARTS, HELD_OUT, STEPS = (3,), 2, 3, 5, 4
RATES = (3e-3, 3e-2)
DRAWS = draw_starts(TASK, SEEDS, STARTS, HELD_OUT, 0)

mean_return = jax.jit(mean_return)
all_returns = jax.jit(episode_returns)
successes = jax.jit(lambda policy, task, s0: jax.vmap(task.success)(rollouts(policy, task, s0).s_T))
action_gradients = jax.jit(lambda policy, task, s0: gauss_newton(policy, task, s0).g)


def take(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def close(one: Any, other: Any, **tolerances: float) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 1e-4, "atol": 1e-5} | tolerances)), one, other
    )


# Draws.


def test_seeds_differ_in_starts_and_policies():
    train, test, keys = DRAWS
    assert train.shape == (SEEDS, STARTS, 4) and test.shape == (HELD_OUT, 4)
    assert np.abs(train[0] - train[1]).min() > 1e-4
    assert (
        len({tuple(row) for row in np.concatenate([train.reshape(-1, 4), test]).tolist()}) == SEEDS * STARTS + HELD_OUT
    )
    one, other = (Neural.init(TASK, hidden=HIDDEN, key=key).net.weights[0] for key in keys)
    assert np.abs(one - other).min() > 1e-4


def test_a_longer_comparison_begins_with_the_seeds_of_a_shorter_one():
    longer = draw_starts(TASK, 5, STARTS, HELD_OUT, 0)
    np.testing.assert_array_equal(longer[0][:SEEDS], DRAWS[0])
    np.testing.assert_array_equal(longer[1], DRAWS[1])
    np.testing.assert_array_equal(jax.random.key_data(longer[2][:SEEDS]), jax.random.key_data(DRAWS[2]))


def test_another_key_is_another_comparison():
    other = draw_starts(TASK, SEEDS, STARTS, HELD_OUT, 1)
    assert not np.any(other[0] == DRAWS[0]) and not np.any(other[1] == DRAWS[1])


# Policies.

SOLVERS = {
    "adam": ([OptaxSolver(optax.adam, learning_rate=rate) for rate in RATES], False),
    "lbfgs": ([OptaxSolver(optax.lbfgs, memory_size=4)], True),
    "gauss-newton": ([GaussNewton(system=Krylov(6))], False),
}


@pytest.fixture(scope="module", params=some_slow(SOLVERS, "lbfgs", "gauss-newton"))
def run(request):
    solvers, sequential = SOLVERS[request.param]
    runs = BatchedPolicyRuns(solvers, TASK, HIDDEN, DRAWS, sequential=sequential)
    begun = runs.evaluate()
    assert runs.compile() > 0
    runs.advance(0, 1)
    runs.advance(1, STEPS - 1)
    return solvers, runs, begun


def test_a_replica_is_a_separate_solve(run):
    solvers, runs, _ = run
    train, _, keys = DRAWS
    assert runs.count == len(solvers) * SEEDS
    fields = runs.evaluate()
    for replica in range(runs.count):
        rate, seed = divmod(replica, SEEDS)
        start = Neural.init(TASK, hidden=HIDDEN, key=keys[seed])
        policy, history = solve(solvers[rate], start, TASK, train[seed], None, STEPS)
        close(take(runs.policies, replica), policy, rtol=1e-3, atol=1e-4)
        for name in ("forward", "jvp", "vjp", "sequential"):
            assert fields[name][rate, seed] == getattr(history.info.work, name).sum(), name
        assert fields["nonfinite"][rate, seed] == 0
        close(fields["J"][rate, seed], history.info.J[-1])
        close(fields["gradient_norm"][rate, seed], history.info.gradient_norm[-1], rtol=2e-2)
        if (model := history.info.model) is not None:
            # Medians over the updates of the last call, which was all but the first; the last Ritz values.
            improved, predicted = (
                model.improved.max(-1),
                np.take_along_axis(model.predicted, model.improved.argmax(-1)[:, None], -1).squeeze(-1),
            )
            close(fields["agreement"][rate, seed], np.median((improved / predicted)[1:]), rtol=2e-2)
            close(fields["gap"][rate, seed], np.median(model.gap[1:]), rtol=2e-2)
            close(fields["curvature"][rate, seed], model.ritz[-1].max(), rtol=2e-2)
            if seed == 0:
                path = runs.path(rate)
                close(path["improved"], model.improved[0], rtol=1e-2, atol=1e-3)


def test_evaluation(run):
    solvers, runs, begun = run
    train, test, _ = DRAWS
    fields = runs.evaluate()
    assert all(x.shape == (len(solvers), SEEDS) for x in fields.values())
    for replica in range(runs.count):
        place = divmod(replica, SEEDS)
        policy = take(runs.policies, replica)
        close(fields["train"][place], mean_return(policy, TASK, train[place[1]]))
        close(fields["test"][place], np.mean(all_returns(policy, TASK, test)))
        close(fields["success"][place], np.mean(successes(policy, TASK, test)))
    assert np.all(fields["train"] > begun["train"])
    # Before the first update nothing is known of one.
    assert np.all(np.isnan(begun["J"])) and np.all(begun["forward"] == 0)


@pytest.mark.slow
def test_profiles(run):
    _, runs, _ = run
    rate = runs.variants - 1
    profile, spectrum = runs.profile(rate), runs.spectrum(rate)
    assert profile.shape == (TASK.horizon,) and spectrum.shape == (runs.parameters,)
    squares = []
    for seed in range(SEEDS):
        policy = take(runs.policies, rate * SEEDS + seed)
        squares.append(np.asarray(action_gradients(policy, TASK, DRAWS[0][seed])) ** 2)
    close(profile, np.sqrt(np.mean(squares, axis=(0, 2, 3))), rtol=1e-3)
    assert runs.parameters == sum(x.size for x in jax.tree.leaves(take(runs.policies, 0)))


def test_a_seed_that_breaks_is_named_and_stops_alone():
    train, test, keys = DRAWS
    runs = BatchedPolicyRuns(
        SOLVERS["adam"][0], TASK, HIDDEN, (train.at[1, 2, 0].set(jnp.nan), test, keys), sequential=False
    )
    before = runs.policies
    assert runs.broken(0) is None
    runs.advance(0, 2)
    assert [runs.broken(rate) for rate in range(2)] == ["s[0] of start 2, seed 1"] * 2
    assert runs.evaluate()["nonfinite"].tolist() == [[0, 1], [0, 1]]
    close(take(runs.policies, 1), take(before, 1), rtol=0, atol=0)
    assert np.abs(take(runs.policies, 0).net.weights[0] - take(before, 0).net.weights[0]).max() > 0


def adam():
    return BatchedPolicyRuns(SOLVERS["adam"][0], TASK, HIDDEN, DRAWS, sequential=False)


def test_more_updates_than_one_call_of_the_program_makes():
    whole, parts = adam(), adam()
    whole.advance(0, CHUNK + 3)
    for done in range(CHUNK + 3):
        parts.advance(done, 1)
    close(whole.policies, parts.policies, rtol=0, atol=0)
    for name in ("sequential", "vjp"):
        np.testing.assert_array_equal(whole.evaluate()[name], parts.evaluate()[name])


def test_a_learning_curve_evaluates_before_and_after_each_share():
    run, runs = learning_curve(adam(), 7, evaluations=3), adam()
    assert run.updates == [0, 2, 4, 7]
    for evaluation, (done, end) in zip(run.evaluations, [(0, 0), *pairwise(run.updates)], strict=True):
        runs.advance(done, end - done)
        close(evaluation, runs.evaluate(), rtol=0, atol=0)
    for spent in (run.cpu, run.wall):
        assert spent[0] == 0 and np.all(np.diff(spent) > 0)
    assert run.compile > 0


def test_a_learning_curve_has_at_most_one_evaluation_per_update():
    assert learning_curve(adam(), 2, evaluations=5).updates == [0, 1, 2]
    with pytest.raises(ValueError, match="evaluations must be at least 1, got 0"):
        learning_curve(adam(), 2, evaluations=0)


# Plans.


@pytest.fixture(scope="module")
def plans():
    runs = BatchedPlanRuns([ILQR()], TASK, DRAWS)
    runs.compile()
    runs.advance(0, 2)
    runs.advance(2, 1)
    return runs


def test_a_plan_is_a_separate_solve(plans):
    task, total = squashed(TASK), np.zeros((SEEDS, STARTS))
    forward = np.zeros(SEEDS)
    for seed in range(SEEDS):
        for start in range(STARTS):
            s0 = DRAWS[0][seed, start]
            plan, history = solve(ILQR(), Affine.zeros(task), task, s0, None, 3)
            replica = take(plans.train[0], seed * STARTS + start)
            close(replica.a, plan.a, rtol=1e-3, atol=1e-3)
            total[seed, start] = mean_return(plan, task, s0[None])
            forward[seed] += history.info.work.forward.sum()
    fields = plans.evaluate()
    close(fields["train"][0], total.mean(1), rtol=1e-3)
    np.testing.assert_array_equal(fields["forward"][0], forward)
    assert plans.count == SEEDS * STARTS and plans.parameters == TASK.horizon
    assert fields["sequential"][0, 0] <= fields["sequential"].max() < 100


def test_held_out_starts_are_planned_as_far(plans):
    fields = plans.evaluate()
    task = squashed(TASK)
    returns = []
    for s0 in DRAWS[1]:
        plan, _ = solve(ILQR(), Affine.zeros(task), task, s0, None, 3)
        returns.append(float(mean_return(plan, task, s0[None])))
    close(fields["test"], np.full((1, SEEDS), np.mean(returns)), rtol=1e-3)
    assert 0 <= fields["success"].min() <= fields["success"].max() <= 1


@pytest.mark.slow
def test_profiles_of_plans(plans):
    assert plans.profile(0).shape == (TASK.horizon,)
    assert plans.spectrum(0).shape == (TASK.horizon,)
    assert plans.broken(0) is None


def test_a_plan_that_breaks_is_named():
    train, test, keys = DRAWS
    runs = BatchedPlanRuns([ILQR()], TASK, (train.at[1, 2, 0].set(jnp.nan), test, keys))
    runs.advance(0, 2)
    assert runs.broken(0) == "s[0] of start 0, start 2, seed 1"


# Variants with tasks and draws of their own.


@pytest.fixture(scope="module")
def variants():
    """Masses and keys that differ."""
    made = [tasks.cartpole_balance(horizon=6, m_p=mass) for mass in (0.1, 0.3)]
    return made, [draw_starts(task, SEEDS, STARTS, HELD_OUT, key) for key, task in enumerate(made)]


def check_variants(together: Any, alone: list[Any]) -> None:
    for runs in (together, *alone):
        runs.advance(0, 2)
    found, own = together.returns(), [runs.returns() for runs in alone]
    assert found.keys() == own[0].keys() == {"train", "test", "success", "nonfinite"}
    for name, x in found.items():
        close(x, np.concatenate([fields[name] for fields in own]))
    assert np.abs(found["train"][0] - found["train"][1]).min() > 1e-3
    for variant, runs in enumerate(alone):
        close(together.profile(variant), runs.profile(0), rtol=1e-3)
        close(together.spectrum(variant), runs.spectrum(0), rtol=1e-2, atol=1e-3)
    assert together.evaluate()["J"].shape == (2, SEEDS)


@pytest.mark.parametrize("sequential", [False, True])
def test_policies_of_several_tasks_are_separate_runs(variants, sequential):
    made, draws = variants
    solvers, options = SOLVERS["adam"][0], {"sequential": sequential}
    alone = [BatchedPolicyRuns([solvers[i]], made[i], HIDDEN, draws[i], **options) for i in range(2)]
    check_variants(BatchedPolicyRuns(solvers, made, HIDDEN, draws, **options), alone)


def test_plans_of_several_tasks_are_separate_runs(variants):
    made, draws = variants
    alone = [BatchedPlanRuns([ILQR()], made[i], draws[i]) for i in range(2)]
    check_variants(BatchedPlanRuns([ILQR(), ILQR()], made, draws), alone)


def test_a_plan_of_a_later_variant_that_breaks_is_named(variants):
    made, draws = variants
    train, test, keys = draws[1]
    runs = BatchedPlanRuns([ILQR(), ILQR()], made, [draws[0], (train.at[1, 2, 0].set(jnp.nan), test, keys)])
    runs.advance(0, 2)
    assert [runs.broken(variant) for variant in range(2)] == [None, "s[0] of start 0, start 2, seed 1"]
