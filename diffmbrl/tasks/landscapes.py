r"""One-dimensional landscapes: each action moves a place, and only the last place is rewarded.

$$s_{t+1} = s_t + a_t,\qquad J = \phi(s_T)$$

With a horizon of 1 and action noise of std sigma, $E\,\phi(s_0 + \theta + \sigma\epsilon)$ is a convolution with a
Gaussian: value, gradient and the variance of every estimator have closed forms or are integrals over one number.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.parameters import accept, accept_real


class Shift(eqx.Module):
    """s' = s + a."""

    def __call__(
        self, s: Float[Array, "1"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "1"]:
        return s + a


class NoReward(eqx.Module):
    """r(s, a) = 0: only the end counts."""

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, ""]:
        return jnp.zeros((), s.dtype)


class StepReward(eqx.Module):
    """`low` below 0, `high` from 0 on: the derivative is 0 wherever it exists."""

    low: Float[Array, ""] = parameter(-1.0)
    high: Float[Array, ""] = parameter(0.0)

    def __call__(self, s: Float[Array, "1"]) -> Float[Array, ""]:
        return jnp.where(s[0] >= 0, self.high, self.low)


class Ramp(eqx.Module):
    """From `low` to `high` along a straight line between -width/2 and width/2, constant beyond."""

    low: Float[Array, ""] = parameter(-1.0)
    high: Float[Array, ""] = parameter(0.0)
    width: Float[Array, ""] = parameter(0.005)

    def __call__(self, s: Float[Array, "1"]) -> Float[Array, ""]:
        share = jnp.clip(2 * s[0] / self.width, -1, 1)
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * share


class Wave(eqx.Module):
    r"""$-(.1\sin(\omega s/\pi) + (s/10)^2 + .1)$: a bowl under a ripple of frequency $\omega/\pi$ rad."""

    frequency: Float[Array, ""] = parameter(10.0)

    def __call__(self, s: Float[Array, "1"]) -> Float[Array, ""]:
        return -(0.1 * jnp.sin(s[0] * self.frequency / jnp.pi) + (s[0] / 10) ** 2 + 0.1)


class Beyond(eqx.Module):
    """Success: at 0 or beyond."""

    def __call__(self, s: Float[Array, "1"]) -> Array:
        return s[0] >= 0


class AtBottom(eqx.Module):
    """Success: within 1 of the middle of the bowl."""

    def __call__(self, s: Float[Array, "1"]) -> Array:
        return jnp.abs(s[0]) < 1


def heaviside(*, horizon: int = 1, low: ScalarLike = -1.0, high: ScalarLike = 0.0) -> Task:
    """Step over an edge at 0: a gradient of exactly 0 everywhere, refused by gradient methods; starts within +-1.5 m.

    The reward is `high` from the edge on and `low` before it. Every sample of the pathwise gradient is 0, so the
    estimate is biased although its variance is 0. Source: Suh et al. 2022, Do Differentiable Simulators Give Better Policy
    Gradients, section 3.

    Args:
        horizon: Number of steps, each of which moves the place by the action.
        low: Reward before the edge.
        high: Reward from the edge on.

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite number, or `horizon` is below 1.
    """
    low, high = accept_real("heaviside", low=low, high=high)
    return _landscape("heaviside", StepReward(low, high), 1.5, 2.0, Beyond(), horizon)


def soft_heaviside(
    *, horizon: int = 1, low: ScalarLike = -1.0, high: ScalarLike = 0.0, width: ScalarLike = 0.005
) -> Task:
    """The step as a ramp of `width` metres: the pathwise gradient is right on average, and nearly always 0.

    Source: Suh et al. 2022, section 3, of which this is `low` = -1, `high` = 1.

    Args:
        horizon: Number of steps, each of which moves the place by the action.
        low: Reward before the ramp.
        high: Reward after the ramp.
        width: Width of the ramp [m]; positive.

    Returns:
        The task.

    Raises:
        ValueError: If `low` or `high` is not finite, `width` is not a finite positive number, or `horizon` is below
            1.
    """
    low, high = accept_real("soft-heaviside", low=low, high=high)
    (width,) = accept("soft-heaviside", width=width)
    return _landscape("soft-heaviside", Ramp(low, high, width), 1.5, 2.0, Beyond(), horizon)


def sinusoid(*, horizon: int = 1, frequency: ScalarLike = 10.0) -> Task:
    """A bowl under ripples: the faster they are, the worse the pathwise gradient, and no worse the score-function one.

    Source: Metz et al. 2021, Gradients are Not All You Need, section 3.

    Args:
        horizon: Number of steps, each of which moves the place by the action.
        frequency: Angular frequency of the ripples times pi [rad/m].

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.
    """
    (frequency,) = accept("sinusoid", frequency=frequency)
    return _landscape("sinusoid", Wave(frequency), 10.0, 20.0, AtBottom(), horizon)


def _landscape(name: str, phi: eqx.Module, spread: float, reach: float, success: eqx.Module, horizon: int) -> Task:
    return Task(
        name=name,
        dynamics=Shift(),
        reward=NoReward(),
        terminal=phi,  # pyright: ignore[reportArgumentType]
        initial=Box([-spread], [spread]),
        success=success,  # pyright: ignore[reportArgumentType]
        a_low=[-reach],
        a_high=[reach],
        horizon=horizon,
        dt=1.0,
    )
