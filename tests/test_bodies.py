"""Rigid bodies against Lagrange's equations, their energy and momentum, and Gymnasium; costs against their formulas."""

from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import OpenLoop, rollout, tasks
from diffmbrl.constraints import violation
from diffmbrl.tasks.acrobot import Acrobot
from diffmbrl.tasks.car import Bicycle
from diffmbrl.tasks.double_pendulum import DoublePendulum
from diffmbrl.tasks.integrate import rk4, semi_implicit
from diffmbrl.tasks.quadrotor import Quadrotor
from diffmbrl.tasks.reacher import Reacher
from tests.problems import lagrangian_acceleration

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


# Two links, from the positions of their centres of mass and their turning.


def two_links(m_1, m_2, l_1, c_1, c_2, I_1, I_2, g):
    """Kinetic and potential energy; angles from the y axis, the second relative."""

    def centres(q):
        along = [jnp.stack([jnp.sin(angle), jnp.cos(angle)]) for angle in (q[0], q[0] + q[1])]
        return c_1 * along[0], l_1 * along[0] + c_2 * along[1]

    def kinetic(q, v):
        one, other = jax.jvp(centres, (q,), (v,))[1]
        turning = I_1 * v[0] ** 2 + I_2 * (v[0] + v[1]) ** 2
        return (m_1 * one @ one + m_2 * other @ other + turning) / 2

    def potential(q):
        one, other = centres(q)
        return g * (m_1 * one[1] + m_2 * other[1])

    return kinetic, potential


ACROBOT = (1.2, 0.7, 0.9, 0.45, 0.6, 0.8, 0.8, 9.7)
DOUBLE = (1.2, 0.7, 0.9, 0.9, 0.6, 0.0, 0.0, 9.7)
ARM = (1.2, 0.7, 0.9, 0.45, 0.3, 1.2 * 0.9**2 / 12, 0.7 * 0.6**2 / 12, 0.0)
LINKS = [
    ("acrobot", lambda: Acrobot(1.2, 0.7, 0.9, 1.2, 0.8, 9.7), ACROBOT, [[0.0], [1.0]]),
    ("double pendulum", lambda: DoublePendulum(1.2, 0.7, 0.9, 0.6, 9.7), DOUBLE, np.eye(2)),
    ("reacher", lambda: Reacher(1.2, 0.7, 0.9, 0.6), ARM, np.eye(2)),
]


@pytest.mark.parametrize("make, numbers, joints", [row[1:] for row in LINKS], ids=[row[0] for row in LINKS])
def test_two_links_are_lagranges(make, numbers, joints, x64):
    system, (kinetic, potential) = make(), two_links(*numbers)
    joints = jnp.asarray(joints)

    @jax.jit
    @jax.vmap
    def both(s, a):
        L = lambda q, v: kinetic(q, v) - potential(q)  # noqa: E731
        return system.derivative(s, a), lagrangian_acceleration(L, s[:2], s[2:], joints @ a)

    rng = np.random.default_rng(0)
    s, a = 3 * rng.normal(size=(50, 4)), 10 * rng.normal(size=(50, joints.shape[1]))
    derivative, acceleration = both(s, a)
    close(derivative[:, :2], s[:, 2:])
    close(derivative[:, 2:], acceleration)


def test_acrobot_is_gymnasiums_step_by_step(x64):
    env = gymnasium.make("Acrobot-v1").unwrapped
    env.reset(seed=0)
    system = Acrobot(g=9.8, dt=env.dt)
    step = jax.jit(lambda s, a: system(s, a))
    rng = np.random.default_rng(0)
    for _ in range(60):
        s, action = rng.normal(size=4) * [2, 2, 1.5, 1.5], int(rng.integers(3))
        env.state = s
        env.step(action)
        # Gymnasium counts from hanging, and wraps; these speeds are below its limits.
        ours = np.array(step(jnp.asarray(s + [np.pi, 0, 0, 0]), jnp.asarray([env.AVAIL_TORQUE[action]], float)))
        ours[0] -= np.pi
        theirs = np.asarray(env.state, np.float64)
        assert np.all(np.abs(theirs[2:]) < [4 * np.pi, 9 * np.pi])
        close(theirs[2:], ours[2:])
        close(np.exp(1j * theirs[:2]), np.exp(1j * ours[:2]))
    task = tasks.acrobot()
    d = task.dynamics
    theirs = (env.LINK_MASS_1, env.LINK_MASS_2, env.LINK_LENGTH_1, env.LINK_LENGTH_2, env.LINK_MOI)
    assert theirs == (d.m_1, d.m_2, d.l_1, d.l_2, d.inertia)


