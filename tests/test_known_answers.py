"""Second-order methods on linear-quadratic problems against Riccati, and curvature elsewhere against dense Jacobians."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import (
    BPTT,
    ILQR,
    Affine,
    Gaussian,
    GaussNewton,
    Linear,
    Neural,
    OpenLoop,
    episode_return,
    mean_return,
    rollout,
    rollouts,
    solve,
    tasks,
)
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.optimizers import DampingGrid, Dense, Krylov
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.linearize import linearize
from diffmbrl.second_order.riccati import riccati as riccati_sweep
from diffmbrl.tasks import TASKS
from tests.problems import LINEAR, bent, changed, optimal_actions, riccati, same, some_slow, stationary_gain
from tests.solvers import SOLVERS

KEY = jax.random.key(0)
UNDAMPED = {"dampings": [0.0]}

every_linear_task = pytest.mark.parametrize("name", some_slow(LINEAR, "double integrator", "stable 12x4"))
close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)


@jax.jit
def update(solver, policy, task, s0):
    policy, _, info = solver.update(policy, solver.init(policy, task), task, s0, key=None)
    return policy, info


evaluate = jax.jit(episode_return)


# Linear dynamics, quadratic costs.


@every_linear_task
def test_ilqr_is_riccati_after_one_iteration(name, x64):
    task = LINEAR[name]()
    s0, optimum = task.initial(KEY), riccati(task)
    plan, info = update(in_double(ILQR()), Affine.zeros(task), task, s0)
    assert info.accepted and info.damping == 0
    close(plan.K, optimum.K)
    close(plan.a, optimal_actions(task, s0))
    close(evaluate(plan, task, s0), optimum.J(s0))
    # As a feedback law it is optimal from everywhere, not from its own start alone.
    elsewhere = task.initial(jax.random.key(1))
    close(evaluate(plan, task, elsewhere), optimum.J(elsewhere))
    # The second iteration finds nothing left to do.
    again, info = update(in_double(ILQR()), plan, task, s0)
    close(info.J, optimum.J(s0))
    assert info.gradient_norm < 1e-8 * np.abs(optimum.J(s0))
    close(again.a, plan.a)


def test_ilqr_is_riccati_for_a_discounted_task(x64):
    task = tasks.lqr(horizon=15)
    task = changed(task, weights=0.8 ** np.arange(16))
    s0 = task.initial(KEY)
    plan, _ = update(in_double(ILQR()), Affine.zeros(task), task, s0)
    close(plan.K, riccati(task).K)
    close(evaluate(plan, task, s0), riccati(task).J(s0))


@pytest.mark.parametrize(
    "name", some_slow(["double integrator", "unstable 3x1", "stable 12x4"], "double integrator", "stable 12x4")
)
def test_gauss_newton_on_a_plan_is_the_lqr_step(name, x64):
    horizon = 8
    task = LINEAR[name](horizon)
    s0 = task.initial(KEY)
    rest = OpenLoop(0.1 * jax.random.normal(jax.random.key(3), (horizon, task.m), float))
    by_ilqr, _ = update(
        in_double(ILQR()), Affine(jnp.zeros((horizon, task.m, task.n)), rest.a, jnp.zeros((horizon, task.n))), task, s0
    )
    close(by_ilqr.a, optimal_actions(task, s0))
    for system in (Dense(), Krylov(rank=horizon * task.m)):
        plan, info = update(GaussNewton(system=system, damping=DampingGrid(**UNDAMPED)), rest, task, s0[None])
        assert info.accepted
        np.testing.assert_allclose(plan.a, by_ilqr.a, rtol=1e-6, atol=1e-7)


def test_gauss_newton_on_a_plan_is_ilqrs_step_off_the_optimum_of_a_nonlinear_task(x64):
    task = bent()
    s0 = task.initial(KEY)
    plan = OpenLoop(0.1 * jnp.ones((8, 1)))
    model = jax.jit(lambda plan, s0: dense_step(plan, task, s0))(plan, s0[None])
    flat = Affine(jnp.zeros((8, 1, 2)), plan.a, jnp.zeros((8, 2)))

    @jax.jit
    def first_order(alpha):
        """Where iLQR's closed loop goes for a small step length: alpha times the open-loop Newton step."""
        nominal = rollout(flat, task, s0)
        sweep = riccati_sweep(linearize(task, nominal), jnp.zeros(()))
        return rollout(Affine(sweep.K, nominal.a + alpha * sweep.k, nominal.s), task, s0).a

    step = jax.jit(jax.jacfwd(first_order))(jnp.zeros(()))
    close(step.ravel(), model)


