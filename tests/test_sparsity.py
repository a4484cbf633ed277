"""Patterns of Hessians read off a jaxpr, and Hessians from compressed tangents."""

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from diffmbrl import tasks
from diffmbrl.second_order.sparsity import colours, compression, dependencies

ANALYTIC = [name for name in tasks.TASKS if not name.startswith(("brax-", "quadrotor-waypoint"))]
A = jnp.arange(12.0).reshape(3, 4) + 1
EYE = np.eye(4, dtype=int).tolist()
# A function of four numbers, and what its outputs can depend on.
KNOWN = {
    "elementwise": (lambda z: jnp.sin(z) * 2 + z**3, EYE),
    "two at a time": (lambda z: z[:3] * z[1:], [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
    "a constant": (lambda z: jnp.ones(1) * 3, [[0, 0, 0, 0]]),
    "reversed": (lambda z: z[::-1], EYE[::-1]),
    "strides": (lambda z: z[1::2], [EYE[1], EYE[3]]),
    "transposed": (lambda z: z.reshape(2, 2).T.ravel(), [EYE[0], EYE[2], EYE[1], EYE[3]]),
    "stacked": (lambda z: jnp.stack([z[2], z[0] * z[3]]), [EYE[2], [1, 0, 0, 1]]),
    "taken apart": (lambda z: jnp.concatenate(jnp.split(z, 2)[::-1]), [EYE[2], EYE[3], EYE[0], EYE[1]]),
    "padded": (lambda z: jax.lax.pad(z[:2], z[3], [(1, 0, 1)]), [EYE[3], EYE[0], EYE[3], EYE[1]]),
    "cut by a negative pad": (lambda z: jax.lax.pad(z, 0.0, [(-1, -1, 0)]), [EYE[1], EYE[2]]),
    "sums": (lambda z: z.reshape(2, 2).sum(axis=0), [[1, 0, 1, 0], [0, 1, 0, 1]]),
    "spread": (lambda z: jnp.broadcast_to(z[:2, None], (2, 2)).ravel(), [EYE[0], EYE[0], EYE[1], EYE[1]]),
    "a matrix": (lambda z: A @ z, [[1, 1, 1, 1]] * 3),
    "a matrix of the inputs": (lambda z: (z.reshape(2, 2) @ jnp.ones((2, 1)))[:, 0], [[1, 1, 0, 0], [0, 0, 1, 1]]),
    "batched products": (
        lambda z: jnp.einsum("bi,bij->bj", z.reshape(2, 2), z[None, :1, None] * jnp.ones((2, 2, 1)))[:, 0],
        [[1, 1, 0, 0], [1, 0, 1, 1]],
    ),
    "a choice": (lambda z: jnp.where(z[:2] > z[3], z[:2], 1.0), EYE[:2]),
    "a call": (lambda z: jax.jit(lambda z: z[:2] * z[3])(z), [[1, 0, 0, 1], [0, 1, 0, 1]]),
    "held": (lambda z: jax.lax.stop_gradient(z[0]) * z[1:2], [[1, 1, 0, 0]]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_pattern(name: str):
    f, wanted = KNOWN[name]
    assert dependencies(f, jnp.arange(4.0)).astype(int).tolist() == wanted


@pytest.mark.parametrize(
    "f",
    [
        lambda z: jax.lax.scan(lambda c, x: (c + x, c), 0.0, z)[1],
        lambda z: jnp.sort(z),
        lambda z: z[jnp.argsort(z)],
        lambda z: jax.lax.cond(z[0] > 0, lambda z: z, lambda z: 2 * z, z),
    ],
    ids=["scan", "sort", "gather", "cond"],
)
def test_what_is_not_known_depends_on_all(f):
    assert dependencies(f, jnp.arange(4.0)).all()


def dense(task, key, *, count: int = 4):
    """The Hamiltonian's value at some costate, and states with actions."""
    keys = jax.random.split(key, 3)
    s0 = jax.vmap(task.initial)(jax.random.split(keys[0], count))
    a = jax.random.normal(keys[1], (count, task.m), s0.dtype)
    costate = jax.random.normal(keys[2], (task.n,), s0.dtype)

    def value(z):
        s, a = z[: task.n], z[task.n :]
        return jnp.vdot(costate, task.dynamics(s, a, key=None)) - task.reward(s, a)

    return value, jnp.concatenate([s0, a], axis=1)


@pytest.mark.parametrize("name", ANALYTIC)
def test_hessians_of_every_task(x64, name: str):
    value, z = dense(tasks.make(name), jax.random.key(1))
    gradient = jax.grad(value)
    pattern = dependencies(gradient, z[0])
    seeds, expand = compression(gradient, z[0])

    def compressed(z):
        return jax.vmap(jax.linearize(gradient, z)[1], out_axes=1)(seeds)

    found, wanted = jax.jit(lambda z: (expand(jax.vmap(compressed)(z)), jax.vmap(jax.hessian(value))(z)))(z)
    assert not np.any(np.asarray(wanted)[:, ~pattern])
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * float(jnp.abs(wanted).max()))
    assert len(seeds) <= z.shape[1]


def test_positions_cost_no_tangent():
    value, z = dense(tasks.make("quadrotor"), jax.random.key(1), count=1)
    pattern = dependencies(jax.grad(value), z[0])
    assert np.array_equal(pattern[:3], np.eye(3, z.shape[1], dtype=bool)) and np.array_equal(pattern, pattern.T)
    assert len(compression(jax.grad(value), z[0])[0]) == 10  # of 16


@hypothesis.given(arrays.arrays(bool, strategies.integers(1, 9).map(lambda d: (d, d))), strategies.randoms())
def test_any_pattern_is_told_apart(pattern, random):
    """A quadratic of that pattern: its Hessian from the tangents along as many seeds as there are colours."""
    pattern = pattern | pattern.T
    d = len(pattern)
    H = np.where(pattern, np.random.default_rng(random.randrange(1000)).normal(size=(d, d)), 0)
    H = H + H.T
    colour = colours(pattern)
    assert colour.min() == 0 and set(colour) == set(range(colour.max() + 1))
    rows = [(int(i), int(j)) for i, j in np.argwhere(np.triu(pattern))]

    def value(z):
        return sum((H[i, j] * z[i] * z[j] * (0.5 if i == j else 1.0) for i, j in rows), start=0.0 * z[0])

    z = jnp.arange(1.0, d + 1)
    seeds, expand = compression(jax.grad(value), z)
    assert len(seeds) == colour.max() + 1
    np.testing.assert_allclose(expand(jnp.asarray(H @ seeds.T)), H, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "number"),
    [(np.eye(5, dtype=bool), 1), (np.ones((5, 5), bool), 5), (np.zeros((3, 3), bool), 1)],
    ids=["diagonal", "full", "empty"],
)
def test_number_of_colours(pattern, number: int):
    assert colours(pattern).max() + 1 == number


def test_an_arrow_takes_two():
    """Read by columns alone it would take all of them."""
    arrow = np.eye(6, dtype=bool)
    arrow[0] = arrow[:, 0] = True
    assert colours(arrow).max() + 1 == 2
