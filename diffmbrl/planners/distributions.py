r"""Sampling distributions of sequences of actions, given a mean and a standard deviation at each time step.

Each is a callable `(key, count, mean [T, m], std [T, m], low [m], high [m]) -> [count, T, m]` within the limits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import as_float

FAR = 5.0  # standard deviations


class Uniform(eqx.Module):
    """Uniform distribution within the action limits, whatever the mean; within `mean +- 2 std` for an action without limits."""

    def __call__(
        self,
        key: PRNGKeyArray,
        count: int,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        low: Float[Array, " m"],
        high: Float[Array, " m"],
    ) -> Float[Array, "N T m"]:
        limited = jnp.isfinite(low) & jnp.isfinite(high)
        least, most = jnp.where(limited, low, mean - 2 * std), jnp.where(limited, high, mean + 2 * std)
        u = jax.random.uniform(key, (count, *mean.shape), mean.dtype)
        return jnp.clip(least + u * (most - least), low, high)


class Normal(eqx.Module):
    """Normal distribution, clipped to the action limits."""

    def __call__(
        self,
        key: PRNGKeyArray,
        count: int,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        low: Float[Array, " m"],
        high: Float[Array, " m"],
    ) -> Float[Array, "N T m"]:
        return jnp.clip(mean + std * jax.random.normal(key, (count, *mean.shape), mean.dtype), low, high)


class TruncatedNormal(eqx.Module):
    """Normal distribution truncated to the action limits: unlike clipping, it puts no probability mass on them."""

    def __call__(
        self,
        key: PRNGKeyArray,
        count: int,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        low: Float[Array, " m"],
        high: Float[Array, " m"],
    ) -> Float[Array, "N T m"]:
        spread = jnp.maximum(std, jnp.finfo(std.dtype).tiny ** 0.5)
        # Drawn by the inverse of erf, which is infinite at 1; in single precision erf is 1 beyond 5.6 deviations.
        least, most = jnp.maximum((low - mean) / spread, -FAR), jnp.minimum((high - mean) / spread, FAR)
        z = jax.random.truncated_normal(key, least, most, (count, *mean.shape), mean.dtype)
        return jnp.clip(mean + std * z, low, high)


class Coloured(eqx.Module):
    r"""Normal noise whose power falls with frequency as $f^{-\beta}$ along the time axis, clipped to the action limits.

    White noise is filtered by $f^{-\beta/2}$, with 1/T in place of f = 0, and divided by the gain of the filter, so its
    standard deviation is exactly `std` for every T and beta. Slow actions move a system further than those that change
    sign at every step.

    Args:
        exponent: Exponent beta of the power spectrum; 0 is white noise.

    Reference: Timmer and Koenig 1995; Pinneri et al. 2020 (iCEM), section 3.1, with beta from .25 to 4.
    """

    exponent: Float[Array, ""]

    def __init__(self, exponent: float | Array = 2.0):
        self.exponent = as_float(exponent)

    def __call__(
        self,
        key: PRNGKeyArray,
        count: int,
        mean: Float[Array, "T m"],
        std: Float[Array, "T m"],
        low: Float[Array, " m"],
        high: Float[Array, " m"],
    ) -> Float[Array, "N T m"]:
        white = jax.random.normal(key, (count, *mean.shape), mean.dtype)
        return jnp.clip(mean + std * self.filter(white), low, high)

    def filter(self, white: Float[Array, "N T m"]) -> Float[Array, "N T m"]:
        """Colour white noise along its second axis, without changing its variance."""
        T = white.shape[1]
        frequencies = np.maximum(np.abs(np.fft.fftfreq(T)), 1 / T)
        gain = jnp.asarray(frequencies, white.dtype) ** (-self.exponent.astype(white.dtype) / 2)
        gain = gain / jnp.sqrt(jnp.mean(gain**2))
        half = gain[: T // 2 + 1, None]
        spectrum = jnp.fft.rfft(white, axis=1)
        coloured = jax.lax.complex(spectrum.real * half, spectrum.imag * half)
        return jnp.fft.irfft(coloured, n=T, axis=1).astype(white.dtype)
