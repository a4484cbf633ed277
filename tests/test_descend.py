"""`OptaxSolver` where it is more than the rule it is given: annealing, alone and continued, and one compile for a line
search."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

from diffmbrl import BPTT, Continuation, Linear, OptaxSolver, solve
from diffmbrl.optimizers import MiniBatch
from tests.problems import bent, same_tree

TASK = bent(horizon=6)
S0 = TASK.starts(jax.random.key(0), 3)
START = Linear.zeros(TASK)


class Counting(eqx.Module):
    """BPTT that counts how often it is traced."""

    remat: ClassVar[int | None] = None
    traces: ClassVar[list[int]] = []

    def __call__(self, policy: Any, task: Any, s0: Any, key: Any) -> Any:
        self.traces.append(1)
        return BPTT()(policy, task, s0, key)

    def samples(self, policy: Any, task: Any, s0: Any, key: Any) -> Any:
        return BPTT().samples(policy, task, s0, key)

    def work(self, task: Any, batch: int) -> Any:
        return BPTT().work(task, batch)


@jax.jit
def step(solver, policy, carry):
    return solver.update(policy, carry, TASK, S0, key=None)


def walk(solver: Any, updates: int) -> tuple[list[Any], Any]:
    """Every policy from the start on, and the last carry."""
    policies, carry = [START], solver.init(START, TASK)
    for _ in range(updates):
        policy, carry, _ = step(solver, policies[-1], carry)
        policies.append(policy)
    return policies, carry


def test_the_second_update_of_an_lbfgs_does_not_recompile():
    solver = OptaxSolver(optax.lbfgs, gradient=Counting(), memory_size=3)
    solve(solver, START, TASK, S0, None, 1)
    once = len(Counting.traces)
    assert once > 0
    _, history = solve(solver, START, TASK, S0, None, 5)  # in several calls, each with the carry of the last
    assert history.updates == 5 and len(Counting.traces) == once


def test_the_step_falls_along_half_a_cosine():
    plain, annealed = OptaxSolver(optax.sgd, learning_rate=0.1), OptaxSolver(optax.sgd, learning_rate=0.1, anneal=4.0)
    policies, carry = walk(annealed, 6)
    assert int(carry.updates) == 6
    for k, factor in enumerate([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0]):
        whole, _, _ = step(plain, policies[k], plain.init(policies[k], TASK))
        wanted = jax.tree.map(lambda x, y, factor=factor: x + factor * (y - x), policies[k], whole)
        same_tree(policies[k + 1], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "wrap", [lambda inner: inner, lambda inner: MiniBatch(inner, size=3)], ids=["alone", "sampled"]
)
def test_a_new_stage_takes_the_moments_and_leaves_the_count(wrap):
    rule = OptaxSolver(optax.adam, learning_rate=0.1, anneal=5.0)
    solver = Continuation(wrap(rule), discounts=[1.0, 1.0], lengths=[3, 2])
    policies, carry = walk(solver, 4)
    inner = getattr(carry.inner, "inner", carry.inner)
    assert int(inner.updates) == 4
    assert int(optax.tree.get(inner.state, "count")) == 1
    # The first step of a fresh Adam is as long as its rate in every coordinate: times what is left of it.
    moved = np.abs(
        np.concatenate([np.ravel(x - y) for x, y in zip(*map(jax.tree.leaves, policies[:-3:-1]), strict=True)])
    )
    np.testing.assert_allclose(moved, 0.1 * (1 + np.cos(0.6 * np.pi)) / 2, rtol=1e-3)


def test_what_cannot_be_annealed():
    with pytest.raises(ValueError, match=r"anneal must be a positive number of updates, or None.*; got 0"):
        OptaxSolver(optax.adam, learning_rate=0.1, anneal=0.0)
    with pytest.raises(ValueError, match="a line search chooses the length of its steps: anneal must be None"):
        OptaxSolver(optax.lbfgs, anneal=5.0).init(START, TASK)
