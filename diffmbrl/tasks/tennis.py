r"""A racket under a falling ball: return it to a point, or miss it.

The racket is a line of half width w through (p, 0), tilted by $\varphi$, whose speeds are the actions; the ball is a
point. Its distance from the racket's line is $d = n \cdot (x - p)$ with the normal $n = (-\sin\varphi, \cos\varphi)$. Where
d falls to 0 within w of the racket's middle the ball bounces off:

$$v^+ = v^- - (1 + e)\,(n \cdot v_\mathrm{rel})\,n,\qquad v_\mathrm{rel} = v^- - v_\mathrm{racket}$$

at the time of impact, which Newton's method finds within the step, so that derivatives are right (`bouncing.py`). Beyond w
it falls past: the return jumps at the racket's edge.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.parameters import accept

TARGET = (0.8, 0.4)  # m
NEWTON = 2  # steps from the chord's root: of an error of 1e-4 s they leave 1e-16


class Racket(eqx.Module):
    """State (ball x, z [m], v_x, v_z [m/s], racket p [m], tilt [rad]), action: the racket's speed [m/s] and turn [rad/s].

    Exact for actions held constant, to rounding, and one impact a step.
    """

    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    e: Float[Array, ""] = parameter(0.9)  # coefficient of restitution
    w: Float[Array, ""] = parameter(0.15)  # m, half the racket's width
    dt: float = eqx.field(static=True, default=0.015)  # s

    def __call__(
        self, s: Float[Array, "6"], a: Float[Array, "2"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "6"]:
        # In scalars: slicing and stacking the state at every use makes the reverse pass several times as long to compile.
        x, z, v_x, v_z, p, tilt = s
        dt = jnp.asarray(self.dt, s.dtype)

        def seen(t):
            """From the racket at time t: normal, distance, its rate and the place along the racket."""
            sine, cosine = jnp.sin(tilt + a[1] * t), jnp.cos(tilt + a[1] * t)
            r_x, r_z = x - p + (v_x - a[0]) * t, z + v_z * t - self.g * t**2 / 2
            along = cosine * r_x + sine * r_z
            rate = cosine * (v_z - self.g * t) - sine * (v_x - a[0]) - a[1] * along
            return sine, cosine, cosine * r_z - sine * r_x, rate, along

        before, after = seen(jnp.zeros_like(dt))[2], seen(dt)[2]
        crosses = (before > 0) & (after <= 0)
        time = jnp.where(crosses, dt * before / jnp.where(crosses, before - after, 1), 0)
        for _ in range(NEWTON):
            _, _, distance, rate, _ = seen(time)
            time = jnp.where(crosses, time - distance / jnp.where(crosses, rate, 1), 0)
        sine, cosine, _, rate, along = seen(time)
        # At the racket the rate of the distance is the speed at which it meets the ball. Without a hit the impulse is 0.
        impulse = jnp.where(crosses & (jnp.abs(along) <= self.w), -(1 + self.e) * rate, 0)
        left = dt - time
        x, z = x + v_x * dt, z + v_z * dt - self.g * dt**2 / 2
        x, z = x - impulse * sine * left, z + impulse * cosine * left
        v_x, v_z = v_x - impulse * sine, v_z + impulse * cosine - self.g * dt
        return jnp.stack([x, z, v_x, v_z, p + a[0] * dt, tilt + a[1] * dt])


class Moving(eqx.Module):
    """-.01 dt |a|^2."""

    dt: float = eqx.field(static=True, default=0.015)

    def __call__(self, s: Float[Array, "6"], a: Float[Array, "2"]) -> Float[Array, ""]:
        return -0.01 * self.dt * jnp.sum(a**2)


class ToTarget(eqx.Module):
    """phi = -|ball - target|^2."""

    def __call__(self, s: Float[Array, "6"]) -> Float[Array, ""]:
        return -jnp.sum(_miss(s) ** 2)


class OnTarget(eqx.Module):
    """Success: the ball within .2 m of the target at the end."""

    def __call__(self, s: Float[Array, "6"]) -> Array:
        return jnp.sum(_miss(s) ** 2) < 0.2**2


def _miss(s: Float[Array, "6"]) -> Float[Array, "2"]:
    return s[:2] - jnp.asarray(TARGET, s.dtype)


def tennis(*, horizon: int = 60, g: ScalarLike = 9.81, e: ScalarLike = 0.9, w: ScalarLike = 0.15) -> Task:
    """Return a ball that falls from .8 m with a racket 30 cm wide, to be at (.8, .4) m after .9 s; a miss costs a jump.

    The ball starts within .5 m of the racket's middle, up to .3 m/s aside. Success: within .2 m of the target. Source:
    after the tennis of Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients, section 5, with gravity,
    and with the racket's own motion in the impact, which the published code leaves out.

    Args:
        horizon: Number of steps of .015 s.
        g: Gravity [m/s^2].
        e: Coefficient of restitution.
        w: Half the width of the racket [m].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    g, e, w = accept("tennis", g=g, e=e, w=w)
    return Task(
        name="tennis",
        dynamics=Racket(g, e, w),
        reward=Moving(),
        terminal=ToTarget(),
        initial=Box([-0.5, 0.7, -0.3, 0.0, 0.0, 0.0], [0.5, 0.9, 0.3, 0.0, 0.0, 0.0]),
        success=OnTarget(),
        a_low=[-3.0, -5.0],
        a_high=[3.0, 5.0],
        horizon=horizon,
        dt=0.015,
    )
