r"""Tasks of finitely many states and choices, as tables, and their values by enumeration in exact arithmetic.

$$Q_t(s, a) = r(s, a) + \sum_{s'} P(s' \mid s, a) \max_{a'} Q_{t+1}(s', a')$$

is the value of the best closed loop. A plan fixes its choices beforehand, so its value is an expectation over the states
they lead to, and the best plan is the best of all $A^T$ of them. A controller that replans at each step applies the first
choice of the best plan from its current state. Probabilities and rewards are fractions, and nothing is rounded.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Finite(NamedTuple):
    """S states and A choices, with rewards, transition probabilities and ends of episodes."""

    s: np.ndarray  # [S, n]
    a: np.ndarray  # [A, m]
    r: Sequence[Sequence[Fraction]]  # [S][A]
    following: Sequence[Sequence[dict[int, Fraction]]]  # [S][A]: the probability of each next state
    done: Sequence[bool]  # [S]


class Lookup(eqx.Module):
    """The states and choices of a table as arrays, and the number of the state that is nearest to one."""

    s: Float[Array, "S n"]
    a: Float[Array, "A m"]

    @classmethod
    def of(cls, finite: Finite) -> "Lookup":
        return cls(jnp.asarray(finite.s), jnp.asarray(finite.a))

    def number(self, s: Float[Array, " n"]) -> Int[Array, ""]:
        return jnp.argmin(jnp.sum((self.s - s) ** 2, axis=-1)).astype(jnp.int32)


class Tabular(eqx.Module):
    """The policy that makes the best choice of a table Q; of equals the first."""

    lookup: Lookup
    Q: Float[Array, "S A"]

    def __call__(self, s: Float[Array, " n"], *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        return self.lookup.a[jnp.argmax(self.Q[self.lookup.number(s)])]


def planned(finite: Finite, s: int, plan: Sequence[int]) -> Fraction:
    """Return the expected return of a plan from state s."""
    total, reached = Fraction(0), {s: Fraction(1)}
    for a in plan:
        after: dict[int, Fraction] = {}
        for i, p in reached.items():
            if finite.done[i]:
                continue
            total += p * finite.r[i][a]
            for j, q in finite.following[i][a].items():
                after[j] = after.get(j, Fraction(0)) + p * q
        reached = after
    return total


def open_loop(finite: Finite, s: int, steps: int) -> tuple[Fraction, tuple[int, ...]]:
    """Return the value of the best plan from state s, and the plan (the first of equals). Cost: all A^steps plans."""
    every = product(range(len(finite.a)), repeat=steps)
    value, plan = max(((planned(finite, s, plan), plan) for plan in every), key=lambda found: found[0])
    return value, plan


def replanned(finite: Finite, s: int, steps: int) -> Fraction:
    """Return the expected return from state s of applying the first choice of the best plan at each step."""
    if steps == 0 or finite.done[s]:
        return Fraction(0)
    a = open_loop(finite, s, steps)[1][0]
    ahead = (q * replanned(finite, j, steps - 1) for j, q in finite.following[s][a].items())
    return finite.r[s][a] + sum(ahead, Fraction(0))


def optimal_q(finite: Finite, steps: int) -> list[list[list[Fraction]]]:
    """Q_t(s, a) of the best policy, [steps][S][A]; 0 where the episode is over."""
    best = [Fraction(0)] * len(finite.s)
    backwards = []
    for _ in range(steps):
        Q = [
            [
                Fraction(0) if over else r + sum((q * best[j] for j, q in ahead.items()), Fraction(0))
                for r, ahead in zip(earned, following, strict=True)
            ]
            for earned, following, over in zip(finite.r, finite.following, finite.done, strict=True)
        ]
        backwards.append(Q)
        best = [max(row) for row in Q]
    return backwards[::-1]


def followed(finite: Finite, s: int, choices: Sequence[int], steps: int) -> Fraction:
    """Return the expected return from state s of a policy, given as its choice in each state, [S]."""
    if steps == 0 or finite.done[s]:
        return Fraction(0)
    a = choices[s]
    ahead = (q * followed(finite, j, choices, steps - 1) for j, q in finite.following[s][a].items())
    return finite.r[s][a] + sum(ahead, Fraction(0))
