"""Physical parameters given by a person: finite, most of them positive, or an error that says so."""

from collections.abc import Callable
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
    return _checked(task, values, "a finite positive number", lambda x: jnp.isfinite(x) & (x > 0))


def accept_real(task: str, **values: Any) -> tuple[Array, ...]:
    """The same for what may be zero or negative, such as a coordinate.

    Raises: `ValueError` for a value that is not a finite number.

    >>> accept_real("quadrotor-waypoint", x=-2)[0].item()
    -2.0
    """
    return _checked(task, values, "a finite number", jnp.isfinite)


def _checked(task: str, values: dict[str, Any], wanted: str, good: Callable[[Array], Array]) -> tuple[Array, ...]:
    arrays = {name: as_float(x) for name, x in values.items()}
    for name, x in arrays.items():
        if x.ndim or (is_concrete(x) and not bool(good(x))):
            raise ValueError(f"{name} of task '{task}' must be {wanted}, got {x}")
    return tuple(arrays.values())
