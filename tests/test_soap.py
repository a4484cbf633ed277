"""SOAP against what it must be: Adam without rotation, the same in rotated coordinates, and quick where Adam is slow."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl.optimizers.soap import scale_by_soap, soap
from tests.problems import same, same_tree

ROWS, COLUMNS = 4, 3


def rotation(seed: int, size: int) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (size, size)))[0]


def kronecker(A, B, W, W_star):
    r"""tr((W - W*)' A (W - W*) B) / 2, whose Hessian is the Kronecker product of B and A."""
    return jnp.sum((A @ (W - W_star) @ B) * (W - W_star)) / 2


@partial(jax.jit, static_argnames=("rule", "steps"))
def trajectory(rule, objective, start, steps):
    """[steps, ...]: parameters after every step."""

    def step(carry, _):
        W, state = carry
        updates, state = rule().update(jax.grad(objective)(W), state, W)
        W = optax.apply_updates(W, updates)
        return (W, state), W

    # As OptaxSolver does: optax's own rules raise floats to powers of whole numbers.
    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.scan(step, (start, rule().init(start)), length=steps)[1]


def quadratic(condition: float, *, seed: int = 0):
    """A matrix problem whose two factors have this condition, in axes of their own, and its start."""
    P, Q = rotation(seed, ROWS), rotation(seed + 1, COLUMNS)
    A, B = ((R * jnp.geomspace(1.0, 1 / condition, R.shape[0])) @ R.T for R in (P, Q))
    W_star = jax.random.normal(jax.random.key(seed + 2), (ROWS, COLUMNS))
    return jax.tree_util.Partial(kronecker, A, B, W_star=W_star), jnp.zeros((ROWS, COLUMNS))


def unrotated():
    return soap(0.03, b1=0.9, b2=0.999, largest=0)


def adam():
    return optax.adam(0.03)


def rotated():
    return soap(0.03, every=5)


def test_without_a_rotation_it_is_adam(x64):
    objective, start = quadratic(10.0)
    same(trajectory(unrotated, objective, start, 30), trajectory(adam, objective, start, 30))


def test_vectors_are_left_to_adam_and_every_shape_is_taken(x64):
    # float32 parameters beside float64 ones, a scalar, an axis of one, and three axes.
    shapes = {"b": (5,), "c": (), "row": (1, 4), "cube": (2, 3, 4)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()} | {"single": jnp.ones((3, 2), jnp.float32)}
    gradients = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    rule: Any = scale_by_soap(b1=0.9, b2=0.999)
    state = rule.init(params)
    assert [[Q if Q is None else Q.shape for Q in sides] for sides in state.bases] == [
        [None], [], [(2, 2), (3, 3), (4, 4)], [None, (4, 4)], [(3, 3), (2, 2)]
    ]  # fmt: skip
    updates, after = jax.jit(rule.update)(gradients, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (updates, after)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, state)
    )
    with jax.numpy_dtype_promotion("standard"):
        plain: Any = optax.scale_by_adam()
        by_adam, _ = plain.update(gradients, plain.init(params))
    for name in ("b", "c"):
        same(updates[name], by_adam[name])
    # In the basis of its own singular vectors a gradient is diagonal, and the first step is an orthogonal matrix.
    np.testing.assert_allclose(np.linalg.svd(updates["single"])[1], 1.0, rtol=0.03)


def test_it_does_not_see_a_rotation_of_the_coordinates_and_adam_does(x64):
    objective, start = quadratic(10.0)
    U, V = rotation(7, ROWS), rotation(8, COLUMNS)
    turned = jax.tree_util.Partial(lambda W, objective, U, V: objective(U.T @ W @ V), objective=objective, U=U, V=V)
    start = start + jnp.eye(ROWS, COLUMNS)
    for rule, equal in ((rotated, True), (adam, False)):
        there = trajectory(rule, turned, U @ start @ V.T, 40)
        back = jnp.einsum("ji,tjk,kl->til", U, there, V)
        close = np.allclose(back, trajectory(rule, objective, start, 40), rtol=1e-6, atol=1e-7)
        assert close == equal, rule.__name__


def test_the_bases_come_to_be_eigenvectors_of_the_factors(x64):
    rule: Any = scale_by_soap(every=1, b2=0.9)
    G = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    state = rule.init(G)
    for step in range(60):
        turned = jax.random.normal(jax.random.key(step % 6), (ROWS, COLUMNS)) * jnp.geomspace(1.0, 0.01, ROWS)[:, None]
        _, state = jax.jit(rule.update)(turned, state)
        for Q in state.bases[0]:
            same(Q.T @ Q, np.eye(len(Q)))
    L, Q = state.factors[0][0], state.bases[0][0]
    spectrum = Q.T @ L @ Q
    assert np.abs(spectrum - np.diag(np.diag(spectrum))).max() < 0.02 * np.abs(spectrum).max()
    same(np.trace(L), np.trace(state.factors[0][1]))


def test_between_refreshes_the_bases_stay():
    rule: Any = scale_by_soap(every=3)
    G = jax.random.normal(jax.random.key(0), (ROWS, COLUMNS))
    state, changed = rule.init(G), []
    for step in range(7):
        before = state.bases
        _, state = jax.jit(rule.update)(G + 0.3 * jnp.cos(step + jnp.arange(12.0)).reshape(G.shape), state)
        changed.append(not np.array_equal(before[0][0], state.bases[0][0]))
    assert changed == [True, False, False, True, False, False, True]


def test_an_ill_conditioned_product_of_factors_is_no_harder_than_a_diagonal(x64):
    objective, start = quadratic(300.0)
    costs = {rule.__name__: float(objective(trajectory(rule, objective, start, 300)[-1])) for rule in (rotated, adam)}
    assert costs["rotated"] < 0.1 * costs["adam"], costs


def test_lanes_are_loops(x64):
    starts = jax.random.normal(jax.random.key(3), (3, ROWS, COLUMNS))
    objective, _ = quadratic(10.0)
    together = jax.vmap(lambda start: trajectory(rotated, objective, start, 12))(starts)
    for lane, start in enumerate(starts):
        same_tree(together[lane], trajectory(rotated, objective, start, 12), rtol=1e-5, atol=1e-6)


def test_a_basis_is_refreshed_at_times():
    with pytest.raises(ValueError, match="every must be at least 1 update, got 0"):
        scale_by_soap(every=0)
