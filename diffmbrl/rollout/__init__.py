r"""Rollouts of a policy on a task and their returns; one step of a rollout, which every loop over time uses.

A policy is applied at every step. A plan (`OpenLoop`, `Affine`) has a leading time axis, and step t uses its slice t. The
memory of a policy that has one (`core.Stateful`) is carried from step to step.

After the end of an episode (`task.done`) the state is held, and every function is evaluated at the start state instead; the
result is then discarded. With a `where` on the outputs alone, the reverse pass would multiply a zero cotangent by the Jacobian
at the terminated state, and 0 * inf is NaN.
"""

from diffmbrl.rollout.batch import (
    episode_returns,
    mean_return,
    rollouts,
    split_keys,
    weights_axis,
)
from diffmbrl.rollout.episode import (
    episode_return,
    recorded,
    returns,
    rollout,
)
from diffmbrl.rollout.step import (
    AdjointRule,
    describe,
    is_done,
    rollout_start,
    step_keys,
    stepping,
    terminal_reward,
    transition,
)

__all__ = [
    "AdjointRule",
    "describe",
    "episode_return",
    "episode_returns",
    "is_done",
    "mean_return",
    "recorded",
    "returns",
    "rollout",
    "rollout_start",
    "rollouts",
    "split_keys",
    "step_keys",
    "stepping",
    "terminal_reward",
    "transition",
    "weights_axis",
]
