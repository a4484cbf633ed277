"""A real system that is no JAX: environments with Gymnasium's `reset` and `step`, stepped on the host by a compiled policy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffmbrl.agents.collect import Acting, Collected, Unknown, met
from diffmbrl.core import Task, is_plan, is_stateful, where
from diffmbrl.models.buffer import Transition
from diffmbrl.tasks.adapters.gymnasium import observed


class HostPlaces(NamedTuple):
    """Where S * N environments are between two steps. They move on: places are used once."""

    environments: list[list[Any]]  # S lists of N
    seen: np.ndarray  # [S, N, n]
    memory: Any  # the policy's, if it has one: leaves [S, N, ...]
    anew: np.ndarray  # [S, N]: an episode begins here
    t: np.ndarray  # [S, N]: step of the episode
    episode: np.ndarray  # [S, N]
    J: np.ndarray  # [S, N]: return of the episode so far


class HostSystem:
    """Environments that `make` makes, and the `task` as an agent knows it; what `tasks.gymnasium.environment` gives.

    The actions of all environments of all seeds are one compiled call a step; they are cut at the task's limits. An environment
    is reset with a seed drawn from the key, so runs repeat as far as it does, and evaluations have the same starts. A time
    limit of its own (`truncated`) ends the episode, but is no end of the task. Where an action, a reward or an observation is
    not finite the step is not kept, and the episode ends there; an action that is not finite is not taken.

    >>> import jax
    >>> from diffmbrl.agents import RandomAgent, learn
    >>> from diffmbrl.tasks.adapters.gymnasium import environment
    >>> system = HostSystem(*environment("Pendulum-v1", horizon=50))
    >>> learned = learn(RandomAgent(every=50), system, jax.random.split(jax.random.key(0), 2), real_steps=200)
    >>> [int(x) for x in learned.buffer.size], len(learned.records)
    ([200, 200], 3)
    """

    def __init__(self, make: Callable[[], Any], task: Task):
        self.make = make
        self.view = eqx.tree_at(lambda t: t.dynamics, task, Unknown())

    @property
    def horizon(self) -> int:
        """The task's."""
        return self.view.horizon

    def begin(
        self, who: Acting, carries: Any, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]
    ) -> HostPlaces:
        """New environments, each reset. Raises: `TypeError` for a plan, which has no action for a second episode."""
        shape = (keys.shape[0], count)
        seeds = _seeds(keys, count)
        made = [[self.make() for _ in row] for row in seeds]
        each = zip(made, seeds, strict=True)
        seen = np.stack([[_reset(env, seed) for env, seed in zip(*row, strict=True)] for row in each])
        memory = _start(who, carries, *shape)
        zero = np.zeros(shape, np.int32)
        episode = np.asarray(first, np.int32)[:, None] + np.arange(count, dtype=np.int32)
        return HostPlaces(made, seen, memory, np.ones(shape, bool), zero, episode, np.zeros(shape, seen.dtype))

    def collect(
        self, who: Acting, carries: Any, places: HostPlaces, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[HostPlaces, Collected]:
        """The policy on the device, the environments one after another on the host."""
        weights = np.asarray(self.view.weights)
        made, seen, memory, anew, t, episode, J = places
        seen, t, episode, J = seen.copy(), t.copy(), episode.copy(), J.copy()
        seeds = _seeds(keys, seen.shape[1] * steps).reshape(*seen.shape[:2], steps)
        rows = []
        for i in range(steps):
            a, memory = _act(who, carries, memory, jnp.asarray(anew), jnp.asarray(seen), keys, jnp.int32(i))
            a, s = np.asarray(a), seen.copy()
            s_next, r = s.copy(), np.full(t.shape, np.nan, s.dtype)
            done, timeout, finite = (np.zeros(t.shape, bool) for _ in range(3))
            for at in np.ndindex(*t.shape):
                if not np.isfinite(a[at]).all():
                    continue
                observation, r[at], done[at], timeout[at], _ = made[at[0]][at[1]].step(a[at])
                s_next[at] = observed(observation)
                finite[at] = np.isfinite(s[at]).all() and np.isfinite(s_next[at]).all() and np.isfinite(r[at])
            last = done | timeout | (t + 1 >= self.horizon) | ~finite
            J = np.where(finite, J + weights[t] * r, np.nan).astype(s.dtype)
            step: Any = (s, a, r, s_next.copy(), done, last)
            doubts = np.broadcast_to(np.asarray(met(memory)), t.shape)
            rows.append((Transition(*step), episode.copy(), t.copy(), finite, J, doubts))
            seen, anew = s_next, last
            for at in np.argwhere(last):
                seen[tuple(at)] = _reset(made[at[0]][at[1]], seeds[*at, i])
            episode = np.where(last, episode + t.shape[1], episode)
            t, J = np.where(last, 0, t + 1), np.where(last, 0, J)
        found = Collected(*jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs, axis=2)), *rows))
        return HostPlaces(made, seen, memory, anew, t, episode, J), found

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """The function as it stands, once a rehearsal, whose results are dropped, has compiled all that is jitted in it."""
        plain = function.__wrapped__  # type: ignore[attr-defined]
        plain(*(_Rehearsal(self.view) if x is self else x for x in arguments), **sizes)
        return lambda *arguments: plain(*arguments, **sizes)


