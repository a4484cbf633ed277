"""Derivatives of an optimum against closed forms, re-converged neighbours, and the planner differentiated step by step."""

from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from benchmarks.riccati import largest_error, smooth_loss
from benchmarks.trajectory_problems import problem
from diffmbrl import ILQR, Affine, Constraints, OpenLoop, OptaxSolver, episode_return, rollout
from diffmbrl.core import Box, Task
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.planners.implicit import implicit, optimal
from diffmbrl.second_order.linearize import linearize
from diffmbrl.second_order.riccati import riccati as riccati_sweep
from tests.problems import LINEAR, Bent, BentReward, BentTerminal, bent, changed, optimal_actions, riccati

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


def start() -> jax.Array:
    return jnp.asarray([0.9, -0.3], float)


def planned(task: Task, s0: Any, steps: int = 60) -> Affine:
    """The optimum by iLQR and then Newton's method on the actions with the dense Hessian: to the last digits."""
    plan = updated(task, s0, Affine.zeros(task), steps)
    return Affine(plan.K, *resolved(task, s0, plan))


@jax.jit
def updated(task, s0, plan, steps):
    planner = in_double(ILQR())

    def update(_, state):
        return planner.update(*state, task, s0, key=None)[:2]

    plan, _ = jax.lax.fori_loop(0, steps, update, (plan, planner.init(plan, task)))
    trajectory = rollout(plan, task, s0)
    return Affine(plan.K, trajectory.a, trajectory.s)


@jax.jit
def gains(task, plan):
    """Undamped: those that iLQR ends with are damped to nothing by its last, failed searches."""
    lin = linearize(task, rollout(plan, task, plan.s[0]))
    return riccati_sweep(lin, jnp.zeros(())).K


def resolved(task, s0, plan):
    """Actions and states of the optimum that a plan is near."""
    a = polished(task, s0, plan.a)
    return a, followed(task, s0, a)


@jax.jit
def polished(task, s0, a):
    flat, unravel = ravel_pytree(a)
    cost = lambda x: -episode_return(OpenLoop(unravel(x)), task, s0)  # noqa: E731

    def newton(_, x):
        return x - jnp.linalg.solve(jax.hessian(cost)(x), jax.grad(cost)(x))

    return unravel(jax.lax.fori_loop(0, 3, newton, flat))


@jax.jit
def followed(task, s0, a):
    def step(s, a):
        return task.dynamics(s, a), s

    return jax.lax.scan(step, s0, a)[1]


def weights(plan: Affine) -> Affine:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), plan)


@jax.jit
def loss(plan, task, s0):
    """Some function of actions, states, last state and return."""
    w, out = weights(plan), implicit(plan, task, s0)
    return jnp.vdot(w.a, out.plan.a) + jnp.vdot(w.s, out.plan.s**2) + out.trajectory.s_T[0] + out.J


look = jax.jit(implicit, static_argnames="tolerance")
gradient = jax.jit(jax.grad(loss, argnums=(1, 2)))

BENT: dict[str, Any] = {
    "mass": lambda t: t.dynamics.mass,
    "scale": lambda t: t.reward.scale,
    "weights": lambda t: t.weights,
}


@cache
def bent_plan():
    task = bent()
    return task, planned(task, start())


def differences(task, plan, where, s0, eps=1e-4):
    """Of `loss` in every number of a leaf, each neighbour solved to the end."""

    def at(p):
        other = eqx.tree_at(where, task, p)
        # From the plan by iLQR first: open loop, the neighbour of a swing-up strays out of Newton's reach.
        near = updated(other, s0, Affine(gains(task, plan), plan.a, plan.s), 100)
        return float(loss(Affine(plan.K, *resolved(other, s0, near)), other, s0))

    flat, unravel = ravel_pytree(where(task))
    return [
        (at(unravel(flat.at[i].add(eps))) - at(unravel(flat.at[i].add(-eps)))) / (2 * eps) for i in range(flat.size)
    ]


def test_the_bent_optimum_is_one(x64):
    task, plan = bent_plan()
    out = look(plan, task, start())
    assert out.ok and out.definite and out.gradient_norm < 1e-10 and out.distance < 1e-10
    close(out.J, episode_return(plan, task, start()), rtol=1e-10)
    close(out.trajectory.a, plan.a, atol=1e-9)


