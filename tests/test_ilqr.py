"""iLQR and DDP: optima on linear-quadratic tasks, limits, dampings, line searches, and the expansion of the return to go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from benchmarks.trajectory_problems import problem
from diffmbrl import DDP, ILQR, Affine, OpenLoop, Task, episode_return, rollout, solve, tasks
from diffmbrl.core import Box
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.planners import (
    MPC,
    ActionDamped,
    Backtracking,
    BoxConstrained,
    Parallel,
    Receding,
    StateDamped,
    act,
    expansion,
)
from diffmbrl.planners.quadratic_models import costates, hamiltonian
from diffmbrl.second_order.linearize import linearize
from diffmbrl.second_order.parallel_riccati import PARALLEL, SCAN, choose
from diffmbrl.second_order.riccati import riccati
from tests.problems import bent, matrices, same, same_tree, some_slow
from tests.problems import riccati as textbook

KEY = jax.random.key(0)
EVERY = {
    "ilqr": ILQR(),
    "ddp": DDP(),
    "state damping": ILQR(sweep=StateDamped()),
    "boxed": ILQR(sweep=BoxConstrained()),
    "parallel": ILQR(search=Parallel()),
}


@jax.jit
def update(planner, plan, task, s0):
    return planner.update(plan, planner.init(plan, task), task, s0, key=None)


def limited(low: float, high: float, *, horizon: int = 6, n: int = 3, m: int = 2) -> Task:
    """An unstable linear-quadratic task whose optimum without limits breaks these."""
    free = tasks.random_lqr(jax.random.key(2), n, m, stability="unstable", horizon=horizon)
    return Task(
        name="limited", dynamics=free.dynamics, reward=free.reward, terminal=free.terminal, horizon=horizon, dt=free.dt,
        initial=Box([1.0] * n, [1.0] * n), a_low=[low] * m, a_high=[high] * m,
    )  # fmt: skip


def dense(task: Task, s0: jax.Array) -> scipy.optimize.OptimizeResult:
    """The quadratic program in all actions at once, by scipy."""
    A, B, Q, R, Q_T = matrices(task)

    def cost(actions):
        s, total, states = np.asarray(s0), 0.0, []
        for a in actions.reshape(-1, task.m):
            states.append((s, a))
            total += (s @ Q @ s + a @ R @ a) / 2
            s = A @ s + B @ a
        costate, gradient = Q_T @ s, []
        for before, a in reversed(states):
            gradient.append(R @ a + B.T @ costate)
            costate = Q @ before + A.T @ costate
        return total + s @ Q_T @ s / 2, np.concatenate(gradient[::-1])

    bounds = list(zip(np.tile(task.a_low, task.horizon), np.tile(task.a_high, task.horizon), strict=True))
    start = np.zeros(task.horizon * task.m)
    return scipy.optimize.minimize(
        cost, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-11, "maxiter": 5000}
    )


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n, m", [*(pytest.param(*size, marks=pytest.mark.slow) for size in [(1, 1), (12, 4)]), (5, 2)])
def test_one_update_solves_a_linear_quadratic_task(name, n, m, x64):
    task = tasks.random_lqr(jax.random.key(n), n, m, stability="unstable", horizon=15)
    planner, s0 = in_double(EVERY[name]), task.initial(KEY)
    start = planner.first_plan(task)
    plan, _, _ = update(planner, start, task, s0)
    optimum = textbook(task)
    np.testing.assert_allclose(plan.K, optimum.K, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(episode_return(plan, task, s0), optimum.J(s0), rtol=1e-9)


@pytest.mark.parametrize("name", some_slow(EVERY, *(set(EVERY) - {"ilqr", "ddp"})))
def test_all_reach_the_same_optimum(name, x64):
    """The residual of the optimality conditions vanishes, and so does the gradient by automatic differentiation."""
    task = bent(horizon=8)
    planner, s0 = in_double(EVERY[name]), jnp.asarray([0.9, -0.3])
    plan, history = solve(planner, planner.first_plan(task), task, s0, None, 200, tolerance=1e-7)
    assert history.stop.startswith("converged: gradient norm")
    actions = rollout(plan, task, s0).a
    assert np.linalg.norm(jax.grad(lambda a: episode_return(OpenLoop(a), task, s0))(actions)) < 1e-6
    reference, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 200, tolerance=1e-7)
    np.testing.assert_allclose(episode_return(plan, task, s0), episode_return(reference, task, s0), rtol=1e-12)


def test_ddp_converges_quadratically(x64):
    """Where iLQR's last steps each gain a digit or less, DDP's double the digits."""
    task = problem("pendulum", 40)
    s0 = task.initial(KEY)
    norms = {}
    for planner in (ILQR(), DDP()):
        # Where the gradient is 1e-9, what a step gains is below the rounding of J, and a search may find nothing.
        _, history = solve(planner, Affine.zeros(task), task, s0, None, 100, tolerance=1e-8)
        assert history.stop.startswith("converged")
        norms[type(planner.model).__name__] = history.info.gradient_norm
    assert len(norms["SecondOrder"]) < len(norms["FirstOrder"])
    last, before = norms["SecondOrder"][-1], norms["SecondOrder"][-2]
    assert last < 10 * before**2 or last < 1e-11


def test_the_hessian_of_the_hamiltonian_is_newtons(x64):
    """L' H L with the exact H is the Hessian of the cost in the actions, by automatic differentiation."""
    task = bent(horizon=4)
    s0, a = jnp.asarray([0.9, -0.3]), jnp.linspace(-1.0, 1.0, 4)[:, None]
    mu = jnp.asarray(50.0)  # the damping that makes it definite

    @jax.jit
    def solved():
        trajectory = rollout(OpenLoop(a), task, s0)
        lin = linearize(task, trajectory)
        H, H_T = hamiltonian(task, trajectory, costates(lin)), -jax.hessian(task.terminal)(trajectory.s_T)
        return lin, riccati(lin._replace(H=H, H_T=H_T), mu)

    def cost(a):
        return -episode_return(OpenLoop(a[:, None]), task, s0)

    gradient, flat = jax.jit(lambda a: (jax.grad(cost)(a), jax.hessian(cost)(a)))(a[:, 0])
    lin, sweep = jax.tree.map(np.asarray, solved())
    # Riccati's feedforward is the first step of the closed loop.
    step, s = [], np.zeros(2)
    for t in range(4):
        step.append((sweep.K[t] @ s + sweep.k[t])[0])
        s = lin.A[t] @ s + lin.B[t] @ step[-1][None]
    same(np.stack(step), -np.linalg.solve(flat + mu * np.eye(4), gradient), rtol=1e-8)


