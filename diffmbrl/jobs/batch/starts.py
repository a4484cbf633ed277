"""Start states and keys of a comparison, which all its methods share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from diffmbrl.core import State, Task
from diffmbrl.devices import mesh_of, shard

NOISE = 2**31 - 1  # folded into a seed's key for the noise of its updates
Draws = tuple[State, State, Key[Array, " seeds"]]


def draw_starts(task: Task, seeds: int, starts: int, held_out: int, key: int) -> Draws:
    """Draw start states and keys; those of seed k depend on k and `key` alone.

    The first seeds of a longer comparison are therefore those of a shorter one.

    Args:
        task: The task whose starts are drawn.
        seeds: The number of seeds.
        starts: The number of training starts of each seed.
        held_out: The number of held-out starts, which all seeds share.
        key: The number of the comparison's random key.

    Returns:
        Training starts [seeds, starts, ...], held-out starts [held_out, ...] and a key for each seed's policy.
    """
    root = jax.random.key(key)
    seed_keys = jax.vmap(lambda k: jax.random.fold_in(root, k))(jnp.arange(seeds))
    train_keys, policy_keys = jax.vmap(lambda k: jax.random.split(k))(seed_keys).T
    train = jax.vmap(lambda k: task.starts(k, starts))(train_keys)
    # No seed has this number.
    test = task.starts(jax.random.fold_in(root, 2**31 - 1), held_out)
    return train, test, policy_keys


def shared(draws: Draws, devices: int) -> Draws:
    """Shard each seed's training starts, and the held-out starts, over devices.

    Args:
        draws: The result of `draw_starts`.
        devices: The number of devices.

    Returns:
        The same draws, on these devices; unchanged for one device of one process.

    Raises:
        ValueError: If `devices` does not divide the numbers of starts, or there are fewer devices.
    """
    if devices == 1 and jax.process_count() == 1:
        return draws
    train, test, keys = draws
    mesh = mesh_of(devices)
    return shard(train, mesh, what="starts", axis=1), shard(test, mesh, what="held-out starts"), keys