class _Still(NamedTuple):
    """An environment in which nothing happens."""

    s: np.ndarray

    def reset(self, *, seed: int) -> tuple[np.ndarray, dict]:
        return self.s, {}

    def step(self, a: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.s, 0.0, False, False, {}


class _Rehearsal(HostSystem):
    """One step of still environments for all steps of the true ones, which are left alone."""

    def __init__(self, task: Task):
        start = task.initial(jax.random.key(0))
        super().__init__(lambda: _Still(np.asarray(start)), task)

    def collect(
        self, who: Acting, carries: Any, places: HostPlaces, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[HostPlaces, Collected]:
        still = [[self.make() for _ in row] for row in places.environments]
        places, found = super().collect(who, carries, places._replace(environments=still), keys, steps=1)
        return places, jax.tree.map(lambda x: jnp.repeat(x, steps, axis=2), found)


@partial(jax.jit, static_argnames=("seeds", "count"))
def _start(who: Acting, carries: Any, seeds: int, count: int) -> Any:
    """Memories before the first step, [seeds, count, ...]; None for a policy without."""

    def one(who: Acting, carry: Any) -> Any:
        policy = who(carry)
        if is_plan(policy):
            raise TypeError(f"a plan acts in one episode alone; got {type(policy).__name__}: put it into an MPC")
        memory = policy.start(who.task) if is_stateful(policy) else None
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), memory)

    return jax.vmap(one, in_axes=(who.axes, 0), axis_size=seeds)(who, carries)


@jax.jit
def _act(
    who: Acting, carries: Any, memory: Any, anew: Array, seen: Float[Array, "S N n"], keys: Key[Array, " S"], i: Array
) -> tuple[Float[Array, "S N m"], Any]:
    """Actions within the limits, and memories, for environment after environment of each seed."""

    def seed(who: Acting, carry: Any, memory: Any, anew: Array, seen: Array, key: Any) -> tuple[Array, Any]:
        policy, task = who(carry), who.task

        def one(memory: Any, anew: Array, s: Array, key: Any) -> tuple[Array, Any]:
            if is_stateful(policy):
                memory = where(anew, policy.start(task), memory)
                a, memory = policy.step(memory, s, key=key)
            else:
                a = policy(s, key=key)
            return jnp.clip(a, task.a_low, task.a_high), memory

        drawn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), i), anew.shape[0])
        return jax.vmap(one)(memory, anew, seen, drawn)

    return jax.vmap(seed, in_axes=(who.axes, 0, 0, 0, 0, 0))(who, carries, memory, anew, seen, keys)


def _reset(env: Any, seed: Any) -> np.ndarray:
    return observed(env.reset(seed=int(seed))[0])


def _seeds(keys: Key[Array, " S"], count: int) -> np.ndarray:
    """[S, count] numbers below 2^31 for environments, which take no keys."""
    drawn = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 0), (count,), jnp.uint32))(keys)
    return np.asarray(drawn) >> 1
