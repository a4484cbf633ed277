"""Two point masses on massless rods with a torque at each joint: swing up and stand."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.acrobot import LinksFeatures, Standing
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.tilt import tilt
from diffmbrl.tasks.twolink import Links, acceleration, weight

TORQUE = 4.0  # N m


class DoublePendulum(eqx.Module):
    """State (angle of the first rod [rad, 0 upright], of the second relative to it, their rates), action: torques [N m].

    Equations: `twolink.py`, with the masses at the ends. `step` is `rk4` or `semi_implicit`: over 10 s without torques, from
    2 rad, RK4 keeps the energy to .3% at dt = .05 and to 4e-6 at dt = .0125, where the semi-implicit step is off by 25%.
    """

    m_1: Float[Array, ""] = parameter(0.5)  # kg
    m_2: Float[Array, ""] = parameter(0.5)  # kg
    l_1: Float[Array, ""] = parameter(0.5)  # m
    l_2: Float[Array, ""] = parameter(0.5)  # m
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    dt: float = eqx.field(static=True, default=0.05)  # s
    step: Callable = eqx.field(static=True, default=rk4)

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "2"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        return self.step(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, "4"]:
        """ds/dt."""
        links = Links(self.m_1, self.m_2, self.l_1, self.l_1, self.l_2, 0.0, 0.0)
        q, v = s[:2], s[2:]
        return jnp.concatenate([v, acceleration(links, q, v, weight(links, self.g, q) + a)])


class RaiseReward(eqx.Module):
    """-dt (2 (1 - cos first) + 2 (1 - cos(first + second)) + .02 |rates|^2 + .05 |a|^2)."""

    dt: float = eqx.field(static=True, default=0.05)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, ""]:
        return -self.dt * (_fallen(s) + 0.02 * jnp.sum(s[2:] ** 2) + 0.05 * jnp.sum(a**2))


class RaiseTerminal(eqx.Module):
    """-(20 (1 - cos first) + 20 (1 - cos(first + second)) + .5 |rates|^2)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, ""]:
        return -(10 * _fallen(s) + 0.5 * jnp.sum(s[2:] ** 2))


def _fallen(s: Float[Array, "4"]) -> Float[Array, ""]:
    return 2 * tilt(s[0]) + 2 * tilt(s[0] + s[1])


def double_pendulum(
    *,
    horizon: int = 100,
    m_1: ScalarLike = 0.5,
    m_2: ScalarLike = 0.5,
    l_1: ScalarLike = 0.5,
    l_2: ScalarLike = 0.5,
    g: ScalarLike = 9.81,
) -> Task:
    """Swing two point masses up with 4 N m at each joint, half of what holds them level; starts hanging, +-.3 rad.

    Rates start within +-.3 rad/s. Success: the cosines of both rods' angles from upright above .95, rates below 1 rad/s at the
    end. Source: Lagrange's equations of two point masses (Goldstein, Classical Mechanics, chapter 1), by automatic
    differentiation in the tests.

    Args:
        horizon: Number of steps of .05 s.
        m_1, m_2: Masses at the ends of the rods [kg].
        l_1, l_2: Lengths of the rods [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m_1, m_2, l_1, l_2, g = accept("double-pendulum", m_1=m_1, m_2=m_2, l_1=l_1, l_2=l_2, g=g)
    centre, spread = jnp.asarray([jnp.pi, 0.0, 0.0, 0.0], float), jnp.full(4, 0.3, float)
    return Task(
        name="double-pendulum",
        dynamics=DoublePendulum(m_1, m_2, l_1, l_2, g),
        reward=RaiseReward(),
        terminal=RaiseTerminal(),
        initial=Box(centre - spread, centre + spread),
        features=LinksFeatures(8.0),
        success=Standing(),
        a_low=[-TORQUE, -TORQUE],
        a_high=[TORQUE, TORQUE],
        horizon=horizon,
        dt=0.05,
    )
