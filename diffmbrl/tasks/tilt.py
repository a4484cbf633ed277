"""Distance of an angle from 0, smooth on the whole circle, for costs."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def tilt(angle: Float[Array, "*k"]) -> Float[Array, "*k"]:
    """1 - cos(angle), without the cancellation that costs float32 four digits near 0.

    >>> tilt(jnp.asarray([0.0, jnp.pi]))
    Array([0., 2.], dtype=float32)
    """
    return 2 * jnp.sin(angle / 2) ** 2