def test_damping_in_state_space_is_a_penalty_on_the_states(x64):
    """-(M + mu L_s' L_s)^-1 g, densely."""
    task = tasks.random_lqr(jax.random.key(1), 3, 2, stability="stable", horizon=5)
    s0, mu = task.initial(KEY), jnp.asarray(0.7)

    def states(w):
        tau = rollout(OpenLoop(w.reshape(5, 2)), task, s0)
        return jnp.concatenate([tau.s[1:].ravel(), tau.s_T])

    def cost(w):
        return -episode_return(OpenLoop(w.reshape(5, 2)), task, s0)

    @jax.jit
    def followed():
        trajectory = rollout(OpenLoop.zeros(task), task, s0)
        sweep = StateDamped()(linearize(task, trajectory), mu, None)
        return rollout(Affine(sweep.K, sweep.k, trajectory.s), task, s0).a

    zero = jnp.zeros(10)
    L_s, M, g = (np.asarray(jax.jit(of)(zero)) for of in (jax.jacobian(states), jax.hessian(cost), jax.grad(cost)))
    same(followed().ravel(), -np.linalg.solve(M + mu * L_s.T @ L_s, g), rtol=1e-8)


# Limits on the actions.


@pytest.mark.parametrize("low, high", [(-0.3, 0.3), (-0.1, 0.5), (-5.0, 5.0)])
def test_limits_are_those_of_the_dense_quadratic_program(low, high, x64):
    task = limited(low, high)
    planner, s0 = in_double(ILQR.with_limits(task)), task.initial(KEY)
    assert isinstance(planner.sweep, BoxConstrained)
    plan, history = solve(planner, Affine.with_limits(task), task, s0, None, 50, tolerance=1e-10)
    assert history.stop.startswith("converged: gradient norm")
    oracle = dense(task, s0)
    a = np.asarray(rollout(plan, task, s0).a)
    np.testing.assert_allclose(-episode_return(plan, task, s0), oracle.fun, rtol=1e-9)
    np.testing.assert_allclose(a.ravel(), oracle.x, atol=1e-5)
    # Complementarity, by automatic differentiation: zero where free, pushing outwards where a limit is active.
    gradient = np.asarray(jax.grad(lambda a: episode_return(OpenLoop(a), task, s0))(jnp.asarray(a)))  # of the return
    at_low, at_high = a <= low, a >= high
    assert np.all(np.abs(gradient[~at_low & ~at_high]) < 1e-6)
    assert np.all(gradient[at_low] <= 1e-9) and np.all(gradient[at_high] >= -1e-9)
    active = at_low | at_high
    assert active.any() == (high < 5)
    # An action at its limit does not react to the state.
    assert np.all(np.asarray(plan.K)[active] == 0) or history.updates <= 2


