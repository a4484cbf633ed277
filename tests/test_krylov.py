"""Lanczos against dense eigenvectors and against conjugate gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st
from matfree import decomp

from diffmbrl.second_order.krylov import conjugate_gradients, lanczos

close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)


def definite(seed: int, size: int, condition: float = 1e3) -> tuple[jax.Array, jax.Array]:
    """A symmetric positive definite matrix of known spectrum, and a vector."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return jnp.asarray((Q * np.logspace(0, np.log10(condition), size)) @ Q.T), jnp.asarray(rng.normal(size=size))


@partial(jax.jit, static_argnames="rank")
def space_of(N, g, rank):
    return lanczos(lambda v: jnp.matmul(N, v, precision="highest"), g, rank)


def plain_cg(N: np.ndarray, g: np.ndarray, iterations: int) -> np.ndarray:
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
    wanted = plain_cg(np.asarray(N) + damping * np.eye(12), np.asarray(g), rank)
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


@pytest.mark.parametrize("rank", [3, 8])
def test_lanczos_is_matfrees(rank, x64):
    N, g = definite(6, 12)
    decompose = decomp.tridiag_sym(rank, reortho="full")
    found = decompose(lambda v: jnp.matmul(N, v, precision="highest"), g)
    close(space_of(N, g, rank).ritz, np.linalg.eigvalsh(np.asarray(found.J_small)))


# Truncated conjugate gradients.


@partial(jax.jit, static_argnames="iterations")
def truncated(N, g, radius=jnp.inf, tolerance=1e-10, iterations=100):
    product = lambda v: jnp.matmul(N, v, precision="highest")  # noqa: E731
    return conjugate_gradients(product, g, radius=radius, tolerance=tolerance, iterations=iterations)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_cut_short_it_is_so_many_iterations(rank, x64):
    N, g = definite(1, 12, condition=30.0)
    found = truncated(N, g, iterations=rank)
    close(found.step, plain_cg(np.asarray(N), np.asarray(g), rank))
    close(found.residual, np.linalg.norm(N @ found.step + g) / np.linalg.norm(g))
    close(found.predicted, -(g @ found.step + found.step @ N @ found.step / 2))
    assert found.products == rank and not found.negative and not found.boundary


def test_whole_it_is_lineaxs_and_scipys(x64):
    N, g = definite(7, 15)
    found = truncated(N, g)
    operator = lineax.MatrixLinearOperator(N, lineax.positive_semidefinite_tag)
    close(found.step, lineax.linear_solve(operator, -g, lineax.CG(rtol=1e-12, atol=1e-12)).value, rtol=1e-6)
    close(found.step, scipy.sparse.linalg.cg(np.asarray(N), -np.asarray(g), rtol=1e-12)[0], rtol=1e-6)
    assert found.residual <= 1e-10


def exact_region(N: np.ndarray, g: np.ndarray, radius: float) -> float:
    """The least value of the model in the ball, by bisection on the multiplier (no hard case here)."""
    values, vectors = np.linalg.eigh(N)
    h = vectors.T @ g
    low, high = max(0.0, -values[0]) + 1e-14, max(0.0, -values[0]) + np.linalg.norm(g) / radius + 1
    if values[0] > 0 and np.linalg.norm(h / values) <= radius:
        d = -h / values
    else:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.linalg.norm(h / (values + middle)) > radius else (low, middle)
        d = -h / (values + high)
    return float(h @ d + d @ (values * d) / 2)


@given(st.integers(0, 2**31), st.floats(0.01, 10.0), st.booleans())
def test_in_a_region_it_is_downhill_within_it_and_not_far_from_the_best(seed, radius, definite_matrix):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        values = rng.uniform(0.1, 2, 6) if definite_matrix else rng.normal(size=6)
        N, g = (Q * values) @ Q.T, rng.normal(size=6)
        found = truncated(jnp.asarray(N), jnp.asarray(g), jnp.asarray(radius))
        d = np.asarray(found.step)
        assert np.linalg.norm(d) <= radius * (1 + 1e-9)
        assert bool(found.boundary) == bool(np.linalg.norm(d) > radius * (1 - 1e-9))
        value = g @ d + d @ N @ d / 2
        close(found.predicted, -value)
        # At least the Cauchy point's share of what is to be had; half for a definite model (Yuan 2000).
        best = exact_region(N, g, radius)
        assert value <= (0.5 if definite_matrix else 0.01) * best + 1e-9
        assert not (definite_matrix and found.negative)
        assert not found.negative or found.boundary


def test_negative_curvature_is_followed_to_the_boundary_or_not_at_all(x64):
    N, g = jnp.diag(jnp.asarray([1.0, -1.0])), jnp.asarray([0.0, 1.0])
    found = truncated(N, g, jnp.asarray(3.0))
    close(found.step, [0.0, -3.0])
    assert found.negative and found.boundary and found.products == 1
    unbounded = truncated(N, g)
    np.testing.assert_array_equal(unbounded.step, np.zeros(2))
    assert unbounded.negative and not unbounded.boundary


def test_a_member_that_fails_does_not_touch_the_others(x64):
    """Not finite, indefinite, already solved, and an ordinary one: each as if it were alone."""
    N, g = definite(8, 5)
    problems = [(N, g), (N.at[0, 0].set(jnp.nan), g), (-N, g), (N, jnp.zeros(5))]
    together = jax.jit(jax.vmap(lambda N, g: truncated(N, g, jnp.asarray(2.0), iterations=3)))(
        *map(jnp.stack, zip(*problems, strict=True))
    )
    for i, (N_i, g_i) in enumerate(problems):
        alone = truncated(N_i, g_i, jnp.asarray(2.0), iterations=3)
        for name, x in alone._asdict().items():
            np.testing.assert_allclose(getattr(together, name)[i], x, rtol=1e-9, err_msg=f"{i} {name}")
    assert np.isnan(together.residual[1]) and np.all(np.isfinite(together.step))
    assert together.products.tolist()[3] == 0
