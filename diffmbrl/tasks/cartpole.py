"""A cart on a rail with a point mass on a massless pole: balancing, and swinging up from hanging."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept
from diffmbrl.tasks.tilt import tilt

FORCE = 10.0  # N


class CartPole(eqx.Module):
    r"""State (x [m], angle [rad, 0 upright], v [m/s], w [rad/s]), action: force on the cart [N]; one RK4 step of dt.

    $\ddot x = \frac{a + m_p\sin\theta\,(l\,w^2 - g\cos\theta)}{m_c + m_p\sin^2\theta}$,
    $\ddot\theta = (g\sin\theta - \ddot x\cos\theta)/l$
    """

    m_c: Float[Array, ""] = parameter(1.0)  # kg
    m_p: Float[Array, ""] = parameter(0.3)  # kg
    l: Float[Array, ""] = parameter(0.5)  # m
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    dt: float = eqx.field(static=True, default=0.05)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        return rk4(self.derivative, s, a, self.dt)

    def derivative(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, "4"]:
        """ds/dt."""
        _, angle, v, w = s
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        acceleration = (a[0] + self.m_p * sin * (self.l * w**2 - self.g * cos)) / (self.m_c + self.m_p * sin**2)
        return jnp.stack([v, w, acceleration, (self.g * sin - acceleration * cos) / self.l])


class CartPoleReward(eqx.Module):
    """-dt (.5 x^2 + 2 (1 - cos angle) + .05 v^2 + .05 w^2 + .01 a^2)."""

    dt: float = eqx.field(static=True, default=0.05)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, ""]:
        x, angle, v, w = s
        cost = 0.5 * x**2 + 2 * tilt(angle) + 0.05 * v**2 + 0.05 * w**2 + 0.01 * a[0] ** 2
        return -self.dt * cost


class CartPoleTerminal(eqx.Module):
    """-(5 x^2 + 20 (1 - cos angle) + v^2 + w^2)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, ""]:
        x, angle, v, w = s
        return -(5 * x**2 + 20 * tilt(angle) + v**2 + w**2)


class CartPoleFeatures(eqx.Module):
    """(x, cos angle, sin angle, v / 3, w / 8)."""

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, "5"]:
        x, angle, v, w = s
        return jnp.stack([x, jnp.cos(angle), jnp.sin(angle), v / 3, w / 8])


class Balanced(eqx.Module):
    """Success: |x| < .5 m, cos(angle) > .95 and |v|, |w| < 1 at the end."""

    def __call__(self, s: Float[Array, "4"]) -> Array:
        x, angle, v, w = s
        return (jnp.abs(x) < 0.5) & (jnp.cos(angle) > 0.95) & (jnp.abs(v) < 1) & (jnp.abs(w) < 1)


def cartpole_balance(
    *, horizon: int = 100, m_c: ScalarLike = 1.0, m_p: ScalarLike = 0.3, l: ScalarLike = 0.5, g: ScalarLike = 9.81
) -> Task:
    """Balance from wide starts: x +-1 m, angle +-.6 rad, rates +-.5; force limit 10 N.

    The cost is -reward, near .8 for a good policy. Equations: Barto, Sutton, Anderson 1983 without friction and with a point
    mass; Tedrake, Underactuated Robotics, section 3.2.

    Args:
        horizon: Number of steps of .05 s.
        m_c: Mass of the cart [kg].
        m_p: Mass of the pole's tip [kg].
        l: Length of the pole [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    return _cartpole("cartpole-balance", [1.0, 0.6, 0.5, 0.5], 0.0, horizon, m_c, m_p, l, g)


def cartpole_swingup(
    *, horizon: int = 100, m_c: ScalarLike = 1.0, m_p: ScalarLike = 0.3, l: ScalarLike = 0.5, g: ScalarLike = 9.81
) -> Task:
    """The same system and costs from hanging: x +-.5 m, angle pi +-.5 rad, rates +-.2.

    Equations as for `cartpole_balance`.

    Args:
        horizon: Number of steps of .05 s.
        m_c: Mass of the cart [kg].
        m_p: Mass of the pole's tip [kg].
        l: Length of the pole [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    return _cartpole("cartpole-swingup", [0.5, 0.5, 0.2, 0.2], jnp.pi, horizon, m_c, m_p, l, g)


def _cartpole(name: str, spread: list[float], angle: float, horizon: int, m_c, m_p, l, g) -> Task:
    m_c, m_p, l, g = accept(name, m_c=m_c, m_p=m_p, l=l, g=g)
    centre, spread_ = jnp.asarray([0.0, angle, 0.0, 0.0], float), jnp.asarray(spread, float)
    return Task(
        name=name,
        dynamics=CartPole(m_c, m_p, l, g),
        reward=CartPoleReward(),
        terminal=CartPoleTerminal(),
        initial=Box(centre - spread_, centre + spread_),
        features=CartPoleFeatures(),
        success=Balanced(),
        a_low=[-FORCE],
        a_high=[FORCE],
        horizon=horizon,
        dt=0.05,
    )
