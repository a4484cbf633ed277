"""Every task of the registry against one contract; each system against an independent source."""

from functools import cache, partial

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from diffmbrl import Neural, OpenLoop, episode_return, rollout, rollouts, tasks
from diffmbrl.second_order.linearize import feedback, linearize
from diffmbrl.second_order.riccati import adjoint
from diffmbrl.tasks import TASKS, squashed
from diffmbrl.tasks.cartpole import CartPole
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.pendulum import GymPendulum
from diffmbrl.tasks.quadrotor2d import Quadrotor2d
from tests.problems import lagrangian_acceleration, some_slow

KEY = jax.random.key(0)
close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
every_task = pytest.mark.parametrize("name", TASKS)
DIFFERENTIABLE = [name for name, row in TASKS.items() if row.differentiable_reward]
differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)
# Their equations of motion are held against Lagrange's in test_bodies.py.
DEAR = ("quadrotor", "quadrotor-waypoint", "acrobot", "reacher", "double-pendulum")
DECISIONS = ("heaviside", "ball-and-wall", "math-test")  # of one step or two
SURVIVAL = ("cartpole-continuous", "inverted-pendulum", "brax-inverted-pendulum")  # 1 a step while the rod stands
# Steps and a start with which bodies meet, if nobody pushes them apart.
MEETING = {
    "pushing": (20, [0.05, 1, 0, 0]),
    "friction": (10, [0.02, 0, 0.05, 0]),
    "tennis": (60, [0.05, 0.8, 0, 0, 0, 0]),
}
MEETING |= {"bouncing": (20, [0.5, -1]), "bouncing-on-the-grid": (20, [0.5, -1])}
# Parameters of contact's condition alone, without a derivative; and friction, as long as nothing touches the ground.
CONDITIONS = (".height", ".width", ".w", ".end", ".physics.friction")


def is_brax(name):
    """Whether rewards and starts are Brax's, which test_brax.py holds against it."""
    return name.startswith("brax-")


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


# The contract of the registry.


@every_task
def test_registered_under_its_name(name):
    task = tasks.make(name, horizon=3)
    assert task.name == name
    assert (task.horizon, task.weights.shape) == (3, (4,))
    np.testing.assert_array_equal(task.weights, 1)
    assert tasks.make(name).horizon == TASKS[name].make().horizon
    assert tasks.make(name).horizon >= (1 if name in DECISIONS else 50)


@every_task
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_shapes_and_dtypes(name, double):
    with jax.enable_x64(double):
        dtype = jnp.dtype(float if double else jnp.float32)
        task = tasks.make(name, horizon=6)
        assert dtypes(task) == {dtype}
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(task))
        s0 = task.starts(KEY, 3)
        trajectory = jax.eval_shape(rollouts, OpenLoop.zeros(task), task, s0)
        assert trajectory.s.shape == (3, 6, task.n)
        assert trajectory.a.shape == (3, 6, task.m)
        assert trajectory.r.shape == (3, 6)
        assert dtypes((s0, trajectory._replace(alive=()))) == {dtype}
        phi = jax.eval_shape(task.terminal, s0[0])
        assert (phi.shape, phi.dtype) == ((), dtype)
        won = jax.eval_shape(task.success, s0[0])
        assert (won.shape, won.dtype) == ((), jnp.bool_)
        features = jax.eval_shape(task.features, s0[0])
        assert (features.ndim, features.dtype) == (1, dtype)
        assert not jax.tree.leaves(task.features)  # policies keep them, and train every leaf


@every_task
def test_rollouts_over_the_whole_horizon_are_finite(name):
    task = tasks.make(name)
    policy = Neural.init(task, hidden=[8], key=KEY, output_scale=1.0)
    trajectory, phi = jax.jit(follow)(policy, task, task.starts(KEY, 4))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((trajectory, phi)))
    if name in SURVIVAL:
        np.testing.assert_array_equal(trajectory.r, np.asarray(trajectory.alive[:, :-1], float))
    else:
        assert np.all(np.asarray(trajectory.r) <= 0) or name in ("math-test", "pets-cartpole") or is_brax(name)
    assert np.all(np.asarray(trajectory.r) >= -1e3)
    assert np.all(np.asarray(phi) <= 0) or is_brax(name)
    assert np.ptp(trajectory.a) > 0


