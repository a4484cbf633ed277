"""The acrobot: two links hanging from a bar, a torque at the elbow alone; swing up and stand."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.tilt import tilt
from diffmbrl.tasks.twolink import Links, acceleration, weight

TORQUE = 20.0  # N m


class Acrobot(eqx.Module):
    """State (shoulder [rad, 0 upright], elbow [rad, relative], their rates), action: torque at the elbow [N m]; RK4.

    Equations: `twolink.py`, with centres of mass at half length. Sutton's constants are the defaults.
    """

    m_1: Float[Array, ""] = parameter(1.0)  # kg
    m_2: Float[Array, ""] = parameter(1.0)  # kg
    l_1: Float[Array, ""] = parameter(1.0)  # m
    l_2: Float[Array, ""] = parameter(1.0)  # m
    inertia: Float[Array, ""] = parameter(1.0)  # kg m^2, of each link about its centre of mass
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    dt: float = eqx.field(static=True, default=0.05)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        return rk4(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, "4"]:
        """ds/dt."""
        links = Links(self.m_1, self.m_2, self.l_1, self.l_1 / 2, self.l_2 / 2, self.inertia, self.inertia)
        q, v = s[:2], s[2:]
        force = weight(links, self.g, q) + jnp.concatenate([jnp.zeros_like(a), a])
        return jnp.concatenate([v, acceleration(links, q, v, force)])


class StandReward(eqx.Module):
    """-dt (2 (1 - cos shoulder) + 2 (1 - cos(shoulder + elbow)) + .02 |rates|^2 + .01 a^2)."""

    dt: float = eqx.field(static=True, default=0.05)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return -self.dt * (_fallen(s) + 0.02 * jnp.sum(s[2:] ** 2) + 0.01 * a[0] ** 2)


class StandTerminal(eqx.Module):
    """-(20 (1 - cos shoulder) + 20 (1 - cos(shoulder + elbow)) + |rates|^2)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, ""]:
        return -(10 * _fallen(s) + jnp.sum(s[2:] ** 2))


class LinksFeatures(eqx.Module):
    """(cos and sin of both angles, rates / scale)."""

    scale: float = eqx.field(static=True)

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, "6"]:
        return jnp.concatenate([jnp.cos(s[:2]), jnp.sin(s[:2]), s[2:] / self.scale])


class Standing(eqx.Module):
    """Success: both links within about 18 degrees of upright, cos > .95, and slower than 1 rad/s at the end."""

    def __call__(self, s: Float[Array, "4"]) -> Array:
        return (jnp.cos(s[0]) > 0.95) & (jnp.cos(s[0] + s[1]) > 0.95) & jnp.all(jnp.abs(s[2:]) < 1)


def _fallen(s: Float[Array, "4"]) -> Float[Array, ""]:
    return 2 * tilt(s[0]) + 2 * tilt(s[0] + s[1])


def acrobot(
    *,
    horizon: int = 100,
    m_1: ScalarLike = 1.0,
    m_2: ScalarLike = 1.0,
    l_1: ScalarLike = 1.0,
    l_2: ScalarLike = 1.0,
    inertia: ScalarLike = 1.0,
    g: ScalarLike = 9.81,
) -> Task:
    """Swing two links up to standing with a torque of up to 20 N m at the elbow; starts hanging, +-.2 rad, rates +-.2.

    Success: the cosines of both links' angles from upright above .95, rates below 1 rad/s at the end.
    Source: Sutton 1996, "Generalization in reinforcement learning", as in Gymnasium's Acrobot-v1 (its "book"
    equations, followed step by step in the tests), with twenty times its torque, for two swings instead of dozens.

    Args:
        horizon: Number of steps of .05 s.
        m_1, m_2: Masses of the links [kg].
        l_1, l_2: Lengths of the links [m].
        inertia: Inertia of each link about its centre of mass [kg m^2].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m_1, m_2, l_1, l_2, inertia, g = accept("acrobot", m_1=m_1, m_2=m_2, l_1=l_1, l_2=l_2, inertia=inertia, g=g)
    centre, spread = jnp.asarray([jnp.pi, 0.0, 0.0, 0.0], float), jnp.full(4, 0.2, float)
    return Task(
        name="acrobot",
        dynamics=Acrobot(m_1, m_2, l_1, l_2, inertia, g),
        reward=StandReward(),
        terminal=StandTerminal(),
        initial=Box(centre - spread, centre + spread),
        features=LinksFeatures(5.0),
        success=Standing(),
        a_low=[-TORQUE],
        a_high=[TORQUE],
        horizon=horizon,
        dt=0.05,
    )
