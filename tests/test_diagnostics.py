"""What is wrong is named; what cannot be improved is refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, Neural, OpenLoop, tasks
from diffmbrl.core import Box, Task
from diffmbrl.solve.gradient_reach import action_gradient, refuse_without_gradient
from diffmbrl.solve.nonfinite import locate, nonfinite_leaf
from diffmbrl.tasks import TASKS
from tests.problems import bent, changed, some_slow

KEY = jax.random.key(0)

# locate.


class Poisoned(eqx.Module):
    """s' = s + a, NaN in the second number once the first is past its edge."""

    edge: Any = eqx.field(default_factory=lambda: jnp.asarray(2.5, float))

    def __call__(self, s, a, *, key=None):
        x = s["x"] + 1 + a
        return {"x": x, "y": jnp.where(x < self.edge, s["y"], jnp.nan)}


class Norm(eqx.Module):
    limit: Any = eqx.field(default_factory=lambda: jnp.asarray(99.0, float))

    def __call__(self, s, a):
        return -jnp.sum(s["x"] ** 2) - jnp.sum(a**2) + jnp.where(s["x"][0] < self.limit, 0.0, jnp.inf)


class Origin(eqx.Module):
    def __call__(self, key):
        return {"x": jnp.zeros(1), "y": jnp.zeros(1)}


def poisoned(**leaves: float) -> Task:
    return Task(
        name="poisoned", dynamics=Poisoned(jnp.asarray(leaves.get("edge", 99.0))), initial=Origin(),
        reward=Norm(jnp.asarray(leaves.get("limit", 99.0))), a_low=[-jnp.inf], a_high=[jnp.inf], horizon=5, dt=1.0,
    )  # fmt: skip


def starts(*x: float) -> dict:
    return {"x": jnp.asarray(x)[:, None], "y": jnp.zeros((len(x), 1))}


@pytest.mark.parametrize(
    "leaves, x, where",
    [
        ({"edge": 2.5}, (-9.0, 0.0), "s[3] of start 1"),
        ({"edge": 2.5}, (0.0, 1.0), "s[2] of start 1"),  # the earliest step, not the first start
        ({"edge": 4.5}, (0.0,), "s[5] of start 0"),
        ({"limit": 2.5}, (-9.0, -9.0, 0.0), "r[3] of start 2"),
        ({"edge": 2.5, "limit": 2.5}, (0.0,), "s[3] of start 0"),  # the cause before the consequence
        ({}, (float("nan"),), "s[0] of start 0"),
    ],
)
def test_the_first_value_that_is_not_finite_is_located(leaves, x, where):
    policy = Linear(jnp.zeros((1, 2)), jnp.zeros(1))
    assert locate(policy, poisoned(**leaves), starts(*x)) == where


def test_a_single_start_and_a_policy_gone_wrong():
    task = tasks.lqr(horizon=5)
    wrong = Linear(jnp.full((1, 2), jnp.nan), jnp.zeros(1))
    assert locate(wrong, task, jnp.ones(2)) == "a[0] of start 0"
    plan = OpenLoop(jnp.zeros((5, 1)).at[3].set(jnp.inf))
    assert locate(plan, task, jnp.ones(2)) == "a[3] of start 0"


def test_a_gradient_that_is_not_finite_is_named_by_its_leaf():
    task = changed(bent(), kink=100.0)
    s0 = task.starts(KEY, 2)
    named = locate(Neural.init(task, hidden=[3], key=KEY), task, s0)
    assert named.startswith("dJ/dtheta in policy.net.weights[0], though every state, action and reward")
    assert locate(OpenLoop.zeros(task), task, s0).startswith("dJ/dtheta in plan.a, ")


def test_nothing_wrong_with_the_full_objective():
    assert locate(OpenLoop.zeros(bent()), bent(), jnp.zeros((1, 2))).startswith("the return of the objective in force")


def test_nonfinite_leaf():
    tree = {"a": jnp.ones(2), "b": [jnp.asarray([1.0, jnp.inf]), jnp.asarray(jnp.nan)], "c": jnp.arange(3)}
    assert nonfinite_leaf(tree) == "['b'][0]"
    assert nonfinite_leaf(tree, allow_infinite=True) == "['b'][1]"
    assert nonfinite_leaf({"a": jnp.ones(2), "c": jnp.arange(3)}) is None
    assert nonfinite_leaf(tasks.lqr(), allow_infinite=True) is None


# Reach.


# Of a reward of each kind one: dense, of a step, after the clock, of contact.
REACHED = {"lqr", "cartpole-balance", "heaviside", "ball-and-wall", "tennis", "pushing", "pendulum"}


@pytest.mark.parametrize("name", some_slow(TASKS, *(set(TASKS) - REACHED)))
def test_every_task_has_the_gradient_in_its_actions_that_the_table_says(name):
    task = tasks.make(name, horizon=5)
    g = action_gradient(task)
    assert g.shape == (5, task.m) and np.all(np.isfinite(g))
    if TASKS[name].differentiable_reward:
        refuse_without_gradient(task)
        assert np.any(g != 0)
    else:
        assert not np.any(g)
        with pytest.raises(ValueError, match=f"'{name}' has no gradient in the action"):
            refuse_without_gradient(task)


class Coasting(eqx.Module):
    """The action moves the second number, which moves the first one a step later."""

    def __call__(self, s, a, *, key=None):
        return jnp.stack([s[0] + s[1], s[1] + a[0]])


class FirstNumber(eqx.Module):
    def __call__(self, s, a):
        return s[0]


def coasting(horizon: int) -> Task:
    return Task(
        name="coasting", dynamics=Coasting(), reward=FirstNumber(), initial=Box([0.0, 0.0], [1.0, 1.0]),
        a_low=[-1.0], a_high=[1.0], horizon=horizon, dt=1.0,
    )  # fmt: skip


def test_a_horizon_that_ends_before_the_reward_is_refused():
    for horizon in (1, 2):
        with pytest.raises(
            ValueError, match=f"the reward of task 'coasting' has no gradient .* horizon of {horizon}: dJ/da is"
        ):
            refuse_without_gradient(coasting(horizon))
    refuse_without_gradient(coasting(3))
    np.testing.assert_allclose(action_gradient(coasting(4))[:, 0], [3, 1, 0, 0])
