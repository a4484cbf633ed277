"""The rods on carts against their sources: Gymnasium's cart-pole and MuJoCo's inverted pendulum, step by step."""

from functools import partial
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from diffmbrl import OpenLoop, rollout, tasks
from diffmbrl.render.registry import frames
from diffmbrl.rollout import returns
from diffmbrl.tasks.balancing import RodOnCart
from tests.problems import lagrangian_acceleration

close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_cartpole_is_gymnasiums_until_it_falls(seed, x64):
    env = gymnasium.make("CartPole-v1").unwrapped
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    states, forces, rewards, ended = [np.asarray(env.state)], [], [], False
    while not ended:
        right = seed == 0 or bool(rng.integers(2))
        _, reward, ended, *_ = env.step(int(right))
        states.append(np.asarray(env.state))
        forces.append([env.force_mag if right else -env.force_mag])
        rewards.append(reward)
    assert 5 < len(rewards) < 100
    ours = jnp.asarray(states)[:, jnp.asarray([0, 2, 1, 3])]

    task = tasks.cartpole_continuous()
    close(jax.vmap(task.dynamics)(ours[:-1], jnp.asarray(forces)), ours[1:], rtol=1e-13)
    np.testing.assert_array_equal(jax.vmap(task.done)(ours), [*[False] * len(rewards), True])
    # A plan that goes on after the fall earns nothing more.
    plan = OpenLoop(jnp.zeros((task.horizon, 1)).at[: len(forces)].set(jnp.asarray(forces)))
    trajectory = jax.jit(rollout)(plan, task, ours[0])
    assert returns(trajectory, task) == sum(rewards) == len(rewards)
    close(trajectory.s_T, ours[-1])
    assert not task.success(trajectory.s_T) and task.success(ours[0])


def test_cartpole_limits_are_gymnasiums():
    env, task = gymnasium.make("CartPole-v1").unwrapped, tasks.cartpole_continuous()
    np.testing.assert_allclose(
        [task.done.angle, task.done.x, *task.a_high], [env.theta_threshold_radians, env.x_threshold, env.force_mag]
    )
    assert task.dt == env.tau and task.horizon == 200
    for x, angle, ended in [(2.39, 0.2, False), (2.41, 0, True), (-2.41, 0, True), (0, 0.21, True), (0, -0.21, True)]:
        assert bool(task.done(jnp.asarray([x, angle, 0.0, 0.0]))) == ended


def test_a_rod_is_lagranges(x64):
    m_c, m_p, l, inertia, g, c_x, c_angle, lean = parameters = (1.1, 0.4, 0.6, 0.3, 9.7, 0.2, 0.1, 0.05)

    def L(q, v):
        velocity = v[0] + l * jnp.cos(q[1] + lean) * v[1], -l * jnp.sin(q[1] + lean) * v[1]
        spin = (inertia - m_p * l**2) * v[1] ** 2
        kinetic = (m_c * v[0] ** 2 + m_p * (velocity[0] ** 2 + velocity[1] ** 2) + spin) / 2
        return kinetic - m_p * g * l * jnp.cos(q[1] + lean)

    @jax.jit
    @jax.vmap
    def both(s, a):
        force = jnp.stack([a[0] - c_x * s[2], -c_angle * s[3]])
        return RodOnCart(*parameters)(s, a), lagrangian_acceleration(L, s[:2], s[2:], force)

    rng = np.random.default_rng(0)
    s = 2 * rng.normal(size=(20, 4))
    derivative, acceleration = both(s, 5 * rng.normal(size=(20, 1)))
    close(derivative[:, :2], s[:, 2:])
    close(derivative[:, 2:], acceleration)


@pytest.fixture(scope="module")
def inverted():
    """MuJoCo's model, as Gymnasium has it; a step of two frames from (x, angle, v, w) under a force."""
    path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "inverted_pendulum.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    data = mujoco.MjData(model)

    def step(s, force):
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = s[:2], s[2:]
        data.ctrl[:] = force / model.actuator_gear[0, 0]
        mujoco.mj_step(model, data, nstep=2)
        return np.concatenate([data.qpos, data.qvel])

    return model, step


def test_inverted_pendulum_is_mujocos(inverted, x64):
    model, step = inverted
    task = tasks.inverted_pendulum()
    rod = task.dynamics.inner
    close([rod.m_c, rod.m_p], model.body_mass[1:], rtol=1e-9)
    close(rod.inertia - rod.m_p * rod.l**2, model.body_inertia[2, 0], rtol=1e-9)
    close(task.a_high, model.actuator_ctrlrange[0, 1] * model.actuator_gear[0, 0])
    assert task.dt == 2 * model.opt.timestep and task.horizon == 1000
    rng = np.random.default_rng(0)
    s = rng.uniform(-1, 1, size=(30, 4)) * [0.5, 0.2, 2, 2]
    a = rng.uniform(-300, 300, size=(30, 1))
    close(jax.vmap(task.dynamics)(s, a), [step(*pair) for pair in zip(s, a, strict=True)], rtol=1e-8, atol=1e-8)


def test_the_end_of_the_rail_is_mujocos_but_for_its_softness(inverted, x64):
    """MuJoCo's end gives way by some millimetres for some steps; what it leaves of the motion is the same."""
    _, step = inverted
    task = tasks.inverted_pendulum()
    s = soft = np.asarray([0.95, 0.05, 1.5, 0.0])
    for _ in range(5):
        s, soft = np.asarray(task.dynamics(jnp.asarray(s), jnp.zeros(1))), step(soft, np.zeros(1))
    assert s[0] <= 1 and abs(soft[0] - 1) < 0.02
    free = np.asarray(task.dynamics.inner(jnp.asarray([0, 0.05, 1.5, 0.0]), jnp.zeros(1)))[3] * 5 * task.dt
    assert s[3] > 3 + free, "thrown over"
    close(s[3], soft[3], rtol=0.1)


def test_a_rod_is_drawn_whole():
    task = tasks.cartpole_continuous(l=0.7)
    [shapes] = frames(task, np.asarray([[0.3, np.pi / 2, 0, 0]]))
    close(shapes[2].points, [[0.3, 0], [1.7, 0]], rtol=1e-6, atol=1e-6)
