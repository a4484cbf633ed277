"""Linearisation against Jacobians and differences; the sweeps against dense matrices and scipy's Riccati equation."""

from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from diffmbrl import Affine, Gaussian, Linear, Neural, OpenLoop, episode_return, rollout, rollouts, tasks
from diffmbrl.core import Box, Task
from diffmbrl.second_order.linearize import Linearization, feedback, flat_states, linearize, project
from diffmbrl.second_order.riccati import adjoint, closed_loop, respond, riccati
from diffmbrl.second_order.small_matrices import INLINE, SUMMED, matmul, matvec
from tests.problems import some_slow

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


class Crane(eqx.Module):
    """A noisy pytree of a system: position and a swinging load."""

    mass: Any = eqx.field(default_factory=lambda: jnp.asarray(0.7, float))

    def __call__(self, s, a, *, key=None):
        noise = 0.0 if key is None else jax.random.normal(key, (), s["x"].dtype)
        w = s["load"]["w"] - 0.1 * jnp.sin(s["load"]["angle"]) + 0.1 * a[0] * jnp.cos(s["load"]["angle"])
        x = s["x"] + 0.1 * a[1] / self.mass + 0.1 * noise * s["x"] ** 2
        return {"load": {"angle": s["load"]["angle"] + 0.1 * w, "w": w}, "x": x}


class CraneReward(eqx.Module):
    def __call__(self, s, a):
        load = jnp.cos(s["load"]["angle"]) - s["load"]["w"] ** 2
        return load - s["x"] @ s["x"] - 0.1 * a @ a - 3 * a[0] * s["x"][0]


class CraneTerminal(eqx.Module):
    def __call__(self, s):
        return 2 * s["x"][0] * s["x"][1] - jnp.sum(s["x"] ** 4)


class CraneStart(eqx.Module):
    def __call__(self, key):
        load = jax.random.normal(key, (2,), float)
        return {"load": {"angle": load[0], "w": load[1]}, "x": jnp.asarray([0.5, -0.2], float)}


class CraneFeatures(eqx.Module):
    def __call__(self, s):
        return ravel_pytree(s)[0]


def crane(horizon=5):
    return Task(
        name="crane", dynamics=Crane(), reward=CraneReward(), terminal=CraneTerminal(), initial=CraneStart(),
        features=CraneFeatures(), a_low=[-1.0, -1.0], a_high=[1.0, 1.0], horizon=horizon, dt=0.1,
    )  # fmt: skip


def discounted(task, discount=0.9):
    return eqx.tree_at(lambda t: t.weights, task, discount ** jnp.arange(task.horizon + 1).astype(float))


PROBLEMS = {
    "cartpole": lambda: (discounted(tasks.cartpole_balance(horizon=5)), None),
    "crane": lambda: (discounted(crane()), None),
    "noisy crane": lambda: (discounted(crane()), jax.random.key(7)),
}


class Along:
    """A problem, a stochastic neural policy, its rollout, and the derivatives along it."""

    def __init__(self, name):
        self.task, self.key = PROBLEMS[name]()
        net = Neural.init(self.task, hidden=[4], key=jax.random.key(0), output_scale=1.0)
        self.policy = Gaussian.around(net, self.task, std=0.2)
        self.s0 = self.task.initial(jax.random.key(1))

        @jax.jit
        def along(policy, task, s0, key):
            trajectory = rollout(policy, task, s0, key)
            return trajectory, linearize(task, trajectory, key), feedback(policy, trajectory, key)

        self.trajectory, self.lin, self.K = along(self.policy, self.task, self.s0, self.key)
        self.states, self.unravel = flat_states(self.trajectory.s)

    def keys(self, t):
        return (None, None) if self.key is None else jax.random.split(jax.random.fold_in(self.key, t))


@pytest.fixture(params=some_slow(PROBLEMS, "crane"))
def along(request, x64):
    return once(request.param)


once = cache(Along)


