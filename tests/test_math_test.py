"""The math test against enumeration, enumeration against plain loops, and tabular learning against both."""

import json
from fractions import Fraction
from itertools import product

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import OpenLoop, episode_return, rollout, tasks
from diffmbrl.agents.dyna_q import DynaQ
from diffmbrl.core import Box, Task
from diffmbrl.tasks.finite import Finite, Lookup, Tabular, followed, open_loop, optimal_q, planned, replanned
from diffmbrl.tasks.math_test import finite_model
from experiments import math_test, record

KEY = jax.random.key(0)
DOOR = jnp.zeros(3)
TASK = tasks.math_test()
PAIRS = list(product(range(10), range(10)))


@pytest.fixture(scope="module")
def finite() -> Finite:
    return finite_model(TASK)


# The task.


@pytest.mark.parametrize("a, chosen", [(-1.5, -1), (-0.51, -1), (-0.49, 0), (7.4, 7), (7.6, 8), (18.5, 18)])
def test_an_action_is_the_nearest_choice(a: float, chosen: int) -> None:
    at_desk = jnp.array([1.0, min(max(chosen, 0), 9), max(chosen - 9, 0)])
    s = TASK.dynamics(DOOR, jnp.array([a]), key=KEY)
    assert float(s[0]) == (-1 if chosen < 0 else 1)
    assert float(TASK.reward(at_desk, jnp.array([a]))) == (-1000 if chosen < 0 else 2000)


def test_all_tests_are_equally_likely_and_unseen_before() -> None:
    keys = jax.random.split(KEY, 20_000)
    s = np.asarray(jax.vmap(lambda k: TASK.dynamics(DOOR, jnp.ones(1), key=k))(keys))
    assert np.all(s[:, 0] == 1)
    seen = np.bincount((10 * s[:, 1] + s[:, 2]).astype(int), minlength=100)
    # 200 expected of each: chi squared with 99 degrees of freedom is below 158 but once in 10,000 draws.
    assert np.sum((seen - 200) ** 2 / 200) < 158
    np.testing.assert_array_equal(TASK.dynamics(DOOR, jnp.ones(1)), [1, 4.5, 4.5])


def test_after_the_answer_nothing_more_is_earned() -> None:
    task = tasks.math_test(horizon=4)
    for a, r, end in [(9.0, [0, 2000, 0, 0], 2), (8.0, [0, -1000, 0, 0], -1), (-1.0, [0, 0, 0, 0], -1)]:
        trajectory = rollout(OpenLoop(jnp.full((4, 1), a)), task, DOOR)  # 4.5 + 4.5, without a key
        np.testing.assert_array_equal(trajectory.r, r)
        assert float(trajectory.s_T[0]) == end
        assert bool(task.success(trajectory.s_T)) == (end == 2)


def test_tables_are_of_this_task_alone() -> None:
    with pytest.raises(ValueError, match="'math-test'; got 'lqr'"):
        finite_model(tasks.lqr())


# Values, by hand.


def test_values_by_hand(finite: Finite) -> None:
    ways = [sum(first + second == answer for first, second in PAIRS) for answer in range(19)]
    for answer, count in enumerate(ways):
        assert planned(finite, 0, (1, 1 + answer)) == Fraction(count, 100) * 2000 - Fraction(100 - count, 100) * 1000
    assert open_loop(finite, 0, 2) == (0, (0, 0))
    assert replanned(finite, 0, 2) == 0
    assert [replanned(finite, s, 1) for s in range(3, 103)] == [2000] * 100
    first, second = optimal_q(finite, 2)
    assert first[0] == [0] + [2000] * 19
    for s, (a, b) in enumerate(PAIRS, start=3):
        assert second[s] == [2000 if answer == a + b else -1000 for answer in range(-1, 19)]


def test_a_worse_prize_makes_no_difference_to_open_loop_until_guessing_pays(finite: Finite) -> None:
    # 10 of 100 tests have the sum 9: guessing it pays when a tenth of the prize is more than nine tenths of the penalty.
    for prize, home in [(8999.0, True), (9001.0, False)]:
        value, plan = open_loop(finite_model(tasks.math_test(prize=prize)), 0, 2)
        assert (plan == (0, 0)) == home and (value == 0) == home
        assert home or plan == (1, 10)


def test_the_greedy_policy_of_the_best_table_earns_what_enumeration_says(finite: Finite) -> None:
    Q = math_test.best_q(finite, 2)
    assert followed(finite, 0, Q.argmax(-1).tolist(), 2) == 2000
    policy = Tabular(Lookup.of(finite), jnp.asarray(Q, jnp.float32))
    J = jax.vmap(lambda k: episode_return(policy, TASK, DOOR, k))(jax.random.split(KEY, 50))
    np.testing.assert_array_equal(J, 2000)


