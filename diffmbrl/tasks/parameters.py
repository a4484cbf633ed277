"""Validation of physical parameters: finite, and most of them positive."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffmbrl.core import as_float, is_concrete


def accept(task: str, **values: Any) -> tuple[Array, ...]:
    """Convert parameters to float arrays and check that they are finite positive numbers; traced values are not checked.

    Args:
        task: Name of the task, for errors.
        **values: Parameters, one number each.

    Returns:
        The arrays, in the order given.

    Raises:
        ValueError: If a value is not one number, or not finite and positive.

    >>> accept("pendulum", m=1.5)[0].item()
    1.5
    """
    return _checked(task, values, "a finite positive number", lambda x: jnp.isfinite(x) & (x > 0))


def accept_real(task: str, **values: Any) -> tuple[Array, ...]:
    """Convert parameters that may be zero or negative, such as coordinates, and check that they are finite.

    Args:
        task: Name of the task, for errors.
        **values: Parameters, one number each.

    Returns:
        The arrays, in the order given.

    Raises:
        ValueError: If a value is not one number, or not finite.

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
