"""The ways to solve the Gauss-Newton system, against dense matrices; the planner's step and what of it a policy follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import GaussNewton, KrylovNewton, Linear, Neural, NewtonCG, OpenLoop, tasks
from diffmbrl.optimizers import Dense, Sigma, SquareRoot
from diffmbrl.second_order.curvature import curve, gauss_newton, planner_step
from diffmbrl.second_order.dense import dense, square_root
from diffmbrl.second_order.projection import projection_gap
from diffmbrl.second_order.riccati import closed_loop, riccati
from tests.problems import bent, same, some_slow

KEY = jax.random.key(3)
BATCH, T = 3, 6


class Matrices:
    """G, M, g and N of the bent task as numpy arrays, the starts stacked: all else is linear algebra."""

    def __init__(self, policy, task, s0):
        @jax.jit
        def parts(policy, s0):
            model = gauss_newton(policy, task, s0)
            G = jax.vmap(model.push)(jnp.eye(model.gradient.size))
            unit = jnp.eye(T)[:, :, None, None] * jnp.ones((1, 1, 1, BATCH))  # one step of all starts, in turn
            columns = jax.vmap(lambda w: curve(model.linearization, model.K, w))(unit)
            return G, columns, model.g, dense(model, policy, task), model.gradient

        G, columns, g, N, gradient = map(np.asarray, parts(policy, s0))
        self.G = G.reshape(G.shape[0], -1).T
        self.g = g.reshape(-1)
        self.N, self.gradient = N, gradient
        self.M = np.zeros((T * BATCH, T * BATCH))
        for i in range(BATCH):
            self.M[i::BATCH, i::BATCH] = columns[:, :, 0, i]
        self.scale = self.g @ self.M @ self.g / (self.g @ self.g)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        task = bent(horizon=T)
        policy, s0 = Neural.init(task, hidden=[4], key=KEY), task.starts(KEY, BATCH)
        yield policy, task, s0, Matrices(policy, task, s0)


def matrix_of(space) -> np.ndarray:
    return np.asarray(space.vectors.T) @ np.diag(space.ritz) @ np.asarray(space.vectors)


def solved(system, policy, task, s0):
    """The system's Spectral, compiled."""
    return jax.jit(lambda policy: system(gauss_newton(policy, task, s0), policy, task, None))(policy)


def test_the_parts_make_the_matrix(problem):
    m = problem[-1]
    same(m.G.T @ m.M @ m.G / BATCH, m.N)
    same(m.G.T @ m.g / BATCH, m.gradient)


def test_the_square_root_squared_is_the_matrix(problem, x64):
    policy, task, s0, m = problem
    R = jax.jit(lambda policy: square_root(gauss_newton(policy, task, s0), policy, task))(policy)
    np.testing.assert_array_equal(np.tril(R, -1), np.zeros_like(R))
    same(R.T @ R, m.N, rtol=1e-8, atol=1e-12)
    space = solved(SquareRoot(), policy, task, s0)
    for damping in (1e-6, 1e-2):
        wanted = -np.linalg.solve(m.N + damping * np.eye(len(m.N)), m.gradient)
        same(space.step(jnp.asarray(damping))[0], wanted, rtol=1e-8)


@pytest.mark.slow
def test_in_float32_the_square_root_keeps_eigenvalues_that_the_matrix_loses(problem):
    policy, task, s0, m = problem
    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (policy, task, s0))
    with jax.enable_x64(False):
        rooted, plain = (np.sort(solved(system, *single).ritz) for system in (SquareRoot(), Dense()))
    true = np.linalg.eigvalsh(m.N)
    # Well below the precision of the largest, and well above the square of it.
    lost = (true < 1e-7 * true[-1]) & (true > 1e-11 * true[-1])
    assert lost.any()
    np.testing.assert_allclose(rooted[lost], true[lost], rtol=0.05)
    assert np.max(np.abs(plain[lost] / true[lost] - 1)) > 0.5


@pytest.mark.parametrize("sigma", some_slow([1e-3, 1.0, 1e3], 1e-3, 1e3))
def test_the_sigma_metric_is_the_dense_one(problem, x64, sigma):
    policy, task, s0, m = problem
    space = solved(Sigma(sigma, rank=len(m.N)), policy, task, s0)
    s, eye = sigma * m.scale, np.eye(len(m.M))
    soft = s * np.linalg.inv(m.M + s * eye)
    same(matrix_of(space), m.G.T @ m.M @ soft @ m.G / BATCH, rtol=1e-6, atol=1e-9)
    damping = 1e-3 * m.scale
    right = m.G.T @ soft @ m.g / BATCH
    wanted = -np.linalg.solve(m.G.T @ m.M @ soft @ m.G / BATCH + damping * np.eye(len(m.N)), right)
    same(space.step(jnp.asarray(damping))[0], wanted, rtol=1e-6)


@pytest.mark.slow
def test_at_its_ends_the_sigma_metric_is_gauss_newton_and_imitation(problem, x64):
    policy, task, s0, m = problem
    large, small = (solved(Sigma(sigma, rank=len(m.N)), policy, task, s0) for sigma in (1e9, 1e-9))
    same(matrix_of(large), m.N, rtol=1e-6, atol=1e-8)
    # Imitation: the regression of G d onto the planner's step, in plain least squares.
    sigma = 1e-9 * m.scale
    planned = -np.linalg.solve(m.M, m.g)
    same(matrix_of(small) / sigma, m.G.T @ m.G / BATCH, rtol=1e-5, atol=1e-7)
    ridge = 1e-3
    wanted = np.linalg.solve(m.G.T @ m.G / BATCH + ridge * np.eye(len(m.N)), m.G.T @ planned / BATCH)
    same(small.step(jnp.asarray(ridge * sigma))[0], wanted, rtol=1e-5)