def difference(f, x, eps=1e-6):
    """The Jacobian of f by central differences."""
    columns = [(f(x + d) - f(x - d)) / (2 * eps) for d in eps * jnp.eye(x.size)]
    return jnp.stack(columns, axis=-1)


def test_matrices_are_the_jacobians_of_each_step(along):
    task, n = along.task, along.states.shape[1]
    assert n == task.n

    @jax.jit
    def differences(z, w, keys):
        key_a, key_s = keys

        def cost(z):
            return -w * task.reward(along.unravel(z[:n]), z[n:])

        F = difference(lambda z: ravel_pytree(task.dynamics(along.unravel(z[:n]), z[n:], key=key_s))[0], z)
        K = difference(lambda s: along.policy(along.unravel(s), key=key_a), z[:n])
        return F, difference(cost, z), K, jax.jacfwd(jax.jacrev(cost))(z)

    for t in range(task.horizon):
        z = jnp.concatenate([along.states[t], along.trajectory.a[t]])
        F, c, K, H = differences(z, task.weights[t], along.keys(t))
        close(jnp.concatenate([along.lin.A[t], along.lin.B[t]], axis=1), F, atol=1e-7)
        close(jnp.concatenate([along.lin.c_s[t], along.lin.c_a[t]]), c, atol=1e-7)
        close(along.K[t], K, atol=1e-7)
        close(along.lin.H[t], nearest_psd(H))


def test_last_step(along):
    @jax.jit
    def derivatives(s):
        cost = lambda s: -along.task.weights[-1] * along.task.terminal(along.unravel(s))  # noqa: E731
        return jax.grad(cost)(s), jax.hessian(cost)(s)

    c, H = derivatives(ravel_pytree(along.trajectory.s_T)[0])
    close(along.lin.c_T, c)
    close(along.lin.H_T, nearest_psd(H))
    assert np.any(np.asarray(H))


class Perturbed(eqx.Module):
    """`policy`, repeated over time, with w added to its actions."""

    policy: Any
    w: Any
    is_plan = True

    def __call__(self, s, *, key=None):
        return self.policy(s, key=key) + self.w


def perturbed(along, w):
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (w.shape[0], *x.shape)), along.policy)
    return Perturbed(repeated, w)


def respond_and_adjoint(along):
    lin, K = along.lin, along.K
    return partial(respond, lin.A, lin.B, K), partial(adjoint, lin.A, lin.B, K)


def test_adjoint_is_the_gradient_in_additive_perturbations_of_the_actions(along):
    w = jnp.zeros_like(along.trajectory.a)
    gradient = jax.jit(jax.grad(lambda w: episode_return(perturbed(along, w), along.task, along.s0, along.key)))(w)
    _, pull = respond_and_adjoint(along)
    close(pull(along.lin.c_s, along.lin.c_a, along.lin.c_T), -gradient)


def test_respond_is_the_derivative_of_the_rollout(along):
    w = jnp.asarray(np.random.default_rng(2).normal(size=along.trajectory.a.shape))

    def run(w):
        trajectory = rollout(perturbed(along, w), along.task, along.s0, along.key)
        return flat_states(trajectory.s)[0], trajectory.a, ravel_pytree(trajectory.s_T)[0]

    push, _ = respond_and_adjoint(along)
    tangents = jax.jit(lambda w: jax.jvp(run, (jnp.zeros_like(w),), (w,))[1])(w)
    jax.tree.map(close, push(w), tangents)


def test_respond_and_adjoint_are_transposes(along):
    push, pull = map(jax.jit, respond_and_adjoint(along))
    normal = np.random.default_rng(3).normal
    c_s, c_T = normal(size=along.states.shape), normal(size=along.states.shape[1:])
    c_a, w = normal(size=(2, *along.trajectory.a.shape))
    s, a, s_T = push(w)
    close(jnp.vdot(s, c_s) + jnp.vdot(a, c_a) + jnp.vdot(s_T, c_T), jnp.vdot(w, pull(c_s, c_a, c_T)))


