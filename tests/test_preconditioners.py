"""Diagonal and blocks of the Gauss-Newton matrix against the dense one, and Krylov methods in their metric."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from diffmbrl import GaussNewton, Linear, Neural, NewtonCG
from diffmbrl.contrib import Jacobi, Kronecker, LeafBlocks, Preconditioned, SignedJacobi
from diffmbrl.contrib.blocks import (
    _root,
    action_curvature,
    diagonal,
    kronecker_factors,
    leaf_blocks,
    signed_diagonal,
)
from diffmbrl.contrib.preconditioners import Diagonal
from diffmbrl.second_order.curvature import curve, gauss_newton
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.krylov import conjugate_gradients
from tests.problems import bent, same

KEY = jax.random.key(3)
BATCH, T = 3, 6
MAKERS = {
    "diagonal": Jacobi(power=0.75),
    "signs": SignedJacobi(),
    "blocks": LeafBlocks(largest=5),  # the first weights have eight parameters
    "factors": Kronecker(),
}
every_maker = pytest.mark.parametrize("name", MAKERS)


def set_up(horizon: int = T, batch: int = BATCH, seed: int = 0):
    task = bent(horizon=horizon)
    key = jax.random.fold_in(KEY, seed)
    policy = Neural.init(task, hidden=[4], key=key, output_scale=1.0)
    # Biases of nothing would hide a bias taken for a weight.
    policy = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), policy)
    return policy, task, task.starts(key, batch)


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        policy, task, s0 = set_up()

        @jax.jit
        def parts(policy, s0):
            model = gauss_newton(policy, task, s0)
            unit = jnp.eye(T)[:, :, None, None] * jnp.ones((1, 1, 1, BATCH))
            return {
                "N": dense(model, policy, task),
                "gradient": model.gradient,
                "G": jax.vmap(model.push)(jnp.eye(model.gradient.size)),
                "M": jax.vmap(lambda w: curve(model.linearization, model.K, w))(unit),
                "diagonal": diagonal(model, policy, task),
                "signed": signed_diagonal(model, KEY, 4000),
                "blocks": leaf_blocks(model, policy, task, largest=5),
                "factors": kronecker_factors(model, policy, task),
                "Q": action_curvature(model.linearization, model.K),
            }

        yield policy, task, s0, jax.tree.map(np.asarray, parts(policy, s0))


def test_the_diagonal_is_the_matrixs(problem):
    parts = problem[-1]
    same(parts["diagonal"], np.diag(parts["N"]), rtol=1e-8)


def test_random_signs_estimate_the_diagonal_without_bias(problem):
    parts = problem[-1]
    true, estimate = np.diag(parts["N"]), parts["signed"]
    assert np.all(estimate >= 0)
    # The mean of 4000 draws, each with a relative standard deviation of at most the root of two.
    assert np.max(np.abs(estimate / true - 1)) < 5 * np.sqrt(2 / 4000)


def test_a_root_of_a_singular_block(x64):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4, 5, 3))
    H = X @ np.swapaxes(X, 1, 2) * 10.0 ** rng.integers(-6, 6, size=(4, 1, 1))
    H[1, 2] = H[1, :, 2] = 0
    H[2] = 0
    C = np.asarray(_root(jnp.asarray(np.moveaxis(np.stack([H, 2 * H], -1), 0, 0))))
    for i in range(2):
        same(C[..., i] @ np.swapaxes(C[..., i], 1, 2), (i + 1) * H, rtol=1e-6, atol=1e-8 * np.abs(H).max())


def test_the_blocks_are_the_matrixs(problem):
    policy, _, _, parts = problem
    first = 0
    for leaf, block in zip(jax.tree.leaves(policy), parts["blocks"], strict=True):
        span = slice(first, first + leaf.size)
        wanted = parts["N"][span, span]
        same(block, wanted if leaf.size <= 5 else np.diag(wanted), rtol=1e-8, atol=1e-12)
        first += leaf.size
    assert {block.ndim for block in parts["blocks"]} == {1, 2}


def test_the_curvature_of_an_action_is_the_diagonal_of_m(problem):
    parts = problem[-1]
    same(parts["Q"][:, 0, 0], np.einsum("ttib->tb", parts["M"]), rtol=1e-8)


def layers_of(policy) -> list[np.ndarray]:
    """For each layer, the places in theta of its weights with the bias behind, [out, in + 1]."""
    theta, unravel = jax.flatten_util.ravel_pytree(policy)
    places = unravel(jnp.arange(theta.size, dtype=theta.dtype)).net
    return [
        np.concatenate([W, b[:, None]], axis=1).astype(int) for W, b in zip(places.weights, places.biases, strict=True)
    ]


def test_kronecker_factors_of_one_step_are_the_matrixs_blocks(x64):
    policy, task, s0 = set_up(horizon=1, batch=1)

    @jax.jit
    def parts(policy):
        model = gauss_newton(policy, task, s0)
        return dense(model, policy, task), kronecker_factors(model, policy, task)

    N, factors = parts(policy)
    for (inputs, outputs), places in zip(factors, layers_of(policy), strict=True):
        flat = places.ravel()
        same(np.kron(outputs, inputs), np.asarray(N)[np.ix_(flat, flat)], rtol=1e-8, atol=1e-12)


def test_kronecker_factors_have_the_trace_without_what_couples_the_steps(problem):
    policy, _, _, parts = problem
    apart = np.einsum("ptab,tacb,ptcb->p", parts["G"], parts["Q"], parts["G"]) / BATCH
    for (inputs, outputs), places in zip(parts["factors"], layers_of(policy), strict=True):
        same(np.trace(inputs) * np.trace(outputs), apart[places].sum(), rtol=1e-8)


@every_maker
def test_a_preconditioned_step_is_a_dense_solve(name, problem, x64):
    policy, task, s0, parts = problem
    maker, size = MAKERS[name], parts["gradient"].size
    dampings = jnp.asarray([1e-4, 1e-1, 10.0])

    @jax.jit
    def run(policy):
        model = gauss_newton(policy, task, s0)
        P, space = maker(model, policy, task, None), Preconditioned(maker, size)(model, policy, task, None)
        eye = jnp.eye(size)
        return jax.vmap(P.inverse)(eye), jax.vmap(P.root)(eye), space, jax.vmap(space.step)(dampings)

    inverse, root, space, (steps, predicted) = map_numpy(run(policy))
    same(root @ root, inverse, rtol=1e-8, atol=1e-8 * np.abs(inverse).max())
    same(root, root.T, rtol=1e-8, atol=1e-8 * np.abs(root).max())
    P, N, g = np.linalg.inv(inverse), parts["N"], parts["gradient"]
    # Orthonormal in its metric, except the zeros that remain when the space closes early.
    found = np.linalg.norm(space.vectors, axis=1) > 0
    assert found.sum() >= size - 2
    same(space.vectors @ P @ space.vectors.T, np.diag(found.astype(float)), rtol=1e-6, atol=1e-6)
    for damping, step, decrease in zip(dampings, steps, predicted, strict=True):
        wanted = -np.linalg.solve(N + float(damping) * P, g)
        same(step, wanted, rtol=1e-6, atol=1e-8 * np.abs(wanted).max())
        same(decrease, -(g @ wanted + wanted @ N @ wanted / 2), rtol=1e-6)


def map_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.slow
def test_without_curvature_it_is_the_identity_and_several_at_once_are_a_loop(x64):
    """Every maker, over a problem and one whose rewards are linear."""
    problems = [set_up(horizon=2, batch=2, seed=seed) for seed in range(2)]
    task = problems[0][1]

    @jax.jit
    @jax.vmap
    def together(policy, s0, curved):
        return run(policy, s0, curved)

    def run(policy, s0, curved):
        model = gauss_newton(policy, task, s0)
        lin = model.linearization
        model = model._replace(linearization=lin._replace(H=curved * lin.H, H_T=curved * lin.H_T))
        v = jnp.arange(1.0, model.gradient.size + 1)
        return [maker(model, policy, task, None).root(v) for maker in MAKERS.values()], v

    policies, starts = (jax.tree.map(lambda *x: jnp.stack(x), *(p[i] for p in problems)) for i in (0, 2))
    roots, v = together(policies, starts, jnp.asarray([1.0, 0.0]))
    alone, _ = jax.jit(run)(problems[0][0], problems[0][2], jnp.asarray(1.0))
    for root, one in zip(roots, alone, strict=True):
        same(root[0], one, rtol=1e-7)
        same(root[1], v[1])
        assert not np.allclose(root[0], v[0], rtol=0.1)


# Conjugate gradients.


def badly_scaled(seed: int, size: int = 30, *, definite: bool = True):
    """D X D with scales over six orders of magnitude and X well conditioned, a vector, and the diagonal."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = rng.uniform(1, 3, size)
    values[:2] *= 1 if definite else -0.3
    scales = np.logspace(-3, 3, size)
    N = scales[:, None] * ((Q * values) @ Q.T) * scales
    return jnp.asarray(N), jnp.asarray(scales * rng.normal(size=size)), jnp.asarray(scales**2)