# Energy.


@partial(jax.jit, static_argnums=(2, 3))
def coast(system, s, m, count):
    """The states of `count` steps without torques."""
    return jax.lax.scan(lambda s, _: (system(s, jnp.zeros(m)), s), s, length=count)[1]


def energies(numbers, s):
    kinetic, potential = two_links(*numbers)
    return np.asarray(jax.jit(jax.vmap(lambda s: kinetic(s[:2], s[2:]) + potential(s[:2])))(s))


def drift(step, dt, seconds=10.0):
    """Of a double pendulum that starts 2 rad from upright: the largest change of energy, as a share of what it swings."""
    system = DoublePendulum(dt=dt, step=step)
    s = coast(system, jnp.asarray([2.0, 0.5, 0.0, 0.0]), 2, round(seconds / dt) + 1)
    assert np.ptp(s[:, 0]) > 1.0
    E = energies((0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 9.81), s)
    return np.abs(E - E[0]).max() / (E[0] + 9.81 * 0.75)


def test_the_energy_of_a_double_pendulum_over_10_seconds(x64):
    task_step, fine, finer = (drift(rk4, dt) for dt in (0.05, 0.0125, 0.00625))
    assert task_step < 0.005
    assert fine < 1e-5
    assert finer < fine / 16
    # The rates' part of the force makes the semi-implicit step of first order, not symplectic: it keeps energy worse.
    rough, smooth = drift(semi_implicit, 0.0125), drift(semi_implicit, 0.00625)
    assert rough > 100 * fine
    assert 0.3 < smooth / rough < 0.7


@pytest.mark.parametrize("step, order", [(rk4, 4), (semi_implicit, 1)], ids=["rk4", "semi-implicit"])
def test_order_of_convergence(step, order, x64):
    start = jnp.asarray([2.0, 0.5, 0.3, -0.2])
    exact = coast(DoublePendulum(dt=1e-3), start, 2, 1001)[-1]
    whole, half = (
        np.abs(coast(DoublePendulum(dt=dt, step=step), start, 2, round(1 / dt) + 1)[-1] - exact).max()
        for dt in (0.02, 0.01)
    )
    assert abs(np.log2(whole / half) - order) < 0.35


def test_semi_implicit_is_the_swing_up_pendulums_step(x64):
    task = tasks.pendulum_swingup()
    s, a = jnp.asarray([2.0, -1.5]), jnp.asarray([0.4])
    stepped = semi_implicit(lambda s, a: jnp.stack([s[1], 15 * jnp.sin(s[0]) + 9 * jnp.tanh(a[0])]), s, a, 0.05)
    close(stepped, task.dynamics(s, a))


def test_a_free_arm_keeps_its_energy_and_angular_momentum(x64):
    system = Reacher(dt=2e-3)
    s = coast(system, jnp.asarray([0.3, 1.2, 1.5, -2.0, 0.4, -0.2]), 2, 1500)
    numbers = (1.0, 1.0, 0.5, 0.25, 0.25, 1 / 48, 1 / 48, 0.0)
    assert np.ptp(s[:, 1]) > 1.0
    E = energies(numbers, s[:, :4])
    close(E, E[0])
    kinetic, _ = two_links(*numbers)
    momentum = jax.vmap(lambda s: jax.grad(kinetic, 1)(s[:2], s[2:4])[0])(s)
    close(momentum, momentum[0])
    np.testing.assert_array_equal(s[:, 4:], np.broadcast_to([0.4, -0.2], (1500, 2)))


# The quadrotor.


def rotation(angles):
    """R_z(yaw) R_y(pitch) R_x(roll), each by Rodrigues' formula."""

    def about(axis, angle):
        N = jnp.asarray(np.cross(np.eye(3)[axis], np.eye(3), axisb=1).T)
        return jnp.eye(3) + jnp.sin(angle) * N + (1 - jnp.cos(angle)) * N @ N

    return about(2, angles[2]) @ about(1, angles[1]) @ about(0, angles[0])