# The LQR problem along a trajectory, with everything random: cross terms, time-varying matrices, linear terms.


def random_linearization(seed, T, n, m):
    normal = np.random.default_rng(seed).normal
    root, root_T = normal(size=(T, n + m, n + m)), normal(size=(n, n))
    H = root @ root.swapaxes(1, 2) + 0.1 * np.eye(n + m)
    A, B = normal(size=(T, n, n)) / np.sqrt(n), normal(size=(T, n, m))
    return jax.tree.map(
        jnp.asarray,
        Linearization(A, B, normal(size=(T, n)), normal(size=(T, m)), H, normal(size=n), root_T @ root_T.T),
    )


def dense(lin):
    """M = L' H L and g = L' c with K = 0, from L's columns."""
    T, n, m = lin.B.shape
    K = jnp.zeros((T, m, n))
    basis = jnp.eye(T * m).reshape(T * m, T, m)
    s, a, s_T = jax.vmap(lambda w: respond(lin.A, lin.B, K, w))(basis)
    x = jnp.concatenate([s, a], axis=-1)
    M = jnp.einsum("iTx,Txy,jTy->ij", x, lin.H, x) + s_T @ lin.H_T @ s_T.T
    g = jnp.einsum("iTx,Tx->i", x, jnp.concatenate([lin.c_s, lin.c_a], axis=-1)) + s_T @ lin.c_T
    return M, g


def follow(lin, sweep):
    """The actions of the closed loop da = K ds + k."""

    def step(s, x):
        A, B, K, k = x
        a = K @ s + k
        return A @ s + B @ a, a

    return jax.lax.scan(step, jnp.zeros(lin.A.shape[-1]), (lin.A, lin.B, sweep.K, sweep.k))[1]


@pytest.mark.parametrize("n, m", [(1, 1), (4, 3), (INLINE + 2, 2), (3, INLINE + 1)])
def test_riccati_is_the_dense_solution(n, m, x64):
    T = 5

    @jax.jit
    def both(lin, damping):
        sweep = riccati(lin, damping)
        M, g = dense(lin)
        w = -jnp.linalg.solve(M + damping * jnp.eye(T * m), g)
        pulled = adjoint(lin.A, lin.B, jnp.zeros((T, m, n)), lin.c_s, lin.c_a, lin.c_T)
        return sweep, follow(lin, sweep), w.reshape(T, m), g, pulled, w @ M @ w + damping * w @ w

    for seed, damping in enumerate([0.0, 0.3, 50.0]):
        sweep, a, w, g, pulled, curvature = both(random_linearization(seed, T, n, m), jnp.asarray(damping))
        assert sweep.definite
        close(a, w, atol=1e-9 * np.abs(w).max())
        close(pulled.ravel(), g, atol=1e-9 * np.abs(g).max())
        assert sweep.slope == pytest.approx(float(g @ w.ravel()), rel=1e-9)
        assert sweep.slope == pytest.approx(-float(curvature), rel=1e-9)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("j", [1, SUMMED, SUMMED + 1, INLINE, INLINE + 1])
def test_products_are_numpys_in_every_form(j, batch, x64):
    normal = np.random.default_rng(j).normal
    X, Y, y = normal(size=(4, j, *batch)), normal(size=(j, 5, *batch)), normal(size=(j, *batch))
    close(jax.jit(matmul)(X, Y), np.einsum("ij...,jk...->ik...", X, Y))
    close(jax.jit(matvec)(X, y), np.einsum("ij...,j...->i...", X, y))


