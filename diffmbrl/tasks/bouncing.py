r"""A ball that bounces off the ground, with three models of the contact: alike in their bounces, not in their derivatives.

Between impacts the height is a parabola, $\ddot q = a/m - g$, which all but the penalty follow exactly. At an impact the
velocity jumps, $v^+ = -e v^-$. A start that is dq higher comes to the ground $dq/|v^-|$ later, and flies that much less
upwards: the derivative of what follows with respect to what was before is the *saltation matrix*

$$\begin{pmatrix} dq^+ \\ dv^+ \end{pmatrix} = \begin{pmatrix} -e & 0 \\ (1 + e)\,\alpha/v^- & -e \end{pmatrix}
\begin{pmatrix} dq^- \\ dv^- \end{pmatrix},\qquad \alpha = a/m - g.$$

Automatic differentiation finds it where the time of impact is computed (`TimeOfImpact`). Where the impact is put on the
grid of time steps (`OnTheGrid`) its time does not depend on the state, and the derivative has +1 in the place of -e: the
wrong sign.

Reference: Hu et al. 2020, DiffTaichi, section 4 (time of impact); Paulus et al. 2025, Hard Contacts with Soft Gradients;
Leine and Nijmeijer 2004, Dynamics and Bifurcations of Non-Smooth Mechanical Systems, chapter 7 (saltation).
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Dynamics, Task, parameter
from diffmbrl.tasks.parameters import accept, accept_real

FORCE = 1.0  # N


class TimeOfImpact(eqx.Module):
    """The flight to the ground, the impact, and the flight of the rest of the step: exact for one impact a step.

    A ball that would come down again within the step is laid on the ground.
    """

    mass: Float[Array, ""] = parameter(1.0)  # kg
    e: Float[Array, ""] = parameter(1.0)  # coefficient of restitution
    g: Float[Array, ""] = parameter(0.0)  # m/s^2
    dt: float = eqx.field(static=True, default=0.04)  # s

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        (q, v), alpha = s, a[0] / self.mass - self.g
        free = jnp.stack(_flight(q, v, alpha, jnp.asarray(self.dt, s.dtype)))
        impact = free[0] < 0
        # Only from above the ground: at rest on it, the square root would have an infinite derivative.
        falls = impact & (q > 0)
        speed = jnp.sqrt(jnp.where(falls, v**2 - 2 * alpha * q, 1))
        down = jnp.where(falls, speed, jnp.maximum(-v, 0))
        time = jnp.where(falls, 2 * q / jnp.where(falls, speed - v, 1), 0)
        bounced = jnp.stack(_flight(jnp.zeros_like(q), self.e * down, alpha, self.dt - time))
        landed = jnp.where(bounced[0] < 0, jnp.zeros_like(bounced), bounced)
        return jnp.where(impact, landed, free)


class OnTheGrid(eqx.Module):
    """The ideal bounce of a simulator with fixed steps: a step that would end below the ground is made with the velocity
    turned.

    The bounce is off by a step at most; the derivative with respect to the height has the wrong sign after each.
    """

    mass: Float[Array, ""] = parameter(1.0)  # kg
    e: Float[Array, ""] = parameter(1.0)  # coefficient of restitution
    g: Float[Array, ""] = parameter(0.0)  # m/s^2
    dt: float = eqx.field(static=True, default=0.04)  # s

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        (q, v), alpha = s, a[0] / self.mass - self.g
        q_free, v_free = _flight(q, v, alpha, jnp.asarray(self.dt, s.dtype))
        turned = -self.e * v_free
        impact = (q_free < 0) & (v_free < 0)
        return jnp.where(impact, jnp.stack([q + self.dt * turned, turned]), jnp.stack([q_free, v_free]))


class Penalty(eqx.Module):
    r"""A spring and a damper below the ground, $m\ddot q = a - mg - kq - c\dot q$, by the semi-implicit Euler step.

    The force jumps by c v where the ball enters and leaves, so the true derivative has a saltation there too, of the
    velocity, which automatic differentiation misses however small the step is. Without gravity that of the exit undoes that
    of the entry; with it the derivative stays wrong, or c = 0 leaves none to miss.
    """

    mass: Float[Array, ""] = parameter(1.0)  # kg
    k: Float[Array, ""] = parameter(50.0)  # N/m
    c: Float[Array, ""] = parameter(1.0)  # N s/m
    g: Float[Array, ""] = parameter(0.0)  # m/s^2
    dt: float = eqx.field(static=True, default=0.04)  # s

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        q, v = s
        contact = jnp.where(q < 0, -self.k * q - self.c * v, 0)
        v = v + self.dt * ((a[0] + contact) / self.mass - self.g)
        return jnp.stack([q + self.dt * v, v])


def _flight(q: Array, v: Array, alpha: Array, t: Array) -> tuple[Array, Array]:
    return q + v * t + alpha * t**2 / 2, v + alpha * t


class Effort(eqx.Module):
    """-.1 dt a^2."""

    dt: float = eqx.field(static=True, default=0.04)

    def __call__(self, s: Float[Array, "2"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return -0.1 * self.dt * a[0] ** 2


class FromTarget(eqx.Module):
    """phi = -|q - target|."""

    target: Float[Array, ""] = parameter(1.0)

    def __call__(self, s: Float[Array, "2"]) -> Float[Array, ""]:
        return -jnp.abs(s[0] - self.target)


class AtTarget(eqx.Module):
    """Success: within 5 cm of the target."""

    target: Float[Array, ""] = parameter(1.0)

    def __call__(self, s: Float[Array, "2"]) -> Array:
        return jnp.abs(s[0] - self.target) < 0.05


def bouncing(
    *, horizon: int = 50, mass: ScalarLike = 1.0, e: ScalarLike = 1.0, g: ScalarLike = 0.0, dt: float = 0.04
) -> Task:
    """Bounce a ball off the ground to be at 1 m after 2 s: impacts at their times, so derivatives are right.

    It comes down at 1 m/s from .2 to 2.8 m, without gravity unless g is given. Success: within 5 cm. `bouncing_on_the_grid` and
    `bouncing_penalty` are the same ball with other models of the contact.
    Source: Paulus et al. 2025, Hard Contacts with Soft Gradients, section 3, with a force on the ball.

    Args:
        horizon: Number of steps of `dt`.
        mass: Mass of the ball [kg].
        e: Coefficient of restitution.
        g: Gravity [m/s^2]; any finite number.
        dt: Duration of a step [s].

    Returns:
        The task.

    Raises:
        ValueError: If `g` is not finite, another parameter is not a finite positive number, or `horizon` is below
            1.
    """
    mass, e, dt = *accept("bouncing", mass=mass, e=e), _seconds("bouncing", dt)
    (g,) = accept_real("bouncing", g=g)
    return _ball("bouncing", TimeOfImpact(mass, e, g, dt), horizon, dt)


def bouncing_on_the_grid(
    *, horizon: int = 50, mass: ScalarLike = 1.0, e: ScalarLike = 1.0, g: ScalarLike = 0.0, dt: float = 0.04
) -> Task:
    """The bouncing ball with impacts at the time steps: after each, derivatives have the wrong sign.

    Args:
        horizon: Number of steps of `dt`.
        mass: Mass of the ball [kg].
        e: Coefficient of restitution.
        g: Gravity [m/s^2]; any finite number.
        dt: Duration of a step [s].

    Returns:
        The task.

    Raises:
        ValueError: If `g` is not finite, another parameter is not a finite positive number, or `horizon` is below
            1.
    """
    mass, e, dt = *accept("bouncing-on-the-grid", mass=mass, e=e), _seconds("bouncing-on-the-grid", dt)
    (g,) = accept_real("bouncing-on-the-grid", g=g)
    return _ball("bouncing-on-the-grid", OnTheGrid(mass, e, g, dt), horizon, dt)


def bouncing_penalty(
    *,
    horizon: int = 50,
    mass: ScalarLike = 1.0,
    k: ScalarLike = 50.0,
    c: ScalarLike = 1.0,
    g: ScalarLike = 0.0,
    dt: float = 0.04,
) -> Task:
    """The bouncing ball on a spring and damper, whose force jumps where contact begins and ends.

    Args:
        horizon: Number of steps of `dt`.
        mass: Mass of the ball [kg].
        k: Stiffness of the ground [N/m].
        c: Damping of the ground [N s/m]; any finite number.
        g: Gravity [m/s^2]; any finite number.
        dt: Duration of a step [s].

    Returns:
        The task.

    Raises:
        ValueError: If `c` or `g` is not finite, another parameter is not a finite positive number, or `horizon` is
            below 1.
    """
    mass, k = accept("bouncing-penalty", mass=mass, k=k)
    c, g = accept_real("bouncing-penalty", c=c, g=g)
    dt = _seconds("bouncing-penalty", dt)
    return _ball("bouncing-penalty", Penalty(mass, k, c, g, dt), horizon, dt)


def _seconds(name: str, dt: float) -> float:
    accept(name, dt=dt)
    return float(dt)


def _ball(name: str, dynamics: Dynamics, horizon: int, dt: float) -> Task:
    return Task(
        name=name,
        dynamics=dynamics,
        reward=Effort(dt),
        terminal=FromTarget(),
        initial=Box([0.2, -1.0], [2.8, -1.0]),
        success=AtTarget(),
        a_low=[-FORCE],
        a_high=[FORCE],
        horizon=horizon,
        dt=dt,
    )
