"""The start states and keys of a comparison, which all its methods share."""

from typing import Any

import jax
import jax.numpy as jnp

from diffmbrl.core import State, Task
from diffmbrl.devices import mesh_of, shard

NOISE = 2**31 - 1  # folded into a seed's key for the noise of its updates


def draw_starts(task: Task, seeds: int, starts: int, held_out: int, key: int) -> tuple[State, State, Any]:
    """Start states [seeds, starts, ...], held-out starts [held_out, ...] and a key for each seed's policy.

    Seed k's draws depend on k and `key` alone, so the first seeds of a longer comparison are those of a shorter one.
    """
    root = jax.random.key(key)
    seed_keys = jax.vmap(lambda k: jax.random.fold_in(root, k))(jnp.arange(seeds))
    train_keys, policy_keys = jax.vmap(lambda k: jax.random.split(k))(seed_keys).T
    train = jax.vmap(lambda k: task.starts(k, starts))(train_keys)
    # Outside the range of the seeds' numbers.
    test = task.starts(jax.random.fold_in(root, 2**31 - 1), held_out)
    return train, test, policy_keys


def shared(draws: tuple[State, State, Any], devices: int) -> tuple[State, State, Any]:
    """The draws with each seed's starts, and the held-out starts, shared out among so many devices.

    Raises: `ValueError` if the devices do not divide them, or are not there.
    """
    if devices == 1 and jax.process_count() == 1:
        return draws
    train, test, keys = draws
    mesh = mesh_of(devices)
    return shard(train, mesh, what="starts", axis=1), shard(test, mesh, what="held-out starts"), keys
