"""What is kept of a walk: the best policy on the task itself, and nothing that the solver needs."""

import jax
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, BestSoFar, Continuation, GaussNewton, OptaxSolver, Sequential, mean_return, solve
from diffmbrl.optimizers import Krylov
from tests.problems import same, same_tree, small, update

KEY = jax.random.key(3)
WILD = OptaxSolver(optax.sgd, learning_rate=3.0)


@pytest.fixture(scope="module")
def problem():
    return small(KEY, 5)


def test_the_walk_is_the_solvers_own_and_the_best_of_it_is_returned(problem):
    best, task, s0 = problem
    solver, walk = BestSoFar(WILD), best
    carry, alone = solver.init(best, task), WILD.init(walk, task)
    fell = 0
    for _ in range(8):
        before = mean_return(best, task, s0)
        walk, alone, plain = update(WILD, walk, alone, task, s0)
        best, carry, info = update(solver, best, carry, task, s0)
        same_tree(carry.policy, walk, rtol=1e-4, atol=1e-5)
        J, J_walk = mean_return(best, task, s0), mean_return(walk, task, s0)
        same(info.J, before, rtol=1e-5)
        same(J, max(before, J_walk), rtol=1e-5)
        assert info.accepted == (info.J < J)
        fell += int(J_walk < before)
        assert info.work.forward == plain.work.forward + 2 * 5 * 6
    assert fell  # or nothing was kept from it


def test_a_schedule_that_leads_away_gives_back_what_it_was_given(problem):
    policy, task, s0 = problem
    trained, _ = solve(GaussNewton(system=Krylov(4)), policy, task, s0, None, steps=20)
    away = Continuation(WILD, discounts=[0.1], lengths=[4])
    kept, history = solve(BestSoFar(away), trained, task, s0, None, steps=4)
    lost, _ = solve(away, trained, task, s0, None, steps=4)
    assert mean_return(lost, task, s0) < mean_return(trained, task, s0)
    same_tree(kept, trained, rtol=0)
    same(history.info.J, np.full(4, mean_return(trained, task, s0)), rtol=1e-6)


@pytest.mark.slow
def test_handed_on_it_begins_from_there(problem):
    """In a relay the walk starts at the handover, not at the first policy."""
    policy, task, s0 = problem
    first, then = OptaxSolver(optax.adam, learning_rate=1e-2), GaussNewton(system=Krylov(4))
    found, _ = solve(Sequential(first, BestSoFar(then), updates=3), policy, task, s0, None, steps=5)
    wanted, _ = solve(Sequential(first, then, updates=3), policy, task, s0, None, steps=5)
    same_tree(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_planner_is_refused():
    with pytest.raises(ValueError, match="BestSoFar judges policies by many starts; ILQR plans from one"):
        BestSoFar(ILQR())
