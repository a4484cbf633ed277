r"""Two bodies on a line, the first of which is moved by a force: it pushes the second, or carries it along by friction.

Both tasks shall bring the second body to a goal, at a cost $e^\top Q e + R a^2$ each step and $e^\top Q e$ at the end,
where e is the distance of the state (x_1, x_2, v_1, v_2) from the goal. The forces between the bodies come and go with
their distance.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, as_float, parameter
from diffmbrl.tasks.parameters import accept

WEIGHTS = (0.1, 10.0, 0.1, 0.1)  # the diagonal of Q
FORCE = 5.0  # N


class Pushing(eqx.Module):
    r"""A spring between the bodies that only pushes: $F = k (x_2 - x_1 - 1)$ when they are less than 1 m apart, else 0.

    $v_1' = c v_1 + \tfrac{h}{m}(F + a)$, $v_2' = c v_2 - \tfrac{h}{m} F$, $x' = x + h v'$ (semi-implicit Euler), c the
    share of the speed left after a step. A touching pair oscillates with $\omega^2 = 2k/m$: the step is stable up to
    $h^2\omega^2 = 2(1 + c)$, k = `stable()`, but from half of that on a single step of contact can throw the bodies apart
    faster than they met.
    """

    k: Float[Array, ""] = parameter(100.0)  # N/m
    mass: Float[Array, ""] = parameter(0.1)  # kg, of each
    keep: Float[Array, ""] = parameter(0.99)  # of the speed after a step
    dt: float = eqx.field(static=True, default=0.005)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        overlap = s[1] - s[0] - 1
        force = jnp.where(overlap < 0, self.k * overlap, 0)
        return _advance(s, jnp.stack([force + a[0], -force]) / self.mass, self.keep, self.dt)

    def stable(self) -> Float[Array, ""]:
        """The stiffness [N/m] up to which the step is stable for a pair that stays in touch; half of it keeps impacts tame."""
        return (1 + self.keep) * self.mass / self.dt**2


class Friction(eqx.Module):
    r"""A block on a sled: $F = \mu\,\mathrm{clip}((v_1 - v_2)/v_s, -1, 1)$ pulls the block along, until it falls off.

    $v_1' = v_1 + \tfrac{h}{m}(a - F)$, $v_2' = v_2 + \tfrac{h}{m} F$, $x' = x + h v'$. There is friction only while the
    block's middle lies on the sled, $|x_2 - x_1| <$ `width`: accelerate faster than mu/m, and it slips, and then is left
    behind for good.
    """

    mu: Float[Array, ""] = parameter(0.18)  # N, largest friction
    v_s: Float[Array, ""] = parameter(0.1)  # m/s, the slip at which it is reached
    mass: Float[Array, ""] = parameter(0.1)  # kg, of each
    width: Float[Array, ""] = parameter(0.1)  # m, half the sled's length
    dt: float = eqx.field(static=True, default=0.005)  # s

    def __call__(
        self, s: Float[Array, "4"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "4"]:
        slip = jnp.clip((s[2] - s[3]) / self.v_s, -1, 1)
        force = jnp.where(jnp.abs(s[1] - s[0]) < self.width, self.mu * slip, 0)
        return _advance(s, jnp.stack([a[0] - force, force]) / self.mass, jnp.ones_like(self.mass), self.dt)


def _advance(
    s: Float[Array, "4"], acceleration: Float[Array, "2"], keep: Float[Array, ""], dt: float
) -> Float[Array, "4"]:
    v = keep * s[2:] + dt * acceleration
    return jnp.concatenate([s[:2] + dt * v, v])


class GoalReward(eqx.Module):
    """-(e'Qe + R a^2), e = s - goal."""

    goal: Float[Array, "4"] = eqx.field(converter=as_float)
    R: Float[Array, ""] = parameter(1.0)

    def __call__(self, s: Float[Array, "4"], a: Float[Array, "1"]) -> Float[Array, ""]:
        return -(_distance(s, self.goal) + self.R * a[0] ** 2)


class GoalTerminal(eqx.Module):
    """-e'Qe."""

    goal: Float[Array, "4"] = eqx.field(converter=as_float)

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, ""]:
        return -_distance(s, self.goal)


