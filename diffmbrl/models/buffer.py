"""Transitions of a system, and a replay buffer of the latest of them: a pytree of fixed size."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task, is_concrete


class Transition(NamedTuple):
    """One step of a system, or many with leading axes.

    Args:
        s: State, leaves [*k, ...].
        a: Action, shape [*k, m].
        r: Reward without the task's weights, shape [*k].
        s_next: Next state.
        done: Whether `s_next` is past the end of the task (`task.done`), shape [*k].
        last: Whether the episode ended with this step, by `done` or by the horizon, shape [*k].
    """

    s: State
    a: Float[Array, "*k m"]
    r: Float[Array, "*k"]
    s_next: State
    done: Bool[Array, "*k"]
    last: Bool[Array, "*k"]


class Buffer(eqx.Module):
    """The latest `capacity` transitions; a new one overwrites the oldest.

    Sizes are traced, so filling a buffer compiles nothing. Drawing from an empty buffer, or windows longer than any run
    of one episode, raises an error outside a transformation; inside one it gives NaN, which `learn` rejects and counts.

    Args:
        rows: Transitions, leaves [capacity, ...].
        episode: Number of the episode of each row, -1 for an empty row, shape [capacity].
        t: Step of each row in its episode, shape [capacity].
        added: Number of rows ever added, shape [].

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

    rows: Transition
    episode: Int[Array, "*batch capacity"]
    t: Int[Array, "*batch capacity"]
    added: Int[Array, "*batch"]

    @classmethod
    def empty(cls, task: Task, capacity: int) -> "Buffer":
        """Make an empty buffer.

        Args:
            task: Task whose states and actions the buffer holds.
            capacity: Largest number of transitions.

        Returns:
            The buffer without transitions.

        Raises:
            ValueError: If `capacity` is not a whole number of at least 1.
        """
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"capacity must be a whole number of at least 1 transition, got {capacity!r}")
        s = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), task.state_shape)
        dtype = task.weights.dtype
        no, nowhere = jnp.zeros(capacity, bool), jnp.full(capacity, -1, jnp.int32)
        rows = Transition(s, jnp.zeros((capacity, task.m), dtype), jnp.zeros(capacity, dtype), s, no, no)
        return cls(rows, nowhere, nowhere, jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """Largest number of transitions."""
        return self.t.shape[-1]

    @property
    def size(self) -> Int[Array, "*batch"]:
        """Number of transitions in the buffer."""
        return jnp.minimum(self.added, self.capacity)

    def add(
        self,
        steps: Transition,
        episode: Int[Array, " k"],
        t: Int[Array, " k"],
        keep: Bool[Array, " k"] | None = None,
    ) -> "Buffer":
        """Add k transitions.

        Args:
            steps: k transitions, in their order.
            episode: Number of the episode of each, shape [k].
            t: Step of each in its episode, shape [k].
            keep: Which of them to add, shape [k]; None for all.

        Returns:
            The buffer with the transitions.

        Raises:
            ValueError: If k exceeds the capacity.
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
        """Draw transitions uniformly, with replacement.

        Args:
            key: Key of the draw.
            count: Number of transitions.

        Returns:
            Transitions with a leading axis of `count`.

        Raises:
            ValueError: If the buffer is empty.
        """
        size = self.size
        if is_concrete(size) and int(size) == 0:
            raise ValueError("the buffer is empty: there is no transition to draw")
        chosen = jax.random.randint(key, (count,), 0, jnp.maximum(size, 1))
        return _poisoned(jax.tree.map(lambda x: x[chosen], self.rows), size > 0)

    def runs(self, length: int) -> Bool[Array, " capacity"]:
        """Return whether `length` consecutive transitions of one episode begin at each row, the oldest row first."""
        age = jnp.arange(self.capacity, dtype=jnp.int32)
        first, last = self._row(age), self._row(age + length - 1)
        together = (self.episode[first] == self.episode[last]) & (self.t[last] - self.t[first] == length - 1)
        return (age + length <= self.size) & together

    def windows(self, key: PRNGKeyArray, count: int, length: int) -> Transition:
        """Draw windows of consecutive transitions of single episodes uniformly.

        Args:
            key: Key of the draw.
            count: Number of windows.
            length: Number of consecutive transitions in a window.

        Returns:
            Transitions with leading axes [count, length].

        Raises:
            ValueError: If no episode has `length` transitions in a row.
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
        """Index of the row of an age; age 0 is the oldest."""
        return (self.added - self.size + age) % self.capacity


def flat(rows: PyTree) -> PyTree:
    """Flatten rows [N, k, ...] of N environments or branches to [N k, ...], one environment after another."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _poisoned(rows: Transition, ok: Bool[Array, ""]) -> Transition:
    """Return the rows, or NaN in every float of them if `ok` is false."""

    def poison(x):
        return jnp.where(ok, x, jnp.full_like(x, jnp.nan)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(poison, rows)
