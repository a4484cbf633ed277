"""Steps that make the closed loop much more sensitive are rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import GaussNewton, KrylovNewton, Neural, NewtonCG
from diffmbrl.contrib import SensitivityGate
from diffmbrl.optimizers import DampingGrid, Krylov
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.sensitivity import sensitivity
from tests.problems import bent, same, same_tree, some_slow

KEY = jax.random.key(3)
SOLVERS = {
    "gauss-newton": lambda gate: GaussNewton(system=Krylov(6), damping=DampingGrid([1e-4, 1e-1]), gate=gate),
    "krylov-newton": lambda gate: KrylovNewton(rank=6, structured=6, starts=2, gate=gate),
    "newton-cg": lambda gate: NewtonCG(gate=gate),
}


def size(policy, task, s0):
    return np.mean(np.log(np.max(np.asarray(sensitivity(policy, task, s0)), axis=0)))


@jax.jit
def update(solver, policy, carry, task, s0):
    return solver.update(policy, carry, task, s0, key=None)


@pytest.fixture(scope="module")
def problem():
    task = bent(horizon=8)
    return Neural.init(task, hidden=[4], key=KEY), task, task.starts(KEY, 3)


@pytest.mark.parametrize("name", some_slow(SOLVERS, *(set(SOLVERS) - {"krylov-newton"})))
def test_a_gate_lets_through_what_its_bound_allows_and_no_more(problem, name):
    policy, task, s0 = problem
    open_gate = SOLVERS[name](SensitivityGate(1e6))
    carry = open_gate.init(policy, task)
    moved, _, _ = update(open_gate, policy, carry, task, s0)
    same_tree(moved, update(SOLVERS[name](None), policy, carry, task, s0)[0], rtol=1e-5, atol=1e-6)
    grown = float(np.exp(size(moved, task, s0) - size(policy, task, s0)))
    assert grown > 1.05, "the step must make the loop more sensitive, or this shows nothing"
    kept, raised, info = update(SOLVERS[name](SensitivityGate(1 + 0.9 * (grown - 1))), policy, carry, task, s0)
    same_tree(kept, policy, rtol=0)
    assert not info.accepted and info.nonfinite == 0
    through, _, info = update(SOLVERS[name](SensitivityGate(1 + 1.1 * (grown - 1))), policy, carry, task, s0)
    assert info.accepted
    same_tree(through, moved, rtol=1e-6)
    # A refused step makes the next one shorter.
    before, after = (jax.tree.leaves(x)[0] for x in (carry, raised))
    assert after < before if name == "newton-cg" else after > before


@pytest.mark.slow
def test_refused_for_long_enough_a_solver_takes_steps_that_are_allowed(problem):
    policy, task, s0 = problem
    solver = SOLVERS["gauss-newton"](SensitivityGate(1.02))
    carry = solver.init(policy, task)
    taken = 0
    for _ in range(12):
        moved, carry, info = update(solver, policy, carry, task, s0)
        assert size(moved, task, s0) <= size(policy, task, s0) + np.log(1.02) + 1e-5
        taken += int(info.accepted)
        policy = moved
    assert taken > 1


def test_a_gate_costs_a_rollout_and_its_linearisation(problem):
    policy, task, s0 = problem
    plain, gated = (
        update(solver, policy, solver.init(policy, task), task, s0)[2].work
        for solver in (SOLVERS["gauss-newton"](None), SOLVERS["gauss-newton"](SensitivityGate()))
    )
    assert gated.forward - plain.forward == 2 * 3 * 8
    assert gated.sequential - plain.sequential == 3
    same(gated.jvp, 2 * plain.jvp)


def test_a_loop_that_is_not_finite_is_beyond_any_bound(problem):
    policy, task, s0 = problem
    allows = SensitivityGate(1e30).around(policy, gauss_newton(policy, task, s0), task, s0, None)
    assert allows(policy)
    assert not allows(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), policy))


def test_a_bound_that_would_refuse_everything_is_refused():
    with pytest.raises(ValueError, match=r"bound must be at least 1, got 0\.5"):
        SensitivityGate(0.5)