# Learning.


def learned(agent: DynaQ, finite: Finite, steps: int, seeds: int = 3, task: Task = TASK, key=KEY):
    lookup = Lookup.of(finite)

    @jax.jit
    def run(agent, keys):
        return jax.vmap(lambda k: agent.run(agent.init(task, lookup, k), task, lookup, k, steps=steps))(keys)

    return run(agent, jax.random.split(key, seeds))


def test_both_converge_to_enumerations_values_and_planning_needs_fewer_real_steps(finite: Finite) -> None:
    # With any choice at all, each of 2000 pairs is met some 9 times in 40,000 real steps.
    optimal = math_test.best_q(finite, 2)
    errors = {}
    for planning in (0, 8):
        Q = np.asarray(learned(DynaQ(rate=0.5, exploration=1.0, planning=planning), finite, 40_000, seeds=1).Q)
        errors[planning] = np.abs(Q - optimal)
        assert np.all(Q[:, 1:3] == 0)  # the ends
        greedy = [followed(finite, 0, q.argmax(-1).tolist(), 2) for q in Q]
        assert greedy == [2000]
    # Planning leaves the pairs never met; without it half of all are still off by more than 1 of 2000.
    assert np.sum(errors[8] > 1) <= 5 and np.mean(errors[8]) < 1
    assert np.sum(errors[0] > 1) > 500


WIDTH, HEIGHT = 9, 6
WALLS = [(2, 1), (2, 2), (2, 3), (5, 4), (7, 0), (7, 1), (7, 2)]