def follow(policy, task, s0):
    trajectory = rollouts(policy, task, s0)
    return trajectory, jax.vmap(task.terminal)(trajectory.s_T)


@every_task
def test_starts(name):
    task = tasks.make(name)
    draw = jax.jit(lambda key: task.starts(key, 64))
    one, other = draw(KEY), draw(jax.random.key(1))
    np.testing.assert_array_equal(one, draw(KEY))
    if is_brax(name):
        assert np.unique(one[:, 0]).size == 64 and not np.any(one[:, 0] == other[:, 0])
        return
    moving = np.asarray(task.initial.high > task.initial.low)
    if name == "math-test":  # it always begins at the door
        np.testing.assert_array_equal(one, other)
        return
    assert moving.any()
    assert not np.any((one == other)[:, moving])
    assert np.unique(one[:, moving], axis=0).shape[0] == 64
    assert np.all((one >= task.initial.low) & (one <= task.initial.high))
    spread = np.ptp(np.asarray(one), axis=0)[moving]
    assert np.all(spread > 0.8 * np.asarray(task.initial.high - task.initial.low)[moving])


# Gradients: BPTT, the adjoint recursion and central differences agree, in the policy, the physics and the start.


class Gradients:
    """One task at a short horizon, and J as a function of all that is differentiable."""

    def __init__(self, name):
        horizon, start = MEETING.get(name, (8, None))
        self.task = tasks.make(name, horizon=horizon)
        weights = 0.9 ** jnp.arange(horizon + 1).astype(float)
        self.task = eqx.tree_at(lambda t: t.weights, self.task, weights)
        self.policy = Neural.init(self.task, hidden=[4], key=KEY, output_scale=1.0 if start is None else 0.01)
        self.s0 = self.task.initial(jax.random.key(1)) if start is None else jnp.asarray(start, float)
        self.gradient = jax.grad(self.J, argnums=(0, 1))

    @partial(jax.jit, static_argnums=0)
    def J(self, policy, task, s0):
        return episode_return(policy, task, s0)


gradients = cache(Gradients)


@pytest.mark.parametrize("name", some_slow(DIFFERENTIABLE, *(set(DIFFERENTIABLE) - {"pendulum", "tennis", "car"})))
def test_bptt_is_the_adjoint_recursion(name, x64):
    problem = gradients(name)

    @jax.jit
    def by_adjoint(policy, task, s0):
        trajectory = rollout(policy, task, s0)
        lin, K = linearize(task, trajectory), feedback(policy, trajectory)
        g = adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)
        _, pull = jax.vjp(lambda pi: jax.vmap(pi)(trajectory.s), policy)
        return pull(-g)[0]

    bptt, _ = problem.gradient(problem.policy, problem.task, problem.s0)
    jax.tree.map(close, bptt, by_adjoint(problem.policy, problem.task, problem.s0))
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(bptt))


@pytest.mark.parametrize("name", some_slow(TASKS, *DEAR))
def test_gradients_are_central_differences(name, x64):
    problem = gradients(name)
    order = 2 if TASKS[name].smooth else 1
    arguments = (problem.policy, problem.task, problem.s0)
    check_grads(problem.J, arguments, order=order, modes=["rev"], eps=1e-6, rtol=1e-5, atol=1e-5)


