"""Slices of a batch through one function: all at once, or a few at a time where caches are small."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree

ROWS = 256  # states in one batch through a network on a CPU: see benchmarks/primitives.py


def map_chunks(f: Callable[[PyTree], PyTree], xs: PyTree, states: int, chunk: int | None = None) -> PyTree:
    """Apply `f` to each slice of `xs`, `chunk` slices at a time.

    Args:
        f: Function of one slice.
        xs: Slices, stacked on a leading axis of every leaf: time steps, starts or directions.
        states: Number of states, or of random numbers, in one slice.
        chunk: Number of slices in one batch. None: on a CPU as many as make `ROWS` states, elsewhere all of them.

    Returns:
        The results, stacked on a leading axis as `jax.vmap` stacks them. They do not depend on `chunk` beyond rounding.

    >>> import jax.numpy as jnp
    >>> map_chunks(lambda x: 2 * x, jnp.arange(4), states=1, chunk=2).tolist()
    [0, 2, 4, 6]
    """
    count = jax.tree.leaves(xs)[0].shape[0]
    if chunk is None:
        chunk = -(-ROWS // states) if jax.default_backend() == "cpu" else count
    return jax.vmap(f)(xs) if chunk >= count else jax.lax.map(f, xs, batch_size=chunk)
