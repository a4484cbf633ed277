"""An episode under a controller, a few steps at a time: what `control` does at once, for an episode that takes long.

    episode = start(mpc, task, s0)
    episode = proceed(mpc, task, s0, episode, key, first=t, count=k)     # as often as needed, from step t on
    trajectory, info = finish(episode)

One compile serves every number of steps, and the numbers do not depend on where the episode was cut.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from diffmbrl.core import State, Task, Trajectory
from diffmbrl.info import Info
from diffmbrl.planners.mpc import MPC
from diffmbrl.rollout import rollout_start, stepping


class ControlledEpisode(NamedTuple):
    """An episode between two of its steps."""

    place: tuple[State, Array, Any]  # the state, whether it goes on, the controller's memory
    rows: tuple[State, Array, Array, Array, Info]  # s, a, r, alive, info [T, ...]; zero where no step was made yet


def start(mpc: MPC, task: Task, s0: State) -> ControlledEpisode:
    """Before the first step."""
    place = rollout_start(mpc, task, s0)
    row = jax.eval_shape(_step(mpc, task, s0, None), place, (jnp.int32(0), None, None))[1]
    return ControlledEpisode(place, jax.tree.map(lambda x: jnp.zeros((task.horizon, *x.shape), x.dtype), row))


def proceed(
    mpc: MPC,
    task: Task,
    s0: State,
    episode: ControlledEpisode,
    key: PRNGKeyArray | None = None,
    *,
    first: Int[Array, ""],
    count: Int[Array, ""],
) -> ControlledEpisode:
    """After `count` steps more, number `first` and on; `s0` and `key` are those of the whole episode."""
    step = _step(mpc, task, s0, key)

    def one(t, episode):
        place, row = step(episode.place, (t, None, None))
        put = jax.lax.dynamic_update_index_in_dim
        return ControlledEpisode(
            place, jax.tree.map(lambda rows, x: put(rows, x.astype(rows.dtype), t, 0), episode.rows, row)
        )

    return jax.lax.fori_loop(first, jnp.minimum(first + count, task.horizon), one, episode)


def finish(episode: ControlledEpisode) -> tuple[Trajectory, Info]:
    """What `control` returns."""
    (s_T, alive_T, _), (s, a, r, alive, info) = episode
    return Trajectory(s, a, r, jnp.append(alive, alive_T), s_T), info


def _step(mpc: MPC, task: Task, s0: State, key: PRNGKeyArray | None) -> Any:
    return stepping(mpc, task, s0, key, lambda s, a, r, alive, memory: (s, a, r, alive, memory.info))
