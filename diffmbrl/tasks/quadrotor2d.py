"""A planar quadrotor with two rotors: hover at the origin from wide starts."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept


class Quadrotor2d(eqx.Module):
    r"""State (x, z [m], pitch [rad], their rates), action: the two rotors' thrusts [N]; one RK4 step of dt.

    $m\ddot x = -(a_1 + a_2)\sin\theta$, $m\ddot z = (a_1 + a_2)\cos\theta - mg$, $I\ddot\theta = r(a_1 - a_2)$
    """

    mass: Float[Array, ""] = parameter(0.486)  # kg
    inertia: Float[Array, ""] = parameter(0.00383)  # kg m^2
    arm: Float[Array, ""] = parameter(0.25)  # m
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    dt: float = eqx.field(static=True, default=0.025)  # s

    def __call__(
        self, s: Float[Array, "6"], a: Float[Array, "2"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "6"]:
        return rk4(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "6"], a: Float[Array, "2"]) -> Float[Array, "6"]:
        """ds/dt."""
        pitch = s[2]
        lift = (a[0] + a[1]) / self.mass
        return jnp.stack(
            [
                s[3],
                s[4],
                s[5],
                -lift * jnp.sin(pitch),
                lift * jnp.cos(pitch) - self.g,
                self.arm / self.inertia * (a[0] - a[1]),
            ]
        )


class HoverReward(eqx.Module):
    """-dt (x^2 + z^2 + 2 (1 - cos pitch) + .1 (vx^2 + vz^2) + .01 w^2 + .05 |a - hover|^2)."""

    hover: Float[Array, ""]  # N, one rotor's share of the weight
    dt: float = eqx.field(static=True, default=0.025)

    def __call__(self, s: Float[Array, "6"], a: Float[Array, "2"]) -> Float[Array, ""]:
        return -self.dt * (_distance(s) + 0.05 * jnp.sum((a - self.hover) ** 2))


class HoverTerminal(eqx.Module):
    """Ten times the stage's rate of cost, without the action."""

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, ""]:
        return -10 * _distance(s)


class HoverFeatures(eqx.Module):
    """(x, z, cos pitch, sin pitch, vx / 2, vz / 2, w / 5)."""

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, "7"]:
        x, z, pitch, vx, vz, w = s
        return jnp.stack([x, z, jnp.cos(pitch), jnp.sin(pitch), vx / 2, vz / 2, w / 5])


class Hovering(eqx.Module):
    """Success: within .3 m of the origin, cos(pitch) > .95 and slower than 1 m/s at the end."""

    def __call__(self, s: Float[Array, "6"]) -> Array:
        near = jnp.sum(s[:2] ** 2) < 0.3**2
        return near & (jnp.cos(s[2]) > 0.95) & (jnp.sum(s[3:5] ** 2) < 1)


def _distance(s: Float[Array, "6"]) -> Float[Array, ""]:
    tilt = 2 * jnp.sin(s[2] / 2) ** 2
    return jnp.sum(s[:2] ** 2) + 2 * tilt + 0.1 * jnp.sum(s[3:5] ** 2) + 0.01 * s[5] ** 2


def quadrotor2d(
    *,
    horizon: int = 100,
    mass: ScalarLike = 0.486,
    inertia: ScalarLike = 0.00383,
    arm: ScalarLike = 0.25,
    g: ScalarLike = 9.81,
) -> Task:
    """Hover from x, z +-1 m, pitch +-.8 rad, speeds +-.5 m/s, pitch rate +-.5 rad/s; each rotor pushes 0 to m g.

    Source: Tedrake, Underactuated Robotics, section 3.3 (the planar quadrotor), with Drake's parameters.

    Args:
        horizon: Number of steps of .025 s.
        mass: Mass [kg].
        inertia: Moment of inertia [kg m^2].
        arm: Distance of each rotor from the centre [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    mass, inertia, arm, g = accept("quadrotor2d", mass=mass, inertia=inertia, arm=arm, g=g)
    spread = jnp.asarray([1.0, 1.0, 0.8, 0.5, 0.5, 0.5], float)
    return Task(
        name="quadrotor2d",
        dynamics=Quadrotor2d(mass, inertia, arm, g),
        reward=HoverReward(mass * g / 2),
        terminal=HoverTerminal(),
        initial=Box(-spread, spread),
        features=HoverFeatures(),
        success=Hovering(),
        a_low=jnp.zeros(2, float),
        a_high=jnp.full(2, 1.0, float) * mass * g,
        horizon=horizon,
        dt=0.025,
    )