@differentiable
def test_physical_parameters_are_leaves(name, x64):
    problem = gradients(name)
    _, gradient = problem.gradient(problem.policy, problem.task, problem.s0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    physics = jax.tree_util.tree_leaves_with_path(gradient.dynamics)
    assert physics
    flat = [jax.tree_util.keystr(path) for path, leaf in physics if not np.any(np.asarray(leaf))]
    assert set(flat) <= set(CONDITIONS), "a parameter that changes nothing"


@pytest.mark.parametrize("name, parameter", [("cartpole-balance", "m_p"), ("lqr", "mass")])
def test_a_task_can_be_built_of_traced_parameters(name, parameter, x64):
    policy = gradients(name).policy

    @jax.jit
    def J(x):
        task = tasks.make(name, horizon=8, **{parameter: x})
        return episode_return(policy, task, jnp.full(task.n, 0.3))

    check_grads(J, (jnp.asarray(0.7),), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)
    assert jax.grad(J)(jnp.asarray(0.7)) != 0
    np.testing.assert_allclose(jax.vmap(J)(jnp.asarray([0.7, 0.9])), [J(0.7), J(0.9)], rtol=1e-12)


# Errors.

PHYSICS = [("lqr", "mass"), ("pendulum", "g"), ("pendulum-swingup", "strength")]
PHYSICS += [("cartpole-balance", "m_p"), ("cartpole-swingup", "l"), ("quadrotor2d", "inertia")]
PHYSICS += [("acrobot", "inertia"), ("double-pendulum", "l_2"), ("reacher", "m_1"), ("car", "radius")]
PHYSICS += [("ball-and-wall", "height"), ("pushing", "k"), ("friction", "v_s"), ("bouncing", "e"), ("tennis", "w")]
PHYSICS += [
    ("quadrotor", "mass"),
    ("quadrotor-waypoint", "g"),
    ("cartpole-continuous", "l"),
    ("inverted-pendulum", "c_x"),
    ("pets-cartpole", "m_p"),
]


@pytest.mark.parametrize("name, parameter", PHYSICS)
@pytest.mark.parametrize("bad", [float("nan"), -1.0, 0.0, float("inf")])
def test_bad_parameter(name, parameter, bad):
    with pytest.raises(ValueError, match=f"{parameter} of task '{name}' must be a finite positive number, got {bad}"):
        tasks.make(name, **{parameter: bad})


def test_a_parameter_is_one_number():
    with pytest.raises(
        ValueError, match=r"strength of task 'pendulum-swingup' must be a finite positive number, got \[1"
    ):
        accept("pendulum-swingup", strength=[1.0, 2.0])


def test_whole_numbers_are_numbers():
    assert tasks.make("cartpole-balance", m_c=2).dynamics.m_c.dtype == jnp.float32
    assert tasks.make("pendulum", g=np.float64(9.8)).dynamics.g.dtype == jnp.float32


@pytest.mark.parametrize(
    "wrong, nearest", [("cartpole-balanc", "cartpole-balance"), ("qadrotor2", "quadrotor2d"), ("?", "lqr")]
)
def test_unknown_task(wrong, nearest):
    with pytest.raises(ValueError, match="unknown task") as error:
        tasks.make(wrong)
    assert f"'{wrong}'" in str(error.value)
    assert "\n" not in str(error.value)
    for name in TASKS:
        assert name in str(error.value)
    if wrong != "?":
        assert f"did you mean '{nearest}'?" in str(error.value)


def test_a_gymnasium_environment_is_no_row():
    with pytest.raises(ValueError, match="'gym:Pendulum-v1' is a real system, whose dynamics cannot be called"):
        tasks.make("gym:Pendulum-v1")


def test_unknown_parameter():
    with pytest.raises(
        ValueError, match=r"unknown parameter of task 'cartpole-balance' 'm_pole'; did you mean 'm_p'\?"
    ):
        tasks.make("cartpole-balance", m_pole=0.2)
    with pytest.raises(ValueError, match=r"did you mean 'gravity'\?"):
        tasks.make("pendulum-swingup", gravitation=10)


@every_task
def test_horizon_0(name):
    with pytest.raises(ValueError, match="horizon must be a whole number of at least 1, got 0"):
        tasks.make(name, horizon=0)


# pendulum: Gymnasium's.


@pytest.mark.parametrize("seed", range(3))
def test_pendulum_is_gymnasiums_step_by_step(seed, x64):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=200).unwrapped
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    states, torques, rewards = [], [], []
    for _ in range(200):
        states.append(env.state)
        # Pushing along drives it to its limit of speed.
        torque = np.sign(env.state[1]) * 2.5 if seed == 0 else rng.uniform(-3, 3)
        torques.append([torque])
        rewards.append(env.step(np.asarray([torque]))[1])
    states, rewards, torques = np.asarray([*states, env.state]), np.asarray(rewards), np.asarray(torques)
    assert np.any(np.abs(torques) > 2)
    assert np.any(np.abs(states[:, 1]) == 8)
    assert np.any(np.abs(states[:, 0]) > np.pi)

    task = tasks.pendulum()
    close(jax.vmap(task.dynamics)(states[:-1], torques), states[1:], rtol=1e-13)
    close(jax.vmap(task.reward)(jnp.asarray(states[:-1]), jnp.asarray(torques)), rewards, rtol=1e-13)
    trajectory = jax.jit(rollout)(OpenLoop(jnp.asarray(torques)), task, jnp.asarray(states[0]))
    close(trajectory.s, states[:-1], rtol=1e-8, atol=1e-8)
    close(trajectory.r, rewards, rtol=1e-7, atol=1e-7)


