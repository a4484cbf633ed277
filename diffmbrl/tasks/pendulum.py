"""A torque-driven pendulum: Gymnasium's, and a swing-up with the squashing of the torque in the plant."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.parameters import accept


class GymPendulum(eqx.Module):
    r"""Gymnasium's Pendulum-v1: angle 0 upright, torque [N m] cut at +-2, speed [rad/s] cut at +-8.

    $\dot\theta' = \mathrm{clip}(\dot\theta + dt(\tfrac{3g}{2l}\sin\theta + \tfrac{3}{ml^2}a), \pm 8)$,
    $\theta' = \theta + dt\,\dot\theta'$
    """

    m: Float[Array, ""] = parameter(1.0)  # kg
    l: Float[Array, ""] = parameter(1.0)  # m
    g: Float[Array, ""] = parameter(10.0)  # m/s^2
    dt: float = eqx.field(static=True, default=0.05)  # s

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        angle, rate = s
        torque = jnp.clip(a[0], -2, 2)
        acceleration = 3 * self.g / (2 * self.l) * jnp.sin(angle) + 3 / (self.m * self.l**2) * torque
        rate = jnp.clip(rate + self.dt * acceleration, -8, 8)
        return jnp.stack([angle + self.dt * rate, rate])


class GymPendulumReward(eqx.Module):
    """-(angle^2 + .1 rate^2 + .001 torque^2), the angle wrapped to [-pi, pi): not smooth where it hangs straight down."""

    def __call__(self, s: Float[Array, "2"], a: Float[Array, "1"]) -> Float[Array, ""]:
        angle = (s[0] + jnp.pi) % (2 * jnp.pi) - jnp.pi
        return -(angle**2 + 0.1 * s[1] ** 2 + 0.001 * jnp.clip(a[0], -2, 2) ** 2)


class AngleFeatures(eqx.Module):
    """(cos angle, sin angle, rate / scale)."""

    scale: float = eqx.field(static=True)

    def __call__(self, s: Float[Array, "2"]) -> Float[Array, "3"]:
        return jnp.stack([jnp.cos(s[0]), jnp.sin(s[0]), s[1] / self.scale])


class Upright(eqx.Module):
    """Success: cos(angle) > .95 and |rate| < 1 rad/s."""

    def __call__(self, s: Float[Array, "2"]) -> Array:
        return (jnp.cos(s[0]) > 0.95) & (jnp.abs(s[1]) < 1)


class SquashedPendulum(eqx.Module):
    r"""A pendulum under gravity g/l and a limited torque, with the squashing in the plant: the action is a logit z.

    $w' = w + dt(15\sin\theta + 3\tanh z)$, $\theta' = \theta + dt\,w'$ (semi-implicit Euler), angle 0 upright.
    """

    gravity: Float[Array, ""] = parameter(15.0)  # 3 g / (2 l), 1/s^2
    strength: Float[Array, ""] = parameter(3.0)  # largest torque u, of which the plant gains `gain` u rad/s^2
    gain: Float[Array, ""] = parameter(3.0)
    dt: float = eqx.field(static=True, default=0.05)  # s

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        torque = self.strength * jnp.tanh(a[0])
        rate = s[1] + self.dt * (self.gravity * jnp.sin(s[0]) + self.gain * torque)
        return jnp.stack([s[0] + self.dt * rate, rate])


class SwingUpReward(eqx.Module):
    r"""$-\tfrac{1}{2}|\rho|^2$ with $\rho = \sqrt{dt}(\cos\theta - 1, \sin\theta, \sqrt{.1}w, .1u, \sqrt{.001}z)$."""

    strength: Float[Array, ""] = parameter(3.0)
    dt: float = eqx.field(static=True, default=0.05)

    def __call__(self, s: Float[Array, "2"], a: Float[Array, "1"]) -> Float[Array, ""]:
        torque = self.strength * jnp.tanh(a[0])
        return -self.dt / 2 * (_distance(s) + 0.01 * torque**2 + 0.001 * a[0] ** 2)


class SwingUpTerminal(eqx.Module):
    """Three times the stage's residual at z = 0, squared and halved: 9 dt / 2 of the distance."""

    dt: float = eqx.field(static=True, default=0.05)

    def __call__(self, s: Float[Array, "2"]) -> Float[Array, ""]:
        return -9 * self.dt / 2 * _distance(s)


def _distance(s: Float[Array, "2"]) -> Float[Array, ""]:
    # (cos - 1)^2 + sin^2 = 2 (1 - cos) = 4 sin^2(angle / 2), the last without cancellation near the top.
    return 4 * jnp.sin(s[0] / 2) ** 2 + 0.1 * s[1] ** 2


def pendulum(*, horizon: int = 200, m: ScalarLike = 1.0, l: ScalarLike = 1.0, g: ScalarLike = 10.0) -> Task:
    """Gymnasium's Pendulum-v1, equations, limits, reward and starts (angle +-pi, rate +-1 rad/s).

    Neither torque nor speed is smooth at its limit, nor the reward where the pendulum hangs straight down.
    Source: gymnasium/envs/classic_control/pendulum.py, version 1; followed step by step in the tests.

    Args:
        horizon: Number of steps of .05 s.
        m: Mass of the rod [kg].
        l: Length of the rod [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m, l, g = accept("pendulum", m=m, l=l, g=g)
    return Task(
        name="pendulum",
        dynamics=GymPendulum(m, l, g),
        reward=GymPendulumReward(),
        initial=Box([-jnp.pi, -1.0], [jnp.pi, 1.0]),
        features=AngleFeatures(8.0),
        success=Upright(),
        a_low=[-2.0],
        a_high=[2.0],
        horizon=horizon,
        dt=0.05,
    )


def pendulum_swingup(
    *, horizon: int = 100, gravity: ScalarLike = 15.0, strength: ScalarLike = 3.0, gain: ScalarLike = 3.0
) -> Task:
    """Swing up and hold, from anywhere on the circle at rest; the policy emits the logit of a strong torque.

    The cost is -reward, of order 2 for a good policy. Success: cos(angle) > .95 and |rate| < 1 at the end.
    Source: the pendulum of Gymnasium's Pendulum-v1 with its torque limit raised and squashed smoothly in the plant.

    Args:
        horizon: Number of steps of .05 s.
        gravity: Largest acceleration by gravity, 3 g / (2 l) [1/s^2].
        strength: Largest torque [N m].
        gain: Angular acceleration per torque [1/(kg m^2)].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    gravity, strength, gain = accept("pendulum-swingup", gravity=gravity, strength=strength, gain=gain)
    return Task(
        name="pendulum-swingup",
        dynamics=SquashedPendulum(gravity, strength, gain),
        reward=SwingUpReward(strength),
        terminal=SwingUpTerminal(),
        initial=Box([-jnp.pi, 0.0], [jnp.pi, 0.0]),
        features=AngleFeatures(4.0),
        success=Upright(),
        a_low=[-jnp.inf],
        a_high=[jnp.inf],
        horizon=horizon,
        dt=0.05,
    )
