"""Keep a rod upright on a cart and earn 1 a step until it falls: the two systems on which MBPO and its peers are compared."""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Dynamics, Task, parameter
from diffmbrl.tasks.integrate import rk4
from diffmbrl.tasks.parameters import accept


class RodOnCart(eqx.Module):
    r"""ds/dt of s = (x [m], angle [rad, 0 upright], v [m/s], w [rad/s]) under a force on the cart [N].

    $$\begin{pmatrix} m_c + m_p & m_p l\cos\phi \\ m_p l\cos\phi & I \end{pmatrix}
    \begin{pmatrix}\ddot x \\ \ddot\theta\end{pmatrix} =
    \begin{pmatrix} a + m_p l\,w^2\sin\phi - c_x v \\ m_p g l\sin\phi - c_\theta w \end{pmatrix},\quad \phi = \theta + \delta$$

    The centre of mass is `l` from the hinge, `lean` ($\delta$) off the line along which the angle is measured; `inertia` is
    about the hinge.
    """

    m_c: Float[Array, ""] = parameter(1.0)  # kg
    m_p: Float[Array, ""] = parameter(0.1)  # kg
    l: Float[Array, ""] = parameter(0.5)  # m
    inertia: Float[Array, ""] = parameter(0.1 * 0.5**2 * 4 / 3)  # kg m^2, of a rod of length 2 l
    g: Float[Array, ""] = parameter(9.8)  # m/s^2
    c_x: Float[Array, ""] = parameter(0.0)  # N s/m
    c_angle: Float[Array, ""] = parameter(0.0)  # N m s
    lean: Float[Array, ""] = parameter(0.0)  # rad

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, "4"]:
        _, angle, v, w = s
        sin, cos = jnp.sin(angle + self.lean), jnp.cos(angle + self.lean)
        moment = self.m_p * self.l
        total, coupling = self.m_c + self.m_p, moment * cos
        push = a[0] + moment * w**2 * sin - self.c_x * v
        turn = moment * self.g * sin - self.c_angle * w
        det = total * self.inertia - coupling**2
        return jnp.stack([v, w, (self.inertia * push - coupling * turn) / det, (total * turn - coupling * push) / det])


class Euler(eqx.Module):
    """The explicit Euler step, s + dt h(s, a), which puts energy into an oscillation: Gymnasium's cart-pole has it."""

    inner: RodOnCart
    dt: float = eqx.field(static=True, default=0.02)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        return s + self.dt * self.inner(s, a)


class RailWithEnds(eqx.Module):
    r"""Two RK4 steps of dt / 2 on a rail of finite length, at whose ends the cart stops dead.

    The stop acts on the cart alone, so the rod keeps its generalised momentum, $m_p l\cos\phi\,v + I w$: what the cart loses in
    speed throws the rod over.
    """

    inner: RodOnCart
    end: Float[Array, ""] = parameter(1.0)  # m
    dt: float = eqx.field(static=True, default=0.04)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        for _ in range(2):
            s = self._stopped(rk4(self.inner, s, a, self.dt / 2))
        return s

    def _stopped(self, s: Float[Array, "4"]) -> Float[Array, "4"]:
        x, angle, v, w = s
        thrown = w + self.inner.m_p * self.inner.l * jnp.cos(angle + self.inner.lean) * v / self.inner.inertia
        return jnp.where(
            jnp.abs(x) > self.end, jnp.stack([jnp.sign(x) * self.end, angle, jnp.zeros_like(v), thrown]), s
        )


class Standing(eqx.Module):
    """r = 1, for a task that ends when the rod falls."""

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return jnp.ones((), s.dtype)


class Fallen(eqx.Module):
    """Whether the angle or the cart has left its limits."""

    angle: Float[Array, ""] = parameter(0.2)  # rad
    x: Float[Array, ""] = parameter(jnp.inf)  # m

    def __call__(self, s: Float[Array, "4"]) -> Bool[Array, ""]:
        return (jnp.abs(s[1]) > self.angle) | (jnp.abs(s[0]) > self.x)


class StillStanding(eqx.Module):
    """Success: not fallen."""

    fallen: Fallen

    def __call__(self, s: Float[Array, "4"]) -> Bool[Array, ""]:
        return ~self.fallen(s)


class InUnits(eqx.Module):
    """s / size: each state variable in its own unit."""

    size: tuple[float, ...] = eqx.field(static=True)  # static: a policy would train a leaf of its features

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, "4"]:
        return s / jnp.asarray(self.size, s.dtype)