def dense_step(policy, task, s0):
    model = gauss_newton(policy, task, s0)
    return -jnp.linalg.solve(dense(model, policy, task), model.gradient)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in SOLVERS if row.exact_on_lqr],
)
@pytest.mark.parametrize("name", some_slow(["double integrator", "marginal 5x2"], "double integrator"))
def test_one_update_of_a_plan_is_optimal(row, name, x64):
    task = LINEAR[name](5)
    s0 = task.initial(KEY)
    start = Affine.zeros(task) if row.kind == "plan" else OpenLoop.zeros(task)
    plan, info = update(in_double(row.solver), start, task, s0 if row.kind == "plan" else s0[None])
    assert info.accepted
    np.testing.assert_allclose(evaluate(plan, task, s0), riccati(task).J(s0), rtol=1e-6)


@pytest.mark.parametrize(
    "name", some_slow(["double integrator", "unstable 3x1", "marginal 5x2"], "unstable 3x1", "marginal 5x2")
)
def test_the_fixed_point_of_a_linear_policy_is_the_stationary_gain(name, x64):
    """Over a horizon at whose end nothing is left to control, the best constant gain is the infinite horizon's."""
    task = LINEAR[name](200)
    K = stationary_gain(task)
    start = Linear(jnp.asarray(0.8 * K), jnp.full(task.m, 0.1))
    s0 = task.starts(KEY, 2 * task.n)
    policy, history = solve(
        GaussNewton(system=Dense(), damping=in_double(DampingGrid())), start, task, s0, None, 40, tolerance=1e-9
    )
    np.testing.assert_allclose(policy.K, K, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(policy.b, np.zeros(task.m), atol=1e-7)
    assert history.info.J[-1] >= history.info.J[0]
    close(history.info.J[-1], np.mean(riccati(task).J(s0)), rtol=1e-6)


# The gradient.


# Of each kind of state one: on a line, with contact, with an end, a body that turns.
MODELLED = {"cartpole-balance", "tennis", "cartpole-continuous", "quadrotor2d"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in MODELLED else pytest.param(name, marks=pytest.mark.slow)
        for name, row in TASKS.items()
        if row.differentiable_reward
    ],
)
def test_the_gradient_of_the_quadratic_model_is_bptt(name, x64):
    task = changed_weights(tasks.make(name, horizon=10))
    policy = Neural.init(task, hidden=[5], key=KEY, output_scale=1.0)
    s0 = task.starts(jax.random.key(1), 3)

    @jax.jit
    def both(policy, task, s0):
        model = gauss_newton(policy, task, s0)
        return model.J, model.gradient, *BPTT()(policy, task, s0, None)

    J, gradient, J_bptt, bptt = both(policy, task, s0)
    close(J, J_bptt)
    close(gradient, -ravel_pytree(bptt)[0])
    assert np.linalg.norm(gradient) > 1e-3


def changed_weights(task, discount=0.95):
    return changed(task, weights=discount ** np.arange(task.horizon + 1))


# The matrix.


def explicit(policy: Any, task: Any, s0: Any, key: Any = None) -> np.ndarray:
    """J' H J, averaged over starts, by Jacobians of whole rollouts and numpy: nothing of linearize or curvature."""
    theta, unravel = ravel_pytree(policy)
    keys = None if key is None else jax.random.split(key, s0.shape[0])

    @jax.jit
    def parts(theta, s, k):
        def path(theta):
            tau = rollout(unravel(theta), task, s, k)
            return jnp.concatenate([tau.s, tau.a], axis=1), tau.s_T, tau.alive

        (z, s_T, alive), (dz, ds_T, _) = path(theta), jax.jacfwd(path)(theta)
        n = s.shape[0]
        H = jax.vmap(jax.hessian(lambda z, w: -w * task.reward(z[:n], z[n:])))(z, task.weights[:-1])
        H_T = jax.hessian(lambda s: -task.weights[-1] * task.terminal(s))(s_T)
        return dz, ds_T, jnp.where(alive[:-1, None, None], H, 0), jnp.where(alive[-1], H_T, 0)

    total = np.zeros((theta.size, theta.size))
    for i in range(s0.shape[0]):
        dz, ds_T, H, H_T = map(np.asarray, parts(theta, s0[i], None if keys is None else keys[i]))
        for X, block in [*zip(dz, H, strict=True), (ds_T, H_T)]:
            values, vectors = np.linalg.eigh((block + block.T) / 2)
            total += X.T @ (vectors * np.maximum(values, 0)) @ vectors.T @ X
    return total / s0.shape[0]


