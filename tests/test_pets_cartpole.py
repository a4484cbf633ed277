"""PETS's cart-pole against its sources, the soft margin of a task's end, and sensors with noise."""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
import scipy.integrate

from diffmbrl import tasks
from diffmbrl.agents import NoisySensor, RandomAgent, System, learn
from diffmbrl.tasks.transforms.refined import refined
from tests.problems import lagrangian_acceleration, replaced

KEY = jax.random.key(0)
# The bodies of the paper's cart-pole: a cart on a rail and a capsule hanging from it, drawn as leaning by .001 m.
XML = """<mujoco><compiler inertiafromgeom="true"/><default><joint damping="1"/></default>
<option gravity="0 0 -9.81" integrator="RK4" timestep="0.02"/>
<worldbody><body><joint name="x" axis="1 0 0" type="slide"/><geom type="capsule" size="0.1 0.1" quat="0.707 0 0.707 0"/>
<body><joint axis="0 1 0" type="hinge"/><geom type="capsule" fromto="0 0 0 0.001 0 -0.6" size="0.049 0.3" contype="0"/></body>
</body></worldbody><actuator><motor gear="100" joint="x"/></actuator></mujoco>"""


def swings(task, steps, seed=0):
    """States under random forces, from leaning, as the task has them: [steps + 1, 4], [steps, 1]."""
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.uniform(-60, 60, size=(steps, 1)))
    s0 = jnp.asarray([0.1, 1.0, 0.1, -0.3])

    def step(s, a):
        s_next = task.dynamics(s, a)
        return s_next, s_next

    return np.concatenate([s0[None], jax.lax.scan(step, s0, a)[1]]), np.asarray(a)


def test_it_is_mujocos_between_the_ends_of_the_rail(x64):
    model = mujoco.MjModel.from_xml_string(XML)
    data = mujoco.MjData(model)
    task = tasks.pets_cartpole()
    rod = task.dynamics.inner
    np.testing.assert_allclose([rod.m_c, rod.m_p], model.body_mass[1:], rtol=1e-9)
    s, a = swings(task, 60)
    assert np.abs(s[:, 0]).max() < 2.5 and np.ptp(s[:, 1]) > 3
    data.qpos[:], data.qvel[:] = s[0, :2] - [0, np.pi], s[0, 2:]
    for force, expected in zip(a, s[1:], strict=True):
        data.ctrl[:] = force / 100
        mujoco.mj_step(model, data, nstep=2)
        np.testing.assert_allclose(np.r_[data.qpos + [0, np.pi], data.qvel], expected, rtol=1e-7, atol=1e-7)


def test_it_is_lagranges_integrated_elsewhere(x64):
    """The rod as a row of points along its axis and about it: the energies by quadrature, the motion by scipy."""
    task = tasks.pets_cartpole()
    rod = task.dynamics.inner
    # Two points of half the mass, one about the other, have the capsule's centre and inertia.
    half = jnp.sqrt(rod.inertia / rod.m_p - rod.l**2)
    places = jnp.stack([rod.l - half, rod.l + half])

    def L(q, v):
        angle = q[1] + rod.lean
        across, up = v[0] + places * jnp.cos(angle) * v[1], -places * jnp.sin(angle) * v[1]
        kinetic = (rod.m_c * v[0] ** 2 + rod.m_p * jnp.mean(across**2 + up**2)) / 2
        return kinetic - rod.m_p * rod.g * jnp.mean(places) * jnp.cos(angle)

    @jax.jit
    def derivative(s, a):
        force = jnp.stack([a - rod.c_x * s[2], -rod.c_angle * s[3]])
        return jnp.concatenate([s[2:], lagrangian_acceleration(L, s[:2], s[2:], force)])

    s, a = swings(task, 25, seed=1)
    true = [s[0]]
    for force in a[:, 0]:
        step = scipy.integrate.solve_ivp(
            lambda _, s, force=force: np.asarray(derivative(s, force)), (0, task.dt), true[-1], rtol=1e-10, atol=1e-10
        )
        true.append(step.y[:, -1])
    error = np.abs(s - true).max()
    assert error < 1e-3
    # The rest is the integrator's: a quarter of the step leaves a 256th of it, or so.
    finer = refined(task, substeps=4)
    assert np.abs(swings(finer, 25, seed=1)[0] - true).max() < error / 64