def test_pendulum_starts_limits_and_parameters_are_gymnasiums():
    env, task = gymnasium.make("Pendulum-v1"), tasks.pendulum()
    assert env.spec.max_episode_steps == task.horizon
    np.testing.assert_array_equal(env.action_space.low, task.a_low)
    np.testing.assert_array_equal(env.action_space.high, task.a_high)
    np.testing.assert_allclose(task.initial.high, [np.pi, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(task.initial.low, -task.initial.high)
    env = env.unwrapped
    assert (env.m, env.l, env.g, env.dt) == (task.dynamics.m, task.dynamics.l, task.dynamics.g, task.dt)


def test_gym_pendulum_is_a_rod(x64):
    m, l, g = 1.3, 0.8, 9.0
    pendulum = GymPendulum(m, l, g, 1e-6)

    def L(q, v):
        return m * l**2 / 3 * v[0] ** 2 / 2 - m * g * l / 2 * jnp.cos(q[0])

    s, a = jnp.asarray([0.7, 0.2]), jnp.asarray([1.1])
    acceleration = (pendulum(s, a) - s)[1] / 1e-6
    close(acceleration, lagrangian_acceleration(L, s[:1], s[1:], a)[0], rtol=1e-9)


# pendulum-swingup.


def test_swing_up_equations(x64):
    task = tasks.pendulum_swingup()
    angle, w, z = 2.0, -1.5, 0.4
    u = 3 * np.tanh(z)
    w_next = w + 0.05 * (15 * np.sin(angle) + 3 * u)
    s, a = jnp.asarray([angle, w]), jnp.asarray([z])
    close(task.dynamics(s, a), [angle + 0.05 * w_next, w_next])
    residual = np.asarray([np.cos(angle) - 1, np.sin(angle), np.sqrt(0.1) * w, 0.1 * u, np.sqrt(0.001) * z])
    close(task.reward(s, a), -0.05 * residual @ residual / 2)
    close(task.terminal(s), -9 * 0.05 * residual[:3] @ residual[:3] / 2)
    close(task.features(s), [np.cos(angle), np.sin(angle), w / 4])
    np.testing.assert_allclose(task.initial.high, [np.pi, 0])
    assert np.all(np.isinf(task.a_high))


# cart-pole.


def cart_pole_lagrangian(m_c, m_p, l, g):
    """A cart, and a point mass at (x + l sin angle, l cos angle)."""

    def tip(q):
        return jnp.stack([q[0] + l * jnp.sin(q[1]), l * jnp.cos(q[1])])

    def kinetic(q, v):
        velocity = jax.jvp(tip, (q,), (v,))[1]
        return m_c * v[0] ** 2 / 2 + m_p * velocity @ velocity / 2

    def potential(q):
        return m_p * g * tip(q)[1]

    return kinetic, potential


def test_cart_pole_is_lagranges(x64):
    parameters = (1.1, 0.4, 0.6, 9.7)
    kinetic, potential = cart_pole_lagrangian(*parameters)
    cart_pole = CartPole(*parameters)

    @jax.jit
    @jax.vmap
    def both(s, a):
        L = lambda q, v: kinetic(q, v) - potential(q)  # noqa: E731
        force = jnp.stack([a[0], jnp.zeros(())])
        return cart_pole.derivative(s, a), lagrangian_acceleration(L, s[:2], s[2:], force)

    rng = np.random.default_rng(0)
    s, a = 3 * rng.normal(size=(50, 4)), 10 * rng.normal(size=(50, 1))
    derivative, acceleration = both(s, a)
    close(derivative[:, :2], s[:, 2:])
    close(derivative[:, 2:], acceleration)


def test_cart_pole_without_force_keeps_its_energy_and_momentum(x64):
    kinetic, potential = cart_pole_lagrangian(1.0, 0.3, 0.5, 9.81)

    @partial(jax.jit, static_argnums=1)
    def coast(s, dt, count):
        cart_pole = CartPole(dt=dt)
        return jax.lax.fori_loop(0, count, lambda _, s: cart_pole(s, jnp.zeros(1)), s)

    def energy(s):
        return kinetic(s[:2], s[2:]) + potential(s[:2])

    def momentum(s):
        return 1.3 * s[2] + 0.3 * 0.5 * s[3] * jnp.cos(s[1])

    s = jnp.asarray([0.2, 2.0, 0.5, 1.0])
    end = coast(s, 1e-3, 3000)
    assert np.abs(end - s).max() > 0.5
    close(energy(end), energy(s), rtol=1e-9)
    close(momentum(end), momentum(s), rtol=1e-9)
    # Of fourth order: half the step, a sixteenth of the error.
    fine, half, whole = coast(s, 1e-3, 1000), coast(s, 0.01, 100), coast(s, 0.02, 50)
    assert 12 < np.abs(whole - fine).max() / np.abs(half - fine).max() < 22


def test_rk4_integrates_cubics_exactly_and_linear_systems_to_order_four(x64):
    A = jnp.asarray([[0.0, 1.0], [-2.0, -0.3]])
    h = 0.1
    taylor = sum(np.linalg.matrix_power(h * np.asarray(A), k) / np.prod(np.arange(1.0, k + 1)) for k in range(5))
    s = jnp.asarray([1.0, -0.5])
    close(rk4(lambda s, a: A @ s, s, jnp.zeros(1), h), taylor @ s)
    close(rk4(lambda s, a: jnp.stack([jnp.ones(()), 4 * s[0] ** 3]), s, jnp.zeros(1), h), [1.1, -0.5 + 1.1**4 - 1])


@pytest.mark.parametrize("name", ["cartpole-balance", "cartpole-swingup"])
def test_cart_pole_costs(name, x64):
    task = tasks.make(name)
    x, angle, v, w, u = 0.7, 2.1, -0.4, 1.2, 3.0
    stage = 0.5 * x**2 + 2 * (1 - np.cos(angle)) + 0.05 * v**2 + 0.05 * w**2 + 0.01 * u**2
    s = jnp.asarray([x, angle, v, w])
    close(task.reward(s, jnp.asarray([u])), -0.05 * stage)
    close(task.terminal(s), -(5 * x**2 + 20 * (1 - np.cos(angle)) + v**2 + w**2))
    close(task.features(s), [x, np.cos(angle), np.sin(angle), v / 3, w / 8])
    np.testing.assert_array_equal(task.a_high, [10])
    centre, spread = (task.initial.high + task.initial.low) / 2, (task.initial.high - task.initial.low) / 2
    if name == "cartpole-balance":
        close(centre, np.zeros(4))
        close(spread, [1, 0.6, 0.5, 0.5])
    else:
        close(centre, [0, np.pi, 0, 0])
        close(spread, [0.5, 0.5, 0.2, 0.2])


def goal_of(task):
    """The state to end in, and the action that holds it."""
    s, hold = jnp.zeros(task.n), jnp.zeros(task.m)
    if task.name == "quadrotor2d":
        hold = task.reward.hover * jnp.ones(2)
    if task.name.startswith("quadrotor-") or task.name == "quadrotor":
        s, hold = s.at[:3].set(task.reward.target), hold.at[0].set(task.reward.hover)
    if task.name == "reacher":
        s = s.at[4].set(1.0)  # where the stretched arm ends
    if task.name == "ball-and-wall":
        s, hold = jnp.stack([jnp.asarray(0.06), task.dynamics.reach()]), jnp.full(1, jnp.pi / 4)
    if task.name in ("pushing", "friction"):
        s = task.reward.goal
    if task.name.startswith("bouncing"):
        s = s.at[0].set(1.0)
    if task.name == "math-test":
        s = s.at[0].set(2.0)
    if task.name in ("inverted-pendulum", "pets-cartpole"):
        s = s.at[1].set(-task.dynamics.inner.lean)
    if task.name == "tennis":
        s = s.at[:2].set(jnp.asarray([0.8, 0.4]))
    return s, hold


# Tasks of places and speeds alone; the number of the state that its success looks at.
PLACES = {"lqr": 0, "heaviside": 0, "ball-and-wall": 1, "pushing": 1, "friction": 1, "tennis": 0}
PLACES |= {"bouncing": 0, "bouncing-on-the-grid": 0, "math-test": 0, "cartpole-continuous": 1, "inverted-pendulum": 1}


@every_task
def test_the_goal_is_an_equilibrium_of_no_cost_and_a_success(name):
    task = tasks.make(name)
    goal, hold = goal_of(task)
    if name != "tennis":  # a ball in the air does not rest
        np.testing.assert_allclose(task.dynamics(goal, hold), goal, atol=1e-6)
    if name == "pets-cartpole":  # leaning a little, it stands where the reward is not quite 1
        np.testing.assert_allclose(task.reward(goal, hold), 1, atol=1e-5)
    else:
        assert float(task.reward(goal, hold)) == (name in SURVIVAL)
    assert task.terminal(goal) == 0
    assert task.success(goal)
    assert not task.success(goal.at[PLACES.get(name, 0)].add(-1.0))
    if name not in PLACES:
        first = {
            "cartpole-balance": 1,
            "cartpole-swingup": 1,
            "pets-cartpole": 1,
            "quadrotor2d": 2,
            "quadrotor": 3,
            "quadrotor-waypoint": 4,
        }
        angle = first.get(name, 2 if name == "car" else 0)
        assert not task.success(goal.at[angle].add(jnp.pi))
        assert task.success(goal.at[angle].add(2 * jnp.pi))
        rate = {"reacher": 3, "quadrotor": 8, "quadrotor-waypoint": 6}.get(name, -1)
        assert not task.success(goal.at[rate].add(1.5)) or name == "quadrotor2d"


@every_task
def test_every_number_of_state_and_action_has_a_name(name):
    row, task = TASKS[name], tasks.make(name, horizon=3)
    assert len(set(row.states)) == task.n
    assert len(set(row.actions)) == task.m
    assert all(text.endswith("]") for text in (*row.states, *row.actions) if text != "logit")


# quadrotor2d.


def test_quadrotor_forces_balance(x64):
    mass, inertia, arm, g = 0.5, 0.004, 0.2, 9.7
    quadrotor = Quadrotor2d(mass, inertia, arm, g)
    rng = np.random.default_rng(0)
    for _ in range(10):
        s, a = rng.normal(size=6), rng.uniform(0, 5, size=2)
        d = quadrotor.derivative(jnp.asarray(s), jnp.asarray(a))
        close(d[:3], s[3:])
        rotation = np.asarray([[np.cos(s[2]), -np.sin(s[2])], [np.sin(s[2]), np.cos(s[2])]])
        close(mass * d[3:5], rotation @ [0, a.sum()] + [0, -mass * g])
        close(inertia * d[5], arm * (a[0] - a[1]))


def test_quadrotor_is_symmetric(x64):
    task = tasks.quadrotor2d()
    mirror = jnp.asarray([-1.0, 1.0, -1.0, -1.0, 1.0, -1.0])
    s, a = jnp.asarray([0.3, -0.2, 0.5, 0.1, 0.2, -0.7]), jnp.asarray([1.0, 3.0])
    close(task.dynamics(mirror * s, a[::-1]), mirror * task.dynamics(s, a))
    close(task.reward(mirror * s, a[::-1]), task.reward(s, a))
    # Free fall: RK4 is exact.
    fall = task.dynamics(jnp.zeros(6), jnp.zeros(2))
    close(fall, [0, -9.81 * 0.025**2 / 2, 0, 0, -9.81 * 0.025, 0])


def test_quadrotor_costs(x64):
    task = tasks.quadrotor2d()
    x, z, pitch, vx, vz, w = s = np.asarray([0.5, -0.3, 0.7, 0.2, -0.1, 1.5])
    a, hover = np.asarray([1.0, 2.0]), 0.486 * 9.81 / 2
    distance = x**2 + z**2 + 2 * (1 - np.cos(pitch)) + 0.1 * (vx**2 + vz**2) + 0.01 * w**2
    close(task.reward(jnp.asarray(s), jnp.asarray(a)), -0.025 * (distance + 0.05 * np.sum((a - hover) ** 2)))
    close(task.terminal(jnp.asarray(s)), -10 * distance)
    close(task.a_high, 2 * hover * np.ones(2))


# lqr.


def test_double_integrator_is_exact(x64):
    task = tasks.lqr(mass=2.0, dt=0.3)
    generator = np.zeros((3, 3))
    generator[0, 1], generator[1, 2] = 1, 1 / 2.0
    flow = scipy.linalg.expm(0.3 * generator)
    close(task.dynamics.A, flow[:2, :2])
    close(task.dynamics.B, flow[:2, 2:])
    s, a = jnp.asarray([0.5, -2.0]), jnp.asarray([3.0])
    close(task.dynamics(s, a), flow[:2, :2] @ s + flow[:2, 2:] @ a)
    close(task.reward(s, a), -0.3 * (0.25 + 4 / 10 + 9 / 10) / 2)
    close(task.terminal(s), -(0.25 + 4) / 2)


@pytest.mark.parametrize("stability, radius", [("stable", 0.9), ("marginal", 1.0), ("unstable", 1.1)])
def test_random_systems_are_what_they_are_called(stability, radius, x64):
    seen = set()
    for n, m in [(1, 1), (4, 1), (6, 3)]:
        for seed in range(2):
            task = tasks.random_lqr(jax.random.key(seed), n, m, stability=stability, horizon=5)
            assert (task.n, task.m, task.name) == (n, m, f"lqr-{stability}-{n}x{m}")
            A, B = np.asarray(task.dynamics.A), np.asarray(task.dynamics.B)
            assert np.abs(np.linalg.eigvals(A)).max() == pytest.approx(radius, rel=1e-4)
            blocks = [np.linalg.matrix_power(A, k) @ B for k in range(n)]
            assert np.linalg.matrix_rank(np.hstack(blocks)) == n
            for weight in (task.reward.Q, task.reward.R, task.terminal.Q):
                close(weight, weight.T)
                assert np.linalg.eigvalsh(weight).min() >= 0.1 - 1e-12
            seen.add(float(A[0, 0]) if n > 1 else float(B[0, 0]))
    assert len(seen) == 6


def test_random_system_errors():
    with pytest.raises(ValueError, match="stability must be one of stable, marginal, unstable, got 'wobbly'"):
        tasks.random_lqr(KEY, 2, 1, stability="wobbly")
    for n, m in [(0, 1), (2, 0)]:
        with pytest.raises(ValueError, match=f"dimensions must be at least 1, got n = {n}, m = {m}"):
            tasks.random_lqr(KEY, n, m)
    eye, column = np.eye(2), np.ones((2, 1))
    with pytest.raises(ValueError, match=r"R has shape \[2, 2\]; expected \[1, 1\]"):
        tasks.linear_quadratic(eye, column, eye, eye, eye, horizon=5, dt=0.1)
    with pytest.raises(ValueError, match=r"A has shape \[2, 1\]; expected \[2, 2\]"):
        tasks.linear_quadratic(column, column, eye, np.eye(1), eye, horizon=5, dt=0.1)


# Limits moved into the plant.


@pytest.mark.parametrize("name", ["cartpole-balance", "quadrotor2d", "pendulum"])
def test_squashed_is_the_task_through_its_limits(name, x64):
    task = tasks.make(name, horizon=10)
    logits = squashed(task)
    assert np.all(np.isinf(logits.a_low) & np.isinf(logits.a_high))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(10, task.m)))
    centre, half = (task.a_low + task.a_high) / 2, (task.a_high - task.a_low) / 2
    run = jax.jit(rollout)
    s0 = task.initial(KEY)
    one, other = run(OpenLoop(z), logits, s0), run(OpenLoop(centre + half * jnp.tanh(z)), task, s0)
    close(one.s, other.s)
    close(one.s_T, other.s_T)
    close(one.r, other.r)
    assert jax.tree.structure(logits.dynamics.inner) == jax.tree.structure(task.dynamics)
    assert squashed(logits) is logits


def test_squashed_leaves_what_has_no_limits():
    task = tasks.lqr()
    assert squashed(task) is task
    mixed = eqx.tree_at(
        lambda t: (t.a_low, t.a_high), tasks.quadrotor2d(), (jnp.asarray([0.0, -jnp.inf]), jnp.asarray([4.0, jnp.inf]))
    )
    s, z = jnp.zeros(6), jnp.asarray([0.5, 1.5])
    np.testing.assert_allclose(
        squashed(mixed).dynamics(s, z), mixed.dynamics(s, jnp.asarray([2 + 2 * np.tanh(0.5), 1.5])), rtol=1e-5
    )
    np.testing.assert_array_equal(squashed(mixed).a_high, [jnp.inf, jnp.inf])
