"""First policies that race: who enters, who wins, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import ILQR, Continuation, GaussNewton, MultiStart, mean_return, solve
from diffmbrl.optimizers import Krylov
from tests.problems import same, same_tree, small, update

KEY = jax.random.key(8)
INNER = GaussNewton(system=Krylov(4))


@pytest.fixture(scope="module")
def problem():
    return small(KEY, 6)


def lane(tree, k):
    return jax.tree.map(lambda x: x[k], tree)


def test_entrants_are_the_policy_and_its_entries_shuffled(problem):
    policy, task, _ = problem
    policies = MultiStart(INNER, entrants=3).init(policy, task).policies
    same_tree(lane(policies, 0), policy, rtol=0)
    for k in (1, 2):
        for leaf, mixed in zip(jax.tree.leaves(policy), jax.tree.leaves(lane(policies, k)), strict=True):
            np.testing.assert_array_equal(np.sort(leaf.ravel()), np.sort(mixed.ravel()))
    assert np.any(policies.net.weights[0][1] != policies.net.weights[0][2])


@pytest.mark.slow
def test_the_best_of_separate_runs_wins_and_goes_on_alone(problem):
    """Against the same entrants updated one by one, all of them on all starts."""
    policy, task, s0 = problem
    solver = MultiStart(INNER, entrants=3, updates=2, starts=6)
    carry = solver.init(policy, task)
    entrants = [(lane(carry.policies, k), INNER.init(policy, task)) for k in range(3)]
    best, wanted = policy, entrants[0]
    for step in range(4):
        if step < 2:
            entrants = [update(INNER, *entrant, task, s0)[:2] for entrant in entrants]
            J = [float(mean_return(pi, task, s0)) for pi, _ in entrants]
            winner = int(np.argmax(J))
            wanted = entrants[winner]
        else:
            wanted = update(INNER, *wanted, task, s0)[:2]
        moved, carry, info = update(solver, best, carry, task, s0)
        same(info.J, mean_return(best, task, s0), rtol=1e-5)
        same(mean_return(moved, task, s0), mean_return(wanted[0], task, s0), rtol=1e-4)
        assert mean_return(moved, task, s0) >= mean_return(best, task, s0) - 1e-6
        best = moved
    assert carry.updates == 4


def test_entrants_see_other_starts_at_each_update_and_all_starts_judge(problem):
    policy, task, s0 = problem
    solver = MultiStart(INNER, entrants=2, updates=3, starts=2)
    carry = solver.init(policy, task)
    entrants, info = [(lane(carry.policies, k), INNER.init(policy, task)) for k in range(2)], None
    for step in range(2):
        some = s0[2 * step : 2 * step + 2]
        entrants = [update(INNER, *entrant, task, some)[:2] for entrant in entrants]
        policy, carry, info = update(solver, policy, carry, task, s0)
        for k in range(2):
            same_tree(lane(carry.policies, k), entrants[k][0], rtol=1e-4, atol=1e-5)
    # Two entrants on two starts: a rollout, its linearisation and twelve candidates each; and three policies on six starts.
    assert info is not None and info.work.forward == 6 * (2 * 2 * 14 + 3 * 6)


@pytest.mark.slow
def test_a_policy_that_was_trained_wins_its_race(problem):
    policy, task, s0 = problem
    trained, _ = solve(INNER, policy, task, s0, None, steps=20)
    solver = MultiStart(INNER, entrants=4, updates=3, starts=6)
    _, history = solve(solver, trained, task, s0, None, steps=4)
    assert np.all(np.diff(history.info.J) >= -1e-6)
    same(history.info.J[0], mean_return(trained, task, s0), rtol=1e-6)


@pytest.mark.slow
def test_each_entrant_has_its_own_continuation(problem):
    policy, task, s0 = problem
    solver = MultiStart(Continuation(INNER, discounts=[0.8, 1.0], lengths=[3, 3]), entrants=2, updates=4, starts=6)
    _, carry, _ = update(solver, policy, solver.init(policy, task), task, s0)
    assert carry.carries.stage.shape == (2,) and carry.carries.made.tolist() == [1, 1]


@pytest.mark.parametrize("name", ["entrants", "updates", "starts"])
def test_what_is_wrong_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        MultiStart(INNER, **{name: 0})


def test_plans_do_not_race():
    with pytest.raises(ValueError, match="a planner has only one start"):
        MultiStart(ILQR())


@pytest.mark.slow
def test_one_entrant_is_the_solver_itself(problem):
    policy, task, s0 = problem
    alone, _ = solve(INNER, policy, task, s0, None, steps=4)
    raced, _ = solve(MultiStart(INNER, entrants=1, updates=2, starts=6), policy, task, s0, None, steps=4)
    same_tree(raced, alone, rtol=1e-4, atol=1e-5)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(raced))