@pytest.mark.parametrize("leaf", BENT)
def test_derivatives_in_the_task_are_differences(leaf, x64):
    task, plan = bent_plan()
    wanted = differences(task, plan, BENT[leaf], start())
    assert np.abs(wanted).max() > 0.1
    close(np.ravel(BENT[leaf](gradient(plan, task, start())[0])), wanted)


def test_derivatives_in_the_start_are_differences(x64):
    task, plan = bent_plan()

    def at(s0):
        a = polished(task, s0, plan.a)
        return float(loss(Affine(plan.K, a, followed(task, s0, a)), task, s0))

    eps = 1e-4
    wanted = [(at(start().at[i].add(eps)) - at(start().at[i].add(-eps))) / (2 * eps) for i in range(2)]
    close(gradient(plan, task, start())[1], wanted)


@pytest.mark.slow
def test_forward_and_reverse_agree_under_vmap_and_jit(x64):
    task, plan = bent_plan()

    @jax.jit
    def rows(s0):
        return jax.jacfwd(lambda s: implicit(plan, task, s).plan.a)(s0), jax.jacrev(
            lambda s: implicit(plan, task, s).plan.a
        )(s0)

    forward, backward = rows(start())
    close(forward, backward, rtol=1e-9)
    plans, starts = jax.tree.map(lambda x: jnp.stack([x, x]), (plan, start()))
    by_lane = jax.jit(jax.vmap(jax.grad(loss, argnums=2), in_axes=(0, None, 0)))(plans, task, starts)
    close(by_lane[1], gradient(plan, task, start())[1], rtol=1e-9)


@pytest.mark.slow
def test_it_is_the_planner_differentiated_step_by_step(x64):
    task, _ = bent_plan()
    planner = in_double(ILQR())

    def unrolled(mass):
        other = changed(task, mass=mass)
        rest = Affine.zeros(other)
        plan, _ = jax.lax.fori_loop(
            0, 60, lambda i, x: planner.update(*x, other, start(), key=None)[:2], (rest, planner.init(rest, other))
        )
        return plan.a

    def solved(mass):
        return optimal(planner, changed(task, mass=mass), start(), steps=60).plan.a

    mass = jnp.asarray(0.8)
    wanted = jax.jit(jax.jacfwd(unrolled))(mass)
    assert np.abs(wanted).max() > 0.1
    close(jax.jit(jax.jacfwd(solved))(mass), wanted, rtol=1e-4, atol=1e-5)
    close(
        jax.jit(jax.grad(lambda mass: jnp.sum(solved(mass) ** 2)))(mass), 2 * np.vdot(solved(mass), wanted), rtol=1e-4
    )


def test_on_a_linear_quadratic_task_it_is_riccatis_closed_form(x64):
    task = LINEAR["unstable 3x1"](5)
    s0 = jnp.asarray([0.3, -0.2, 0.5])

    @jax.jit
    def solved(s0, Q):
        out = optimal(in_double(ILQR()), eqx.tree_at(lambda t: t.reward.Q, task, Q), s0, steps=3)
        return out.plan.a, out.J, out.ok

    jacobian = jax.jit(jax.jacrev(lambda s0: solved(s0, task.reward.Q)[0]))(s0)
    wanted = np.stack([optimal_actions(task, e) for e in np.eye(3)], axis=-1)
    close(jacobian, wanted)
    close(jax.jit(jax.grad(lambda s0: solved(s0, task.reward.Q)[1]))(s0), -riccati(task).P @ s0)
    assert solved(s0, task.reward.Q)[2]

    eps = 1e-5
    direction = np.diag([1.0, 0.0, 2.0])
    plus, minus = (
        optimal_actions(eqx.tree_at(lambda t: t.reward.Q, task, task.reward.Q + sign * eps * direction), s0)
        for sign in (1, -1)
    )
    tangent = jax.jit(lambda Q, d: jax.jvp(lambda Q: solved(s0, Q)[0], (Q,), (d,))[1])(
        task.reward.Q, jnp.asarray(direction)
    )
    close(tangent, (plus - minus) / (2 * eps), rtol=1e-6)


# Limits.


def limited(high: Any) -> Task:
    task = bent()
    return eqx.tree_at(lambda t: (t.a_low, t.a_high), task, (-jnp.asarray([high]), jnp.asarray([high])))


