"""Physical parameters given by a person: finite, positive, or an error that says so."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffmbrl.core import as_float, is_concrete


def accept(task: str, **values: Any) -> tuple[Array, ...]:
    """The values as float arrays, in order. Traced values pass: they can only be looked at outside a transformation.

    Raises: `ValueError` for a value that is not a finite positive number.

    >>> accept("pendulum", m=1.5)[0].item()
    1.5
    """
    arrays = {name: as_float(x) for name, x in values.items()}
    for name, x in arrays.items():
        if x.ndim or (is_concrete(x) and not bool(jnp.isfinite(x) & (x > 0))):
            raise ValueError(f"{name} of task '{task}' must be a finite positive number, got {x}")
    return tuple(arrays.values())
