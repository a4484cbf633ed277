"""A planar arm of two links on a table that brings its tip to a target."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.twolink import Links, acceleration

TORQUE = 4.0  # N m


class Reacher(eqx.Module):
    """State (two joint angles [rad], their rates, the target's x and y [m]), action: joint torques [N m]; RK4.

    Uniform rods on a horizontal table, `twolink.py` without weight. The target is part of the state and rests: each start
    has its own, so one policy learns to reach them all.
    """

    m_1: Float[Array, ""] = parameter(1.0)  # kg
    m_2: Float[Array, ""] = parameter(1.0)  # kg
    l_1: Float[Array, ""] = parameter(0.5)  # m
    l_2: Float[Array, ""] = parameter(0.5)  # m
    dt: float = eqx.field(static=True, default=0.025)  # s

    def __call__(
        self, s: Float[Array, "6"], a: Float[Array, "2"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "6"]:
        return jnp.concatenate([rk4(self.derivative, s[:4], a, self.dt), s[4:]])

    def derivative(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, "4"]:
        """ds/dt of the arm."""
        I_1, I_2 = self.m_1 * self.l_1**2 / 12, self.m_2 * self.l_2**2 / 12
        links = Links(self.m_1, self.m_2, self.l_1, self.l_1 / 2, self.l_2 / 2, I_1, I_2)
        q, v = s[:2], s[2:]
        return jnp.concatenate([v, acceleration(links, q, v, a)])


class Miss(eqx.Module):
    """From the target to the tip, [m]: l_1 (cos, sin)(first) + l_2 (cos, sin)(first + second) - target."""

    l_1: Float[Array, ""]
    l_2: Float[Array, ""]

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, "2"]:
        first, both = s[0], s[0] + s[1]
        x = self.l_1 * jnp.cos(first) + self.l_2 * jnp.cos(both)
        return jnp.stack([x, self.l_1 * jnp.sin(first) + self.l_2 * jnp.sin(both)]) - s[4:]


class ReachReward(eqx.Module):
    """-dt (10 |miss|^2 + .05 |rates|^2 + .2 |a|^2)."""

    miss: Miss
    dt: float = eqx.field(static=True, default=0.025)

    def __call__(self, s: Float[Array, "6"], a: Float[Array, "2"]) -> Float[Array, ""]:
        cost = 10 * jnp.sum(self.miss(s) ** 2) + 0.05 * jnp.sum(s[2:4] ** 2) + 0.2 * jnp.sum(a**2)
        return -self.dt * cost


class ReachTerminal(eqx.Module):
    """-(50 |miss|^2 + .5 |rates|^2)."""

    miss: Miss

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, ""]:
        return -(50 * jnp.sum(self.miss(s) ** 2) + 0.5 * jnp.sum(s[2:4] ** 2))


class ReachFeatures(eqx.Module):
    """(cos and sin of both angles and of their sum, rates / 5, target): the miss is linear in them, whatever the lengths."""

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, "10"]:
        angles = jnp.stack([s[0], s[1], s[0] + s[1]])
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), s[2:4] / 5, s[4:]])


class Reached(eqx.Module):
    """Success: the tip within 5 cm of the target, both joints slower than .5 rad/s, at the end."""

    miss: Miss

    def __call__(self, s: Float[Array, "6"]) -> Array:
        return (jnp.sum(self.miss(s) ** 2) < 0.05**2) & jnp.all(jnp.abs(s[2:4]) < 0.5)


def reacher(
    *,
    horizon: int = 100,
    m_1: ScalarLike = 1.0,
    m_2: ScalarLike = 1.0,
    l_1: ScalarLike = 0.5,
    l_2: ScalarLike = 0.5,
) -> Task:
    """Reach any target in a square of 1.3 m about the shoulder; joints +-1.5 rad, rates +-.5 rad/s, torques up to 4 N m.

    Success: the tip within 5 cm of the target and both joints slower than .5 rad/s at the end.
    Source: the two-link manipulator of Murray, Li, Sastry 1994, A Mathematical Introduction to Robotic Manipulation, chapter
    4, after the Reacher of OpenAI Gym, without its friction.

    Args:
        horizon: Number of steps of .025 s.
        m_1, m_2: Masses of the links [kg].
        l_1, l_2: Lengths of the links [m].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m_1, m_2, l_1, l_2 = accept("reacher", m_1=m_1, m_2=m_2, l_1=l_1, l_2=l_2)
    spread = jnp.asarray([1.5, 1.5, 0.5, 0.5, 0.65, 0.65], float)
    miss = Miss(l_1, l_2)
    return Task(
        name="reacher",
        dynamics=Reacher(m_1, m_2, l_1, l_2),
        reward=ReachReward(miss),
        terminal=ReachTerminal(miss),
        initial=Box(-spread, spread),
        features=ReachFeatures(),
        success=Reached(miss),
        a_low=[-TORQUE, -TORQUE],
        a_high=[TORQUE, TORQUE],
        horizon=horizon,
        dt=0.025,
    )