def test_the_planner_step_is_a_dense_solve_of_each_start(problem, x64):
    policy, task, s0, m = problem

    @jax.jit
    def step(policy, sigma):
        model = gauss_newton(policy, task, s0)
        return planner_step(model.linearization, model.K, sigma, model.g)

    for sigma in (1e-6, 0.1, 10.0):
        same(np.ravel(step(policy, jnp.asarray(sigma))), -np.linalg.solve(m.M + sigma * np.eye(len(m.M)), m.g))


def test_trajectories_on_a_last_axis_are_a_loop(problem, x64):
    """`riccati` and `closed_loop`, for each of the batch alone and for all."""
    policy, task, s0, _ = problem

    @jax.jit
    def both(policy):
        model = gauss_newton(policy, task, s0)
        lin, K, mu = model.linearization, model.K, jnp.asarray(0.1)
        together = riccati(closed_loop(lin, K), mu)
        alone = jax.vmap(lambda lin, K: riccati(closed_loop(lin, K), mu), in_axes=-1, out_axes=-1)(lin, K)
        return together, alone

    together, alone = both(policy)
    for x, y in zip(together, alone, strict=True):
        same(x, y)


# The projection gap.


def gap_of(policy, task, s0, step):
    """The gap, and the step that `step` makes of (model, N)."""

    @jax.jit
    def run(policy):
        model = gauss_newton(policy, task, s0)
        d = step(model, dense(model, policy, task))
        return projection_gap(model, d, damping=1e-13), d

    return run(policy)


def newton_step(model, N):
    """The undamped step, within the directions that double precision can tell from none."""
    values, vectors = jnp.linalg.eigh(N)
    kept = values > 1e-9 * values[-1]
    return -(vectors * jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)) @ (vectors.T @ model.gradient)


def test_the_gauss_newton_step_is_the_projection_of_the_planners(problem, x64):
    policy, task, s0, m = problem
    gap, d = gap_of(policy, task, s0, newton_step)
    planned, followed = -np.linalg.solve(m.M, m.g), m.G @ np.asarray(d)
    missed = followed - planned
    whole = planned @ m.M @ planned
    # The missed part is M-orthogonal to everything that the policy can express, so Pythagoras holds.
    values, vectors = np.linalg.eigh(m.N)
    expressed = m.G @ vectors[:, values > 1e-9 * values[-1]]
    cosines = (missed @ m.M @ expressed) / np.sqrt(whole * np.sum(expressed * (m.M @ expressed), axis=0))
    assert np.max(np.abs(cosines)) < 1e-8
    same(gap**2, missed @ m.M @ missed / whole, rtol=1e-7)
    same(gap**2, 1 - followed @ m.M @ followed / whole, rtol=1e-6)
    assert 0.01 < gap < 1


def test_the_gap_is_nothing_for_a_plan_and_for_a_linear_policy_on_lqr(x64):
    """A plan has every action for itself; and the planner's step from any linear policy is the same linear law everywhere."""
    task = bent(horizon=T)
    plan = OpenLoop(0.3 * jax.random.normal(KEY, (T, 1)))
    assert gap_of(plan, task, task.starts(KEY, 1), newton_step)[0] < 1e-5
    lqr = tasks.lqr(horizon=1)
    assert gap_of(Linear.zeros(lqr), lqr, lqr.starts(KEY, 5), newton_step)[0] < 1e-5


def test_no_step_follows_nothing(problem, x64):
    policy, task, s0, _ = problem
    gap, _ = gap_of(policy, task, s0, lambda model, N: jnp.zeros_like(model.gradient))
    same(gap, 1.0)


# The report of a solver.


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(GaussNewton(system=Dense()), marks=pytest.mark.slow),
        pytest.param(KrylovNewton(rank=20), marks=pytest.mark.slow),
        NewtonCG(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_what_an_update_reports_of_its_model(solver, problem, x64):
    policy, task, s0, m = problem
    solver = jax.tree.map(lambda x: x.astype(float), solver)
    _, _, info = jax.jit(lambda p: solver.update(p, solver.init(p, task), task, s0, key=None))(policy)
    model = info.model
    best = int(np.argmax(model.improved))
    assert info.accepted and model.improved[best] > 0 and float(model.dampings[best]) == float(info.damping)
    if isinstance(solver, GaussNewton):
        same(model.ritz, np.linalg.eigvalsh(m.N), rtol=1e-6, atol=1e-10)
        d = -np.linalg.solve(m.N + float(info.damping) * np.eye(len(m.N)), m.gradient)
        same(model.predicted[best], -(m.gradient @ d + d @ m.N @ d / 2), rtol=1e-6)
        assert 0 < float(model.gap) < 1 and model.negative < 1e-6
    elif isinstance(solver, NewtonCG):
        assert np.isnan(model.gap)
    if isinstance(solver, KrylovNewton):
        assert 0 < float(model.gap) < 1
        assert model.ritz[0] < 0 and 0 < model.negative < 1