def test_limits_hold_from_every_start(x64):
    task = limited(-0.3, 0.3)
    plan, _ = solve(in_double(ILQR.with_limits(task)), Affine.with_limits(task), task, task.initial(KEY), None, 20)
    for scale in (0.0, -2.0, 30.0):
        a = rollout(plan, task, scale * task.initial(KEY)).a
        assert np.all(a >= -0.3) and np.all(a <= 0.3)


def test_limits_that_do_not_bind_change_nothing(x64):
    task = limited(-1e3, 1e3)
    s0 = task.initial(KEY)
    boxed, _ = solve(in_double(ILQR.with_limits(task)), Affine.with_limits(task), task, s0, None, 2)
    free, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 2)
    same(boxed.K, free.K)
    same(boxed.a, free.a)


def test_a_quadratic_program_in_a_box(x64):
    """Against every assignment of the limits, m = 4."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        X, q = rng.normal(size=(4, 4)), 3 * rng.normal(size=4)
        Q, low, high = X @ X.T + 0.1 * np.eye(4), -rng.uniform(0, 1, 4), rng.uniform(0, 1, 4)
        k, clamped, positive = jax.jit(lambda *x: BoxConstrained().minimise(*x))(*map(jnp.asarray, (Q, q, low, high)))
        best = min(_corners(Q, q, low, high), key=lambda x: x @ Q @ x / 2 + q @ x)
        np.testing.assert_allclose(k, best, atol=1e-8)
        assert positive and np.all(clamped == ((best <= low) | (best >= high)))


def _corners(Q, q, low, high):
    """The stationary points of every face of the box that lie in it."""
    for face in np.ndindex(3, 3, 3, 3):
        face = np.array(face)
        x, free = np.where(face == 1, low, high), face == 0
        if free.any():
            x[free] = np.linalg.solve(Q[np.ix_(free, free)], -(q + Q[:, ~free] @ x[~free])[free])
        if np.all(x >= low - 1e-12) and np.all(x <= high + 1e-12):
            yield x


def test_limits_need_a_plan_that_keeps_them():
    task = limited(-0.3, 0.3)
    with pytest.raises(ValueError, match=r"needs a plan with limits, and this one has none: .*with_limits\(task\)"):
        solve(ILQR.with_limits(task), Affine.zeros(task), task, task.initial(KEY), None, 2)
    with pytest.raises(ValueError, match="a_low must lie below a_high"):
        limited(0.5, -0.5)
    assert not isinstance(ILQR.with_limits(bent()).sweep, BoxConstrained)
    with pytest.raises(ValueError, match="the limits of a plan are static"):
        jax.jit(lambda task: Affine.with_limits(task).a)(task)


def test_one_step_and_none(x64):
    task = tasks.lqr(horizon=1)
    s0 = task.initial(KEY)
    for planner in map(in_double, EVERY.values()):
        plan, _ = solve(planner, planner.first_plan(task), task, s0, None, 2)
        same(episode_return(plan, task, s0), textbook(task).J(s0))
    with pytest.raises(ValueError, match="horizon must be a whole number of at least 1, got 0"):
        tasks.lqr(horizon=0)


# Line searches and damping.


def test_parallel_takes_the_best_of_all_lengths(x64):
    task = problem("cart-pole", 20)
    s0 = task.initial(KEY)
    start = Affine.zeros(task)
    for _ in range(3):
        found = []
        for trials in (1, 3, 8):
            planner = ILQR(search=Parallel(trials=trials))
            plan, _, info = update(planner, start, task, s0)
            found.append(float(episode_return(plan, task, s0)))
            assert info.inner_iterations == 1 + trials
        assert np.all(np.diff(found) >= 0)
        backtracked = ILQR(search=Backtracking(trials=8))
        plan, _, _ = update(backtracked, start, task, s0)
        assert found[-1] >= float(episode_return(plan, task, s0))
        start = plan


@pytest.mark.parametrize("sweep", [ActionDamped, StateDamped])
def test_parallel_in_time_it_takes_the_same_steps(sweep, x64):
    """On a CPU the scan is chosen; elsewhere long horizons are swept so."""
    task = bent(horizon=7)
    s0, plan = jnp.asarray([0.9, -0.3]), Affine.zeros(task)
    assert choose(task.horizon) is SCAN
    for _ in range(3):
        (scanned, _, info), (parallel, _, other) = (
            update(in_double(ILQR(sweep=sweep(recursion))), plan, task, s0) for recursion in (None, PARALLEL)
        )
        same_tree(parallel, scanned, rtol=1e-8, atol=1e-8)
        assert info.accepted and other.accepted
        plan = scanned


def test_at_an_optimum_neither_the_plan_nor_the_damping_changes(x64):
    """What a step gains there is below the rounding of J: that it fails says nothing of the damping."""
    task = bent(horizon=5)
    s0, planner = jnp.asarray([0.9, -0.3]), in_double(ILQR())
    plan, history = solve(planner, Affine.zeros(task), task, s0, None, 150)
    assert not history.info.accepted[-1]
    assert history.info.damping[-1] == 0
    assert np.all(np.diff(history.info.J) >= 0)
    assert episode_return(plan, task, s0) == history.info.J[-1]


def test_the_damping_is_bounded_and_falls_along_a_receding_horizon():
    planner, task = ILQR(), bent(horizon=5)
    damping = planner.init(Affine.zeros(task), task)
    for _ in range(30):
        damping = planner.damping.raised(damping)
    assert damping == planner.damping.largest
    for _ in range(40):
        assert planner.shift(damping) <= damping / 2
        damping = planner.shift(damping)
    assert damping == 0


@pytest.mark.slow
def test_a_controller_at_rest_is_still_awake_when_something_happens():
    """Balanced for a hundred steps, and then pushed: no damping has piled up meanwhile that keeps the plan as it is."""
    task = tasks.pets_cartpole(horizon=160)
    mpc = MPC.init(ILQR.with_limits(task), task, horizon=25, first=10, window=Receding())
    memory, s, a = mpc.start(task), jnp.asarray([0.1, 0.1, 0.0, 0.0]), jnp.zeros(1)
    for t in range(160):
        a, memory = act(mpc, memory, s)
        s = task.dynamics(s, a) if t != 100 else jnp.asarray([0.5, 0.2, 0.0, 0.0])
    assert task.reward(s, a) > 0.99


# The expansion of the return to go.


def test_the_expansion_is_that_of_the_return_to_go(x64):
    task = tasks.random_lqr(jax.random.key(1), 4, 2, stability="unstable", horizon=10)
    s0, optimum = task.initial(KEY), textbook(task)
    plan, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 2)
    found = jax.jit(expansion)(plan, task, s0)
    np.testing.assert_allclose(found.V[0], -optimum.P, rtol=1e-8)
    np.testing.assert_allclose(found.v[0], -optimum.P @ s0, rtol=1e-8)
    np.testing.assert_allclose(found.J[0], optimum.J(s0), rtol=1e-10)
    assert found.J.shape == (11,) and found.V.shape == (11, 4, 4)
    # On a nonlinear task its gradient in the start is exact.
    task = bent(horizon=6)
    s0 = jnp.asarray([0.9, -0.3])
    plan, _ = solve(in_double(ILQR()), Affine.zeros(task), task, s0, None, 3)
    found = jax.jit(expansion)(plan, task, s0)
    same(found.v[0], jax.grad(lambda s: episode_return(plan, task, s))(s0))
    same(found.J[0], episode_return(plan, task, s0))
