"""Transitions of a system, and the replay buffer that keeps the latest of them: a pytree of fixed size."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, is_concrete


class Transition(NamedTuple):
    """One step of a system, or many with leading axes."""

    s: State
    a: Float[Array, "*k m"]
    r: Float[Array, "*k"]  # not weighted
    s_next: State
    done: Bool[Array, "*k"]  # s_next is past the end of the task (`task.done`): nothing comes after
    last: Bool[Array, "*k"]  # the episode ended here, by `done` or by the clock


class Buffer(eqx.Module):
    """The latest `capacity` transitions; older ones are overwritten. Sizes are traced: a buffer that fills compiles nothing.

    Drawing from an empty buffer, or windows longer than any run of one episode, is an error where the buffer can be looked at;
    inside a transformation it gives NaN, which `learn` rejects and counts.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.lqr()
    >>> s = jax.numpy.ones((3, 2))
    >>> no = jax.numpy.zeros(3, bool)
    >>> steps = Transition(s, s[:, :1], s[:, 0], s, no, no)
    >>> buffer = Buffer.empty(task, 100).add(steps, jax.numpy.zeros(3, int), jax.numpy.arange(3))
    >>> int(buffer.size), buffer.sample(jax.random.key(0), 5).s.shape
    (3, (5, 2))
    """

    rows: Transition  # [capacity, ...]
    episode: Int[Array, "*batch capacity"]  # which episode a row is of; -1 for none
    t: Int[Array, "*batch capacity"]  # its step in the episode
    added: Int[Array, "*batch"]  # rows ever added

    @classmethod
    def empty(cls, task: Task, capacity: int) -> "Buffer":
        """A buffer for the states and actions of `task`. Raises: `ValueError` if the capacity is below 1."""
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be a whole number of at least 1 transition, got {capacity!r}")
        s = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), task.state_shape)
        dtype = task.weights.dtype
        no, nowhere = jnp.zeros(capacity, bool), jnp.full(capacity, -1, jnp.int32)
        rows = Transition(s, jnp.zeros((capacity, task.m), dtype), jnp.zeros(capacity, dtype), s, no, no)
        return cls(rows, nowhere, nowhere, jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """The most transitions that it keeps."""
        return self.t.shape[-1]

    @property
    def size(self) -> Int[Array, "*batch"]:
        """The number of transitions in it."""
        return jnp.minimum(self.added, self.capacity)

    def add(
        self,
        steps: Transition,
        episode: Int[Array, " k"],
        t: Int[Array, " k"],
        keep: Bool[Array, " k"] | None = None,
    ) -> "Buffer":
        """The buffer after k steps more, in their order; those that are not to `keep` are left out.

        Raises: `ValueError` if they are more than the capacity.
        """
        k = t.shape[0]
        if k > self.capacity:
            raise ValueError(f"{k} transitions do not fit a buffer of {self.capacity}: add fewer at once")
        keep = jnp.ones(k, bool) if keep is None else keep
        place = (self.added + jnp.cumsum(keep, dtype=jnp.int32) - 1) % self.capacity
        place = jnp.where(keep, place, self.capacity)  # beyond the end: dropped

        def put(old, new):
            return old.at[place].set(new.astype(old.dtype), mode="drop")

        rows = jax.tree.map(put, self.rows, steps)
        added = self.added + jnp.sum(keep, dtype=jnp.int32)
        return Buffer(rows, put(self.episode, episode), put(self.t, t), added)

    def sample(self, key: PRNGKeyArray, count: int) -> Transition:
        """`count` transitions drawn evenly, with replacement. Raises: `ValueError` if the buffer is empty."""
        size = self.size
        if is_concrete(size) and int(size) == 0:
            raise ValueError("the buffer is empty: there is no transition to draw")
        chosen = jax.random.randint(key, (count,), 0, jnp.maximum(size, 1))
        return _poisoned(jax.tree.map(lambda x: x[chosen], self.rows), size > 0)

    def runs(self, length: int) -> Bool[Array, " capacity"]:
        """Whether `length` transitions of one episode, one after another, begin at a row; rows from the oldest on."""
        age = jnp.arange(self.capacity, dtype=jnp.int32)
        first, last = self._row(age), self._row(age + length - 1)
        together = (self.episode[first] == self.episode[last]) & (self.t[last] - self.t[first] == length - 1)
        return (age + length <= self.size) & together

    def windows(self, key: PRNGKeyArray, count: int, length: int) -> Transition:
        """`count` windows [count, length, ...] of consecutive transitions of single episodes, drawn evenly.

        Raises: `ValueError` if there is none.
        """
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be a whole number of at least 1 transition, got {length!r}")
        begins = jnp.cumsum(self.runs(length), dtype=jnp.int32)
        total = begins[-1]
        if is_concrete(total) and int(total) == 0:
            raise ValueError(f"no episode in the buffer has {length} transitions in a row (of {int(self.size)} in all)")
        number = jax.random.randint(key, (count,), 0, jnp.maximum(total, 1))
        age = jnp.searchsorted(begins, number + 1).astype(jnp.int32)
        place = self._row(age[:, None] + jnp.arange(length, dtype=jnp.int32))
        return _poisoned(jax.tree.map(lambda x: x[place], self.rows), total > 0)

    def _row(self, age: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where the row of an age is, 0 the oldest."""
        return (self.added - self.size + age) % self.capacity


def flat(rows: Any) -> Any:
    """Rows [N, k, ...] of N environments, or branches, as [N k, ...]: all of the first, then all of the second."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _poisoned(rows: Transition, ok: Bool[Array, ""]) -> Transition:
    """The rows, or NaN in every number that can be."""

    def poison(x):
        return jnp.where(ok, x, jnp.full_like(x, jnp.nan)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(poison, rows)
