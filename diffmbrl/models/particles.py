r"""The task of P particles: several states under the same actions, rewarded by the mean of their rewards.

$$J = \frac1P \sum_p \Big[\sum_{t<T} w_t\, r(s^p_t, a_t) + w_T\, \phi(s^p_T)\Big],\quad s^p_{t+1} = f^p_t(s^p_t, a_t)$$

It is an ordinary task of states [P, ...], so any planner for one state plans for the mean of the particles: gradient
methods, iLQR and sampling alike. With an `Ensemble`, its propagation decides which member each particle follows.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Dynamics, Identity, State, Task, where
from diffmbrl.models.protocols import ParticleStepping


class Cloud(NamedTuple):
    """Particles of a task whose episodes can end: each particle ends on its own, and is then held and earns nothing.

    Args:
        s: States, leaves [P, ...].
        alive: 1 before a particle's end and 0 after it, shape [P]; a float, so that second-order methods can linearise it.
        s0: Start states, leaves [P, ...], at which functions are evaluated in place of a state past its end.
    """

    s: State
    alive: Float[Array, " P"]
    s0: State


class ParticleDynamics(eqx.Module):
    """One step of all particles: by the dynamics' own `many` if it has one, else particle by particle with separate noise.

    Args:
        inner: Dynamics of one state, or an ensemble.
        done: End of an episode, as in `Task`; None if there is none.
    """

    inner: Dynamics
    done: Callable | None

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        if self.done is None:
            return self._step(s, a, key)
        moved = where(s.alive > 0, self._step(where(s.alive > 0, s.s, s.s0), a, key), s.s)
        return Cloud(moved, s.alive * _not_done(self.done, moved), s.s0)

    def _step(self, s: State, a: Array, key: PRNGKeyArray | None) -> State:
        if isinstance(self.inner, ParticleStepping):
            return self.inner.many(s, a, key=key)
        keys = None if key is None else jax.random.split(key, jax.tree.leaves(s)[0].shape[0])
        return jax.vmap(lambda s, k: self.inner(s, a, key=k), in_axes=(0, None if key is None else 0))(s, keys)


class ParticleReward(eqx.Module):
    """Mean over the particles of a reward r(s, a) or phi(s); particles past their end count as 0.

    Args:
        inner: Reward or terminal reward of one state.
    """

    inner: Callable

    def __call__(self, s: State, *a: Float[Array, " m"]) -> Float[Array, ""]:
        if not isinstance(s, Cloud):
            return jnp.mean(jax.vmap(lambda s: self.inner(s, *a))(s))
        r = jax.vmap(lambda s: self.inner(s, *a))(where(s.alive > 0, s.s, s.s0))
        return jnp.mean(jnp.where(s.alive > 0, r, jnp.zeros_like(r)))


class ParticleStart(eqx.Module):
    """Places all particles at one start state of the task.

    Args:
        inner: Start distribution of the task.
        done: End of an episode, as in `Task`.
        count: Number of particles P.
    """

    inner: Callable
    done: Callable | None
    count: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray) -> State:
        return _spread(self.inner(key), self.count, self.done)


class EachParticle(eqx.Module):
    """A constraint of the task applied to each particle: k values become P k.

    Args:
        inner: Constraint of one state.
    """

    inner: Callable

    def __call__(self, s: State, *a: Float[Array, " m"]) -> Float[Array, " Pk"]:
        states = s.s if isinstance(s, Cloud) else s
        return jax.vmap(lambda s: self.inner(s, *a))(states).ravel()


def particles(task: Task, count: int) -> Task:
    """Make the task of `count` particles under the same actions; its start states come from `replicate_start`.

    Args:
        task: Task of one state.
        count: Number of particles P.

    Returns:
        The task on states [P, ...], or `Cloud`s of them if the task's episodes can end. It has no `success`.

    Raises:
        ValueError: If `count` is below 1.

    >>> from diffmbrl import tasks
    >>> cloud = particles(tasks.cartpole_balance(), 20)
    >>> cloud.state_shape.shape, cloud.m
    ((20, 4), 1)
    """
    if count < 1:
        raise ValueError(f"the number of particles must be at least 1, got {count}")
    constraints = task.constraints
    if constraints is not None:
        constraints = jax.tree.map(EachParticle, constraints, is_leaf=lambda x: x is not constraints)
    return eqx.tree_at(
        lambda t: (t.dynamics, t.reward, t.terminal, t.initial, t.features, t.done, t.success, t.constraints),
        task,
        (
            ParticleDynamics(task.dynamics, task.done),
            ParticleReward(task.reward),
            ParticleReward(task.terminal),
            ParticleStart(task.initial, task.done, count),
            Identity(),
            None,
            None,
            constraints,
        ),
        is_leaf=lambda x: x is None,
    )


def replicate_start(s0: State, task: Task, count: int) -> State:
    """Place `count` particles at one start state.

    Args:
        s0: A start state of `task`.
        task: Task of one state.
        count: Number of particles P.

    Returns:
        A state of `particles(task, count)`, leaves [P, ...].
    """
    return _spread(s0, count, task.done)


def _spread(s0: State, count: int, done: Callable | None) -> State:
    s = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), s0)
    return s if done is None else Cloud(s, _not_done(done, s), s)


def _not_done(done: Callable, s: State) -> Array:
    dtype = next(x.dtype for x in jax.tree.leaves(s) if jnp.issubdtype(x.dtype, jnp.floating))
    return 1 - jax.vmap(done)(s).astype(dtype)
