"""The records of plans and of controllers' episodes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from diffmbrl.core import State, Task, Trajectory
from diffmbrl.info import Info
from diffmbrl.jobs.plan.setting import ResolvedPlan
from diffmbrl.policies import squash
from diffmbrl.render.registry import frames
from diffmbrl.report.plan_report import shape_record
from diffmbrl.rollout import returns
from diffmbrl.solve.nonfinite import named
from diffmbrl.tasks import TASKS
from diffmbrl.tasks.registry import state_names
from diffmbrl.tasks.transforms.plant import Delayed

Write = Callable[[dict[str, Any]], None]


def write_scene(resolved: ResolvedPlan, write: Write) -> None:
    """Write the record of the task that the figures need.

    Args:
        resolved: The planning job.
        write: Writes a record.
    """
    row, model = TASKS[resolved.config.task], resolved.model
    write(
        {
            "kind": "scene",
            "dt": model.dt,
            "a_low": model.a_low,
            "a_high": model.a_high,
            "state_names": state_names(model),
            "action_names": list(row.actions),
        }
    )


def write_result(
    write: Write,
    index: int,
    model: Task,
    plant: Task,
    trajectory: Trajectory,
    last: dict[str, Any],
) -> None:
    """Write one row of the table.

    Args:
        write: Writes a record.
        index: The number of the start.
        model: The planner's task.
        plant: The task with the real dynamics.
        trajectory: The trajectory on the plant.
        last: Further entries: the end, seconds and counts.
    """
    success = None if plant.success is None else bool(plant.success(trajectory.s_T))
    write({"kind": "result", "start": index, "return": float(returns(trajectory, plant)), "success": success} | last)


def write_trajectory(
    write: Write,
    index: int,
    model: Task,
    trajectory: Trajectory,
    real: bool,
    gains: ArrayLike | None,
) -> None:
    """Write a trajectory: states [T+1, n], actions of the plant [T, m], gains da/ds of a plan [T, m, n]; draw the first start.

    Args:
        write: Writes a record.
        index: The number of the start.
        model: The planner's task.
        trajectory: The trajectory on the plant.
        real: Whether its actions are within the limits; otherwise they are before the squashing.
        gains: Gains of the plan, None without feedback.
    """
    states, last = trajectory.s, trajectory.s_T
    late = isinstance(states, Delayed)
    a = np.asarray(states.queue[:, 0] if late else trajectory.a)
    states, last = (states.s, last.s) if late else (states, last)
    s = np.concatenate([np.asarray(_flat(states)), np.asarray(_flat(jax.tree.map(lambda x: x[None], last)))])
    if not real:
        low, high = np.asarray(model.a_low), np.asarray(model.a_high)
        slope = jax.vmap(jax.jacfwd(lambda z: squash(z, low, high)))(jnp.asarray(a))
        a = np.asarray(jax.vmap(lambda z: squash(z, low, high))(jnp.asarray(a)))
        gains = None if gains is None else np.einsum("tij,tjn->tin", slope, gains)
    write({"kind": "trajectory", "start": index, "s": s, "a": a, "gains": gains})
    seen = int(np.argmin(np.append(np.isfinite(s).all(1), False)))  # states before the first that is not finite
    if index == 0 and seen > 1:
        drawn = [[shape_record(shape) for shape in shapes] for shapes in frames(model, s[:seen])]
        write({"kind": "frames", "start": index, "frames": drawn})


def ended(trajectory: Trajectory, info: Info) -> str:
    """Describe the end of an episode, and the non-finite values on the plant and in the model's rollouts.

    Args:
        trajectory: The trajectory on the plant.
        info: The planner's `Info` of each step.

    Returns:
        One line.
    """
    words = [f"{len(trajectory.r)} steps, {float(np.mean(np.asarray(info.accepted))):.0%} of last updates accepted"]
    if (found := named(jax.tree.map(lambda x: x[None], trajectory))) is not None:
        words.insert(0, f"nonfinite: {found[0]}[{found[1]}] of the plant")
    if (met := np.flatnonzero(np.asarray(info.nonfinite))).size:
        words.append(f"nonfinite: rollouts of the model at {met.size} steps, the first of them {met[0]}, were rejected")
    return "; ".join(words)


def _flat(states: State) -> Array:
    leaves = jax.tree.leaves(states)
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)
