"""Consensus on linear-quadratic problems, where the planner is Riccati and the regression is numpy's; and within limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import Consensus, Linear, Neural, solve, tasks
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.optimizers import DampingGrid
from diffmbrl.optimizers.consensus import _Plans, _Rounds
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.riccati import closed_loop
from diffmbrl.second_order.riccati import riccati as sweep_of
from tests.problems import matrices, riccati, same, stationary_gain

KEY = jax.random.key(0)
ONE = {"rounds": 1, "iterations": 1, "lengths": [1.0], "blends": [1.0], "fit": DampingGrid([0.0])}


@jax.jit
def update(solver, policy, task, s0):
    policy, _, info = solver.update(policy, solver.init(policy, task), task, s0, key=None)
    return policy, info


def test_a_round_without_a_price_is_regression_onto_riccati(x64):
    """With rho to 0 the trajectories are optimal from every start, and the policy their weighted least squares."""
    task = tasks.lqr(horizon=12)
    s0 = task.starts(KEY, 6)
    policy, info = update(Consensus(rho=1e-10, **ONE), Linear.zeros(task), task, s0)
    assert info.accepted
    A, B, Q, R, Q_T = matrices(task)
    optimum, P, pivots = riccati(task), Q_T, []
    for K in optimum.K[::-1]:
        pivots.append(R + B.T @ P @ B)
        P = Q + K.T @ R @ K + (A + B @ K).T @ P @ (A + B @ K)
    s, rows, wanted = np.asarray(s0), [], []
    for K, pivot in zip(optimum.K, pivots[::-1], strict=True):
        root = np.sqrt(pivot.item())
        rows.append(root * np.column_stack([s, np.ones(len(s))]))
        wanted.append(root * s @ K.T)
        s = s @ (A + B @ K).T
    fitted = np.linalg.lstsq(np.concatenate(rows), np.concatenate(wanted), rcond=None)[0]
    same(policy.K, fitted[:2].T, rtol=1e-5)
    same(policy.b, fitted[2], rtol=1e-5, atol=1e-6)
    # It promised the return of the optimum.
    same(info.model.predicted[0], np.mean(optimum.J(s0)) - info.J, rtol=1e-6)


def test_at_a_high_price_it_is_gradient_descent_in_the_metric_of_the_policy(x64):
    task = tasks.lqr(horizon=12)
    s0 = task.starts(KEY, 6)
    start = Linear(jnp.asarray([[-0.3, -0.4]]), jnp.asarray([0.1]))

    @jax.jit
    def parts(start, s0):
        model = gauss_newton(start, task, s0)
        S = sweep_of(closed_loop(model.linearization, model.K), jnp.asarray(1e-12)).Q_aa
        return model.gradient, S, jax.vmap(model.push, out_axes=-1)(jnp.eye(3))

    gradient, S, G = map(np.asarray, parts(start, s0))
    G = G.reshape(-1, 3)
    metric = G.T @ (S.reshape(-1, 1) * G) / 6
    for rho in (1e6, 1e8):
        policy, info = update(Consensus(rho=rho, **ONE), start, task, s0)
        assert info.accepted and info.damping == rho
        moved = np.asarray(ravel_pytree(policy)[0] - ravel_pytree(start)[0])
        np.testing.assert_allclose(moved * rho, -np.linalg.solve(metric, gradient), rtol=1e-3)
        assert np.max(np.abs(moved)) < 100 / rho  # beyond any price nothing moves


@pytest.mark.slow
def test_its_fixed_point_is_the_stationary_gain(x64):
    task = tasks.lqr(horizon=120)
    K, s0 = stationary_gain(task), task.starts(KEY, 4)
    start = Linear(jnp.asarray(0.7 * K), jnp.full(task.m, 0.1))
    policy, history = solve(in_double(Consensus(rank=3)), start, task, s0, None, 30)
    np.testing.assert_allclose(policy.K, K, rtol=1e-3)
    np.testing.assert_allclose(history.info.J[-1], np.mean(riccati(task).J(s0)), rtol=1e-6)


def test_trajectories_keep_the_limits_and_never_get_worse(x64):
    task = tasks.cartpole_balance(horizon=30)
    policy, s0 = Neural.init(task, hidden=[4], key=KEY), task.starts(KEY, 8)

    @jax.jit
    def improve(policy, s0):
        model = gauss_newton(policy, task, s0)
        rounds = _Rounds(in_double(Consensus()), task, s0, None, jnp.asarray(1e-3), model)
        zero = jnp.zeros_like(model.g)
        J = jnp.sum(model.trajectory.r, axis=0) + jax.vmap(task.terminal)(model.trajectory.s_T)
        before = _Plans(model.trajectory, J, model.linearization, model.K, zero, zero)
        after, _ = rounds._improve(policy, before)
        cost = rounds._augmented(after.trajectory, after.J, after.w, after.u)
        return before, after, cost, rounds._actions(policy, after.trajectory.s)

    before, after, cost, followed = improve(policy, s0)
    assert np.max(np.abs(after.trajectory.a)) == task.a_high[0]  # the limit is reached, and not exceeded
    assert np.all(cost <= -before.J) and np.mean(after.J - before.J) > 1
    same(after.w, np.moveaxis(after.trajectory.a, 1, -1) - followed)


@pytest.mark.parametrize("name", ["rounds", "iterations", "regressions", "rank"])
def test_counts_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Consensus(**{name: 0})
