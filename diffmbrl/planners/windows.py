r"""Planning windows of a receding-horizon controller: H steps of a task of T, from the current state.

At time t the window covers $t, \dots, t + H$, with the task's weights $w_{t+j}$ and its terminal reward (or a value function)
at the end. Two windows differ in how they treat the end of the episode:

* `Ending`: the plan knows when the episode stops. Beyond T the state is held and nothing is earned, so the terminal reward
  is that of $s_T$: if H is at least the remaining time, the window's problem is the task's own.
* `Receding`: every window has the same weights, as if the task never ended: the usual choice on a real machine.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, reweighted
from diffmbrl.models.particles import ParticleDynamics
from diffmbrl.policies import resting_action
from diffmbrl.tasks.transforms.plant import OfState, remade

REST = 1e-6  # curvature of the cost of actions without effect, whose optimum is then unique


class Clocked(NamedTuple):
    """A state and the steps left until the episode ends: a float, so that planners may linearise in all of it."""

    s: State
    left: Float[Array, ""]


class Ending(eqx.Module):
    r"""Windows that end with the episode: $s_{j+1} = f(s_j, a_j)$ for $t + j < T$, and $s_{j+1} = s_j$ afterwards.

    The number of steps left is one more state variable (`Clocked`), so one compiled planner serves every window.

    Args:
        value: Terminal reward of a window that ends before the episode; None for the task's own.
    """

    value: Callable | None = None

    def task(self, task: Task, horizon: int) -> Task:
        """Return the planning task, of `horizon` steps."""
        made = remade(
            task,
            horizon,
            dynamics=_Held(task.dynamics),
            reward=_Stopped(task.reward, resting_action(task)),
            initial=_Full(task.initial, jnp.asarray(horizon, task.a_low.dtype)),
            features=OfState(task.features),
            along=OfState,
        )
        if self.value is None:
            return made
        return eqx.tree_at(lambda t: t.terminal, made, _Continued(task.terminal, self.value))

    def at(self, task: Task, weights: Float[Array, " T1"], t: Int[Array, ""]) -> Task:
        """Return the planning task with the weights of the window that begins at t."""
        T = weights.shape[0] - 1
        index = t + jnp.arange(task.horizon + 1, dtype=jnp.int32)
        seen = weights[jnp.minimum(index, T)]
        within = jnp.where(index < T, seen, jnp.ones_like(seen))
        return reweighted(task, within.at[-1].set(seen[-1]))

    def state(self, s: State, t: Int[Array, ""], T: int) -> Clocked:
        """Return the state in which the window begins."""
        left = jnp.maximum(jnp.asarray(T, jnp.int32) - t, 0)
        return Clocked(s, left.astype(jax.tree.leaves(s)[0].dtype))


class Receding(eqx.Module):
    """Windows that never see the end of the episode: all have the weights of the first one.

    Args:
        value: Terminal reward of the window; None for the task's own.
    """

    value: Callable | None = None

    def task(self, task: Task, horizon: int) -> Task:
        """Return the planning task, of `horizon` steps."""
        made = Task(
            name=task.name,
            dynamics=task.dynamics,
            reward=task.reward,
            terminal=task.terminal if self.value is None else self.value,
            initial=task.initial,
            features=task.features,
            done=task.done,
            success=task.success,
            constraints=task.constraints,
            a_low=task.a_low,
            a_high=task.a_high,
            horizon=horizon,
            dt=task.dt,
        )
        return self.at(made, task.weights, jnp.zeros((), jnp.int32))

    def at(self, task: Task, weights: Float[Array, " T1"], t: Int[Array, ""]) -> Task:
        """Return the planning task, the same for every t."""
        return reweighted(task, weights[jnp.minimum(jnp.arange(task.horizon + 1), weights.shape[0] - 1)])

    def state(self, s: State, t: Int[Array, ""], T: int) -> State:
        """Return the state in which the window begins."""
        return s


class _Held(eqx.Module):
    inner: Callable

    def __call__(self, state: Clocked, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Clocked:
        return self._on(state, self.inner(state.s, a, key=key))

    def many(self, state: Clocked, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Clocked:
        """Step P particles [P, ...] together, as an ensemble does."""
        return jax.vmap(self._on)(state, ParticleDynamics(self.inner, None)(state.s, a, key=key))

    def _on(self, state: Clocked, moved: State) -> Clocked:
        going = state.left > 0
        s = jax.tree.map(lambda new, old: jnp.where(going, new, old), moved, state.s)
        return Clocked(s, jnp.maximum(state.left - 1, 0))


class _Stopped(eqx.Module):
    inner: Callable
    rest: Float[Array, " m"]

    def __call__(self, state: Clocked, a: Float[Array, " m"]) -> Float[Array, ""]:
        idle = -REST / 2 * jnp.sum((a - self.rest) ** 2)
        return jnp.where(state.left > 0, self.inner(state.s, a), idle)


class _Full(eqx.Module):
    inner: Callable
    steps: Float[Array, ""]

    def __call__(self, key: PRNGKeyArray) -> Clocked:
        return Clocked(self.inner(key), self.steps)


class _Continued(eqx.Module):
    """Terminal reward after the end of the episode, value before it."""

    terminal: Callable
    value: Callable

    def __call__(self, state: Clocked) -> Float[Array, ""]:
        return jnp.where(state.left > 0, self.value(state.s), self.terminal(state.s))
