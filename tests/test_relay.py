"""One solver after another: each with its own updates, the second afresh from what the first has left."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, GaussNewton, OptaxSolver, Sequential, solve
from diffmbrl.core import restart
from diffmbrl.optimizers import Krylov
from tests.problems import same, same_tree, small

KEY = jax.random.key(9)
FIRST, THEN = OptaxSolver(optax.adam, learning_rate=1e-2), GaussNewton(system=Krylov(4))


@pytest.fixture(scope="module")
def problem():
    return small(KEY, 5)


def test_it_is_the_first_and_then_the_second_from_there(problem):
    policy, task, s0 = problem
    both, history = solve(Sequential(FIRST, THEN, updates=3), policy, task, s0, None, steps=5)
    left, before = solve(FIRST, policy, task, s0, None, steps=3)
    wanted, after = solve(THEN, left, task, s0, None, steps=2)
    same_tree(both, wanted, rtol=1e-4, atol=1e-6)
    for name in ("J", "gradient_norm", "damping", "accepted"):
        each = [getattr(part.info, name) for part in (before, after)]
        same(getattr(history.info, name), np.concatenate(each), rtol=1e-4, atol=1e-6)
    for name in ("forward", "jvp", "vjp", "sequential"):
        each = [getattr(part.info.work, name) for part in (before, after)]
        np.testing.assert_array_equal(getattr(history.info.work, name), np.concatenate(each))


def test_what_only_one_reports_is_left_out(problem):
    policy, task, s0 = problem
    relay = Sequential(FIRST, THEN, updates=1)
    assert jax.eval_shape(lambda: relay.update(policy, relay.init(policy, task), task, s0, key=None))[2].model is None
    two = Sequential(THEN, THEN, updates=1)
    info = jax.eval_shape(lambda: two.update(policy, two.init(policy, task), task, s0, key=None))[2]
    assert info.model is not None


class Lost(eqx.Module):
    """A gradient that is not finite from an update on."""

    after: int = eqx.field(static=True)
    kind: ClassVar[str] = "policy"

    def init(self, policy, task):
        return FIRST.init(policy, task), jnp.zeros((), jnp.int32)

    on_objective_change = restart

    def update(self, policy, carry, task, s0, *, key):
        inner, done = carry
        moved, inner, info = FIRST.update(policy, inner, task, s0, key=key)
        lost = done >= self.after
        info = info._replace(
            gradient_norm=jnp.where(lost, jnp.nan, info.gradient_norm), nonfinite=lost.astype(jnp.int32)
        )
        moved = jax.tree.map(lambda x: jnp.where(lost, jnp.nan, x), moved)
        return moved, (inner, done + 1), info


def test_a_search_that_is_lost_is_handed_on_at_once(problem):
    """From the policy that it had, in the update that was lost; the run goes on."""
    policy, task, s0 = problem
    both, history = solve(Sequential(Lost(after=2), THEN, updates=50), policy, task, s0, None, steps=4)
    wanted, _ = solve(Sequential(FIRST, THEN, updates=2), policy, task, s0, None, steps=4)
    same_tree(both, wanted, rtol=1e-4, atol=1e-6)
    assert history.updates == 4 and history.info.nonfinite.tolist() == [0, 0, 1, 0]


@pytest.mark.slow
def test_the_updates_are_a_leaf(problem):
    """So that a sweep over the handover is a `vmap`."""
    policy, task, s0 = problem

    @jax.jit
    @jax.vmap
    def J_after(updates):
        relay = Sequential(FIRST, THEN, updates=1)
        relay = jax.tree.unflatten(jax.tree.structure(relay), [*jax.tree.leaves(relay)[:-1], updates])
        moved, carry, _ = relay.update(policy, relay.init(policy, task), task, s0, key=None)
        return relay.update(moved, carry, task, s0, key=None)[2].damping

    assert (np.asarray(J_after(np.asarray([1, 2], np.int32))) > 0).tolist() == [True, False]


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        Sequential(FIRST, THEN, updates=0)
    with pytest.raises(ValueError, match="passes on a policy; ILQR plans from one start"):
        Sequential(FIRST, ILQR(), updates=1)
