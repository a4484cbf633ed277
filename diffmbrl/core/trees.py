"""Helpers on pytrees of arrays, and fields of modules that are array leaves."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, PyTree

T = TypeVar("T")


def is_concrete(*arrays: PyTree) -> bool:
    """Whether values are known now, as they are not inside a transformation such as `jit`.

    Args:
        arrays: Pytrees of arrays.

    Returns:
        Whether no leaf is traced.
    """
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def where(condition: Bool[Array, "..."], x: T, y: T) -> T:
    """Choose x where the condition holds and y elsewhere, leaf by leaf.

    Args:
        condition: Its axes are the first of x's.
        x: A pytree of arrays.
        y: Another of the same structure.

    Returns:
        A pytree like x.
    """

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(pick, x, y)


def cond_once(asked: Bool[Array, ""], turn: Callable[[T], T], state: T) -> T:
    """Apply `turn` to the state if asked to: a loop of at most one iteration.

    Under `vmap` a `cond` runs both branches for all replicas; a loop runs only if any replica asks.

    Args:
        asked: Whether to apply it.
        turn: A function of the state that keeps its structure, shapes and types.
        state: A pytree of arrays.

    Returns:
        `turn(state)` or the state.
    """
    return jax.lax.while_loop(lambda loop: loop[0], lambda loop: (jnp.array(False), turn(loop[1])), (asked, state))[1]


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all numbers of all float leaves are finite.

    Args:
        tree: A pytree with at least one float leaf.

    Returns:
        True if none is infinite or NaN.
    """
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def as_float(x: Any) -> Array:
    """Convert to a float array that is not weakly typed.

    Args:
        x: A number, a nested sequence or an array; a float JAX array keeps its precision.

    Returns:
        An array of the default precision, or of x's own.
    """
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.convert_element_type(x, x.dtype)
    return jnp.asarray(x, dtype=float)


def parameter(default: ArrayLike | Sequence[Any]) -> Any:
    """Declare a field of a module that is a float leaf: differentiable, and changed without recompiling.

    Args:
        default: Its value unless another is given.

    Returns:
        An `equinox.field` whose values are converted by `as_float`.
    """
    return eqx.field(default_factory=lambda: as_float(default), converter=as_float)
