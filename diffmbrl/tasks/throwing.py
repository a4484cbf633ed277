"""A ball thrown over a wall: hit it, and the ball lies at its foot."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.landscapes import NoReward
from diffmbrl.tasks.parameters import accept


class Throw(eqx.Module):
    r"""State (distance of the wall [m], where the last ball lies [m]), action: the angle $\theta$ of a throw [rad].

    The flight ends at $x_t = 2 v^2 \sin\theta\cos\theta / g$. If the wall is nearer than that, at d, and the ball's height
    there, $y = d\tan\theta - g d^2 / (2 v^2 \cos^2\theta)$, is at most the wall's, it ends at d. The landing jumps at the
    angle that just clears the wall, and there is no gradient in `height`.
    """

    v: Float[Array, ""] = parameter(1.0)  # m/s
    g: Float[Array, ""] = parameter(9.81)  # m/s^2
    height: Float[Array, ""] = parameter(0.02)  # m

    def __call__(
        self, s: Float[Array, "2"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "2"]:
        d, angle = s[0], a[0]
        flight = self.reach() * jnp.sin(2 * angle)
        # The height times cos^2, which is finite straight up.
        c = jnp.cos(angle)
        low = d * jnp.sin(angle) * c - self.g * d**2 / (2 * self.v**2) <= self.height * c**2
        return jnp.stack([d, jnp.where((flight > d) & low, d, flight)])

    def reach(self) -> Float[Array, ""]:
        """The longest flight [m], at 45 degrees."""
        return self.v**2 / self.g


class Farthest(eqx.Module):
    """phi = x^2 - reach^2, at most 0: how far the ball has flown."""

    reach: Float[Array, ""] = parameter(1 / 9.81)

    def __call__(self, s: Float[Array, "2"]) -> Float[Array, ""]:
        return s[1] ** 2 - self.reach**2


class OverTheWall(eqx.Module):
    """Success: the ball lies beyond the wall."""

    def __call__(self, s: Float[Array, "2"]) -> Array:
        return s[1] > s[0]


def ball_and_wall(*, horizon: int = 1, v: ScalarLike = 1.0, g: ScalarLike = 9.81, height: ScalarLike = 0.02) -> Task:
    """Throw a ball as far as it goes, over a wall of 2 cm at 5.5 to 6.5 cm: one decision, whose result jumps.

    The reward is the square of the distance, less that of the longest flight; only the last of several
    throws counts. Success: over the wall. Source: Suh et al. 2022, Do Differentiable Simulators Give Better Policy
    Gradients, section 3 (wall at 6 cm).

    Args:
        horizon: Number of throws.
        v: Speed of the throw [m/s].
        g: Gravity [m/s^2].
        height: Height of the wall [m].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    v, g, height = accept("ball-and-wall", v=v, g=g, height=height)
    throw = Throw(v, g, height)
    return Task(
        name="ball-and-wall",
        dynamics=throw,
        reward=NoReward(),
        terminal=Farthest(throw.reach()),
        initial=Box([0.055, 0.0], [0.065, 0.0]),
        success=OverTheWall(),
        a_low=[-0.3],
        a_high=[0.8],
        horizon=horizon,
        dt=1.0,
    )
