"""A quadrotor in space: hover at the origin from wide starts, or fly to a waypoint."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept, accept_real
from diffmbrl.tasks.tilt import tilt

TORQUES = (0.05, 0.05, 0.02)  # N m


class Quadrotor(eqx.Module):
    r"""State (position [m], roll, pitch, yaw [rad], world velocity [m/s], body rates [rad/s]); RK4.

    Action (thrust [N], body torques [N m]). With $R = R_z(yaw) R_y(pitch) R_x(roll)$, z up, and J the diagonal inertia,

    $\dot p = v$, $m\dot v = R e_z a_1 - m g e_z$, $J\dot w = \tau - w\times Jw$, and the rates of roll, pitch and yaw are
    $w_1 + (w_2\sin\phi + w_3\cos\phi)\tan\theta$, $w_2\cos\phi - w_3\sin\phi$, $(w_2\sin\phi + w_3\cos\phi)/\cos\theta$.

    The angles are singular at a pitch of 90 degrees: for flight that stays clear of it.
    """

    mass: Float[Array, ""] = parameter(0.5)  # kg
    inertia: Float[Array, "3"] = parameter((0.0023, 0.0023, 0.004))  # kg m^2
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    dt: float = eqx.field(static=True, default=0.025)  # s

    def __call__(
        self, s: Float[Array, "12"], a: Float[Array, "4"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "12"]:
        return rk4(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "12"], a: Float[Array, "4"]) -> Float[Array, "12"]:
        """ds/dt."""
        w = s[9:]
        (sin_r, sin_p, sin_y), (cos_r, cos_p, cos_y) = jnp.sin(s[3:6]), jnp.cos(s[3:6])
        up = jnp.stack(
            [cos_y * sin_p * cos_r + sin_y * sin_r, sin_y * sin_p * cos_r - cos_y * sin_r, cos_p * cos_r]
        )  # the body's z axis in the world
        swing = w[1] * sin_r + w[2] * cos_r
        rates = jnp.stack([w[0] + swing * sin_p / cos_p, w[1] * cos_r - w[2] * sin_r, swing / cos_p])
        force = up * (a[0] / self.mass) - self.g * jnp.asarray([0.0, 0.0, 1.0], s.dtype)
        return jnp.concatenate([s[6:9], rates, force, (a[1:] - jnp.cross(w, self.inertia * w)) / self.inertia])


class FlyReward(eqx.Module):
    """-dt (d(s) + .05 (thrust - m g)^2 + 20 |torques|^2), d as in `distance`."""

    target: Float[Array, "3"]  # m
    hover: Float[Array, ""]  # N, the weight
    dt: float = eqx.field(static=True, default=0.025)

    def __call__(self, s: Float[Array, "12"], a: Float[Array, "4"]) -> Float[Array, ""]:
        effort = 0.05 * (a[0] - self.hover) ** 2 + 20 * jnp.sum(a[1:] ** 2)
        return -self.dt * (distance(s, self.target) + effort)


class FlyTerminal(eqx.Module):
    """-10 d(s)."""

    target: Float[Array, "3"]

    def __call__(self, s: Float[Array, "12"]) -> Float[Array, ""]:
        return -10 * distance(s, self.target)


def distance(s: Float[Array, "12"], target: Float[Array, "3"]) -> Float[Array, ""]:
    """|p - target|^2 + sum of (1 - cos) of roll, pitch and yaw + .1 |v|^2 + .02 |w|^2."""
    tilts = jnp.sum(tilt(s[3:6]))
    return jnp.sum((s[:3] - target) ** 2) + tilts + 0.1 * jnp.sum(s[6:9] ** 2) + 0.02 * jnp.sum(s[9:] ** 2)


class FlyFeatures(eqx.Module):
    """(p, cos and sin of the three angles, v / 2, w / 3)."""

    def __call__(self, s: Float[Array, "12"]) -> Float[Array, "15"]:
        return jnp.concatenate([s[:3], jnp.cos(s[3:6]), jnp.sin(s[3:6]), s[6:9] / 2, s[9:] / 3])


class Arrived(eqx.Module):
    """Success: within .3 m of the target, cosines of roll and pitch above .95, slower than 1 m/s at the end."""

    target: Float[Array, "3"]

    def __call__(self, s: Float[Array, "12"]) -> Array:
        near = jnp.sum((s[:3] - self.target) ** 2) < 0.3**2
        return near & jnp.all(jnp.cos(s[3:5]) > 0.95) & (jnp.sum(s[6:9] ** 2) < 1)


def quadrotor(*, horizon: int = 100, mass: ScalarLike = 0.5, g: ScalarLike = 9.81) -> Task:
    """Hover at the origin from +-1 m, angles +-.3 rad, speeds +-.3 m/s, body rates +-.3 rad/s.

    Thrust 0 to 2 m g, torques up to .05 N m about roll and pitch and .02 about yaw. Success: within .3 m of the origin, cosines
    of roll and pitch above .95, slower than 1 m/s at the end. Equations: Beard 2008, Quadrotor Dynamics and Control (Euler
    angles, with z up here).

    Args:
        horizon: Number of steps of .025 s.
        mass: Mass [kg].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    spread = jnp.asarray([1.0] * 3 + [0.3] * 9, float)
    return _fly("quadrotor", jnp.zeros(3, float), spread, horizon, mass, g)


def quadrotor_waypoint(
    *,
    horizon: int = 100,
    mass: ScalarLike = 0.5,
    g: ScalarLike = 9.81,
    x: ScalarLike = 2.0,
    y: ScalarLike = 1.5,
    z: ScalarLike = 1.0,
) -> Task:
    """The same quadrotor flies from about the origin, +-.2 m and +-.1 in all else, to the waypoint (x, y, z), and stays.

    Limits, success and sources as for `quadrotor`, about the waypoint.

    Args:
        horizon: Number of steps of .025 s.
        mass: Mass [kg].
        g: Gravity [m/s^2].
        x, y, z: Coordinates of the waypoint [m]; any finite numbers.

    Returns:
        The task.

    Raises:
        ValueError: If a coordinate is not finite, another parameter is not a finite positive number, or `horizon`
            is below 1.
    """
    target = jnp.stack(accept_real("quadrotor-waypoint", x=x, y=y, z=z))
    spread = jnp.asarray([0.2] * 3 + [0.1] * 9, float)
    return _fly("quadrotor-waypoint", target, spread, horizon, mass, g)


def _fly(name: str, target: Array, spread: Array, horizon: int, mass: ScalarLike, g: ScalarLike) -> Task:
    mass_, g_ = accept(name, mass=mass, g=g)
    torques, one = jnp.asarray(TORQUES, float), jnp.ones(1, float)
    return Task(
        name=name,
        dynamics=Quadrotor(mass=mass_, g=g_),
        reward=FlyReward(target, mass_ * g_),
        terminal=FlyTerminal(target),
        initial=Box(-spread, spread),
        features=FlyFeatures(),
        success=Arrived(target),
        a_low=jnp.concatenate([0 * one, -torques]),
        a_high=jnp.concatenate([2 * mass_ * g_ * one, torques]),
        horizon=horizon,
        dt=0.025,
    )