def body_rates(angles, rates):
    """w of R'(dR/dt), which is w's cross product."""
    R, turning = jax.jvp(rotation, (angles,), (rates,))
    W = R.T @ turning
    return jnp.stack([W[2, 1], W[0, 2], W[1, 0]])


def test_quadrotor_is_lagranges(x64):
    mass, inertia, g = 0.6, jnp.asarray([0.003, 0.002, 0.005]), 9.7
    system = Quadrotor(mass=mass, inertia=inertia, g=g)

    def L(q, v):
        w = body_rates(q, v)
        return w @ (inertia * w) / 2

    @jax.jit
    @jax.vmap
    def both(s, a):
        d = system.derivative(s, a)
        q, rates = s[3:6], d[3:6]
        force = jax.jacobian(body_rates, 1)(q, rates).T @ a[1:]  # the torques' power is force . rates
        turning = lagrangian_acceleration(L, q, rates, force)
        spin = jax.jvp(body_rates, (q, rates), (rates, turning))[1]
        push = rotation(q)[:, 2] * a[0] / mass - g * jnp.eye(3)[2]
        return d, jnp.concatenate([push, spin]), body_rates(q, rates)

    rng = np.random.default_rng(0)
    s = rng.normal(size=(20, 12)) * np.asarray([1] * 3 + [2, 0.5, 2] + [1] * 6)
    a = rng.normal(size=(20, 4)) * [5, 0.02, 0.02, 0.02]
    derivative, acceleration, w = both(jnp.asarray(s), jnp.asarray(a))
    close(derivative[:, :3], s[:, 6:9])
    close(w, s[:, 9:])
    close(derivative[:, 6:], acceleration)


def test_a_tumbling_quadrotor_keeps_its_spin_and_energy(x64):
    system = Quadrotor(dt=1e-3)
    start = jnp.zeros(12).at[9:].set(jnp.asarray([0.5, 0.3, 4.0])).at[6].set(1.0)
    s = coast(system, start, 4, 1000)
    spin = jax.vmap(lambda s: rotation(s[3:6]) @ (system.inertia * s[9:]))(s)
    assert np.abs(s[:, 4]).max() > 0.05
    np.testing.assert_allclose(spin, np.broadcast_to(spin[0], spin.shape), rtol=1e-8, atol=1e-10)
    energy = (
        0.25 * np.sum(s[:, 6:9] ** 2, axis=1) + 0.5 * 9.81 * s[:, 2] + s[:, 9:] ** 2 @ np.asarray(system.inertia) / 2
    )
    close(energy, energy[0])
    close(s[-1, :3], [0.999, 0, -9.81 * 0.999**2 / 2])


# The car.


def test_a_car_that_steers_evenly_drives_a_circle(x64):
    car = Bicycle(2.0, dt=0.02)
    steering, speed = 0.4, 3.0
    radius = 2.0 / np.tan(steering)
    a = jnp.asarray([steering, 0.0])
    end, s = jax.lax.scan(lambda s, _: (car(s, a), s), jnp.asarray([0.0, 0.0, 0.0, speed]), length=200)
    close(np.hypot(s[:, 0], s[:, 1] - radius), radius, rtol=1e-7)
    close(end[2], 4 * speed / radius)
    straight = car(jnp.asarray([1.0, 2.0, np.pi / 2, 1.0]), jnp.asarray([0.0, 2.0]))
    close(straight, [1.0, 2.0 + 0.02 + 2 * 0.02**2 / 2, np.pi / 2, 1.04])


def test_obstacles_are_depths_near_their_edge(x64):
    task = tasks.car(radius=1.2)
    depth = task.constraints.inequality
    np.testing.assert_allclose(depth.radii, 1.2)
    centre = np.asarray(depth.centres[1])
    outward = np.asarray([0.6, 0.8])
    for distance, wanted in [(1.2, 0.0), (1.19, 0.01), (1.21, -0.01), (0.0, 0.6)]:
        s = jnp.asarray([*(centre + distance * outward), 0.3, 1.0])
        close(depth(s, jnp.zeros(2))[1], wanted, atol=1e-4)
    edge = jnp.asarray([*(centre + 1.2 * outward), 0.3, 1.0])
    close(jax.jacobian(depth)(edge, jnp.zeros(2))[1], [*-outward, 0, 0])


