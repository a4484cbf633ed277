r"""Tabular Q-learning, and Dyna-Q, which learns from a model of what it has seen as well.

For a task of finitely many states and choices (`tasks/finite.py`), given as a `Lookup` of both: real steps are the task's own,
and what is learned is a table.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, as_float, is_concrete
from diffmbrl.rollout import is_done, step_keys, transition
from diffmbrl.tasks.finite import Lookup


class Experience(NamedTuple):
    """The model: how often each next state has followed, and the pairs met, in the order in which they were."""

    followed: Int[Array, "S A S"]
    known: Bool[
        Array, "S A"
    ]  # whether anything has: apart, so that the large table is written before it is read, in place
    r: Float[Array, "S A"]  # as last seen
    done: Bool[Array, " S"]  # the state was seen to end an episode
    pairs: Int[Array, " SA"]  # s A + a
    met: Int[Array, ""]


class DynaQCarry(NamedTuple):
    """What was learned, and where the real episode is."""

    Q: Float[Array, "S A"]
    experience: Experience
    s: State
    t: Int[Array, ""]
    steps: Int[Array, ""]  # real ones made
    nonfinite: Int[Array, ""]  # of them, those that were not finite: not learned from, and the end of their episode


class DynaQ(eqx.Module):
    r"""Q-learning from each real step, and from `planning` steps more drawn from a model of those made so far.

    $$Q(s, a) \leftarrow Q(s, a) + \alpha\,[r + \gamma \max_{a'} Q(s', a') - Q(s, a)],\qquad \max_{a'} Q(s', a') = 0$$
    where s' ends an episode. With `planning` = 0 that is Q-learning. The model counts what has followed each pair (s, a); a
    planning step takes one of the pairs met, each as likely, and a next state as often as it was seen. Choices are the best of
    Q, ties broken at random, or with the share `exploration` any. An episode that the clock ends at T goes on in the values:
    Q knows of no time, nor of a terminal reward.

    A real step with a reward or a state that is not finite is not learned from; it is counted and ends its episode.

    Shapes: Q [S, A]. Cost of a real step: 1 + `planning` updates of one entry of Q, a look for the nearest of S states.
    Raises: `ValueError` for a rate outside (0, 1], a discount or exploration outside [0, 1], or a negative `planning`.
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

    def __init__(self, *, rate: Any = 0.5, discount: Any = 1.0, exploration: Any = 0.1, planning: int = 0):
        if is_concrete(rate) and not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        for name, share in {"discount": discount, "exploration": exploration}.items():
            if is_concrete(share) and not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if not isinstance(planning, int) or planning < 0:
            raise ValueError(f"planning must be a whole number of steps, 0 for Q-learning; got {planning!r}")
        self.rate, self.discount, self.exploration = as_float(rate), as_float(discount), as_float(exploration)
        self.planning = planning

    def init(self, task: Task, lookup: Lookup, key: PRNGKeyArray) -> DynaQCarry:
        """Q = 0, nothing seen, at a start of the task."""
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
        """So many real steps more; step i draws from `fold_in(key, i)`, i counted over all runs of the carry."""

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
        """`planning` updates from the model; none before anything was seen."""

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
    """The model after one more step, if that was finite."""
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
