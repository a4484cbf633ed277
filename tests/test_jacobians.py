"""Jacobians along rollouts are the derivatives; products of thousands of matrices are what exact arithmetic says."""

import math
from typing import Any, ClassVar

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import Affine, Gaussian, Neural, OpenLoop, rollout, tasks
from diffmbrl.diagnostics import (
    contributions,
    eigenvalues,
    jacobians,
    log_eigenvalues,
    log_singular_values,
    log_spectral_radius,
    products,
    singular_values,
    spectral_radius,
)
from diffmbrl.rollout import mean_return, split_keys
from diffmbrl.tasks.transforms.plant import delayed
from tests.problems import bent, changed, same, some_slow

KEY = jax.random.key(0)
LONG = 2000


def turned(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def log_sigma(A: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda A: log_singular_values(products(A)))(jnp.asarray(A)))


# Products.


def test_singular_values_of_a_long_unstable_product_that_overflows(x64: None) -> None:
    """A_t = U_{t+1} D_t U_t': the product's singular values are those of the product of the diagonal D_t."""
    rng = np.random.default_rng(0)
    logs = np.array([0.9, 0.3, -0.1, -1.2]) + 0.4 * rng.normal(size=(LONG, 4))
    U = np.stack([turned(rng, 4) for _ in range(LONG + 1)])
    A = U[1:] @ (np.exp(logs)[:, :, None] * np.swapaxes(U[:-1], 1, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        naive = np.eye(4)
        for factor in A:
            naive = factor @ naive
    assert not np.isfinite(naive).all()
    found = log_sigma(A)
    # Every 100 steps, so that neighbours have parted.
    for t in range(100, LONG + 1, 100):
        np.testing.assert_allclose(found[t - 1], np.sort(logs[:t].sum(0))[::-1], atol=1e-10)


@pytest.mark.parametrize("kind", ["random", "one", "shear"])
def test_singular_values_agree_with_exact_integers(kind: str, x64: None) -> None:
    """Of two by two, sigma_1^2 + sigma_2^2 and sigma_1 sigma_2 are a trace and a determinant: exact in Python's integers."""
    rng = np.random.default_rng(1)
    if kind == "random":
        A = rng.integers(-9, 10, size=(LONG, 2, 2))
        A = A[np.abs(np.linalg.det(A)) > 0.5]
    else:
        A = np.tile({"one": [[3, 1], [-2, 4]], "shear": [[1, 7], [0, 1]]}[kind], (LONG, 1, 1))
    M = [[1, 0], [0, 1]]
    for factor in A.tolist():
        M = [[sum(row[k] * M[k][j] for k in range(2)) for j in range(2)] for row in factor]
    trace, det = sum(x * x for row in M for x in row), abs(M[0][0] * M[1][1] - M[0][1] * M[1][0])
    digits = 10**20  # so that the square root is not cut at whole numbers
    root = math.isqrt((trace * trace - 4 * det * det) * digits**2)
    first = (math.log(trace * digits + root) - math.log(2 * digits)) / 2
    found = log_sigma(A.astype(float))[-1]
    np.testing.assert_allclose(found, [first, math.log(det) - first], rtol=1e-12, atol=1e-9)


def test_the_factors_are_the_products_and_their_singular_values_at_every_step(x64: None) -> None:
    A = np.random.default_rng(2).normal(size=(12, 5, 5))
    found = jax.jit(products)(jnp.asarray(A))
    Phi, wanted = np.eye(5), []
    for factor in A:
        Phi = factor @ Phi
        wanted.append(Phi)
    Q, logs, R, growth, frame = (np.asarray(x) for x in found)
    same(Q @ (np.exp(logs)[:, :, None] * R) @ frame.T, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
    same(np.linalg.norm(R, axis=2), 1)
    same(R, np.triu(R))
    same(log_singular_values(found), np.log(np.linalg.svd(np.stack(wanted), compute_uv=False)), atol=1e-9)
    same(log_spectral_radius(found), np.log(np.abs(np.linalg.eigvals(np.stack(wanted))).max(1)), atol=1e-9)
    # QR's diagonal has the product's volume, but not its singular values.
    same(growth.sum(1).cumsum(), np.linalg.slogdet(np.stack(wanted))[1])
    assert np.abs(np.sort(growth.sum(0))[::-1] - np.asarray(log_singular_values(found))[-1]).max() > 0.1


def test_with_its_batch_axis_the_radius_is_each_ones(x64: None) -> None:
    A = jax.random.normal(KEY, (3, 8, 2, 2))
    batch = log_spectral_radius(jax.vmap(products)(A))
    assert batch.shape == (3, 8)
    same(batch, [log_spectral_radius(products(a)) for a in A])


CONSTANT = {
    "triangular": [[0.5, 1.0, 3.0], [0.0, 2.0, 5.0], [0.0, 0.0, 1.1]],  # invariant subspaces along the axes, unsorted
    "diagonal": [[0.3, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1e-3]],
    "negative": [[-1.5, 1.0, 0.0], [0.0, 0.7, 0.0], [1.0, 0.0, 0.1]],
    "a turn that grows": [[1.2, -0.9, 0.3], [0.9, 1.2, 0.1], [0.0, 0.0, 0.5]],
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_eigenvalues_of_a_long_power_are_the_powers_of_the_eigenvalues(name: str, x64: None) -> None:
    A = np.array(CONSTANT[name])
    values = np.linalg.eigvals(A)
    values = values[np.argsort(-np.abs(values), kind="stable")]
    power = jnp.tile(A, (LONG, 1, 1))
    modulus, angle = log_eigenvalues(power)
    np.testing.assert_allclose(modulus, LONG * np.log(np.abs(values)), rtol=1e-11, atol=1e-8)
    wanted = np.exp(1j * LONG * np.angle(values))
    order = np.lexsort((wanted.imag, -modulus.round(6)))
    mine = np.exp(1j * angle)
    np.testing.assert_allclose(mine[np.lexsort((mine.imag, -modulus.round(6)))], wanted[order], atol=1e-7)
    radius = log_spectral_radius(jax.jit(products)(power))
    np.testing.assert_allclose(radius, np.arange(1, LONG + 1) * np.log(np.abs(values[0])), rtol=1e-9, atol=1e-9)


def test_eigenvalues_on_the_unit_circle_are_found_though_no_pass_parts_them(x64: None) -> None:
    """Two turns by different angles, seen in a skewed basis: a stable Hamiltonian system's."""
    rng = np.random.default_rng(3)
    turn = np.zeros((4, 4))
    for i, angle in enumerate((0.3, 1.1)):
        c, s = np.cos(angle), np.sin(angle)
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    skew = rng.normal(size=(4, 4))
    modulus, angle = log_eigenvalues(jnp.tile(skew @ turn @ np.linalg.inv(skew), (5, 1, 1)))
    np.testing.assert_allclose(modulus, 0, atol=1e-9)
    np.testing.assert_allclose(np.sort(angle), np.sort([1.5, -1.5, 5.5 - 2 * np.pi, 2 * np.pi - 5.5]), atol=1e-9)


def test_a_singular_factor_ends_what_it_maps_to_zero(x64: None) -> None:
    A = np.random.default_rng(4).normal(size=(20, 3, 3))
    A[10] = A[10] @ np.diag([1.0, 1.0, 0.0])
    found = log_sigma(A)
    assert np.isfinite(found[:10]).all() and np.isfinite(found[10:, :2]).all()
    # Zero, or what rounding makes of it.
    assert (found[10:, 2] < found[10:, 0] - 25).all()
    nothing = log_sigma(A * (np.arange(20) != 5)[:, None, None])
    assert (nothing[5:] == -np.inf).all()


def test_a_factor_that_is_not_finite_shows_from_its_step_on(x64: None) -> None:
    A = np.random.default_rng(5).normal(size=(6, 3, 3))
    A[4, 1, 1] = np.nan
    found = jax.jit(products)(jnp.asarray(A))
    for x in (log_singular_values(found), log_spectral_radius(found)):
        assert np.isfinite(np.asarray(x)[:4]).all() and np.isnan(np.asarray(x)[4:]).all()
    with pytest.raises(ValueError, match="product of the Jacobians is not finite"):
        log_eigenvalues(jnp.asarray(A))


def test_one_step(x64: None) -> None:
    A = np.random.default_rng(6).normal(size=(2, 7, 3, 3))
    same(singular_values(jnp.asarray(A)), np.linalg.svd(A, compute_uv=False))
    radius = np.abs(np.linalg.eigvals(A)).max(-1)
    same(spectral_radius(jnp.asarray(A)), radius)
    values = eigenvalues(jnp.asarray(A).at[1, 2, 0, 0].set(jnp.inf))
    assert np.isnan(values[1, 2]).all() and np.isfinite(values[0]).all()
    same(np.abs(values[0, :, 0]), radius[0])


# Jacobians along rollouts.


class Nudged(eqx.Module):
    """A policy with an additive perturbation of its actions, one a time step."""

    policy: Any
    w: Any
    is_plan: ClassVar[bool] = True

    def __call__(self, s, *, key=None):
        return self.policy(s, key=key) + self.w


def nudged(policy: Any, task: Any, w: Any) -> Nudged:
    tiled = jax.tree.map(lambda x: jnp.broadcast_to(x, (task.horizon, *x.shape)), policy)
    return Nudged(policy if getattr(policy, "is_plan", False) else tiled, w)


def cases() -> list[tuple[str, Any, Any, Any]]:
    """Policies and plans, with noise and with an end of the episode."""
    task, ends = changed(bent(), noise=0.1), bent(ends=True)
    net = Neural.init(task, hidden=[4], key=KEY, output_scale=1.0)
    plan = OpenLoop(jax.random.normal(KEY, (task.horizon, 1), float))
    affine = Affine(jax.random.normal(KEY, (8, 1, 2), float), plan.a, jnp.zeros((8, 2)))
    return [
        ("noise", Gaussian.around(net, task, std=0.2), task, jax.random.key(5)),
        ("ends", net, ends, None),
        ("plan", plan, task, jax.random.key(6)),
        ("plan with feedback, ends", affine, ends, None),
    ]


@pytest.mark.parametrize("which", some_slow(range(4), 0, 2, 3), ids=lambda i: ["noise", "ends", "plan", "feedback"][i])
def test_jacobians_and_contributions_are_the_derivatives(which: int, x64: None) -> None:
    _, policy, task, key = cases()[which]
    s0 = task.starts(jax.random.key(1), 4)
    found = jax.jit(jacobians)(policy, task, s0, key)
    parts = jax.jit(contributions)(policy, task, s0, key)
    same(found.loop, found.A + found.B @ found.K)

    @jax.jit
    def direct(s, k):
        trajectory = rollout(policy, task, s, k)

        def step(pi, s, a, t):
            key_a, key_s = (None, None) if k is None else jax.random.split(jax.random.fold_in(k, t))
            f = jax.jacfwd(lambda s, a: task.dynamics(s, a, key=key_s), (0, 1))(s, a)
            return *f, jax.jacfwd(lambda s: pi(s, key=key_a))(s)

        axes = (0 if getattr(policy, "is_plan", False) else None, 0, 0, 0)
        A, B, K = jax.vmap(step, in_axes=axes)(policy, trajectory.s, trajectory.a, jnp.arange(task.horizon))
        one = jax.tree.map(lambda x: x[None], s)

        def J(w):
            # expected splits its key among one start; the rollout's own key is wanted.
            return jnp.sum(rollout_value(nudged(policy, task, w), task, one, k))

        return A, B, K, jax.grad(J)(jnp.zeros((task.horizon, task.m))), trajectory.alive

    keys = split_keys(key, s0)
    A, B, K, dJ_da, alive = jax.vmap(direct)(s0, keys)
    same(found.alive, alive)
    assert bool(alive.all()) != ("ends" in cases()[which][0])
    mask = np.asarray(alive)[:, :-1, None, None]
    same(found.A, np.where(mask, A, np.eye(task.n)))
    same(found.B, np.where(mask, B, 0))
    same(found.K, np.where(mask, K, 0))
    same(found.dJ_da, dJ_da)

    gradient = jax.jit(jax.grad(mean_return))(policy, task, s0, key)
    same(jnp.sum(parts, axis=0), ravel_pytree(gradient)[0])
    if getattr(policy, "is_plan", False):
        rows = jax.vmap(lambda row: ravel_pytree(policy)[1](row))(parts)
        for leaf in jax.tree.leaves(rows):
            off = ~np.eye(task.horizon, dtype=bool)
            assert (np.asarray(leaf)[off] == 0).all() and np.any(np.asarray(leaf)[~off])


def rollout_value(policy, task, s, key):
    from diffmbrl.rollout import episode_return

    return jax.vmap(lambda s: episode_return(policy, task, s, key))(s)


def test_states_that_are_not_flat_are_flattened(x64: None) -> None:
    task = delayed(bent(), steps=2)
    policy = Neural.init(task, hidden=[3], key=KEY)
    found = jax.jit(jacobians)(policy, task, task.starts(KEY, 2))
    assert found.loop.shape == (2, 8, 4, 4)
    # The next action to arrive is the queue's first, the last in it the one just taken.
    same(found.A[:, :, 2], np.broadcast_to([0, 0, 0, 1.0], (2, 8, 4)))
    same(found.B[:, :, 3, 0], 1)


class Remembers(eqx.Module):
    is_stateful: ClassVar[bool] = True

    def start(self, task):
        return jnp.zeros(task.m)

    def step(self, memory, s, *, key=None):
        return memory, memory


@pytest.mark.parametrize("of", [jacobians, contributions])
def test_a_policy_with_a_memory_is_refused(of: Any) -> None:
    with pytest.raises(TypeError, match=r"a policy with a memory \(Remembers\) has no gain"):
        of(Remembers(), bent(), bent().starts(KEY, 2))


def test_new_weights_and_starts_do_not_recompile() -> None:
    task = tasks.pendulum(horizon=5)
    run = jax.jit(chex.assert_max_traces(lambda pi, s: jax.vmap(products)(jacobians(pi, task, s).loop), n=1))
    for i in range(2):
        run(Neural.init(task, hidden=[2], key=jax.random.key(i)), task.starts(jax.random.key(i), 3))