def bounded(task, s0):
    """By scipy's L-BFGS-B on the actions."""
    high = float(task.a_high[0])
    cost = jax.jit(jax.value_and_grad(lambda a: -episode_return(OpenLoop(a[:, None]), task, s0)))
    found = scipy.optimize.minimize(
        lambda a: tuple(np.asarray(x) for x in cost(jnp.asarray(a))),
        np.zeros(task.horizon),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-high, high)] * task.horizon,
        options={"ftol": 0.0, "gtol": 1e-13, "maxiter": 2000, "maxcor": 20},
    )
    a = jnp.asarray(found.x)[:, None]
    return Affine(jnp.zeros((task.horizon, 1, 2)), a, followed(task, s0, a))


def test_actions_at_a_limit_stay_there_and_move_with_it(x64):
    task = limited(0.5)
    plan = bounded(task, start())
    held = np.abs(np.abs(plan.a[:, 0]) - 0.5) < 1e-9
    assert 0 < held.sum() < task.horizon
    out = look(plan, task, start(), tolerance=1e-5)
    assert out.ok
    by_start = jax.jit(jax.jacfwd(lambda s: implicit(plan, task, s).plan.a[:, 0]))(start())
    by_limit = jax.jit(jax.jacfwd(lambda high: implicit(plan, with_limit(task, high), start()).plan.a[:, 0]))(0.5)
    assert not np.any(by_start[held]) and np.all(np.any(by_start[~held] != 0, axis=1))
    eps = 1e-4
    for i in range(2):
        plus, minus = (bounded(task, start().at[i].add(sign * eps)).a[:, 0] for sign in (1, -1))
        close(by_start[:, i], (plus - minus) / (2 * eps), rtol=1e-3, atol=2e-3)
    plus, minus = (bounded(limited(0.5 + sign * eps), start()).a[:, 0] for sign in (1, -1))
    close(by_limit, (plus - minus) / (2 * eps), rtol=1e-3, atol=2e-3)


def with_limit(task, high):
    return eqx.tree_at(lambda t: (t.a_low, t.a_high), task, (-jnp.stack([high]), jnp.stack([high])))


# What is not an optimum, and what cannot be differentiated.


def test_a_plan_that_is_no_optimum_says_so(x64):
    task, plan = bent_plan()
    far = Affine(plan.K, plan.a + 0.3, plan.s)
    out = look(far, task, start())
    assert not out.ok and out.gradient_norm > 0.01 and out.distance > 0.01
    # The reward that punishes becomes one that pays: the same plan is stationary, and the worst of all.
    linear = LINEAR["unstable 3x1"](5)
    worst = eqx.tree_at(
        lambda t: (t.reward.Q, t.reward.R, t.terminal.Q),
        linear,
        (-linear.reward.Q, -linear.reward.R, -linear.terminal.Q),
    )
    rest = Affine.zeros(linear)
    good, bad = (look(rest, task, jnp.zeros(3)) for task in (linear, worst))
    assert good.ok and good.definite
    assert not bad.ok and not bad.definite and bad.distance == 0
    assert np.isfinite(jax.jit(jax.grad(lambda s0: implicit(rest, worst, s0).J))(jnp.zeros(3))).all()
    assert not look(plan, changed(task, mass=np.nan), start()).ok


class Counted(eqx.Module):
    """Dynamics with a leaf that is no float."""

    bent: Bent
    count: Any = eqx.field(default_factory=lambda: jnp.asarray(1, jnp.int32))

    def __call__(self, s, a, *, key=None):
        return self.bent(s, a, key=key)


def test_leaves_that_are_not_float_have_no_derivative(x64):
    task, plan = bent_plan()
    counted = Task(
        name="counted", dynamics=Counted(task.dynamics), reward=BentReward(), terminal=BentTerminal(),
        initial=Box([0.0, 0.0], [1.0, 1.0]), a_low=[-jnp.inf], a_high=[jnp.inf], horizon=8, dt=0.2,
    )  # fmt: skip
    found = eqx.filter_jit(eqx.filter_grad(lambda task: loss(plan, task, start())))(counted)
    assert found.dynamics.count is None
    close(found.dynamics.bent.mass, gradient(plan, task, start())[0].dynamics.mass)


@pytest.mark.slow
def test_fixed_noise_is_part_of_the_problem(x64):
    task, key = changed(bent(), noise=0.3), jax.random.key(3)

    @jax.jit
    def solved(task):
        out = optimal(in_double(ILQR()), task, start(), steps=60, key=key, tolerance=1e-5)
        return out.J, out.ok

    def J(noise):
        return solved(changed(task, noise=noise))[0]

    assert solved(task)[1]
    # At the optimum the actions' change does not count: the return's derivative is that of the return alone.
    close(jax.jit(jax.grad(J))(jnp.asarray(0.3)), (J(0.3 + 1e-4) - J(0.3 - 1e-4)) / 2e-4, rtol=1e-5)


