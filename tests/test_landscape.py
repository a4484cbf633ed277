"""Slices are returns at moved parameters; directions have the policy's own lengths, filter by filter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, Neural, OpenLoop, tasks
from diffmbrl.diagnostics import filter_normalised, landscape_line, landscape_plane
from diffmbrl.rollout import episode_returns
from tests.problems import bent, changed, same

KEY = jax.random.key(0)


def test_filters_have_the_policys_lengths(x64: None) -> None:
    task = bent()
    policy = Neural.init(task, hidden=[5, 4], key=KEY)
    policy = jax.tree.map(lambda x: x + 0.1 if x.ndim == 1 else x.at[0].set(0.0), policy)
    d = filter_normalised(policy, jax.random.key(1))
    for own, drawn in zip(policy.net.weights, d.net.weights, strict=True):
        same(np.linalg.norm(drawn, axis=1), np.linalg.norm(own, axis=1))
        assert (np.asarray(drawn[0]) == 0).all()
    for own, drawn in zip(policy.net.biases, d.net.biases, strict=True):
        same(np.linalg.norm(drawn), np.linalg.norm(own))
    other = filter_normalised(policy, jax.random.key(2))
    assert not np.allclose(other.net.weights[0][1:], d.net.weights[0][1:])


def test_directions_do_not_repeat_themselves_between_leaves() -> None:
    policy = Linear(jnp.ones((2, 3)), jnp.ones(2))
    d = filter_normalised(policy, KEY)
    assert not np.allclose(d.K[0, :2], d.b * np.linalg.norm(d.K[0, :2]) / np.linalg.norm(d.b))
    assert d.K.dtype == jnp.float32


@pytest.mark.parametrize("chunk", [4, 100])
def test_slices_are_the_returns_at_moved_parameters(chunk: int, x64: None) -> None:
    task = changed(bent(), noise=0.2)
    policy, s0, key = Neural.init(task, hidden=[3], key=KEY), task.starts(KEY, 3), jax.random.key(9)
    d, e = (filter_normalised(policy, jax.random.key(i)) for i in (1, 2))
    alphas, betas = jnp.linspace(-1, 1, 5), jnp.linspace(0, 2, 3)
    at = jax.jit(
        lambda a, b: episode_returns(jax.tree.map(lambda x, u, v: x + a * u + b * v, policy, d, e), task, s0, key)
    )
    on_line = jax.jit(landscape_line, static_argnames="chunk")(policy, task, s0, d, alphas, key, chunk=chunk)
    on_plane = jax.jit(landscape_plane, static_argnames="chunk")(
        policy, task, s0, (d, e), alphas, betas, key, chunk=chunk
    )
    assert on_line.shape == (5, 3) and on_plane.shape == (5, 3, 3)
    for i, a in enumerate(alphas):
        same(on_line[i], at(a, 0.0))
        for j, b in enumerate(betas):
            same(on_plane[i, j], at(a, b))


def test_a_quadratic_return_has_a_quadratic_slice(x64: None) -> None:
    task = tasks.lqr(horizon=7)
    plan = OpenLoop(jax.random.normal(KEY, (7, 1)))
    d = filter_normalised(plan, jax.random.key(1))
    same(jnp.abs(d.a), jnp.abs(plan.a))
    alphas = jnp.linspace(-3, 3, 9)
    J = np.mean(landscape_line(plan, task, task.starts(KEY, 2), d, alphas), axis=1)
    fit = np.polyfit(alphas, J, 2)
    assert fit[0] < 0
    same(np.polyval(fit, alphas), J, atol=1e-8)


def test_new_points_do_not_recompile() -> None:
    task = tasks.lqr(horizon=3)
    policy, s0 = Linear(jnp.ones((1, 2)), jnp.ones(1)), task.starts(KEY, 2)
    run = jax.jit(chex.assert_max_traces(lambda d, a: landscape_line(policy, task, s0, d, a), n=1))
    for i in range(2):
        run(filter_normalised(policy, jax.random.key(i)), jnp.linspace(0.0, i, 5))


def test_bad_input_is_named() -> None:
    task = tasks.lqr(horizon=3)
    policy, s0 = Linear.zeros(task), task.starts(KEY, 2)
    with pytest.raises(ValueError, match=r"must be like the policy, .K \[1, 2\], .b \[1\]; got .K \[1, 3\], .b \[1\]"):
        landscape_line(policy, task, s0, Linear(jnp.ones((1, 3)), jnp.ones(1)), jnp.ones(2))
    with pytest.raises(ValueError, match="chunk must be at least 1 point, got 0"):
        landscape_line(policy, task, s0, policy, jnp.ones(2), chunk=0)
