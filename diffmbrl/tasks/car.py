"""A car that parks at the origin, past round obstacles."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.constraints import Constraints
from diffmbrl.core import Box, Task, as_float, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.tilt import tilt

STEERING, ACCELERATION = 0.6, 3.0  # rad, m/s^2
OBSTACLES = ((-8.0, 0.8), (-4.0, -0.8))  # m


class Bicycle(eqx.Module):
    r"""State (x, y [m], heading [rad], speed [m/s]) of the rear axle, action (steering [rad], acceleration [m/s^2]); RK4.

    $\dot x = v\cos\psi$, $\dot y = v\sin\psi$, $\dot\psi = v\tan(a_1)/L$, $\dot v = a_2$
    """

    wheelbase: Float[Array, ""] = parameter(2.5)  # m
    dt: float = eqx.field(static=True, default=0.1)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "2"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        return rk4(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, "4"]:
        """ds/dt."""
        heading, speed = s[2], s[3]
        turn = speed * jnp.tan(a[0]) / self.wheelbase
        return jnp.stack([speed * jnp.cos(heading), speed * jnp.sin(heading), turn, a[1]])


class Obstacles(eqx.Module):
    r"""Round ones that the rear axle must not enter: $(\rho_i^2 - |p - c_i|^2) / (2 \rho_i) \le 0$.

    Near the edge this is the depth inside in metres, and unlike the distance it is smooth everywhere.
    """

    centres: Float[Array, "k 2"] = eqx.field(converter=as_float)
    radii: Float[Array, " k"] = eqx.field(converter=as_float)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, " k"]:
        return (self.radii**2 - jnp.sum((s[:2] - self.centres) ** 2, axis=-1)) / (2 * self.radii)


class ParkReward(eqx.Module):
    """-dt (.05 x^2 + .1 y^2 + .2 (1 - cos heading) + .05 v^2 + .5 a_1^2 + .05 a_2^2)."""

    dt: float = eqx.field(static=True, default=0.1)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "2"]) -> Float[Array, ""]:
        x, y, heading, speed = s
        place = 0.05 * x**2 + 0.1 * y**2 + 0.2 * tilt(heading)
        return -self.dt * (place + 0.05 * speed**2 + 0.5 * a[0] ** 2 + 0.05 * a[1] ** 2)


class ParkTerminal(eqx.Module):
    """-(5 (x^2 + y^2) + 20 (1 - cos heading) + 2 v^2)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, ""]:
        x, y, heading, speed = s
        return -(5 * (x**2 + y**2) + 20 * tilt(heading) + 2 * speed**2)


class CarFeatures(eqx.Module):
    """(x / 10, y / 3, cos heading, sin heading, v / 3)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, "5"]:
        x, y, heading, speed = s
        return jnp.stack([x / 10, y / 3, jnp.cos(heading), jnp.sin(heading), speed / 3])


class Parked(eqx.Module):
    """Success: within .5 m of the origin, cos(heading) > .97 (14 degrees) and slower than .5 m/s at the end."""

    def __call__(self, s: Float[Array, "4"]) -> Array:
        return (jnp.sum(s[:2] ** 2) < 0.5**2) & (jnp.cos(s[2]) > 0.97) & (jnp.abs(s[3]) < 0.5)


def car(*, horizon: int = 80, wheelbase: ScalarLike = 2.5, radius: ScalarLike = 1.5) -> Task:
    """Park at the origin, heading along x, from 11 to 13 m behind it, past two round obstacles in the way.

    Starts: y +-1.5 m, heading +-.4 rad, speed 0 to 2 m/s; steering up to .6 rad, acceleration up to 3 m/s^2. Success: within
    .5 m of the origin, cos(heading) above .97, slower than .5 m/s at the end. The obstacles, of `radius` (the car's half width
    included), are in `task.constraints` alone: the reward does not know them, and a method that knows no constraints drives
    through. Source: the kinematic bicycle of Rajamani 2012, Vehicle Dynamics and Control, section 2.2, at the rear axle.

    Args:
        horizon: Number of steps of .1 s.
        wheelbase: Distance between the axles [m].
        radius: Radius of the obstacles, half the width of the car included [m].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    wheelbase, radius = accept("car", wheelbase=wheelbase, radius=radius)
    return Task(
        name="car",
        dynamics=Bicycle(wheelbase),
        reward=ParkReward(),
        terminal=ParkTerminal(),
        initial=Box([-13.0, -1.5, -0.4, 0.0], [-11.0, 1.5, 0.4, 2.0]),
        features=CarFeatures(),
        success=Parked(),
        constraints=Constraints(inequality=Obstacles(OBSTACLES, radius * jnp.ones(len(OBSTACLES), radius.dtype))),
        a_low=[-STEERING, -ACCELERATION],
        a_high=[STEERING, ACCELERATION],
        horizon=horizon,
        dt=0.1,
    )
