r"""Tabular Q-learning, and Dyna-Q, which also learns from a model of the steps that it has made.

The task has finitely many states and choices (`tasks/finite.py`), given as a `Lookup` of both. Real steps are the task's own.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, as_float, is_concrete
from diffmbrl.rollout import is_done, step_keys, transition
from diffmbrl.tasks.finite import Lookup


class Experience(NamedTuple):
    """The model: counts of next states, and the pairs of state and choice in the order in which they were first seen.

    Args:
        followed: How often each next state has followed a pair.
        known: Whether a pair was seen. It is separate so that the large table is written in place before it is read.
        r: The last reward of each pair.
        done: Whether a state was seen to end an episode.
        pairs: The pairs seen, as s A + a.
        met: Their number.
    """

    followed: Int[Array, "S A S"]
    known: Bool[Array, "S A"]
    r: Float[Array, "S A"]
    done: Bool[Array, " S"]
    pairs: Int[Array, " SA"]
    met: Int[Array, ""]


class DynaQCarry(NamedTuple):
    """The learned table and model, and the state of the real episode.

    Args:
        Q: The table.
        experience: The model.
        s: The state of the episode.
        t: Its time.
        steps: The number of real steps.
        nonfinite: The number of non-finite real steps, which are not learned from and end their episode.
    """

    Q: Float[Array, "S A"]
    experience: Experience
    s: State
    t: Int[Array, ""]
    steps: Int[Array, ""]
    nonfinite: Int[Array, ""]


class DynaQ(eqx.Module):
    r"""Q-learning from each real step, and from further steps drawn from a model of the real ones.

    $$Q(s, a) \leftarrow Q(s, a) + \alpha\,[r + \gamma \max_{a'} Q(s', a') - Q(s, a)],\qquad \max_{a'} Q(s', a') = 0$$
    if s' ends an episode. A planning step draws one of the pairs (s, a) seen, uniformly, and a next state in proportion to its
    count. Q ignores time and the terminal reward: an episode that the clock ends at T continues in the values. A real step with
    a non-finite reward or state is counted, ends its episode, and is not learned from.

    Args:
        rate: $\alpha$, in (0, 1].
        discount: $\gamma$, in [0, 1].
        exploration: The probability of a random choice; else the choice is the best of Q, with ties broken at random.
        planning: Steps from the model after each real step; 0 for Q-learning.

    Raises:
        ValueError: If a value is outside its interval, or `planning` is negative.

    Cost: of a real step, 1 + `planning` updates of one entry of Q, and a search for the nearest of S states.
    Reference: Watkins 1989; Sutton 1990; Sutton and Barto 2018, sections 6.5 and 8.2.

    >>> from diffmbrl.tasks.finite import Lookup
    >>> from diffmbrl.tasks.math_test import math_test, finite_model
    >>> task = math_test()
    >>> agent, lookup = DynaQ(planning=5), Lookup.of(finite_model(task))
    >>> carry = agent.run(agent.init(task, lookup, jax.random.key(0)), task, lookup, jax.random.key(1), steps=100)
    >>> carry.Q.shape, int(carry.steps)
    ((103, 20), 100)
    """

    rate: Float[Array, ""]
    discount: Float[Array, ""]
    exploration: Float[Array, ""]
    planning: int = eqx.field(static=True)

    def __init__(
        self, *, rate: ArrayLike = 0.5, discount: ArrayLike = 1.0, exploration: ArrayLike = 0.1, planning: int = 0
    ):
        if is_concrete(rate) and not 0 < np.asarray(rate) <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        for name, share in {"discount": discount, "exploration": exploration}.items():
            if is_concrete(share) and not 0 <= np.asarray(share) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if not isinstance(planning, int) or planning < 0:
            raise ValueError(f"planning must be a whole number of steps, 0 for Q-learning; got {planning!r}")
        self.rate, self.discount, self.exploration = as_float(rate), as_float(discount), as_float(exploration)
        self.planning = planning

    def init(self, task: Task, lookup: Lookup, key: PRNGKeyArray) -> DynaQCarry:
        """Start with Q = 0, an empty model, and the real episode at a start of the task.

        Args:
            task: The task.
            lookup: Its states and choices.
            key: The random key of the start.

        Returns:
            The carry.
        """
        S, A = lookup.s.shape[0], lookup.a.shape[0]
        zero, Q = jnp.zeros((), jnp.int32), jnp.zeros((S, A), lookup.s.dtype)
        experience = Experience(
            jnp.zeros((S, A, S), jnp.int32),
            jnp.zeros((S, A), bool),
            Q,
            jnp.zeros(S, bool),
            jnp.zeros(S * A, jnp.int32),
            zero,
        )
        return DynaQCarry(Q, experience, task.initial(key), zero, zero, zero)

    def run(self, carry: DynaQCarry, task: Task, lookup: Lookup, key: PRNGKeyArray, *, steps: int) -> DynaQCarry:
        """Make further real steps; step i of all runs of the carry draws from `fold_in(key, i)`.

        Args:
            carry: The carry.
            task: The task.
            lookup: Its states and choices.
            key: The random key.
            steps: The number of further real steps.

        Returns:
            The new carry.
        """

        def step(carry, _):
            return self._step(carry, task, lookup, key), None

        return jax.lax.scan(step, carry, None, length=steps)[0]

    def _step(self, carry: DynaQCarry, task: Task, lookup: Lookup, key: PRNGKeyArray) -> DynaQCarry:
        key_a, key_s, key_start, key_plan = step_keys(key, carry.steps, 4)
        i = lookup.number(carry.s)
        a = self._choice(carry.Q[i], key_a)
        r, s_next = transition(task, carry.s, lookup.a[a], key_s)
        done = is_done(task, s_next)
        finite = jnp.isfinite(r) & jnp.all(jnp.isfinite(s_next))
        j = lookup.number(jnp.where(finite, s_next, carry.s))

        Q = jnp.where(finite, self._learned(carry.Q, i, a, r, j, done), carry.Q)
        experience = _seen(carry.experience, i, a, r, j, done, finite)
        Q = self._planned(Q, experience, key_plan)
        again = done | ~finite | (carry.t + 1 >= task.horizon)
        return DynaQCarry(
            Q,
            experience,
            jnp.where(again, task.initial(key_start), s_next),
            jnp.where(again, 0, carry.t + 1),
            carry.steps + 1,
            carry.nonfinite + (~finite).astype(jnp.int32),
        )

    def _choice(self, q: Float[Array, " A"], key: PRNGKeyArray) -> Int[Array, ""]:
        key_tie, key_any, key_share = jax.random.split(key, 3)
        best = jnp.argmax(jnp.where(q == jnp.max(q), jax.random.uniform(key_tie, q.shape, q.dtype), -1))
        some = jax.random.randint(key_any, (), 0, q.shape[0], jnp.int32)
        return jnp.where(jax.random.uniform(key_share) < self.exploration, some, best.astype(jnp.int32))

    def _learned(self, Q: Array, i: Array, a: Array, r: Array, j: Array, done: Array) -> Float[Array, "S A"]:
        ahead = jnp.where(done, jnp.zeros_like(r), jnp.max(Q[j]))
        return Q.at[i, a].add(self.rate * (r + self.discount * ahead - Q[i, a]))

    def _planned(self, Q: Array, experience: Experience, key: PRNGKeyArray) -> Float[Array, "S A"]:
        """`planning` updates from the model; none if it is empty."""

        def step(Q, key):
            key_pair, key_next = jax.random.split(key)
            number = jax.random.randint(key_pair, (), 0, jnp.maximum(experience.met, 1))
            i, a = jnp.divmod(experience.pairs[number], Q.shape[1])
            ahead = jnp.cumsum(experience.followed[i, a])
            j = jnp.searchsorted(ahead, jax.random.randint(key_next, (), 0, jnp.maximum(ahead[-1], 1)), side="right")
            learned = self._learned(Q, i, a, experience.r[i, a], j, experience.done[j])
            return jnp.where(experience.met > 0, learned, Q), None

        return jax.lax.scan(step, Q, jax.random.split(key, self.planning))[0] if self.planning else Q


def _seen(experience: Experience, i: Array, a: Array, r: Array, j: Array, done: Array, finite: Array) -> Experience:
    """The model after one more step, unchanged if that was not finite."""
    followed, pairs = experience.followed, experience.pairs
    new = finite & ~experience.known[i, a]
    end = jnp.where(new, experience.met, pairs.size)  # out of bounds: dropped
    return Experience(
        followed.at[i, a, j].add(finite.astype(followed.dtype)),
        experience.known.at[i, a].set(experience.known[i, a] | finite),
        experience.r.at[i, a].set(jnp.where(finite, r, experience.r[i, a])),
        experience.done.at[j].set(jnp.where(finite, done, experience.done[j])),
        pairs.at[end].set((i * experience.r.shape[1] + a).astype(pairs.dtype), mode="drop"),
        experience.met + new.astype(jnp.int32),
    )