def neural(task):
    return Neural.init(task, hidden=[3], key=jax.random.key(1), output_scale=1.0)


PROBLEMS = {
    "network": lambda: (bent(), neural, None),
    "linear policy": lambda: (bent(), lambda task: Linear(jnp.asarray([[-0.5, -0.3]]), jnp.asarray([0.1])), None),
    "plan": lambda: (bent(), lambda task: OpenLoop(jnp.linspace(-1, 1, 8)[:, None]), None),
    "plan with feedback": lambda: (
        bent(),
        lambda task: Affine(-0.3 * jnp.ones((8, 1, 2)), jnp.linspace(-1, 1, 8)[:, None], 0.1 * jnp.ones((8, 2))),
        None,
    ),
    "noisy policy": lambda: (bent(), lambda task: Gaussian.around(neural(task), task, std=0.3), jax.random.key(5)),
    "noisy dynamics": lambda: (changed(bent(), noise=0.5), neural, jax.random.key(5)),
    "termination": lambda: (bent(ends=True), neural, None),
}


class Problem:
    def __init__(self, name: str):
        self.task, make, self.key = PROBLEMS[name]()
        self.task = changed_weights(self.task)
        self.policy = make(self.task)
        self.s0 = self.task.starts(jax.random.key(2), 3)
        self.P = ravel_pytree(self.policy)[0].size

    def products(self, vectors, *, chunk=None):
        @jax.jit
        def run(policy, vectors):
            model = gauss_newton(policy, self.task, self.s0, self.key, chunk=chunk)
            return jax.vmap(model.product)(vectors), dense(model, policy, self.task, self.key)

        return run(self.policy, vectors)


@pytest.mark.parametrize("name", some_slow(PROBLEMS, "linear policy", "plan with feedback"))
def test_products_dense_and_explicit_matrices_agree(name, x64):
    problem = Problem(name)
    by_products, N = problem.products(jnp.eye(problem.P))
    wanted = explicit(problem.policy, problem.task, problem.s0, problem.key)
    scale = np.abs(wanted).max()
    assert scale > 1e-2
    close(by_products, wanted, atol=1e-8 * scale)
    close(N, wanted, atol=1e-8 * scale)
    np.testing.assert_array_equal(N, N.T)
    assert np.linalg.eigvalsh(N).min() > -1e-12 * scale


@pytest.mark.slow
def test_the_problem_with_termination_has_one_and_the_projection_has_work():
    task = bent(ends=True)
    alive = rollouts(neural(task), task, task.starts(jax.random.key(2), 3)).alive
    assert alive[:, 0].all() and not alive[:, -1].all() and alive[:, -1].any()
    H = -jax.hessian(lambda z: task.reward(z[:2], z[2:]))(jnp.asarray([2.0, 0.0, 0.0]))
    assert np.linalg.eigvalsh(H).min() < -0.1


@pytest.mark.parametrize(
    "name, chunk",
    [
        *[("network", 1), ("plan", 3)],
        *(pytest.param(*row, marks=pytest.mark.slow) for row in [("network", 100), ("noisy policy", 3)]),
    ],
)
def test_chunks_do_not_change_products(name, chunk, x64):
    problem = Problem(name)
    vectors = jax.random.normal(KEY, (2, problem.P), float)
    close(problem.products(vectors, chunk=chunk)[0], problem.products(vectors)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_on_a_linear_quadratic_task_it_is_the_hessian(x64):
    """Of an open-loop plan: then the model is exact."""
    task = LINEAR["unstable 3x1"](5)
    plan, s0 = OpenLoop(0.1 * jnp.ones((5, 1))), task.starts(KEY, 2)
    theta, unravel = ravel_pytree(plan)
    hessian = jax.jit(jax.hessian(lambda theta: -mean_return(unravel(theta), task, s0)))(theta)
    same(jax.jit(lambda: dense(gauss_newton(plan, task, s0), plan, task))(), hessian)