def test_energy_is_conserved_without_friction_and_lost_with_it(x64):
    def energies(task):
        rod = task.dynamics.inner
        s0 = jnp.asarray([0.0, 1.0, 0.2, 0.5])

        def step(s, _):
            return task.dynamics(s, jnp.zeros(1)), s

        x, angle, v, w = jax.lax.scan(step, s0, None, length=100)[1].T
        kinetic = (rod.m_c + rod.m_p) * v**2 / 2 + rod.inertia * w**2 / 2
        coupling = rod.m_p * rod.l * jnp.cos(angle + rod.lean) * v * w
        assert jnp.max(jnp.abs(x)) < 2.5
        return kinetic + coupling + rod.m_p * rod.g * rod.l * jnp.cos(angle + rod.lean)

    conserved = energies(tasks.pets_cartpole(c_x=1e-12, c_angle=1e-12))
    np.testing.assert_allclose(conserved, conserved[0], atol=1e-3)
    assert np.all(np.diff(energies(tasks.pets_cartpole())) < 0)


def test_the_reward_is_the_papers():
    task = tasks.pets_cartpole()
    for s, a, expected in [
        ([0, np.pi, 3, 3], 0, np.exp(-4)),
        ([0, 0, 0, 0], 0, 1),
        ([0, 2 * np.pi, 0, 0], 300, 0.91),
        ([0.6, 0, 0, 0], 0, np.exp(-1)),
        ([-0.6, np.pi / 2, 0, 0], 100, np.exp(-1) - 0.01),
    ]:
        np.testing.assert_allclose(task.reward(jnp.asarray(s, float), jnp.asarray([a], float)), expected, atol=1e-6)
    s = task.starts(KEY, 1000)
    np.testing.assert_allclose(jnp.mean(s, axis=0), [0, np.pi, 0, 0], atol=0.01)
    np.testing.assert_allclose(jnp.std(s, axis=0), 0.1, rtol=0.1)
    assert (task.horizon, task.dt, float(task.a_high[0])) == (200, 0.04, 300)


# The soft margin.


def test_the_margin_of_a_box_is_its_sides():
    task = tasks.cartpole_continuous()
    soft = tasks.soft_margin(task, weight=2.0)
    assert soft.done is None and soft.horizon == task.horizon
    limits = np.asarray([task.done.x, task.done.angle])
    np.testing.assert_allclose(soft.reward.high[:2] + soft.reward.centre[:2], limits, rtol=1e-5)
    np.testing.assert_allclose(soft.reward.low[:2] - soft.reward.centre[:2], limits, rtol=1e-5)
    assert np.all(np.isinf(soft.reward.low[2:])) and np.all(np.isinf(soft.reward.high[2:]))
    a = jnp.zeros(1)
    centre = soft.reward.centre
    assert soft.reward(centre, a) == 1
    for i in (0, 1):
        np.testing.assert_allclose(soft.reward(centre.at[i].add(-soft.reward.low[i]), a), -1, rtol=1e-6)
    gradient = jax.grad(soft.reward)(jnp.asarray([1.0, 0.1, 5.0, 5.0]), a)
    assert gradient[0] < 0 and gradient[1] < 0 and np.all(gradient[2:] == 0)


@pytest.mark.parametrize(
    "done, message",
    [
        (lambda s: jnp.all(s > -jnp.inf), "'lqr' has ended in the middle"),
        (lambda s: jnp.all(s > jnp.inf), "'lqr' ends along no axis"),
    ],
)
def test_a_margin_needs_an_end(done, message):
    with pytest.raises(ValueError, match=message):
        tasks.soft_margin(replaced(tasks.lqr(), done=done))


# Sensors.


def test_a_noisy_sensor_shows_other_states_than_the_plants():
    plant, std = tasks.pendulum(horizon=50), jnp.asarray([0.1, 0.0])
    keys = jax.random.split(KEY, 2)
    exact = learn(RandomAgent(), plant, keys, real_steps=200)
    noisy = learn(RandomAgent(), System(plant, sensor=NoisySensor(std)), keys, real_steps=200)
    apart = np.asarray(noisy.buffer.rows.s - exact.buffer.rows.s)
    np.testing.assert_allclose(apart[..., 1], 0, atol=1e-5)
    np.testing.assert_allclose(apart[..., 0].std(), 0.1, rtol=0.15)
    # What is shown of a state is one thing, as the end of a step and as the beginning of the next; the rewards are the plant's.
    inside = ~np.asarray(noisy.buffer.rows.last)[:, :-1]
    np.testing.assert_array_equal(
        np.asarray(noisy.buffer.rows.s_next)[:, :-1][inside], np.asarray(noisy.buffer.rows.s)[:, 1:][inside]
    )
    np.testing.assert_allclose(noisy.buffer.rows.r, exact.buffer.rows.r, rtol=1e-5)


@pytest.mark.parametrize("std", [-1.0, float("nan"), [0.1, float("inf")]])
def test_a_sensors_noise_is_finite(std):
    with pytest.raises(ValueError, match="std of the noise must be finite and not negative"):
        NoisySensor(std)
