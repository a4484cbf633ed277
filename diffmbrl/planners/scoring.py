"""Returns of many sequences of actions at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.devices import divided, gathered
from diffmbrl.models.particles import particles, replicate_start
from diffmbrl.policies import Affine, OpenLoop
from diffmbrl.rollout import episode_return


def plan_returns(
    sequences: Float[Array, "N T m"], task: Task, s0: State, key: PRNGKeyArray | None, *, mesh: Mesh | None = None
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    """Score sequences of actions by one rollout each, from one start.

    Args:
        sequences: N sequences of actions, shape [N, T, m].
        task: Task to score them on.
        s0: One start state.
        key: Key of the noise and of an ensemble's members, the same for all sequences, so that only the actions
            differ; None for no noise.
        mesh: Devices that share the sequences; None for one device.

    Returns:
        Return of each sequence, shape [N], -inf if it is not finite; and how many were not.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.lqr(horizon=5)
    >>> J, nonfinite = plan_returns(jax.numpy.zeros((3, 5, 1)), task, task.initial(jax.random.key(0)), None)
    >>> J.shape, int(nonfinite)
    ((3,), 0)
    """
    J = jax.vmap(lambda a: episode_return(OpenLoop(a), task, s0, key, remat=None))(divided(sequences, mesh))
    J = gathered(J, mesh)
    finite = jnp.isfinite(J)
    return jnp.where(finite, J, -jnp.inf), jnp.sum(~finite, dtype=jnp.int32)


def clouded(task: Task, s0: State, count: int | None) -> tuple[Task, State]:
    """Return the task and the start of `count` particles, or of the single state for None."""
    return (task, s0) if count is None else (particles(task, count), replicate_start(s0, task, count))


def check_plan(policy: Any, task: Task, solver: str) -> None:
    """Raises: `TypeError` unless the plan is an `OpenLoop` or `Affine` one; `ValueError` for one of another length."""
    if not isinstance(policy, OpenLoop | Affine):
        raise TypeError(f"{solver} improves a plan, such as OpenLoop.zeros(task); got {type(policy).__name__}")
    if policy.a.shape[-2:] != (task.horizon, task.m):
        raise ValueError(
            f"the plan has actions of shape {list(policy.a.shape)}; "
            f"task '{task.name}' takes [T, m] = [{task.horizon}, {task.m}]"
        )


def with_actions(policy: OpenLoop | Affine, a: Float[Array, "T m"]) -> OpenLoop | Affine:
    """Return a plan of the same kind with other actions and without feedback."""
    if isinstance(policy, OpenLoop):
        return OpenLoop(a)
    return Affine(jnp.zeros_like(policy.K), a, policy.s, policy.low, policy.high)