@pytest.mark.parametrize("n, m", [(1, 1), (5, 3), (INLINE + 1, 2)])
def test_a_closed_loop_is_the_change_of_variables(n, m, x64):
    """z = Z (s, w) with Z = (I, 0; K, I); along stacked trajectories as along one."""
    lins = [random_linearization(seed, 4, n, m) for seed in range(2)]
    K = np.random.default_rng(5).normal(size=(2, 4, m, n))
    stacked = jax.jit(closed_loop)(jax.tree.map(lambda *x: jnp.stack(x, axis=-1), *lins), jnp.moveaxis(K, 0, -1))
    for i, lin in enumerate(lins):
        Z = np.tile(np.eye(n + m), (4, 1, 1))
        Z[:, n:, :n] = K[i]
        c = np.concatenate([lin.c_s, lin.c_a], axis=1)
        wanted = lin._replace(
            A=lin.A + lin.B @ K[i], c_s=np.einsum("Txz,Tx->Tz", Z, c)[:, :n], H=Z.swapaxes(1, 2) @ lin.H @ Z
        )
        jax.tree.map(close, jax.jit(closed_loop)(lin, K[i]), wanted)
        jax.tree.map(lambda x, y, i=i: close(x[..., i], y), stacked, wanted)


def test_a_batch_of_sweeps_is_a_loop(x64):
    @jax.jit
    def sweeps(lin, damping, w):
        sweep = riccati(lin, damping)
        pulled = adjoint(lin.A, lin.B, sweep.K, lin.c_s, lin.c_a, lin.c_T)
        return sweep, respond(lin.A, lin.B, sweep.K, w), pulled

    lins = [random_linearization(seed, 6, 3, 2) for seed in range(3)]
    dampings = np.asarray([0.0, 0.5, 1.0])
    w = np.random.default_rng(9).normal(size=(3, 6, 2))
    batch = jax.jit(jax.vmap(sweeps))(jax.tree.map(lambda *x: np.stack(x), *lins), dampings, w)
    lin, K = jax.tree.map(lambda *x: jnp.stack(x, axis=-1), *lins), jnp.moveaxis(batch[0].K, 0, -1)
    last = respond(lin.A, lin.B, K, jnp.moveaxis(jnp.asarray(w), 0, -1))
    jax.tree.map(lambda x, y: close(jnp.moveaxis(x, -1, 0), y), last, batch[1])
    close(jnp.moveaxis(adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T), -1, 0), batch[2])
    for i, lin in enumerate(lins):
        one = sweeps(lin, dampings[i], w[i])
        jax.tree.map(lambda x, y, i=i: close(x[i], y, atol=1e-10), batch, one)


def test_riccati_reports_an_indefinite_action_hessian(x64):
    lin = random_linearization(0, 4, 2, 2)
    negative = lin._replace(H=lin.H.at[2, 2:, 2:].set(-100 * jnp.eye(2)))
    sweep = jax.jit(riccati)
    assert not sweep(negative, jnp.asarray(0.0)).definite
    assert sweep(negative, jnp.asarray(1e4)).definite


@jax.jit
def gains_from_rest(task):
    trajectory = rollout(OpenLoop.zeros(task), task, jnp.ones(task.n))
    return riccati(linearize(task, trajectory), jnp.asarray(0.0)).K


@pytest.mark.parametrize("name", ["double integrator", "marginal", "unstable"])
def test_gains_of_a_long_horizon_are_stationary(name, x64):
    if name == "double integrator":
        task = tasks.lqr(horizon=300)
    else:
        task = tasks.random_lqr(jax.random.key(4), 4, 2, stability=name, horizon=300)
        task = eqx.tree_at(lambda t: t.terminal.Q, task, 10 * task.terminal.Q)
    A, B, Q, R = (np.asarray(x) for x in (task.dynamics.A, task.dynamics.B, task.reward.Q, task.reward.R))
    P = scipy.linalg.solve_discrete_are(A, B, Q, R)
    K = -np.linalg.solve(R + B.T @ P @ B, B.T @ P @ A)
    gains = gains_from_rest(task)
    close(gains[0], K, rtol=1e-7, atol=1e-8)
    assert not np.allclose(gains[-1], K, rtol=1e-3)
    assert np.abs(np.linalg.eigvals(A + B @ gains[0])).max() < 1