class Maze(eqx.Module):
    """Sutton's maze: x, y on a grid; north, south, east, west are the actions 0 to 3."""

    def __call__(self, s, a, *, key=None):
        moves = jnp.array([[0.0, -1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
        to = s + moves[jnp.round(a[0]).astype(jnp.int32)]
        inside = jnp.all((to >= 0) & (to < jnp.array([WIDTH, HEIGHT], to.dtype)))
        walled = jnp.any(jnp.all(to == jnp.array(WALLS, to.dtype), axis=1))
        return jnp.where(inside & ~walled, to, s)


class AtGoal(eqx.Module):
    def __call__(self, s, *a):
        return jnp.all(s == jnp.array([WIDTH - 1, 0], s.dtype))


class ToGoal(eqx.Module):
    def __call__(self, s, a):
        return AtGoal()(Maze()(s, a)).astype(s.dtype)


def maze() -> tuple[Task, Finite]:
    task = Task(
        name="maze", dynamics=Maze(), reward=ToGoal(), done=AtGoal(), initial=Box([0, 2], [0, 2]), a_low=[-0.5],
        a_high=[3.5], horizon=2000, dt=1.0,
    )  # fmt: skip
    s = np.array([[x, y] for x in range(WIDTH) for y in range(HEIGHT) if (x, y) not in WALLS], np.float32)
    a = np.arange(4, dtype=np.float32)[:, None]
    to = jax.vmap(lambda s: jax.vmap(lambda a: task.dynamics(s, a))(a))(jnp.asarray(s))
    names = {tuple(state): i for i, state in enumerate(s.tolist())}
    goal = names[(WIDTH - 1, 0)]
    following = [[{names[tuple(x)]: Fraction(1)} for x in row] for row in np.asarray(to).tolist()]
    r = [[Fraction(int(goal in ahead)) for ahead in row] for row in following]
    return task, Finite(s, a, r, following, [i == goal for i in range(len(s))])


@pytest.mark.slow
def test_planning_finds_suttons_maze_in_a_fraction_of_the_real_steps() -> None:
    """Sutton and Barto 2018, figure 8.2: the shortest way is 14 steps (here: 16 will do); planning needs a fraction of them."""
    task, finite = maze()
    shortest = optimal_q(finite, 14)
    start = int(np.flatnonzero((finite.s == [0, 2]).all(1))[0])
    assert max(shortest[0][start]) == 1 and max(shortest[1][start]) == 0

    def reached(planning: int, steps: int) -> np.ndarray:
        agent = DynaQ(rate=0.1, discount=0.95, exploration=0.1, planning=planning)
        Q = np.asarray(learned(agent, finite, steps, seeds=6, task=task).Q)
        return np.array([float(followed(finite, start, q.argmax(-1).tolist(), 16)) for q in Q])

    assert np.mean(reached(30, 3000)) >= 0.8
    assert np.mean(reached(0, 3000)) <= 0.2
    assert np.mean(reached(0, 15_000)) >= 0.7


@pytest.mark.slow
def test_seeds_differ_and_repeat_and_one_alone_is_one_of_many(finite: Finite) -> None:
    agent = DynaQ(planning=2)
    many, again = learned(agent, finite, 300), learned(agent, finite, 300)
    jax.tree.map(np.testing.assert_array_equal, many, again)
    assert np.any(many.Q[0] != many.Q[1])
    lookup = Lookup.of(finite)
    k = jax.random.split(KEY, 3)[1]
    alone = agent.run(agent.init(TASK, lookup, k), TASK, lookup, k, steps=100)
    alone = agent.run(alone, TASK, lookup, k, steps=200)
    np.testing.assert_array_equal(alone.Q, many.Q[1])


def test_a_new_rate_does_not_recompile(finite: Finite) -> None:
    lookup = Lookup.of(finite)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(agent, key):
        return agent.run(agent.init(TASK, lookup, key), TASK, lookup, key, steps=10)

    run(DynaQ(rate=0.5, planning=1), KEY)
    assert int(run(DynaQ(rate=0.1, exploration=0.5, planning=1), KEY).steps) == 10


class Broken(eqx.Module):
    """Of one test in two the reward is not a number."""

    inner: eqx.Module

    def __call__(self, s, a):
        return jnp.where((s[0] == 1) & (s[1] < 5), jnp.nan, self.inner(s, a))


def test_rewards_that_are_not_finite_are_counted_and_not_learned(finite: Finite) -> None:
    broken = eqx.tree_at(lambda t: t.reward, TASK, Broken(TASK.reward))
    carry = learned(DynaQ(exploration=1.0, planning=3), finite, 2000, task=broken)
    assert np.all(np.isfinite(carry.Q))
    # Of 2000 steps some 975 are at the desk, half of them before such a test.
    assert np.all(np.abs(carry.nonfinite - 487) < 100)
    low = finite.s[:, 1] < 5
    assert not np.any(carry.Q[:, low & (finite.s[:, 0] == 1)])
    assert np.any(carry.Q[:, ~low])


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"rate": 0.0}, r"rate must lie in \(0, 1\], got 0"),
        ({"discount": 1.1}, r"discount must lie in \[0, 1\], got 1.1"),
        ({"exploration": -0.1}, "exploration"),
        ({"planning": -1}, "planning must be a whole number"),
    ],
)
def test_bad_hyperparameters(bad: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DynaQ(**bad)


# The figure.


def test_every_value_of_the_figure_is_enumerations() -> None:
    saved = json.loads((record.RESULTS / "math_test.json").read_text())["numbers"]
    expected = {
        math_test.BEST: 0,
        math_test.TAKES: -700,
        math_test.MEAN: -700,
        math_test.REPLANNED: 0,
        math_test.SEATED: 2000,
        math_test.DRAWN: 2000,
        math_test.POLICY: 2000,
    }
    assert saved["exact"]["values"] == expected
    assert saved["exact"]["goes home"] is True and saved["exact"]["believed"] == 2000
    for name, x in saved["planner"].items():
        # Where its model shows it one test, CEM may not find back from that one's answer to the real one's.
        assert x == expected[name] or (name == math_test.DRAWN and x > 1500), name
    for name in math_test.LEARNED:
        curve = np.array(saved[name]["value"])
        assert np.all(curve[-1] == 2000)
        # Each test that is answered right is worth 30 more than one that is not, a hundredth of 2000 + 1000; or it goes home.
        assert np.all(((curve + 1000) % 30 == 0) | (curve == 0))


@pytest.mark.slow
def test_the_figures_values_are_measured_anew(finite: Finite) -> None:
    saved = json.loads((record.RESULTS / "math_test.json").read_text())["numbers"]
    assert record.rounded(math_test.exact(TASK, finite)) == saved["exact"]


def test_conclusion_and_figure_follow_the_numbers() -> None:
    exact = {"values": dict.fromkeys([math_test.BEST, math_test.REPLANNED], 0.0), "believed": 2000.0, "goes home": True}
    rest = (math_test.TAKES, math_test.MEAN, math_test.SEATED, math_test.DRAWN, math_test.POLICY)
    exact["values"] |= dict.fromkeys(rest, 7.0)
    curve = {"steps": [10, 20, 30], "value": [[-1, -1], [3, 3], [7, 7]], "error": [[3, 3], [2, 2], [1, 1]]}
    numbers = {"exact": exact, "planner": {math_test.BEST: 1.0}, "Q-learning": curve}
    said = math_test.conclude(numbers)
    assert "goes home" in said and "off by at most 1 (best plan)" in said
    assert "Q-learning beats the best plan after 20 real steps and is optimal after 30" in said
    assert "Dyna-Q beats" not in said
    assert len(math_test.paint(numbers).axes) == 3