def _distance(s: Float[Array, "4"], goal: Float[Array, "4"]) -> Float[Array, ""]:
    return jnp.sum(jnp.asarray(WEIGHTS, s.dtype) * (s - goal) ** 2)


class Delivered(eqx.Module):
    """Success: the second body within .1 m of its goal, slower than .3 m/s."""

    goal: Float[Array, "4"] = eqx.field(converter=as_float)

    def __call__(self, s: Float[Array, "4"]) -> Array:
        return (jnp.abs(s[1] - self.goal[1]) < 0.1) & (jnp.abs(s[3]) < 0.3)


class FromGoal(eqx.Module):
    """Features: (x_1, x_2) from their goals [m], v_1, v_2 [m/s]."""

    goal: tuple[float, ...] = eqx.field(static=True)

    def __call__(self, s: Float[Array, "4"]) -> Float[Array, "4"]:
        return s - jnp.asarray(self.goal, s.dtype)


def pushing(
    *, horizon: int = 200, k: ScalarLike = 100.0, mass: ScalarLike = 0.1, keep: ScalarLike = 0.99, dt: float = 0.005
) -> Task:
    """Push a body 1 m on in a second, through a spring of stiffness k; starts with x_1 within .1 m of touching, at rest.

    Neither body is pulled: the force is not smooth where they touch, and its slope grows with k. Success: the second body
    within .1 m of x = 2, slower than .3 m/s. Source: Suh et al. 2022, Do Differentiable Simulators Give Better Policy
    Gradients, section 5.

    Args:
        horizon: Number of steps of `dt`.
        k: Stiffness of the spring between the bodies [N/m].
        mass: Mass of each body [kg].
        keep: Fraction of the speed left after a step.
        dt: Duration of a step [s].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    k, mass, keep = accept("pushing", k=k, mass=mass, keep=keep)
    start = (0.0, 1.0, 0.0, 0.0)
    return _two_bodies("pushing", Pushing(k, mass, keep, dt), (1.0, 2.0, 0.0, 0.0), start, 0.1, horizon, dt)


def friction(
    *,
    horizon: int = 400,
    mu: ScalarLike = 0.18,
    v_s: ScalarLike = 0.1,
    mass: ScalarLike = 0.1,
    width: ScalarLike = 0.1,
    dt: float = 0.005,
) -> Task:
    """Carry a block 2 m on in two seconds on a sled that holds it by friction alone; starts within 5 cm of its middle.

    Pulled too hard the block slips off, and the return jumps. Success: the block within .1 m of x = 2, slower than .3 m/s.
    Source: Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients, section 5, with a limit of friction
    that does not depend on the slip speed.

    Args:
        horizon: Number of steps of `dt`.
        mu: Largest friction force [N].
        v_s: Slip speed at which friction is largest [m/s].
        mass: Mass of sled and block, each [kg].
        width: Half the length of the sled [m].
        dt: Duration of a step [s].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    mu, v_s, mass, width = accept("friction", mu=mu, v_s=v_s, mass=mass, width=width)
    dynamics = Friction(mu, v_s, mass, width, dt)
    return _two_bodies("friction", dynamics, (2.0, 2.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), 0.05, horizon, dt)


def _two_bodies(
    name: str,
    dynamics: Pushing | Friction,
    goal: tuple[float, ...],
    start: tuple[float, ...],
    spread: float,
    horizon: int,
    dt: float,
) -> Task:
    """The task of bringing x_2 to the goal; x_1 starts `spread` about its place."""
    accept(name, dt=dt)
    low, high = (jnp.asarray(start, float).at[0].add(side * spread) for side in (-1, 1))
    return Task(
        name=name,
        dynamics=dynamics,
        reward=GoalReward(goal),
        terminal=GoalTerminal(goal),
        initial=Box(low, high),
        features=FromGoal(goal),
        success=Delivered(goal),
        a_low=[-FORCE],
        a_high=[FORCE],
        horizon=horizon,
        dt=dt,
    )
