"""Every wrapper around every kind of solver: what it forwards, and that a new objective reaches the solver inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import (
    ILQR,
    BestSoFar,
    Continuation,
    GaussNewton,
    MultipleShooting,
    MultiStart,
    OptaxSolver,
    Sequential,
    ShortHorizon,
    solve,
)
from diffmbrl.core import Planner, Solver, is_planner
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers import Krylov, MiniBatch
from diffmbrl.planners import CEM, BoxConstrained, Sampling, Shooting
from tests.problems import same_tree, small

KEY = jax.random.key(4)
ANNEALED = OptaxSolver(optax.adam, learning_rate=1e-2, anneal=20.0)
SGD = OptaxSolver(optax.sgd, learning_rate=1e-2)
POLICY_SOLVERS = {
    "moments": ANNEALED,
    "second order": GaussNewton(system=Krylov(4)),
    "short horizon": ShortHorizon(SGD, window=2, environments=2, epochs=1, batches=1, hidden=(4,)),
}
PLANNERS = {
    "ilqr": ILQR(),
    "ilqr within limits": ILQR(sweep=BoxConstrained()),
    "multiple shooting": MultipleShooting(),
    "cem": Sampling(CEM(elites=2), samples=8, keep=1, std=1.0),
    "shooting": Shooting(SGD),
}


class Wrapper(NamedTuple):
    """How it is made, and where the carry of the solver inside is when it is that solver's turn."""

    make: Callable[[Any], Any]
    inside: Callable[[Any], Any] = lambda carry: carry.inner
    turn: Callable[[Any], Any] = lambda carry: carry


def stages(solver: Any, *lengths: int) -> Continuation:
    """Stages of the same objective: whatever differs from one run is a solver that was started again."""
    return Continuation(solver, discounts=[1.0] * len(lengths), lengths=lengths)


WRAPPERS = {
    "continuation": Wrapper(lambda solver: stages(solver, 2, 2)),
    "best so far": Wrapper(BestSoFar),
    "mini-batch": Wrapper(lambda solver: MiniBatch(solver, size=3)),
    "multi-start": Wrapper(lambda solver: MultiStart(solver, entrants=2, updates=2, starts=3), lambda c: c.carries),
    "sequential, the first": Wrapper(lambda solver: Sequential(solver, SGD, updates=9), lambda c: c.first),
    "sequential, the second": Wrapper(
        lambda solver: Sequential(SGD, solver, updates=1),
        lambda c: c.then,
        lambda c: c._replace(updates=jnp.full_like(c.updates, 1)),
    ),
}
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)


class Count(NamedTuple):
    updates: Any
    changes: Any


class Counter(eqx.Module):
    """Leaves the policy, and counts its updates and the changes of objective that it hears of."""

    @property
    def kind(self) -> str:
        return "policy"

    def init(self, policy, task):
        return Count(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def on_objective_change(self, policy, carry, task):
        return carry._replace(changes=carry.changes + 1)

    def update(self, policy, carry, task, s0, *, key):
        zero = jnp.zeros((), jnp.int32)
        info = Info(
            jnp.sum(task.weights), jnp.ones(()), jnp.array(False), jnp.zeros(()), zero, zero, count_evaluations()
        )
        return policy, carry._replace(updates=carry.updates + 1), info


def counts(carry: Any) -> list[Count]:
    leaves = jax.tree.leaves(carry, is_leaf=lambda x: isinstance(x, Count))
    return [x for x in leaves if isinstance(x, Count)]


@pytest.fixture(scope="module")
def problem():
    return small(KEY, 6)


@every_wrapper
@pytest.mark.parametrize("inner", POLICY_SOLVERS.values(), ids=POLICY_SOLVERS)
def test_the_solver_inside_decides_what_it_retains(problem, wrapper, inner):
    policy, task, _ = problem
    solver = wrapper.make(inner)
    assert isinstance(solver, Solver) and solver.kind == "policy" and not is_planner(solver)
    carry = wrapper.turn(solver.init(policy, task))
    later = jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.number) else x, wrapper.inside(carry))
    carry = eqx.tree_at(wrapper.inside, carry, later)
    told = wrapper.inside(solver.on_objective_change(policy, carry, task))
    if isinstance(solver, MultiStart):
        # The first entrant is the policy itself.
        told, later = (jax.tree.map(lambda x: x[0], tree) for tree in (told, later))
    same_tree(told, inner.on_objective_change(policy, later, task), rtol=0)


