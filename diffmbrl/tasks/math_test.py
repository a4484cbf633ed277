r"""The math test of the lecture: a plan that must fix its answer before it sees the question does best to go home.

Two time steps. At the door: take the test, or go home and earn nothing. At the desk: two one-digit numbers are seen, each of
0 to 9 equally likely, and their sum is to be written down: right earns `prize`, wrong loses `penalty`.

A choice is the whole number nearest to the one action, from -1 to 18. At the door -1 goes home and any other takes the test;
at the desk 0 to 18 are answers, and -1 is a wrong one. Every policy, planner and estimator of the package can therefore run on
it, and a uniform action within the limits makes each choice equally often. No gradient passes through a choice.
"""

from collections.abc import Sequence
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, ScalarLike

from diffmbrl.core import Box, Task, parameter
from diffmbrl.tasks.finite import Finite
from diffmbrl.tasks.parameters import accept

HOME, DOOR, DESK, PASSED = -1.0, 0.0, 1.0, 2.0  # places
DIGITS = 10
CHOICES = 20  # -1 to 18


def choice(a: Float[Array, "1"]) -> Float[Array, ""]:
    """Return the whole number nearest to an action, within -1 to 18."""
    return jnp.clip(jnp.round(a[0]), -1, CHOICES - 2)


def right(s: Float[Array, "3"], a: Float[Array, "1"]) -> Bool[Array, ""]:
    """Whether the action is the sum of the digits seen."""
    return jnp.abs(s[1] + s[2] - choice(a)) < 0.5


def at(s: Float[Array, "3"], place: float) -> Bool[Array, ""]:
    """Whether the state is in that place."""
    return jnp.abs(s[0] - place) < 0.5


class MathTest(eqx.Module):
    """The digits are drawn from the key as the test is taken; without a key they are at their mean, 4.5 each."""

    def __call__(
        self, s: Float[Array, "3"], a: Float[Array, "1"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "3"]:
        mean = jnp.full(2, (DIGITS - 1) / 2, s.dtype)
        digits = mean if key is None else jax.random.randint(key, (2,), 0, DIGITS).astype(s.dtype)
        return self.after(s, a, digits)

    def after(self, s: Float[Array, "3"], a: Float[Array, "1"], digits: Float[Array, "2"]) -> Float[Array, "3"]:
        """The next state, if these are the digits on the sheet."""
        home, passed = (jnp.asarray([place, 0, 0], s.dtype) for place in (HOME, PASSED))
        test = jnp.concatenate([jnp.full(1, DESK, s.dtype), digits])
        chosen = jnp.where(choice(a) >= 0, test, home)
        answered = jnp.where(right(s, a), passed, home)
        return jnp.where(at(s, DOOR), chosen, jnp.where(at(s, DESK), answered, s))


class Money(eqx.Module):
    """Reward of an answer at the desk; 0 at every other place."""

    prize: Float[Array, ""] = parameter(2000.0)
    penalty: Float[Array, ""] = parameter(1000.0)

    def __call__(self, s: Float[Array, "3"], a: Float[Array, "1"]) -> Float[Array, ""]:
        earned = jnp.where(right(s, a), self.prize, -self.penalty)
        return jnp.where(at(s, DESK), earned, jnp.zeros_like(earned))


class Over(eqx.Module):
    """The end of an episode: home, or past the desk."""

    def __call__(self, s: Float[Array, "3"]) -> Bool[Array, ""]:
        return at(s, HOME) | at(s, PASSED)


class Passed(eqx.Module):
    """Success: the answer was right."""

    def __call__(self, s: Float[Array, "3"]) -> Bool[Array, ""]:
        return at(s, PASSED)


class Sheet(eqx.Module):
    """Features: the place, and the digits as shares of 9."""

    def __call__(self, s: Float[Array, "3"]) -> Float[Array, "3"]:
        return s / jnp.asarray([1, DIGITS - 1, DIGITS - 1], s.dtype)


def math_test(*, horizon: int = 2, prize: ScalarLike = 2000.0, penalty: ScalarLike = 1000.0) -> Task:
    """Take a test of adding two digits or go home: an open loop, which answers before it sees, cannot win.

    The one action is rounded to a choice: -1 goes home, 0 to 18 take the test and then answer it. Success: the right answer.
    Source: Levine, CS 285, the lecture on model-based reinforcement learning with policies.

    Args:
        horizon: Number of steps; an episode needs two.
        prize: Reward of a right answer.
        penalty: Cost of a wrong answer.

    Returns:
        The task.

    Raises:
        ValueError: If a parameter is not a finite positive number, or `horizon` is below 1.

    >>> float(math_test().reward(jnp.array([1.0, 3.0, 4.0]), jnp.array([7.2])))
    2000.0
    """
    prize, penalty = accept("math-test", prize=prize, penalty=penalty)
    return Task(
        name="math-test",
        dynamics=MathTest(),
        reward=Money(prize, penalty),
        initial=Box([DOOR, 0, 0], [DOOR, 0, 0]),
        features=Sheet(),
        done=Over(),
        success=Passed(),
        a_low=[-1.5],
        a_high=[CHOICES - 1.5],
        horizon=horizon,
        dt=1.0,
    )


def finite_model(task: Task) -> Finite:
    """All that can happen, with its probability: the functions of the task itself at every state, choice and pair of digits.

    States: the door, the two ends, and a hundred tests; choices -1 to 18. Raises: `ValueError` for another task.
    """
    if not isinstance(task.dynamics, MathTest):
        raise ValueError(f"the tables are those of the task 'math-test'; got '{task.name}'")
    digits = np.stack(np.meshgrid(np.arange(DIGITS), np.arange(DIGITS), indexing="ij"), -1).reshape(-1, 2)
    ends = np.array([[DOOR, 0, 0], [HOME, 0, 0], [PASSED, 0, 0]])
    s = np.concatenate([ends, np.insert(digits, 0, DESK, axis=1)]).astype(task.a_low.dtype)
    a = np.arange(-1, CHOICES - 1).astype(task.a_low.dtype)[:, None]
    each = jnp.asarray(digits, task.a_low.dtype)
    r, following, done = jax.jit(_everything)(task, jnp.asarray(s), jnp.asarray(a), each)
    names = {tuple(state): i for i, state in enumerate(s.tolist())}
    return Finite(
        s=s,
        a=a,
        r=[[Fraction(x) for x in row] for row in np.asarray(r).tolist()],
        following=[[_counted(x, names) for x in row] for row in np.asarray(following).tolist()],
        done=np.asarray(done).tolist(),
    )


def _everything(task: Task, s: Array, a: Array, digits: Array) -> tuple[Array, Array, Array]:
    def over(f, *rest):
        return jax.vmap(lambda s: jax.vmap(lambda a: f(s, a, *rest))(a))(s)

    dynamics, done = task.dynamics, task.done
    assert isinstance(dynamics, MathTest) and done is not None

    def following(s, a):
        return jax.vmap(lambda d: dynamics.after(s, a, d))(digits)

    return over(task.reward), over(following), jax.vmap(done)(s)


def _counted(states: Sequence[Sequence[float]], names: dict[tuple[float, ...], int]) -> dict[int, Fraction]:
    """Equally likely next states as probabilities of their numbers."""
    found: dict[int, Fraction] = {}
    for state in states:
        i = names[tuple(state)]
        found[i] = found.get(i, Fraction(0)) + Fraction(1, len(states))
    return found