def cartpole_continuous(
    *, horizon: int = 200, m_c: ScalarLike = 1.0, m_p: ScalarLike = 0.1, l: ScalarLike = 0.5, g: ScalarLike = 9.8
) -> Task:
    """Gymnasium's CartPole with a force of any size up to 10 N: 1 a step until |angle| > 12 deg or |x| > 2.4 m.

    The pole is a rod of length 2 l. All four numbers start within .05 of 0; the best return is T. mbrl-lib's balancing
    cart-pole, whose action is the force in units of 10 N. The reward has no gradient.
    Source: Barto, Sutton, Anderson 1983, without friction; Florian 2007, Correct equations for the dynamics of the cart-pole.

    Args:
        horizon: Number of steps of .02 s.
        m_c: Mass of the cart [kg].
        m_p: Mass of the pole [kg].
        l: Half the length of the pole [m].
        g: Gravity [m/s^2].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m_c, m_p, l, g = accept("cartpole-continuous", m_c=m_c, m_p=m_p, l=l, g=g)
    rod = RodOnCart(m_c, m_p, l, 4 / 3 * m_p * l**2, g)
    limit = 12 * math.pi / 180
    fallen = Fallen(jnp.asarray(limit, float), jnp.asarray(2.4, float))
    units = (2.4, limit, 2.0, 2.0)
    return _standing("cartpole-continuous", Euler(rod), fallen, 0.05, 10.0, units, horizon, 0.02)


def inverted_pendulum(
    *,
    horizon: int = 1000,
    m_c: ScalarLike = 10.47197551,
    m_p: ScalarLike = 5.01859164,
    g: ScalarLike = 9.81,
    c_x: ScalarLike = 1.0,
    c_angle: ScalarLike = 1.0,
) -> Task:
    """MuJoCo's InvertedPendulum: 1 a step until |angle| > .2, on a rail of 2 m; a force of up to 300 N, held for .04 s.

    All four numbers start within .01 of 0; the best return is T. The equations are our own and agree with MuJoCo's to rounding
    between the ends of the rail, where its soft stop is here a dead one. The reward has no gradient.
    Source: Gymnasium's InvertedPendulum (v4: the step of the fall earns 1, too), after the Brax and OpenAI Gym tasks.

    Args:
        horizon: Number of steps of .04 s.
        m_c: Mass of the cart [kg].
        m_p: Mass of the pole [kg].
        g: Gravity [m/s^2].
        c_x: Friction of the rail [N s/m].
        c_angle: Friction of the hinge [N m s].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    m_c, m_p, g, c_x, c_angle = accept("inverted-pendulum", m_c=m_c, m_p=m_p, g=g, c_x=c_x, c_angle=c_angle)
    length = jnp.hypot(jnp.asarray(0.6, float), 0.001)  # leaning by .001 m
    inertia, lean = capsule_inertia(m_p, length), jnp.arctan(jnp.asarray(0.001 / 0.6, float))
    rod = RodOnCart(m_c, m_p, length / 2, inertia, g, c_x, c_angle, lean)
    return _standing("inverted-pendulum", RailWithEnds(rod), Fallen(), 0.01, 300.0, (1.0, 0.2, 2.0, 2.0), horizon, 0.04)


def capsule_inertia(m_p: Array, length: Array, radius: float = 0.049) -> Float[Array, ""]:
    """About the centre of one cap, of a solid capsule of mass m_p, `length` between the centres of its caps."""
    tube, caps = length, 4 / 3 * radius  # volumes over pi radius^2
    about_centre = (tube * (3 * radius**2 + length**2) / 12) + caps * (
        2 / 5 * radius**2 + length**2 / 4 + 3 / 8 * radius * length
    )
    return m_p * (about_centre / (tube + caps) + length**2 / 4)


def _standing(
    name: str,
    dynamics: Dynamics,
    fallen: Fallen,
    spread: float,
    force: float,
    units: tuple[float, ...],
    horizon: int,
    dt: float,
):
    spreads = jnp.full(4, spread, float)
    return Task(
        name=name,
        dynamics=dynamics,
        reward=Standing(),
        initial=Box(-spreads, spreads),
        features=InUnits(units),
        done=fallen,
        success=StillStanding(fallen),
        a_low=[-force],
        a_high=[force],
        horizon=horizon,
        dt=dt,
    )
