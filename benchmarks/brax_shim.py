"""Brax's trainers on JAX 0.10, which no longer has `jax.device_put_replicated`: a guarded stand-in, for benchmarks alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@contextlib.contextmanager
def trainers() -> Iterator[None]:
    """The removed function for the length of a block; nothing where JAX still has it."""
    if hasattr(jax, "device_put_replicated"):
        yield
        return
    jax.device_put_replicated = _replicated  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del jax.device_put_replicated  # type: ignore[attr-defined]


def _replicated(tree: Any, devices: Any) -> Any:
    """A copy of each leaf for each device, along a first axis."""
    if len(devices) != 1:
        raise ValueError(f"this stand-in puts arrays on one device, got {len(devices)}")
    return jax.tree.map(lambda x: jax.device_put(jnp.asarray(x)[None], devices[0]), tree)