def test_an_episode_that_ended_has_no_derivatives(x64):
    task = bent(ends=True)
    plan = Affine(jnp.zeros((8, 1, 2)), jnp.full((8, 1), 2.0), jnp.zeros((8, 2)))
    s0 = jnp.asarray([1.0, 0.5])
    out = look(plan, task, s0)
    assert not out.trajectory.alive[-1]
    close(out.J, episode_return(plan, task, s0))
    dead = np.flatnonzero(~out.trajectory.alive[:-1])
    jacobian = jax.jit(jax.jacrev(lambda s0: implicit(plan, task, s0).plan.a))(s0)
    assert dead.size and not np.any(jacobian[dead]) and np.isfinite(jacobian).all()


def test_clear_errors():
    task = bent()
    plan, s0 = Affine.zeros(task), jnp.zeros(2)
    with pytest.raises(TypeError, match=r"implicit differentiates an Affine plan.*got OpenLoop"):
        implicit(OpenLoop.zeros(task), task, s0)
    with pytest.raises(TypeError, match="optimal needs a planner, whose kind is 'plan'; OptaxSolver is a 'policy'"):
        optimal(OptaxSolver(optax.adam, learning_rate=0.1), task, s0, steps=3)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        optimal(ILQR(), task, s0, steps=0)
    bound = eqx.tree_at(lambda t: t.constraints, task, Constraints(), is_leaf=lambda x: x is None)
    with pytest.raises(ValueError, match="task 'bent' has constraints; implicit derivatives know the limits"):
        implicit(plan, bound, s0)


# The systems that planners are compared on.


class Acrobot(eqx.Module):
    """Sutton's constants: masses and lengths 1, centres .5, inertias 1; torque on the second joint, angle 0 hanging."""

    m: Any = eqx.field(default_factory=lambda: jnp.asarray(1.0, float))

    def __call__(self, s, a, *, key=None):
        q1, q2, v1, v2 = s
        g, l, c, inertia, dt = 9.81, 1.0, 0.5, 1.0, 0.05
        d1 = self.m * c**2 + self.m * (l**2 + c**2 + 2 * l * c * jnp.cos(q2)) + 2 * inertia
        d2 = self.m * (c**2 + l * c * jnp.cos(q2)) + inertia
        p2 = self.m * c * g * jnp.sin(q1 + q2)
        p1 = -self.m * l * c * jnp.sin(q2) * (v2**2 + 2 * v1 * v2) + (self.m * c + self.m * l) * g * jnp.sin(q1) + p2
        h2 = self.m * l * c * v1**2 * jnp.sin(q2) + p2
        acc2 = (a[0] + d2 / d1 * p1 - h2) / (self.m * c**2 + inertia - d2**2 / d1)
        acc1 = -(d2 * acc2 + p1) / d1
        v1, v2 = v1 + dt * acc1, v2 + dt * acc2
        return jnp.stack([q1 + dt * v1, q2 + dt * v2, v1, v2])


def acrobot(horizon):
    task = problem("cart-pole", horizon)
    task = eqx.tree_at(
        lambda t: (t.dynamics, t.reward.goal, t.terminal.goal),
        task,
        (Acrobot(), *[jnp.asarray([jnp.pi, 0, 0, 0.0])] * 2),
    )
    return eqx.tree_at(lambda t: (t.reward.w, t.terminal.w), task, (0.005 * jnp.ones(4), 1000 * jnp.ones(4)))


SYSTEMS: dict[str, Any] = {
    "pendulum": lambda: problem("pendulum", 100),
    "cart-pole": lambda: problem("cart-pole", 100),
    "acrobot": lambda: acrobot(100),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_on_swing_ups_derivatives_are_differences(name, x64):
    task = SYSTEMS[name]()
    s0 = task.initial(jax.random.key(0)) + 0.03
    # Not polished: open loop, rounding of the actions alone moves the end of a swing-up.
    plan = updated(task, s0, Affine.zeros(task), 800)
    plan = Affine(gains(task, plan), plan.a, plan.s)
    assert look(plan, task, s0).ok
    # Of a smooth loss, and with wide differences: a neighbour is solved to some 1e-7, and no better in double precision.
    assert largest_error(jax.jit(jax.grad(smooth_loss, argnums=(1, 2))), plan, task, s0) < 1e-4
