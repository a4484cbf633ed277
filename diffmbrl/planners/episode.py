"""`control` in parts: an episode under a controller, a few steps at a time, for episodes that take long.

    episode = start(mpc, task, s0)
    episode = proceed(mpc, task, s0, episode, key, first=t, count=k)     # as often as needed, from step t on
    trajectory, info = finish(episode)

One compilation serves every number of steps, and the results do not depend on where the episode was divided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task, Trajectory
from diffmbrl.info import Info
from diffmbrl.planners.mpc import MPC
from diffmbrl.rollout import rollout_start, stepping


class ControlledEpisode(NamedTuple):
    """An episode between two of its steps.

    Args:
        place: The state, whether the episode has not ended, and the controller's memory.
        rows: s, a, r, alive and info of every step, with a leading axis of T; zero for steps that were not made yet.
    """

    place: tuple[State, Array, PyTree]
    rows: tuple[State, Array, Array, Array, Info]


def start(mpc: MPC, task: Task, s0: State) -> ControlledEpisode:
    """Start an episode.

    Args:
        mpc: The controller.
        task: The task.
        s0: One start state.

    Returns:
        The episode before its first step.
    """
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
    """Make the next steps of an episode.

    Args:
        mpc: The controller.
        task: The task.
        s0: The start state of the whole episode.
        episode: The episode so far.
        key: Key of the whole episode; None for no noise.
        first: Number of the first step to make.
        count: Number of steps to make; those beyond the horizon are omitted.

    Returns:
        The episode after these steps.
    """
    step = _step(mpc, task, s0, key)

    def one(t, episode):
        place, row = step(episode.place, (t, None, None))
        put = jax.lax.dynamic_update_index_in_dim
        return ControlledEpisode(
            place, jax.tree.map(lambda rows, x: put(rows, x.astype(rows.dtype), t, 0), episode.rows, row)
        )

    return jax.lax.fori_loop(first, jnp.minimum(first + count, task.horizon), one, episode)


def finish(episode: ControlledEpisode) -> tuple[Trajectory, Info]:
    """Finish an episode.

    Args:
        episode: The episode after its last step.

    Returns:
        The trajectory and the solver's info of every step, as `control`.
    """
    (s_T, alive_T, _), (s, a, r, alive, info) = episode
    return Trajectory(s, a, r, jnp.append(alive, alive_T), s_T), info


def _step(mpc: MPC, task: Task, s0: State, key: PRNGKeyArray | None) -> Callable[[Any, Any], tuple[Any, Any]]:
    return stepping(mpc, task, s0, key, lambda s, a, r, alive, memory: (s, a, r, alive, memory.info))
