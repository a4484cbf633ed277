r"""Rewards, ends and successes of Brax's environments, from its formulas, as functions of (s, a) with their curvature.

Brax pays a step for the state that it reaches: $R_t = g(s_{t+1}) + h - c|a_t|^2$. A reward here is of the state before the
step, $r(s_t, a_t) = g(s_t) + h - c|a_t|^2$, and the last state is paid at the end, $\phi(s_T) = g(s_T)$; so

$$J = \sum_t R_t + g(s_0),$$

Brax's return and a number that no policy changes. (An episode that ends early at $s_k$ lacks $g(s_k)$: one step's share.)
`brax_rewards` gives $R_t$ itself, which the tests compare with Brax step by step. A reward read from Brax's state would be
linear in it, with a zero Gauss-Newton matrix; here the distances are functions of the joints.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffmbrl.core import Task, Trajectory, parameter
from diffmbrl.tasks.adapters.brax import Body, seen


def brax_rewards(task: Task, trajectory: Trajectory) -> Float[Array, " T"]:
    """Brax's own reward of each step of one trajectory, 0 after its end; their sum is the return that Brax reports."""
    reached = jnp.concatenate([trajectory.s[1:], trajectory.s_T[None]])
    r = jax.vmap(task.reward)(reached, trajectory.a)
    return jnp.where(trajectory.alive[:-1], r, 0)


class Upright(eqx.Module):
    """r = 1, for a task that ends with a fall."""

    def __call__(self, s: Float[Array, " n"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return jnp.ones((), s.dtype)


class NearlyUpright(eqx.Module):
    r"""$1 - .45 (\theta / .2)^2 - .45 x^2 - .1 a^2$: not negative before the fall or the ends of the rail at 1 m."""

    body: Body = eqx.field(static=True)
    weights: Float[Array, "3"] = parameter((0.45 / 0.2**2, 0.45, 0.1))

    def __call__(self, s: Float[Array, " n"], a: Float[Array, "1"]) -> Float[Array, ""]:
        x, angle = seen(self.body, s).q
        return 1 - self.weights.astype(s.dtype) @ jnp.stack([angle, x, a[0]]) ** 2


class Lean(eqx.Module):
    """Whether the pole leans more than .2 rad."""

    body: Body = eqx.field(static=True)
    angle: Float[Array, ""] = parameter(0.2)  # rad

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return jnp.abs(seen(self.body, s).q[1]) > self.angle


class Tip(eqx.Module):
    """Place of the tip of the second pole (x, z) [m]."""

    body: Body = eqx.field(static=True)

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, "2"]:
        return _point(self.body, s, 2, (0.0, 0.0, 0.6))[::2]


class Balanced(eqx.Module):
    r"""$h - .01 x^2 - (z - 2)^2 - .001 w_1^2 - .005 w_2^2$ with the tip (x, z), both rates, and h = 10."""

    tip: Tip
    alive: Float[Array, ""] = parameter(10.0)

    def __call__(self, s: Float[Array, " n"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return self.alive + self.posture(s)

    def posture(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        """The same without h."""
        (x, z), (w_1, w_2) = self.tip(s), seen(self.tip.body, s).qd[1:]
        return -(0.01 * x**2 + (z - 2) ** 2 + 1e-3 * w_1**2 + 5e-3 * w_2**2)


class LastPosture(eqx.Module):
    """Terminal reward: the reward of the last state without h."""

    balanced: Balanced

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        return self.balanced.posture(s)


class Down(eqx.Module):
    """Whether the tip is at 1 m or below."""

    tip: Tip
    height: Float[Array, ""] = parameter(1.0)  # m

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return self.tip(s)[1] <= self.height


class Miss(eqx.Module):
    """Fingertip less target [m]."""

    body: Body = eqx.field(static=True)

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, "3"]:
        return _point(self.body, s, 1, (0.11, 0.0, 0.0)) - seen(self.body, s).x.pos[2]


class ReachReward(eqx.Module):
    """-|miss| - |a|^2, and -|miss| at the end. Its slope at a miss of exactly 0 is 0."""

    miss: Miss

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"] | None = None) -> Float[Array, ""]:
        squared = jnp.sum(self.miss(s) ** 2)
        distance = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
        return -distance if a is None else -distance - jnp.sum(a**2)


class Reached(eqx.Module):
    """Success: the fingertip within 2 cm of the target."""

    miss: Miss

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return jnp.sum(self.miss(s) ** 2) < 0.02**2


class Forward(eqx.Module):
    """Forward speed + alive - control |a|^2; at the end, the speed alone."""

    control: Float[Array, ""]
    alive: Float[Array, ""]

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, ""]:
        return s[-1] + self.alive - self.control * jnp.sum(a**2)


class Speed(eqx.Module):
    """The mean forward speed of the last step [m/s]."""

    def __call__(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        return s[-1]


class Faster(eqx.Module):
    """Success: a last step faster than `speed` [m/s], and not fallen."""

    speed: Float[Array, ""]
    fallen: "Fallen | None"

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        fast = s[-1] > self.speed
        return fast if self.fallen is None else fast & ~self.fallen(s)


class Fallen(eqx.Module):
    """Whether the torso has left its range of heights, or of angles, or any number its bound."""

    body: Body = eqx.field(static=True)
    height: Float[Array, "2"]  # m
    angle: Float[Array, "2"] | None = None  # rad
    bound: Float[Array, ""] | None = None

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        state = seen(self.body, s)
        fine = _between(state.x.pos[0, 2], self.height)
        if self.angle is not None:
            fine &= _between(state.q[2], self.angle)
        if self.bound is not None:
            fine &= jnp.all(jnp.abs(jnp.concatenate([state.q[2:], state.qd])) < self.bound)
        return ~fine


class Not(eqx.Module):
    """Success: the end has not come."""

    end: eqx.Module

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return ~self.end(s)  # pyright: ignore[reportCallIssue]


def _between(x: Array, limits: Array) -> Array:
    return (limits[0] < x) & (x < limits[1])


def _point(body: Body, s: Array, link: int, offset: tuple[float, float, float]) -> Float[Array, "3"]:
    """Where a point of a link's frame is in the world."""
    x = seen(body, s).x
    v, (w, *u) = jnp.asarray(offset, s.dtype), x.rot[link]
    u = jnp.stack(u)
    return x.pos[link] + v + 2 * jnp.cross(u, jnp.cross(u, v) + w * v)