@partial(jax.jit, static_argnames="iterations")
def solved(N, g, diagonal=None, radius=jnp.inf, tolerance=1e-9, iterations=400):
    return conjugate_gradients(
        lambda v: jnp.matmul(N, v, precision="highest"),
        g,
        radius=radius,
        tolerance=tolerance,
        iterations=iterations,
        preconditioner=None if diagonal is None else Diagonal(diagonal).inverse,
    )


def test_preconditioned_it_needs_fewer_iterations_for_the_same_answer(x64):
    N, g, scales = badly_scaled(0)
    plain, better = solved(N, g), solved(N, g, scales)
    assert better.products < 30 and better.residual <= 1e-9
    assert plain.products > 5 * better.products
    same(better.step, -np.linalg.solve(N, g), rtol=1e-6)
    for k in (1, 4, 9):
        M = scipy.sparse.diags(1 / np.asarray(scales))
        wanted = scipy.sparse.linalg.cg(np.asarray(N), -np.asarray(g), rtol=0, maxiter=k, M=M)[0]
        same(solved(N, g, scales, iterations=k).step, wanted, rtol=1e-7)


@pytest.mark.parametrize("definite", [True, False])
@pytest.mark.parametrize("radius", [0.3, 3.0, 100.0])
def test_preconditioned_it_is_plain_in_the_coordinates_of_the_root(radius, definite, x64):
    """The trust region is a ball there, and the boundary and negative curvature are met as there."""
    N, g, scales = badly_scaled(1, definite=definite)
    root = 1 / np.sqrt(scales)
    # The residuals that end them are measured in different norms.
    found = solved(N, g, scales, radius, tolerance=0.0, iterations=8)
    plain = solved(root[:, None] * N * root, root * g, None, radius, tolerance=0.0, iterations=8)
    same(found.step, root * plain.step, rtol=1e-6)
    assert (found.negative, found.boundary, found.products) == (plain.negative, plain.boundary, plain.products)
    same(found.length, np.sqrt(found.step @ (scales * found.step)), rtol=1e-7)
    assert not found.boundary or abs(found.length / radius - 1) < 1e-7
    if radius == 100.0:
        assert bool(found.negative) == (not definite)


