r"""The task of P particles: states side by side under the same actions, and the mean of their rewards.

$$J = \frac1P \sum_p \Big[\sum_{t<T} w_t\, r(s^p_t, a_t) + w_T\, \phi(s^p_T)\Big],\quad s^p_{t+1} = f^p_t(s^p_t, a_t)$$

It is a task like any other, of states [P, ...], so whatever plans for one state plans for the particles' mean: gradient
methods, iLQR and sampling alike. With an `Ensemble` each particle follows the members as its propagation says.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Dynamics, Identity, State, Task, where


class Cloud(NamedTuple):
    """Particles of a task that can end: each has its own end, after which it is held and earns nothing."""

    s: State  # [P, ...]
    alive: Float[Array, " P"]  # 1 or 0: a number, so that a second-order method can take it as part of the state
    s0: State  # [P, ...]; where functions are evaluated instead of at a state past its end


@runtime_checkable
class ManyDynamics(Dynamics, Protocol):
    """Dynamics that step particles together, as an ensemble does, whose particles share its members."""

    def many(self, s: State, a: Array, *, key: PRNGKeyArray | None = None) -> State:
        """The next states of particles [P, ...] under one action."""
        ...


class ParticleDynamics(eqx.Module):
    """The dynamics of each particle, with noise of its own; an ensemble's `many` where there is one."""

    inner: Dynamics
    done: Any

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        if self.done is None:
            return self._step(s, a, key)
        moved = where(s.alive > 0, self._step(where(s.alive > 0, s.s, s.s0), a, key), s.s)
        return Cloud(moved, s.alive * _going(self.done, moved), s.s0)

    def _step(self, s: State, a: Array, key: PRNGKeyArray | None) -> State:
        if isinstance(self.inner, ManyDynamics):
            return self.inner.many(s, a, key=key)
        keys = None if key is None else jax.random.split(key, jax.tree.leaves(s)[0].shape[0])
        return jax.vmap(lambda s, k: self.inner(s, a, key=k), in_axes=(0, None if key is None else 0))(s, keys)


class ParticleReward(eqx.Module):
    """The mean over particles of a reward r(s, a) or phi(s); 0 for those past their end."""

    inner: Any

    def __call__(self, s: State, *a: Float[Array, " m"]) -> Float[Array, ""]:
        if not isinstance(s, Cloud):
            return jnp.mean(jax.vmap(lambda s: self.inner(s, *a))(s))
        r = jax.vmap(lambda s: self.inner(s, *a))(where(s.alive > 0, s.s, s.s0))
        return jnp.mean(jnp.where(s.alive > 0, r, jnp.zeros_like(r)))


class ParticleStart(eqx.Module):
    """All particles at one start of the task."""

    inner: Any
    done: Any
    count: int = eqx.field(static=True)

    def __call__(self, key: PRNGKeyArray) -> State:
        return _spread(self.inner(key), self.count, self.done)


class EachParticle(eqx.Module):
    """A constraint of the task for each particle: [P k]."""

    inner: Any

    def __call__(self, s: State, *a: Float[Array, " m"]) -> Float[Array, " Pk"]:
        states = s.s if isinstance(s, Cloud) else s
        return jax.vmap(lambda s: self.inner(s, *a))(states).ravel()


def particles(task: Task, count: int) -> Task:
    """The task of `count` particles; its start is `replicate_start(s0, task, count)`. It says nothing of success.

    Raises: `ValueError` if there are none.

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
    """`count` particles at one start state of `task`."""
    return _spread(s0, count, task.done)


def _spread(s0: State, count: int, done: Any) -> State:
    s = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), s0)
    return s if done is None else Cloud(s, _going(done, s), s)


def _going(done: Any, s: State) -> Array:
    dtype = next(x.dtype for x in jax.tree.leaves(s) if jnp.issubdtype(x.dtype, jnp.floating))
    return 1 - jax.vmap(done)(s).astype(dtype)
