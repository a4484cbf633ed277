"""What both kinds of lanes run."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.solve.loop import CHUNK, iterate


def chunks(done: int, updates: int) -> Iterator[tuple[int, int]]:
    """Updates number `done` and on as (first, count) of as many as a program makes in one call."""
    for first in range(done, done + updates, CHUNK):
        yield first, min(CHUNK, done + updates - first)


def replica_updates(lane, task, done, updates):
    solver, policy, carry, s0, key = lane
    zero = jnp.zeros((), task.weights.dtype)
    return iterate(solver, policy, carry, task=task, s0=s0, key=key, first=done, count=updates, tolerance=zero)


@jax.jit
def action_gradients(policies, task, s0):
    """dJ/da_t through the closed loop, [lanes, T, m, B]."""
    return jax.vmap(lambda policy, s: gauss_newton(policy, task, s).g)(policies, s0)


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def replica(tree: Any, lane: Any) -> Any:
    return jax.tree.map(lambda x: x[lane], tree)