@every_wrapper
@pytest.mark.parametrize("outer", [name for name in WRAPPERS if "second" not in name])
def test_a_new_objective_reaches_the_solver_inside_two_wrappers(problem, wrapper, outer):
    policy, task, _ = problem
    solver = WRAPPERS[outer].make(wrapper.make(Counter()))
    carry = solver.init(policy, task)
    if wrapper is WRAPPERS["sequential, the second"]:
        carry = eqx.tree_at(WRAPPERS[outer].inside, carry, replace_fn=wrapper.turn)
    [count] = counts(solver.on_objective_change(policy, carry, task))
    assert np.all(count.changes == 1)


@every_wrapper
def test_in_a_continuation_it_is_told_of_each_stage_and_not_started_again(problem, wrapper):
    policy, task, s0 = problem
    solver = Continuation(wrapper.make(Counter()), discounts=[0.8, 0.9, 1.0], lengths=[2, 2, 2])
    update = jax.jit(lambda carry: solver.update(policy, carry, task, s0, key=None)[1])
    carry = solver.init(policy, task)
    for _ in range(6):
        carry = update(carry)
    [count] = counts(carry)
    updates, changes = (int(np.max(x)) for x in count)  # of the entrant that won
    if wrapper is WRAPPERS["sequential, the second"]:
        assert (updates, changes) == (5, 2)  # its turn begins with the second update
    elif wrapper is WRAPPERS["continuation"]:
        assert updates == 6 and changes > 3  # of its own stages, too
    else:
        assert (updates, changes) == (6, 3)


def _moved(x):
    """Other values, each its own, but of a switch."""
    return x if x.dtype == bool else x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) + 1


@every_wrapper
@pytest.mark.parametrize("inner", PLANNERS.values(), ids=PLANNERS)
def test_around_a_planner_it_plans_or_refuses(problem, wrapper, inner):
    _, task, _ = problem
    assert isinstance(inner, Planner)
    if wrapper is not WRAPPERS["continuation"]:
        with pytest.raises(ValueError, match="start"):
            wrapper.make(inner)
        return
    solver = wrapper.make(inner)
    assert isinstance(solver, Planner) and is_planner(solver)
    assert solver.keeps_limits == inner.keeps_limits
    plan = solver.first_plan(task)
    same_tree(plan, inner.first_plan(task), rtol=0)
    carry = solver.init(plan, task)
    moved = jax.tree.map(_moved, carry.inner)
    shifted = solver.shift(carry._replace(inner=moved))
    same_tree(shifted.inner, inner.shift(moved), rtol=0)
    told = solver.on_objective_change(plan, carry._replace(inner=moved), task)
    same_tree(told.inner, inner.on_objective_change(plan, moved, task), rtol=0)


def test_around_a_policy_solver_there_are_no_plans():
    with pytest.raises(TypeError, match=r"OptaxSolver improves policies; only a planner, such as ILQR\(\), has plans"):
        stages(SGD, 1).keeps_limits  # noqa: B018


def test_a_sequence_continues_in_the_next_stage(problem):
    """The stage begins with the count of updates of the last one, so `then` has its turn after three updates in all."""
    policy, task, s0 = problem
    found, _ = solve(stages(Sequential(ANNEALED, SGD, updates=3), 2, 4), policy, task, s0, None, 6)
    first, _ = solve(stages(ANNEALED, 2, 1), policy, task, s0, None, 3)
    wanted, _ = solve(SGD, first, task, s0, None, 3)
    same_tree(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_race_is_over_once(problem):
    policy, task, s0 = problem
    _, history = solve(stages(MultiStart(ANNEALED, entrants=2, updates=2), 3, 3), policy, task, s0, None, 6)
    # Only the updates of a race evaluate all entrants.
    raced = history.info.work.vjp > history.info.work.vjp[-1]
    assert raced.tolist() == [True, True, False, False, False, False]


def test_the_best_so_far_continues_with_the_solver_of_the_last_stage(problem):
    """The annealed rate falls with the count of all stages."""
    policy, task, s0 = problem
    found, _ = solve(stages(BestSoFar(ANNEALED), 3, 3), policy, task, s0, None, 6)
    wanted, _ = solve(stages(ANNEALED, 3, 3), policy, task, s0, None, 6)
    same_tree(found, wanted, rtol=1e-4, atol=1e-6)