def test_preconditioned_members_of_a_batch_do_not_touch_each_other(x64):
    problems = [badly_scaled(2), badly_scaled(3, definite=False), badly_scaled(4)]
    problems[2] = (problems[2][0].at[0, 0].set(jnp.nan), *problems[2][1:])
    together = jax.jit(jax.vmap(lambda N, g, D: solved(N, g, D, 2.0, iterations=5)))(
        *map(jnp.stack, zip(*problems, strict=True))
    )
    for i, (N, g, D) in enumerate(problems):
        for name, x in solved(N, g, D, 2.0, iterations=5)._asdict().items():
            np.testing.assert_allclose(getattr(together, name)[i], x, rtol=1e-7, atol=1e-12, err_msg=f"{i} {name}")


# Bad input.


def test_what_cannot_be_is_refused():
    policy, task, s0 = set_up(horizon=2, batch=2)
    linear = Linear.zeros(task)

    def make(maker, policy):
        jax.eval_shape(lambda p: maker(gauss_newton(p, task, s0), p, task, None).inverse(jnp.zeros(17)), policy)

    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        make(SignedJacobi(samples=0), policy)
    with pytest.raises(TypeError, match="Kronecker factors need a Neural policy; got Linear: take Jacobi"):
        make(Kronecker(), linear)
    solver = NewtonCG(preconditioner=Jacobi())
    with pytest.raises(
        TypeError, match="Jacobi approximates the Gauss-Newton matrix: NewtonCG\\(curvature=gauss_newton"
    ):
        jax.eval_shape(lambda p: solver.update(p, solver.init(p, task), task, s0, key=None), policy)


def test_it_counts_the_pass_that_makes_it():
    assert GaussNewton(system=Preconditioned(rank=4)).system.passes(17) == 2 * 4 + 1
