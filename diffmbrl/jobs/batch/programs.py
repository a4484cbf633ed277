"""Compiled functions that batched runs of policies and of plans share."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from diffmbrl.core import Task
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.solve.loop import CHUNK, iterate

Tree = TypeVar("Tree")


def chunks(done: int, updates: int) -> Iterator[tuple[int, int]]:
    """Split `updates` updates after the first `done` into calls of the program, as pairs (first, count)."""
    for first in range(done, done + updates, CHUNK):
        yield first, min(CHUNK, done + updates - first)


def replica_updates(task: Task, replica: tuple[Any, ...], done: Int[Array, ""], updates: Int[Array, ""]) -> Any:
    """Make the updates of one replica (solver, policy, carry, s0, key)."""
    solver, policy, carry, s0, key = replica
    zero = jnp.zeros((), task.weights.dtype)
    return iterate(solver, policy, carry, task=task, s0=s0, key=key, first=done, count=updates, tolerance=zero)


def over_replicas(
    function: Callable[[Any, Any], Any],
    common: PyTree,
    replicas: PyTree,
    *,
    axis: int | None,
    sequential: bool = False,
) -> Any:
    """Apply `function(common, replica)` to every replica; `axis` is None if all replicas share `common`, else 0."""
    if not sequential:
        return jax.vmap(function, in_axes=(axis, 0))(common, replicas)
    if axis is None:
        return jax.lax.map(lambda replica: function(common, replica), replicas)
    return jax.lax.map(lambda pair: function(*pair), (common, replicas))


@jax.jit
def action_gradients(policies: PyTree, task: Task, s0: PyTree) -> Array:
    """dJ/da_t through the closed loop, shape [replicas, T, m, B]."""
    return jax.vmap(lambda policy, s: gauss_newton(policy, task, s).g)(policies, s0)


def timed(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def replica(tree: Tree, index: int | slice) -> Tree:
    """The leaves of one replica, or of several."""
    return jax.tree.map(lambda x: x[index], tree)


def stack(trees: Sequence[Tree], times: int) -> Tree:
    """Stack trees along a leading axis, each repeated `times` times in a row."""
    return jax.tree.map(lambda *x: jnp.repeat(jnp.stack(x), times, axis=0), *trees)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Concatenate trees along their leading axes."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees) if len(trees) > 1 else trees[0]