# The nearest positive semidefinite matrix.


def nearest_psd(H):
    values, vectors = np.linalg.eigh((H + H.T) / 2)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def mixed(seed, size=4):
    """One of each: indefinite, diagonal with negatives, positive definite, zero, barely indefinite."""
    X = np.random.default_rng(seed).normal(size=(5, size, size))
    sub = np.eye(size) * 2
    sub[0, 1] = sub[1, 0] = 2.001
    return np.stack([X[0] + X[0].T, np.diag(X[1, 0]), X[2] @ X[2].T, np.zeros((size, size)), sub])


@given(st.integers(0, 2**31))
def test_project_is_eigh_clipped(seed):
    with jax.enable_x64(True):
        H = mixed(seed)
        for batch in (H, H[1:2], H[2:3], H[[1, 3]], H[:1]):
            close(projected(jnp.asarray(batch)), np.stack([nearest_psd(x) for x in batch]), atol=1e-12)


projected = jax.jit(project)


def test_project_symmetrises_keeps_easy_matrices_exactly_and_batches(x64):
    H = mixed(0)
    H[2] = np.diag([1.0, 2.0, 3.0, 4.0]) + 0.1  # positive definite by Gershgorin
    out = np.asarray(projected(jnp.asarray(H)))
    np.testing.assert_array_equal(out[2], H[2])
    np.testing.assert_array_equal(out[1], np.maximum(H[1], 0))
    np.testing.assert_array_equal(out[3], H[3])
    skew = np.zeros_like(H)
    skew[:, 0, 1], skew[:, 1, 0] = 0.5, -0.5
    close(projected(jnp.asarray(H + skew)), out)
    pairs = [[1, 2], [0, 4]]  # easy ones, and ones that need their eigenvectors
    close(jax.jit(jax.vmap(project))(jnp.asarray(H[pairs])), out[pairs])


# The end of an episode.


class Until(eqx.Module):
    """Ends above 1, where the dynamics and the rewards below are NaN."""

    def __call__(self, s):
        return s[0] >= 1


class Ending(eqx.Module):
    drift: Any = eqx.field(default_factory=lambda: jnp.asarray(0.3, float))

    def __call__(self, s, a, *, key=None):
        first = s[0] + self.drift + 0.1 * a[0] * jnp.sqrt(1 - s[0])
        return jnp.stack([first, 0.9 * s[1] + a[0]])


class EndingReward(eqx.Module):
    def __call__(self, s, a):
        return jnp.sqrt(1 - s[0]) - s[1] ** 2 - a[0] ** 2


class EndingTerminal(eqx.Module):
    def __call__(self, s):
        return jnp.sqrt(1 - s[0]) - s @ s


class EndingPolicy(eqx.Module):
    gain: Any = eqx.field(default_factory=lambda: jnp.asarray(0.4, float))

    def __call__(self, s, *, key=None):
        return self.gain * jnp.sqrt(1 - s[:1]) - 0.1 * s[1:]


def ending(horizon):
    return Task(
        name="ending", dynamics=Ending(), reward=EndingReward(), terminal=EndingTerminal(), done=Until(),
        initial=Box([0.0, 0.0], [0.5, 1.0]), a_low=[-1.0], a_high=[1.0], horizon=horizon, dt=0.1,
    )  # fmt: skip


