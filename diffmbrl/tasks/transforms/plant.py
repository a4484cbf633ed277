r"""Plants that differ from their model: delayed actions, and noise that the model does not have.

Each is an ordinary task made from another, on which any policy can be evaluated:

    plant = noisy(delayed(make("pendulum-swingup", gravity=18.0), steps=2), std=0.01)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.constraints import Constraints
from diffmbrl.core import State, Task, as_float
from diffmbrl.policies import resting_action


class Delayed(NamedTuple):
    """A state, and the queue of actions under way, the next to arrive first."""

    s: State
    queue: Float[Array, "*batch d m"]


def delayed(task: Task, *, steps: int) -> Task:
    r"""Delay every action by d steps: $s_{t+1} = f(s_t, a_{t-d})$ on states $(s_t, a_{t-d}, \dots, a_{t-1})$.

    The reward is that of the action that arrives. The features contain the queue, so a policy can know which actions are
    under way; `planners.Unaware` hides it from a controller.

    Args:
        task: Task without delay.
        steps: Delay d, in steps.

    Returns:
        The task on `Delayed` states; the first d actions that arrive are resting ones.

    Raises:
        ValueError: If `steps` is not a whole number of at least 1.

    >>> from diffmbrl import tasks
    >>> delayed(tasks.lqr(horizon=20), steps=3).n
    5
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps of delay must be a whole number of at least 1, got {steps!r}")
    queue = jnp.tile(resting_action(task), (steps, 1))
    return remade(
        task,
        task.horizon,
        dynamics=_Late(task.dynamics),
        reward=_AtArrival(task.reward),
        initial=_WithQueue(task.initial, queue),
        features=_QueueFeatures(task.features),
        along=_AtArrival,
    )


def noisy(task: Task, *, std: Any) -> Task:
    r"""Add process noise to the dynamics: $s' = f(s, a) + \sigma \epsilon$, $\epsilon \sim N(0, I)$.

    Args:
        task: Task without noise.
        std: Standard deviation sigma, in units of the state: one number, or a pytree like the state.

    Returns:
        The task with noise, drawn from the key of the rollout; a rollout without a key has none.

    Raises:
        ValueError: If `std` is negative or not finite.

    >>> from diffmbrl import tasks
    >>> float(noisy(tasks.lqr(), std=0.1).dynamics.std)
    0.10000000149011612
    """
    std = accept_std(std)
    return eqx.tree_at(lambda t: t.dynamics, task, Noisy(task.dynamics, std))


def accept_std(std: Any) -> Any:
    """Convert standard deviations to arrays. Raises: `ValueError` if one is negative or not finite."""
    std = jax.tree.map(as_float, std)
    if not all(bool(jnp.all(jnp.isfinite(x) & (x >= 0))) for x in jax.tree.leaves(std)):
        raise ValueError(f"std of the noise must be finite and not negative, got {std}")
    return std


def perturbed(s: State, std: Any, key: PRNGKeyArray) -> State:
    r"""$s + \sigma \epsilon$; `std` is one number or one for each state variable."""
    x, unravel = ravel_pytree(s)
    each = jax.tree.leaves(std)
    flat = ravel_pytree(std)[0] if len(each) > 1 or each[0].ndim else each[0]
    return unravel(x + flat.astype(x.dtype) * jax.random.normal(key, x.shape, x.dtype))


def remade(
    task: Task,
    horizon: int,
    *,
    dynamics: Callable,
    reward: Callable,
    initial: Callable,
    features: Callable,
    along: Callable[[Callable], Callable],
) -> Task:
    """Make the task on larger states, whose part `s` is a state of `task`; `along` wraps its constraints of (s, a).

    Weights become ones if the horizon changes.
    """
    made = Task(
        name=task.name,
        dynamics=dynamics,
        reward=reward,
        terminal=OfState(task.terminal),
        initial=initial,
        features=features,
        done=None if task.done is None else OfState(task.done),
        success=None if task.success is None else OfState(task.success),
        constraints=_constraints(task.constraints, along),
        a_low=task.a_low,
        a_high=task.a_high,
        horizon=horizon,
        dt=task.dt,
    )
    return eqx.tree_at(lambda t: t.weights, made, task.weights) if horizon == task.horizon else made


def _constraints(constraints: Constraints | None, along: Callable[[Callable], Callable]) -> Constraints | None:
    if constraints is None:
        return None
    wraps = {"equality": along, "inequality": along, "final_equality": OfState, "final_inequality": OfState}
    given = {name: getattr(constraints, name) for name in wraps}
    return Constraints(**{name: f if f is None else wraps[name](f) for name, f in given.items()})


class OfState(eqx.Module):
    """A function of a state (and an action), of the part `s` of a larger state."""

    inner: Callable

    def __call__(self, state: Any, *rest: Any) -> Any:
        return self.inner(state.s, *rest)


class Noisy(eqx.Module):
    """f(s, a) + std * noise."""

    inner: Callable
    std: Any

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        if key is None:
            return self.inner(s, a)
        key_inner, key_noise = jax.random.split(key)
        return perturbed(self.inner(s, a, key=key_inner), self.std, key_noise)


class _Late(eqx.Module):
    inner: Callable

    def __call__(self, state: Delayed, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Delayed:
        s = self.inner(state.s, state.queue[0], key=key)
        return Delayed(s, jnp.concatenate([state.queue[1:], a[None]]))


class _AtArrival(eqx.Module):
    """A function of a state and of the action that arrives."""

    inner: Callable

    def __call__(self, state: Delayed, a: Float[Array, " m"]) -> Any:
        return self.inner(state.s, state.queue[0])


class _WithQueue(eqx.Module):
    inner: Callable
    queue: Float[Array, "d m"]

    def __call__(self, key: PRNGKeyArray) -> Delayed:
        return Delayed(self.inner(key), self.queue)


class _QueueFeatures(eqx.Module):
    inner: Callable

    def __call__(self, state: Delayed) -> Float[Array, " k"]:
        return jnp.concatenate([self.inner(state.s), state.queue.ravel()])
