"""Mini-batches of starts and blocks of noise, against the inner solver given the same starts and key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import ILQR, Continuation, GaussNewton, Neural, OptaxSolver, solve
from diffmbrl.core import reweighted
from diffmbrl.optimizers import Krylov, MiniBatch
from tests.problems import bent, changed, same_tree

KEY = jax.random.key(3)
POOL, SIZE, EVERY = 10, 4, 2
INNER = GaussNewton(system=Krylov(4))


@jax.jit
def update(solver, policy, carry, task, s0, key):
    return solver.update(policy, carry, task, s0, key=key)


@pytest.fixture(scope="module")
def problem():
    task = changed(bent(horizon=6), noise=0.3)
    return Neural.init(task, hidden=[4], key=KEY), task, task.starts(KEY, POOL)


@pytest.mark.parametrize("noisy", [True, False])
def test_each_block_has_its_starts_and_its_noise(problem, noisy):
    policy, task, s0 = problem
    root = jax.random.key(9)
    solver = MiniBatch(INNER, size=SIZE, every=EVERY, key=root)
    carry, inner, same_policy = solver.init(policy, task), INNER.init(policy, task), policy
    for i in range(8):
        block = i // EVERY
        batch = s0[np.arange(block * SIZE, (block + 1) * SIZE) % POOL]  # the third wraps round
        # The key of each update is another; that of the block stays.
        key = jax.random.fold_in(KEY, i) if noisy else None
        policy, carry, info = update(solver, policy, carry, task, s0, key)
        noise = jax.random.fold_in(root, block) if noisy else None
        same_policy, inner, alone = update(INNER, same_policy, inner, task, batch, noise)
        same_tree(policy, same_policy, rtol=1e-5, atol=1e-6)
        same_tree(info._replace(model=None), alone._replace(model=None), rtol=1e-4)
    assert carry.updates == 8


def test_weights_of_each_start_go_with_them(problem):
    policy, task, s0 = problem
    w = jax.random.uniform(KEY, (POOL, 7))
    solver = MiniBatch(INNER, size=SIZE)
    got = update(solver, policy, solver.init(policy, task), reweighted(task, w), s0, None)
    wanted = update(INNER, policy, INNER.init(policy, task), reweighted(task, w[:SIZE]), s0[:SIZE], None)
    same_tree(got[0], wanted[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_around_a_continuation_it_gives_every_stage_fresh_starts(problem):
    policy, task, s0 = problem
    stages = Continuation(INNER, discounts=[0.8, 1.0], lengths=[EVERY, EVERY])
    better, history = solve(MiniBatch(stages, size=POOL // 2, every=EVERY), policy, task, s0, None, 2 * EVERY)
    first, _ = solve(INNER, policy, reweighted(task, task.weights * 0.8 ** jnp.arange(7.0)), s0[:5], None, EVERY)
    second, _ = solve(INNER, first, task, s0[5:], None, EVERY)
    same_tree(better, second, rtol=1e-4, atol=1e-5)
    assert history.updates == 2 * EVERY


def test_what_is_wrong_is_refused(problem):
    policy, task, s0 = problem
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        MiniBatch(INNER, size=0)
    with pytest.raises(ValueError, match="every must be at least 1, got -1"):
        MiniBatch(INNER, size=2, every=-1)
    with pytest.raises(ValueError, match="a planner has only one"):
        MiniBatch(ILQR(), size=2)
    solver = MiniBatch(OptaxSolver(optax.adam, learning_rate=1e-2), size=POOL + 1)
    with pytest.raises(ValueError, match="a mini-batch of 11 needs as many starts, got 10"):
        solver.update(policy, solver.init(policy, task), task, s0, key=None)