def test_derivatives_after_the_end_are_zero_and_the_state_is_held(x64):
    task, policy, s0 = ending(8), EndingPolicy(), jnp.asarray([0.0, 0.5])

    @jax.jit
    def along(task):
        trajectory = rollout(policy, task, s0)
        lin, K = linearize(task, trajectory), feedback(policy, trajectory)
        return trajectory, lin, K, adjoint(lin.A, lin.B, K, lin.c_s, lin.c_a, lin.c_T)

    trajectory, lin, K, g = along(task)
    steps = int(trajectory.alive.sum())
    assert 1 < steps < 8
    for x in (lin.B, lin.c_s, lin.c_a, lin.H, K):
        assert not np.any(x[steps:])
        assert np.all(np.isfinite(x))
        assert np.any(x[: steps - 1])
    np.testing.assert_array_equal(lin.A[steps:], np.broadcast_to(np.eye(2), (8 - steps, 2, 2)))
    assert not np.any(lin.c_T)
    assert not np.any(lin.H_T)
    # The same task, cut at its end and without a terminal reward, needs no mask.
    cut = eqx.tree_at(lambda t: (t.weights, t.done), ending(steps), (jnp.ones(steps + 1).at[-1].set(0), None))
    for x, y in zip(lin[:5], along(cut)[1][:5], strict=True):
        close(x[:steps], y)
    # Nor does a NaN reach a derivative of it. (Of H there is none in reverse: its projection is a loop.)
    gradient = jax.jit(
        jax.grad(lambda task: sum(map(jnp.sum, along(task)[1]._replace(H=jnp.zeros(()), H_T=jnp.zeros(())))))
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient(task)))
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), policy)
    gradient = jax.jit(jax.grad(lambda w: episode_return(Perturbed(repeated, w), task, s0)))(jnp.zeros((8, 1)))
    close(g, -gradient)
    assert np.any(g)


# States.


def test_eigenvectors_are_found_once_and_only_if_needed():
    """Two batched decompositions at a time can lock jaxlib's thread pool; one outside the loop runs for diagonal costs too."""
    task = tasks.pendulum(horizon=3)
    batch = rollouts(OpenLoop.zeros(task), task, task.starts(jax.random.key(0), 2))
    text = jax.jit(jax.vmap(linearize, in_axes=(None, 0))).lower(task, batch).compile().as_text()
    assert text is not None
    computations = [c for c in text.split("\n\n") if "custom-call(" in c and "syevd" in c]
    assert len(computations) == 1
    assert computations[0].count("syevd_ffi") == 1
    assert not computations[0].lstrip().startswith("ENTRY")
    name = computations[0].lstrip().split(" ")[0]
    assert f"body={name}" in text


def test_states_must_be_float():
    states = {"x": jnp.zeros((3, 2)), "gear": jnp.zeros((3, 1), jnp.int32)}
    with pytest.raises(TypeError, match=r"states must be float to be linearised; leaf \['gear'\] is int32"):
        flat_states(states)
    with pytest.raises(TypeError, match="leaf s is int32"):
        flat_states(jnp.zeros((3, 2), jnp.int32))


def test_flat_states_round_trip():
    states = {"b": jnp.arange(6.0).reshape(3, 2), "a": {"c": jnp.arange(12.0).reshape(3, 2, 2)}}
    flat, unravel = flat_states(states)
    assert flat.shape == (3, 6)
    jax.tree.map(np.testing.assert_array_equal, unravel(flat[1]), jax.tree.map(lambda x: x[1], states))
    vector = jnp.arange(6.0).reshape(3, 2)
    flat, unravel = flat_states(vector)
    np.testing.assert_array_equal(flat, vector)
    np.testing.assert_array_equal(unravel(flat[1]), vector[1])


def test_feedback_of_an_affine_plan_and_of_a_linear_policy_is_their_gain():
    task = tasks.lqr(horizon=4)
    K = jnp.arange(8.0).reshape(4, 1, 2) / 8
    run = jax.jit(lambda policy: feedback(policy, rollout(policy, task, jnp.ones(2))))
    plan = Affine(K, jnp.ones((4, 1)), jnp.zeros((4, 2)))
    np.testing.assert_allclose(run(plan), K, rtol=1e-6)
    np.testing.assert_allclose(run(Linear(K[1], jnp.zeros(1))), np.broadcast_to(K[1], K.shape), rtol=1e-6)
    assert not np.any(run(OpenLoop.zeros(task)))
