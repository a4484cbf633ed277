"""The sweeps by associative scan against the sweeps by scan; a step with gaps against the dense KKT system."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import OpenLoop, rollout
from diffmbrl.second_order.kkt import solve_with_gaps
from diffmbrl.second_order.linearize import linearize
from diffmbrl.second_order.parallel_riccati import (
    PARALLEL,
    PARALLEL_FROM,
    SCAN,
    choose,
    join,
    parallel_adjoint,
    parallel_respond,
    parallel_riccati,
)
from diffmbrl.second_order.parallel_riccati import _stage as stage
from diffmbrl.second_order.riccati import adjoint, respond, riccati
from diffmbrl.second_order.small_matrices import INLINE
from tests.problems import LINEAR
from tests.problems import riccati as textbook
from tests.test_linearize import random_linearization

close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
both = jax.jit(lambda lin, damping: (parallel_riccati(lin, damping), riccati(lin, damping)))


def agree(lin, damping, tolerance=1e-8):
    parallel, scanned = both(lin, jnp.asarray(damping))
    for x, y in zip(parallel, scanned, strict=True):
        close(x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))
    return parallel


@pytest.mark.parametrize("T, n, m", [(1, 4, 3), (7, 2, 1), (9, 12, 4), (2, 3, INLINE + 1)])
def test_it_is_the_scan(T, n, m, x64):
    """Cross terms, time-varying matrices and linear terms, with and without damping."""
    for seed, damping in enumerate([0.0, 0.3, 50.0]):
        assert agree(random_linearization(seed, T, n, m), damping).definite


@pytest.mark.parametrize(
    "name, horizon",
    [("unstable 3x1", 40), *(pytest.param(name, 300, marks=pytest.mark.slow) for name in LINEAR)],
)
def test_gains_over_a_long_horizon_are_the_textbooks(name, horizon, x64):
    task = LINEAR[name](horizon)
    lin = jax.jit(lambda s: linearize(task, rollout(OpenLoop.zeros(task), task, s)))(jnp.zeros(task.n))
    sweep = agree(lin, 0.0)
    close(sweep.K, textbook(task).K)


def test_in_single_precision_it_loses_little():
    lin = jax.tree.map(lambda x: x.astype(jnp.float32), random_linearization(0, 7, 2, 1))
    agree(lin, 0.1, tolerance=2e-3)


def test_joining_is_associative(x64):
    lin = random_linearization(3, 3, 4, 2)
    a, b, c = (stage(lin.A[t], lin.B[t], lin.c_s[t], lin.c_a[t], lin.H[t])[0] for t in range(3))
    jax.tree.map(partial(close, rtol=1e-10), join(join(a, b), c), join(a, join(b, c)))


def test_it_reports_what_is_not_positive_definite(x64):
    lin = random_linearization(0, 4, 2, 2)
    negative = lin._replace(H=lin.H.at[2, 2:, 2:].set(-100 * jnp.eye(2)))
    assert not both(negative, jnp.asarray(0.0))[0].definite
    assert both(negative, jnp.asarray(1e4))[0].definite
    # Positive at the step, negative by what follows.
    later = lin._replace(H_T=-100 * jnp.eye(2))
    assert [bool(sweep.definite) for sweep in both(later, jnp.asarray(0.0))] == [False, False]
    # No price on the actions: enough for the scan, not here.
    free = lin._replace(H=lin.H.at[:, 2:].set(0.0).at[:, :, 2:].set(0.0))
    assert [bool(sweep.definite) for sweep in both(free, jnp.asarray(0.0))] == [False, True]


def test_what_is_not_finite_stays_visible(x64):
    lin = random_linearization(0, 4, 2, 2)
    sweep = both(lin._replace(c_s=lin.c_s.at[3, 0].set(jnp.nan)), jnp.asarray(0.0))[0]
    assert np.isnan(sweep.k[:3]).all() and np.isnan(sweep.slope)


def test_adjoint_and_respond_are_the_scans(x64):
    lin = random_linearization(1, 9, 3, 2)
    normal = np.random.default_rng(0).normal
    K, w = jnp.asarray(0.3 * normal(size=(9, 2, 3))), jnp.asarray(normal(size=(9, 2)))
    arguments = lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T
    close(jax.jit(parallel_adjoint)(*arguments), adjoint(*arguments))
    jax.tree.map(close, jax.jit(parallel_respond)(lin.A, lin.B, K, w), respond(lin.A, lin.B, K, w))


def test_the_choice():
    assert choose(PARALLEL_FROM, platform="cpu") is SCAN
    assert choose(10**6, platform="cpu") is SCAN
    assert choose(PARALLEL_FROM, platform="gpu") is PARALLEL
    assert choose(PARALLEL_FROM - 1, platform="gpu") is SCAN
    assert choose(5) in (SCAN, PARALLEL)
    with pytest.raises(ValueError, match=r"platform must be one of cpu, gpu, .*, got 'cpus'"):
        choose(5, platform="cpus")
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        choose(0)
    with pytest.raises(ValueError, match=r"A must have shape \[T, n, n\], got \[4, 2, 2, 1\]; vmap"):
        parallel_riccati(jax.tree.map(lambda x: x[..., None], random_linearization(0, 4, 2, 2)), jnp.zeros(()))


# The step with gaps.


def dense_kkt(lin, gaps, damping):
    """(s, a, s_T) from the whole matrix, in the order (s_0, a_0, .., s_{T-1}, a_{T-1}, s_T) and then the costates."""
    T, n, m = lin.B.shape
    N = T * (n + m) + n
    H, c, F, d = np.zeros((N, N)), np.zeros(N), np.zeros(((T + 1) * n, N)), np.asarray(gaps).ravel()
    F[:n, :n] = np.eye(n)
    for t in range(T):
        i = t * (n + m)
        H[i : i + n + m, i : i + n + m] = lin.H[t]
        H[i + n : i + n + m, i + n : i + n + m] += damping * np.eye(m)
        c[i : i + n], c[i + n : i + n + m] = lin.c_s[t], lin.c_a[t]
        rows = slice((t + 1) * n, (t + 2) * n)
        F[rows, i : i + n], F[rows, i + n : i + n + m] = -lin.A[t], -lin.B[t]
        F[rows, i + n + m : i + n + m + n] = np.eye(n)
    H[-n:, -n:], c[-n:] = lin.H_T, lin.c_T
    system = np.block([[H, F.T], [F, np.zeros((F.shape[0],) * 2)]])
    z = np.linalg.solve(system, np.concatenate([-c, d]))[:N]
    steps = z[:-n].reshape(T, n + m)
    return steps[:, :n], steps[:, n:], z[-n:]


@pytest.mark.parametrize("sweeps", [SCAN, PARALLEL], ids=["scan", "parallel"])
def test_a_step_with_gaps_is_the_dense_solution(sweeps, x64):
    @jax.jit
    def solve(lin, gaps, damping):
        sweep = sweeps.riccati(lin, damping)
        return sweep, solve_with_gaps(lin, sweep, gaps, damping=damping, sweeps=sweeps)

    for T, damping in [(1, 0.0), (6, 0.0), (6, 2.0)]:
        lin = random_linearization(5, T, 3, 2)
        gaps = np.random.default_rng(6).normal(size=(T + 1, 3))
        sweep, step = solve(lin, gaps, jnp.asarray(damping))
        s, a, s_T = dense_kkt(lin, gaps, damping)
        close(step.s, s)
        close(step.a, a)
        close(step.s_T, s_T)
        close(np.einsum("tij,tj->ti", sweep.K, s) + step.k, a)
        # Without gaps, Riccati's own.
        close(solve(lin, 0 * gaps, jnp.asarray(damping))[1].k, sweep.k)
