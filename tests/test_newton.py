"""Krylov Newton's three paths against dense matrices, and the starts that its Hessian sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import KrylovNewton, Neural, mean_return
from diffmbrl.core import reweighted
from diffmbrl.optimizers import DampingGrid
from diffmbrl.second_order.curvature import gauss_newton, hessian
from diffmbrl.second_order.dense import dense
from tests.problems import bent, same

KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        task = bent(horizon=6)
        policy = Neural.init(task, hidden=[3], key=KEY)
        yield policy, task, task.starts(KEY, 6)


@jax.jit
def update(solver, policy, carry, task, s0):
    return solver.update(policy, carry, task, s0, key=None)


@jax.jit
def matrices(policy, task, s0):
    """The Hessian, the Gauss-Newton matrix, G'G and the gradient of -J."""
    model, full = gauss_newton(policy, task, s0), hessian(policy, task, s0)
    eye = jnp.eye(model.gradient.size)
    imitation = jax.vmap(lambda v: model.pull(model.push(v)))(eye)
    return jax.vmap(full.product)(eye), dense(model, policy, task), imitation, model.gradient


def candidates(H, N, F, g, dampings):
    """Steps of all paths from whole matrices, each damping relative to its matrix's largest absolute eigenvalue."""
    out = []
    for matrix, every in ((H, 1), (N, 1), (F, 2)):
        values, vectors = np.linalg.eigh(matrix)
        safe = np.abs(values) if matrix is H else np.maximum(values, 0)
        out += [-vectors @ ((vectors.T @ g) / (safe + d * safe.max())) for d in dampings[::every]]
    return np.stack(out)


@pytest.mark.parametrize(
    "rank", [pytest.param(None, marks=pytest.mark.slow), 40], ids=["all eigenvectors", "full Krylov space"]
)
@pytest.mark.parametrize("margin", [1.0, 1e6], ids=["the best of all", "the Hessian last"])
def test_it_takes_the_best_step_of_the_three_paths(problem, rank, margin, x64):
    policy, task, s0 = problem
    dampings = np.asarray([1e-2, 1e-1, 1.0])
    solver = KrylovNewton(damping=DampingGrid(jnp.asarray(dampings)), rank=rank, structured=40, starts=6, margin=margin)
    moved, _, info = update(solver, policy, solver.init(policy, task), task, s0)
    H, N, F, g = (np.asarray(x) for x in matrices(policy, task, s0))
    theta, unravel = ravel_pytree(policy)
    steps = candidates(H, N, F, g, dampings)
    improved = np.asarray([mean_return(unravel(theta + d), task, s0) - mean_return(policy, task, s0) for d in steps])
    np.testing.assert_allclose(info.model.improved, improved, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(
        ravel_pytree(moved)[0] - theta,
        steps[np.argmax(improved / np.repeat([margin, 1], [3, 5]))],
        rtol=1e-3,
        atol=1e-6,
    )
    assert info.accepted and np.linalg.eigvalsh(H)[0] < 0
    same(info.model.ritz[:1], np.linalg.eigvalsh(H)[:1], rtol=1e-6)


def test_all_eigenvectors_need_few_passes(problem, x64):
    policy, task, s0 = problem
    for rank, passes in [(None, 2 + 1 + 3 + 2 + 1), (5, 2 + 2 * 4 + 3 + 2 * 5 + 1)]:
        solver = KrylovNewton(rank=rank, structured=4)
        assert update(solver, policy, solver.init(policy, task), task, s0)[2].work.sequential == passes


def test_the_hessian_is_of_some_starts_in_turn(problem, x64):
    """Two of six: the first update's Ritz values are of the first two, the fourth's again, each with its own weights."""
    policy, task, s0 = problem
    weighted = reweighted(task, jax.random.uniform(KEY, (6, 7), minval=0.5))
    solver = KrylovNewton(damping=DampingGrid(jnp.asarray([1e30])), rank=None, starts=2)  # hardly moves
    carry = solver.init(policy, task)
    for pair in (0, 2, 4, 0):
        _, carry, info = update(solver, policy, carry, weighted, s0)
        chosen = slice(pair, pair + 2)
        H, *_ = matrices(policy, reweighted(task, weighted.weights[chosen]), s0[chosen])
        same(info.model.ritz, np.linalg.eigvalsh(H), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["rank", "structured", "starts"])
def test_what_is_wrong_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        KrylovNewton(**{name: 0})