def test_straight_through_is_a_violation_and_around_is_none(x64):
    task = tasks.car()
    drive = jax.jit(lambda a, s0: violation(task.constraints, rollout(OpenLoop(a), task, s0)))
    ahead = jnp.zeros((80, 2))
    assert 0.3 < drive(ahead, jnp.asarray([-12.0, 0.8, 0.0, 2.0])) <= 0.75
    assert drive(ahead, jnp.asarray([-12.0, 4.0, 0.0, 2.0])) == 0


# Costs and features, as documented.


def test_acrobot_and_double_pendulum_costs(x64):
    first, second, v, w = s = np.asarray([0.7, 2.1, -0.4, 1.2])
    fallen = 2 * (1 - np.cos(first)) + 2 * (1 - np.cos(first + second))
    rates = v**2 + w**2
    one, both = tasks.acrobot(), tasks.double_pendulum()
    s = jnp.asarray(s)
    close(one.reward(s, jnp.asarray([3.0])), -0.05 * (fallen + 0.02 * rates + 0.09))
    close(one.terminal(s), -(10 * fallen + rates))
    close(both.reward(s, jnp.asarray([3.0, -1.0])), -0.05 * (fallen + 0.02 * rates + 0.5))
    close(both.terminal(s), -(10 * fallen + 0.5 * rates))
    close(one.features(s), [*np.cos(s[:2]), *np.sin(s[:2]), v / 5, w / 5])
    close(both.features(s)[4:], s[2:] / 8)


def test_reacher_costs(x64):
    task = tasks.reacher(l_1=0.4, l_2=0.6)
    s, a = jnp.asarray([0.7, -2.1, -0.4, 1.2, 0.3, -0.2]), jnp.asarray([0.5, -1.0])
    tip = 0.4 * np.exp(0.7j) + 0.6 * np.exp(-1.4j)
    miss = np.asarray([tip.real - 0.3, tip.imag + 0.2])
    stage = 10 * miss @ miss + 0.05 * (0.4**2 + 1.2**2) + 0.2 * 1.25
    close(task.reward(s, a), -0.025 * stage)
    close(task.terminal(s), -(50 * miss @ miss + 0.5 * (0.4**2 + 1.2**2)))
    angles = np.asarray([0.7, -2.1, -1.4])
    features = task.features(s)
    close(features, [*np.cos(angles), *np.sin(angles), -0.08, 0.24, 0.3, -0.2])
    close(
        miss, [0.4 * features[0] + 0.6 * features[2] - features[8], 0.4 * features[3] + 0.6 * features[5] - features[9]]
    )


def test_car_costs(x64):
    task = tasks.car()
    s, a = jnp.asarray([-3.0, 1.0, 0.5, 2.0]), jnp.asarray([0.2, -1.0])
    stage = 0.05 * 9 + 0.1 + 0.2 * (1 - np.cos(0.5)) + 0.05 * 4 + 0.5 * 0.04 + 0.05
    close(task.reward(s, a), -0.1 * stage)
    close(task.terminal(s), -(50 + 20 * (1 - np.cos(0.5)) + 8))
    close(task.features(s), [-0.3, 1 / 3, np.cos(0.5), np.sin(0.5), 2 / 3])


def test_waypoint_costs(x64):
    task = tasks.quadrotor_waypoint(x=1.0, y=-2.0, z=0.5, mass=0.4)
    s = jnp.asarray([0.5, -1.0, 0.2, 0.3, -0.2, 0.1, 1.0, 0.0, -1.0, 0.5, 0.0, -1.0])
    a = jnp.asarray([5.0, 0.01, -0.02, 0.005])
    distance = 0.25 + 1 + 0.09 + np.sum(1 - np.cos([0.3, -0.2, 0.1])) + 0.1 * 2 + 0.02 * 1.25
    effort = 0.05 * (5 - 0.4 * 9.81) ** 2 + 20 * (0.01**2 + 0.02**2 + 0.005**2)
    close(task.reward(s, a), -0.025 * (distance + effort))
    close(task.terminal(s), -10 * distance)
    close(task.features(s)[:3], s[:3])
    close(task.a_high, [2 * 0.4 * 9.81, 0.05, 0.05, 0.02])


def test_a_waypoint_is_any_finite_place():
    assert tasks.make("quadrotor-waypoint", x=0, y=-2).reward.target.tolist() == [0.0, -2.0, 1.0]
    with pytest.raises(ValueError, match="z of task 'quadrotor-waypoint' must be a finite number, got nan"):
        tasks.make("quadrotor-waypoint", z=float("nan"))
