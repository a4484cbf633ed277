"""Rollouts and returns from a batch of start states, each with its own key and, if the task has them, its own weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from diffmbrl.core import Policy, State, Stateful, Task, Trajectory, reweighted
from diffmbrl.rollout.episode import episode_return, rollout
from diffmbrl.rollout.step import AdjointRule


def rollouts(
    policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None = None, *, remat: int | None = 1
) -> Trajectory:
    """Follow a policy for T steps from each start state of a batch.

    Args:
        policy: As in `rollout`, shared by all starts.
        task: As in `rollout`.
        s0: Start states, shape [B, ...].
        key: Key of the noise; start i uses `split_keys(key, s0)[i]`. None for no noise.
        remat: As in `rollout`.

    Returns:
        The trajectories; every leaf has a leading axis of B.

    Raises:
        ValueError: As `rollout`.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> rollouts(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).s.shape
    (4, 10, 2)
    """
    return jax.vmap(lambda s, k: rollout(policy, task, s, k, remat=remat))(s0, split_keys(key, s0))


def episode_returns(
    policy: Policy | Stateful,
    task: Task,
    s0: State,
    key: PRNGKeyArray | None = None,
    *,
    remat: int | None = 1,
    adjoint: AdjointRule | None = None,
) -> Float[Array, " B"]:
    """The return from each start state of a batch.

    Args:
        policy: As in `rollout`, shared by all starts.
        task: The task; weights of shape [B, T+1] give each start its own.
        s0: Start states, shape [B, ...].
        key: Key of the noise; start i uses `split_keys(key, s0)[i]`. None for no noise.
        remat: As in `rollout`.
        adjoint: As in `episode_return`.

    Returns:
        The returns, shape [B].

    Raises:
        ValueError: If the task's weights have a batch axis of another length; as `rollout`.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> episode_returns(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).shape
    (4,)
    """

    def one(s, k, w):
        return episode_return(policy, reweighted(task, w), s, k, remat=remat, adjoint=adjoint)

    return jax.vmap(one, in_axes=(0, 0, weights_axis(task, s0)))(s0, split_keys(key, s0), task.weights)


def mean_return(
    policy: Policy | Stateful, task: Task, s0: State, key: PRNGKeyArray | None = None, *, remat: int | None = 1
) -> Float[Array, ""]:
    """The mean return over a batch of start states; its gradient is that of `BPTT`.

    Args:
        policy: As in `rollout`, shared by all starts.
        task: The task; weights of shape [B, T+1] give each start its own.
        s0: Start states, shape [B, ...].
        key: Key of the noise; start i uses `split_keys(key, s0)[i]`. None for no noise.
        remat: As in `rollout`.

    Returns:
        The mean over the B returns, a scalar.

    Raises:
        ValueError: As `episode_returns`.

    >>> from diffmbrl import Linear, tasks
    >>> task = tasks.lqr(horizon=10)
    >>> jax.grad(mean_return)(Linear.zeros(task), task, task.starts(jax.random.key(0), 4)).K.shape
    (1, 2)
    """
    return jnp.mean(episode_returns(policy, task, s0, key, remat=remat))


def weights_axis(task: Task, s0: State) -> int | None:
    """The axis of `task.weights` that runs over a batch of start states, for `jax.vmap`.

    Args:
        task: The task, with weights of shape [T+1] or [B, T+1].
        s0: Start states, shape [B, ...].

    Returns:
        0, or None if all starts share the weights.

    Raises:
        ValueError: If the weights have a batch axis of another length.
    """
    if task.weights.ndim == 1:
        return None
    batch = jax.tree.leaves(s0)[0].shape[0]
    if task.weights.shape[:-1] != (batch,):
        raise ValueError(
            f"task.weights must have shape [T+1] or [{batch}, T+1] for {batch} starts, got {list(task.weights.shape)}"
        )
    return 0


def split_keys(key: PRNGKeyArray | None, s0: State) -> Key[Array, " B"] | None:
    """One key for each start state of a batch.

    Args:
        key: The key to split; None for no noise.
        s0: Start states, shape [B, ...].

    Returns:
        Keys, shape [B]; None without a key.
    """
    return None if key is None else jax.random.split(key, jax.tree.leaves(s0)[0].shape[0])
