r"""A task shortened to a length that is a traced number, so that one compiled program serves every horizon.

$$J_L(\pi) = \sum_{t<L} w_t\, r(s_t, a_t) + w_T\, \phi(s_L),\qquad L \le T$$

The number of steps left is one more variable of the state. After the last step the episode has ended, and the rollout masks
the remaining steps (`diffmbrl.rollout`): their values affect neither the return nor the gradient, even if they are not finite.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, State, Stateful, Task, is_plan, is_stateful, where
from diffmbrl.tasks.transforms.plant import OfState, remade


class Counted(NamedTuple):
    """A state with the number of steps left.

    Args:
        s: The state.
        left: The number of steps left, a float, so that the whole can be linearised.
    """

    s: State
    left: Float[Array, "*batch"]


def prefix(task: Task, length: Int[Array, ""]) -> Task:
    r"""Shorten a task of T steps to its first L steps, as a task of T + 1 steps on `Counted` states.

    The terminal reward of $s_L$, with its own weight, is earned in one additional step, whose action has no effect.

    Args:
        task: The task.
        length: The number of steps L, from 1 to T; may be traced.

    Returns:
        The shortened task, whose starts come from `prefix_start`.

    Cost: T + 1 steps for each evaluation, whatever the length.

    >>> from diffmbrl import Linear, tasks, episode_return
    >>> task, s0 = tasks.lqr(horizon=20), jnp.array([1.0, 0.0])
    >>> short = episode_return(Seeing(Linear.zeros(task)), prefix(task, jnp.int32(5)), prefix_start(s0, jnp.int32(5)))
    >>> bool(jnp.isclose(short, episode_return(Linear.zeros(task), tasks.lqr(horizon=5), s0)))
    True
    """
    elsewhere = task.initial(jax.random.key(0))
    made = remade(
        task,
        task.horizon + 1,
        dynamics=_Dynamics(task.dynamics, elsewhere),
        reward=_Reward(task.reward, task.terminal, elsewhere),
        initial=_Initial(task.initial, length),
        features=OfState(task.features),
        along=OfState,
    )
    t = jnp.arange(task.horizon + 2, dtype=length.dtype)
    weights = jnp.where(t < length, jnp.pad(task.weights, (0, 1)), task.weights[-1])
    done = _Done(task.done)
    return eqx.tree_at(
        lambda x: (x.terminal, x.done, x.weights),
        made,
        (_NoTerminal(), done, weights),
        is_leaf=lambda x: x is None,
    )


def prefix_start(s0: State, length: Int[Array, ""]) -> Counted:
    """The start state of a prefix, with `length` steps left.

    Args:
        s0: A start state of the whole task.
        length: The number of steps L, as in `prefix`.

    Returns:
        The start state of the prefix.
    """
    leaf = jax.tree.leaves(s0)[0]
    return Counted(s0, length.astype(leaf.dtype))


class Seeing(eqx.Module):
    """A policy on `Counted` states that ignores the number of steps left.

    Args:
        policy: A policy of the state alone.

    Raises:
        ValueError: For a plan or a policy with a memory.
    """

    policy: Policy | Stateful

    def __check_init__(self):
        if is_plan(self.policy) or is_stateful(self.policy):
            raise ValueError(
                f"a prefix takes policies of the state alone, not {type(self.policy).__name__}: a plan or a policy with a "
                "memory"
            )

    def __call__(self, s: Counted, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return cast(Policy, self.policy)(s.s, key=key)


class _Dynamics(eqx.Module):
    """f while steps are left; the state is held in the step that earns the terminal reward.

    A result that is not used is evaluated at a start state, since 0 * inf in the reverse pass would be NaN.
    """

    inner: Callable
    elsewhere: State

    def __call__(self, state: Counted, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Counted:
        going = state.left > 0
        moved = self.inner(where(going, state.s, self.elsewhere), a, key=key)
        return Counted(where(going, moved, state.s), state.left - 1)


class _Reward(eqx.Module):
    """r while steps are left, then phi once."""

    reward: Callable
    terminal: Callable
    elsewhere: State

    def __call__(self, state: Counted, a: Float[Array, " m"]) -> Float[Array, ""]:
        going = state.left > 0
        r = self.reward(where(going, state.s, self.elsewhere), a)
        return jnp.where(going, r, self.terminal(where(going, self.elsewhere, state.s)))


class _Done(eqx.Module):
    """The task's end, or the end after the terminal reward has been earned."""

    inner: Callable | None

    def __call__(self, state: Counted) -> Bool[Array, ""]:
        over = state.left < 0
        return over if self.inner is None else over | self.inner(state.s)


class _Initial(eqx.Module):
    inner: Callable
    length: Int[Array, ""]

    def __call__(self, key: PRNGKeyArray) -> Counted:
        return prefix_start(self.inner(key), self.length)


class _NoTerminal(eqx.Module):
    def __call__(self, state: Counted) -> Float[Array, ""]:
        return jnp.zeros_like(state.left)
