"""Lanczos against dense eigenvectors and against conjugate gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmbrl.krylov import lanczos

close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)


def definite(seed: int, size: int, condition: float = 1e3) -> tuple[jax.Array, jax.Array]:
    """A symmetric positive definite matrix of known spectrum, and a vector."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return jnp.asarray((Q * np.logspace(0, np.log10(condition), size)) @ Q.T), jnp.asarray(rng.normal(size=size))


@partial(jax.jit, static_argnames="rank")
def space_of(N, g, rank):
    return lanczos(lambda v: jnp.matmul(N, v, precision="highest"), g, rank)


def conjugate_gradients(N: np.ndarray, g: np.ndarray, iterations: int) -> np.ndarray:
    """Hestenes and Stiefel's, from zero, for N d = -g."""
    d, residual = np.zeros_like(g), -g
    direction = residual
    for _ in range(iterations):
        Np = N @ direction
        alpha = residual @ residual / (direction @ Np)
        d = d + alpha * direction
        smaller = residual - alpha * Np
        direction = smaller + (smaller @ smaller) / (residual @ residual) * direction
        residual = smaller
    return d


@pytest.mark.parametrize("size", [1, 2, 9])
def test_at_full_rank_it_is_the_eigendecomposition(size, x64):
    N, g = definite(0, size)
    space = space_of(N, g, size)
    values, vectors = np.linalg.eigh(N)
    close(space.values, values)
    close(np.abs(np.sum(np.asarray(space.vectors) * vectors.T, axis=1)), np.ones(size))
    close(space.vectors @ space.vectors.T, np.eye(size))
    close(space.coefficients, space.vectors @ g)
    assert space.products == size


@pytest.mark.parametrize("rank", [1, 2, 5, 12])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 10.0])
def test_a_step_is_so_many_conjugate_gradient_iterations(rank, damping, x64):
    N, g = definite(1, 12, condition=30.0)  # CG itself loses its way in rounding when it is ill conditioned
    step, predicted = space_of(N, g, rank).step(jnp.asarray(damping))
    wanted = conjugate_gradients(np.asarray(N) + damping * np.eye(12), np.asarray(g), rank)
    np.testing.assert_allclose(step, wanted, rtol=1e-6, atol=1e-9)
    close(predicted, -(g @ wanted + wanted @ N @ wanted / 2))


def test_a_rank_beyond_the_dimension_is_the_dimension(x64):
    N, g = definite(2, 4)
    space = space_of(N, g, 30)
    assert space.vectors.shape == (4, 4) and space.products == 4
    close(space.step(jnp.asarray(0.1))[0], -np.linalg.solve(N + 0.1 * np.eye(4), g))


@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(1, 8))
def test_ritz_values_interlace_and_the_step_never_predicts_a_loss(seed, size, rank):
    with jax.enable_x64(True):
        N, g = definite(seed, size)
        space = space_of(N, g, rank)
        values = np.linalg.eigvalsh(N)
        assert space.values.min() >= values[0] * (1 - 1e-9) and space.values.max() <= values[-1] * (1 + 1e-9)
        close(np.linalg.norm(space.coefficients), np.linalg.norm(g))
        for damping in (1e-3, 1.0, 1e3):
            assert space.step(jnp.asarray(damping))[1] > 0


def test_a_space_that_closes_early(x64):
    """g in the span of two eigenvectors: two products say all there is to say."""
    N, _ = definite(3, 8)
    values, vectors = np.linalg.eigh(N)
    g = jnp.asarray(2 * vectors[:, 1] - 3 * vectors[:, 6])
    space = space_of(N, g, 6)
    assert np.all(np.isfinite(space.vectors)) and np.all(np.isfinite(space.values))
    present = np.linalg.norm(space.vectors, axis=1) > 0.5
    assert present.sum() == 2
    close(np.sort(space.values[present]), values[[1, 6]])
    close(space.values[~present], 0)
    close(space.coefficients[~present], 0)
    for damping in (1e-6, 1.0):
        close(space.step(jnp.asarray(damping))[0], -np.linalg.solve(N + damping * np.eye(8), g))


@pytest.mark.parametrize("repeated", [0.0, 5.0])
def test_a_multiple_of_the_identity(repeated, x64):
    g = jnp.arange(1.0, 6.0)
    step, predicted = space_of(repeated * jnp.eye(5), g, 5).step(jnp.asarray(0.5))
    close(step, -g / (repeated + 0.5))
    assert predicted > 0


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_nothing_to_do(double):
    with jax.enable_x64(double):
        N = jnp.asarray(definite(4, 5)[0], float)
        space = space_of(N, jnp.zeros(5), 3)
        step, predicted = space.step(jnp.asarray(1e-3))
        np.testing.assert_array_equal(step, np.zeros(5))
        assert predicted == 0
        assert step.dtype == N.dtype and space.products.dtype == jnp.int32


def test_a_batch_is_a_loop(x64):
    problems = [definite(seed, 6) for seed in range(3)]
    # One of them closes at once: the others are none the worse for it.
    problems[1] = (problems[1][0], jnp.zeros(6))
    N, g = (jnp.stack(x) for x in zip(*problems, strict=True))
    together = jax.jit(jax.vmap(lambda N, g: lanczos(lambda v: N @ v, g, 4).step(jnp.asarray(0.1))))(N, g)
    for i in range(3):
        step, predicted = space_of(N[i], g[i], 4).step(jnp.asarray(0.1))
        close(together[0][i], step)
        close(together[1][i], predicted)


def test_float32_keeps_orthogonality_on_ill_conditioned_operators():
    N, g = definite(5, 60, condition=1e6)
    space = space_of(jnp.asarray(N, jnp.float32), jnp.asarray(g, jnp.float32), 30)
    np.testing.assert_allclose(space.vectors @ space.vectors.T, np.eye(30), atol=1e-5)
    assert abs(space.values.max() / 1e6 - 1) < 1e-4
