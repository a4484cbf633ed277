r"""A task cut short at a length that is a number, not a shape: one compiled program then serves every horizon.

$$J_L(\pi) = \sum_{t<L} w_t\, r(s_t, a_t) + w_T\, \phi(s_L),\qquad L \le T$$

The steps left are one more variable of the state; after the last the episode has ended, and the rollout masks it as it masks
every ended episode (`rollout.py`): what a longer rollout would have run into afterwards can spoil nothing, its gradient
included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, is_plan, is_stateful, where
from diffmbrl.tasks.transforms.plant import OfState, remade


class Counted(NamedTuple):
    """A state and the steps left: a float, so that it may be linearised in all of it."""

    s: State
    left: Float[Array, "*batch"]


def prefix(task: Task, length: Int[Array, ""]) -> Task:
    r"""The first `length` of T steps, as a task of T + 1 steps on `Counted` states, whose starts come from `prefix_start`.

    The terminal reward, with its own weight, is that of $s_L$: it is earned in one step more, without an action that matters.
    `length` may be traced, from 1 to T. Each evaluation costs T + 1 steps whatever the length.

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
        dynamics=_Going(task.dynamics, elsewhere),
        reward=_Paid(task.reward, task.terminal, elsewhere),
        initial=_Begun(task.initial, length),
        features=OfState(task.features),
        along=OfState,
    )
    t = jnp.arange(task.horizon + 2, dtype=length.dtype)
    weights = jnp.where(t < length, jnp.pad(task.weights, (0, 1)), task.weights[-1])
    done = _Over(task.done)
    return eqx.tree_at(
        lambda x: (x.terminal, x.done, x.weights),
        made,
        (_Nothing(), done, weights),
        is_leaf=lambda x: x is None,
    )


def prefix_start(s0: State, length: Int[Array, ""]) -> Counted:
    """The start of a prefix; `s0` with any batch axes in front, which `left` gets as `jax.vmap` would see them."""
    leaf = jax.tree.leaves(s0)[0]
    return Counted(s0, length.astype(leaf.dtype))


class Seeing(eqx.Module):
    """A policy on `Counted` states, which knows nothing of the steps left.

    Raises: `ValueError` for a plan or a policy with a memory.
    """

    policy: Any

    def __check_init__(self):
        if is_plan(self.policy) or is_stateful(self.policy):
            raise ValueError(
                f"a prefix takes policies of the state alone, not {type(self.policy).__name__}: a plan or a policy with a "
                "memory"
            )

    def __call__(self, state: Counted, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.policy(state.s, key=key)


class _Going(eqx.Module):
    """f while steps are left. In the step that pays the terminal reward the state is held.

    What is not used is evaluated at a start: were it infinite where the state is, 0 * inf would come back from it.
    """

    inner: Callable
    elsewhere: State

    def __call__(self, state: Counted, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Counted:
        going = state.left > 0
        moved = self.inner(where(going, state.s, self.elsewhere), a, key=key)
        return Counted(where(going, moved, state.s), state.left - 1)


class _Paid(eqx.Module):
    """r while steps are left, then once phi."""

    reward: Callable
    terminal: Callable
    elsewhere: State

    def __call__(self, state: Counted, a: Float[Array, " m"]) -> Float[Array, ""]:
        going = state.left > 0
        r = self.reward(where(going, state.s, self.elsewhere), a)
        return jnp.where(going, r, self.terminal(where(going, self.elsewhere, state.s)))


class _Over(eqx.Module):
    """Done as the task says, or when the terminal reward has been paid."""

    inner: Callable | None

    def __call__(self, state: Counted) -> Bool[Array, ""]:
        over = state.left < 0
        return over if self.inner is None else over | self.inner(state.s)


class _Begun(eqx.Module):
    inner: Callable
    length: Int[Array, ""]

    def __call__(self, key: PRNGKeyArray) -> Counted:
        return prefix_start(self.inner(key), self.length)


class _Nothing(eqx.Module):
    def __call__(self, state: Counted) -> Float[Array, ""]:
        return jnp.zeros_like(state.left)
