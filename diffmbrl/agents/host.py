"""A real system outside JAX: environments with Gymnasium's `reset` and `step`, stepped on the host by a compiled policy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from diffmbrl.agents.collect import Acting, Collected, Unknown, met
from diffmbrl.core import Task, is_plan, is_stateful, where
from diffmbrl.models.buffer import Transition
from diffmbrl.tasks.adapters.gymnasium import observed


class HostPlaces(NamedTuple):
    """The positions of S * N environments between two steps; used once, since the environments are mutable.

    Args:
        environments: The environments, S lists of N.
        seen: Their observations, shape [S, N, n].
        memory: The policy's memory, with leaves [S, N, ...]; None for a policy without.
        begins: Whether an episode begins here, shape [S, N].
        t: Step of the episode, shape [S, N].
        episode: Number of the episode, shape [S, N].
        J: Return of the episode so far, shape [S, N].
    """

    environments: list[list[Any]]
    seen: np.ndarray
    memory: PyTree
    begins: np.ndarray
    t: np.ndarray
    episode: np.ndarray
    J: np.ndarray


class HostSystem:
    """A real system of environments with Gymnasium's `reset` and `step`, which run on the host.

    One compiled call computes the actions of all environments and clips them to the task's limits. An environment is reset with
    a seed drawn from the key, so runs are as reproducible as it is. Its own time limit (`truncated`) ends the episode, but not
    the task. If an action, a reward or an observation is not finite, the step is discarded and the episode ends.

    Args:
        make: Function that makes an environment; it and the task are the result of `tasks.gymnasium.environment`.
        task: The task as the agent knows it.

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
        """The task's horizon."""
        return self.view.horizon

    def begin(
        self, who: Acting, carries: PyTree, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]
    ) -> HostPlaces:
        """Make and reset environments; raise `TypeError` for a plan, which has no action for a second episode."""
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
        self, who: Acting, carries: PyTree, places: HostPlaces, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[HostPlaces, Collected]:
        """Make steps, with the policy on the device and the environments one after another on the host."""
        weights = np.asarray(self.view.weights)
        made, seen, memory, begins, t, episode, J = places
        seen, t, episode, J = seen.copy(), t.copy(), episode.copy(), J.copy()
        seeds = _seeds(keys, seen.shape[1] * steps).reshape(*seen.shape[:2], steps)
        rows = []
        for i in range(steps):
            a, memory = _act(who, carries, memory, jnp.asarray(begins), jnp.asarray(seen), keys, jnp.int32(i))
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
            met_before = np.broadcast_to(np.asarray(met(memory)), t.shape)
            rows.append((Transition(*step), episode.copy(), t.copy(), finite, J, met_before))
            seen, begins = s_next, last
            for at in np.argwhere(last):
                seen[tuple(at)] = _reset(made[at[0]][at[1]], seeds[*at, i])
            episode = np.where(last, episode + t.shape[1], episode)
            t, J = np.where(last, 0, t + 1), np.where(last, 0, J)
        found = Collected(*jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs, axis=2)), *rows))
        return HostPlaces(made, seen, memory, begins, t, episode, J), found

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """Compile the jitted parts of a function by a call on still environments, whose results are dropped."""
        plain = function.__wrapped__  # type: ignore[attr-defined]
        plain(*(_Rehearsal(self.view) if x is self else x for x in arguments), **sizes)
        return lambda *arguments: plain(*arguments, **sizes)


class _Still(NamedTuple):
    """An environment whose state never changes."""

    s: np.ndarray

    def reset(self, *, seed: int) -> tuple[np.ndarray, dict]:
        return self.s, {}

    def step(self, a: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.s, 0.0, False, False, {}


class _Rehearsal(HostSystem):
    """A copy of a host system that makes one step in still environments in place of all steps in the true ones."""

    def __init__(self, task: Task):
        start = task.initial(jax.random.key(0))
        super().__init__(lambda: _Still(np.asarray(start)), task)

    def collect(
        self, who: Acting, carries: PyTree, places: HostPlaces, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[HostPlaces, Collected]:
        still = [[self.make() for _ in row] for row in places.environments]
        places, found = super().collect(who, carries, places._replace(environments=still), keys, steps=1)
        return places, jax.tree.map(lambda x: jnp.repeat(x, steps, axis=2), found)


@partial(jax.jit, static_argnames=("seeds", "count"))
def _start(who: Acting, carries: PyTree, seeds: int, count: int) -> Any:
    """The policy's memory before the first step, [seeds, count, ...]; None for a policy without."""

    def one(who: Acting, carry: PyTree) -> Any:
        policy = who(carry)
        if is_plan(policy):
            raise TypeError(f"a plan acts in one episode only; got {type(policy).__name__}: wrap it in an MPC")
        memory = policy.start(who.task) if is_stateful(policy) else None
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), memory)

    return jax.vmap(one, in_axes=(who.axes, 0), axis_size=seeds)(who, carries)


@jax.jit
def _act(
    who: Acting,
    carries: PyTree,
    memory: PyTree,
    begins: Array,
    seen: Float[Array, "S N n"],
    keys: Key[Array, " S"],
    i: Array,
) -> tuple[Float[Array, "S N m"], Any]:
    """The actions, clipped to the limits, and the memories in all environments of each seed."""

    def seed(who: Acting, carry: PyTree, memory: PyTree, begins: Array, seen: Array, key: Any) -> tuple[Array, Any]:
        policy, task = who(carry), who.task

        def one(memory: PyTree, begins: Array, s: Array, key: Any) -> tuple[Array, Any]:
            if is_stateful(policy):
                memory = where(begins, policy.start(task), memory)
                a, memory = policy.step(memory, s, key=key)
            else:
                a = policy(s, key=key)
            return jnp.clip(a, task.a_low, task.a_high), memory

        drawn = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), i), begins.shape[0])
        return jax.vmap(one)(memory, begins, seen, drawn)

    return jax.vmap(seed, in_axes=(who.axes, 0, 0, 0, 0, 0))(who, carries, memory, begins, seen, keys)


def _reset(env: Any, seed: Any) -> np.ndarray:
    return observed(env.reset(seed=int(seed))[0])


def _seeds(keys: Key[Array, " S"], count: int) -> np.ndarray:
    """Seeds of environments, numbers below 2^31, shape [S, count]."""
    drawn = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 0), (count,), jnp.uint32))(keys)
    return np.asarray(drawn) >> 1
