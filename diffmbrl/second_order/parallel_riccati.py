r"""The sweeps of `riccati.py` parallel in time: O(log T) sequential steps in place of T.

The value of a stretch of time $i \to j$, minimised over its actions, is a function of its two ends,

$$V_{ij}(s_i, s_j) = \max_\lambda\; \tfrac12 s_i^\top V s_i + v^\top s_i - \tfrac12\lambda^\top C\lambda
- \lambda^\top(s_j - A s_i - b),$$

and two stretches join to one of the same form. Joining is associative, so `jax.lax.associative_scan` makes the value
functions of all time steps at once, and the gains follow from them in parallel. It does about 10 times the arithmetic of the
scan, for devices with cores to spare; `choose` selects one of the two.

Reference: Sarkka and Garcia-Fernandez 2023, "Temporal parallelization of dynamic programming and linear quadratic control",
section IV, here with cross terms of state and action and with damping.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.riccati import RiccatiSolution, adjoint, respond, riccati
from diffmbrl.second_order.small_matrices import eliminate

# The horizon from which `choose` takes the parallel sweeps, except on a CPU. Not measured: by count of sequential steps,
# 2 log2 T joins of ten small operations each against T steps of ten.
PARALLEL_FROM = 128


class Sweeps(NamedTuple):
    """The three recursions along a trajectory, with the same arguments and results by a scan or in parallel.

    Args:
        riccati: As `riccati.riccati`.
        adjoint: As `riccati.adjoint`.
        respond: As `riccati.respond`.
    """

    riccati: Callable[[Linearization, Array], RiccatiSolution]
    adjoint: Callable[[Array, Array, Array, Array, Array, Array], Array]
    respond: Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]


class Stretch(NamedTuple):
    """The value of a stretch of time as a function of its two ends, its actions minimised away.

    Args:
        A: Transition from the first state to the last.
        b: Offset of the last state.
        C: Reachability of the last state by the actions.
        v: Gradient of the value in the first state.
        V: Hessian of the value in the first state.
    """

    A: Float[Array, "*T n n"]
    b: Float[Array, "*T n"]
    C: Float[Array, "*T n n"]
    v: Float[Array, "*T n"]
    V: Float[Array, "*T n n"]


def choose(horizon: int, *, platform: str | None = None) -> Sweeps:
    """Choose the sweeps for a horizon and a platform.

    On a CPU the scan is several times faster at any horizon (`python -m benchmarks riccati`). Elsewhere the sweeps are parallel
    from a horizon of `PARALLEL_FROM`.

    Args:
        horizon: Number of time steps.
        platform: "cpu", "gpu", "cuda", "rocm" or "tpu"; None is JAX's default backend.

    Returns:
        `SCAN` or `PARALLEL`.

    Raises:
        ValueError: If the horizon is below 1 or JAX has no such platform.

    >>> choose(1000, platform="cpu") is SCAN, choose(1000, platform="gpu") is PARALLEL
    (True, True)
    """
    platform = jax.default_backend() if platform is None else platform
    if platform not in PLATFORMS:
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)}, got {platform!r}")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    return SCAN if platform == "cpu" or horizon < PARALLEL_FROM else PARALLEL


PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")


def parallel_riccati(linearization: Linearization, damping: Float[Array, ""]) -> RiccatiSolution:
    """Solve the LQR problem along one trajectory by an associative scan, equal to `riccati` to rounding.

    One condition is stricter: `definite` also requires that each step's own damped H_aa is positive definite, because an action
    is minimised away before the later steps are known. The scan requires it of H_aa + B' V B alone, so a reward without a price
    on the actions needs damping only here.

    Args:
        linearization: Derivatives along one trajectory, with positive semidefinite Hessians.
        damping: Damping of the actions.

    Returns:
        The feedback law, and whether the damped problem is convex.

    Raises:
        ValueError: If trajectories are stacked along a last axis; `vmap` over them instead.

    Cost: O(T n^3) arithmetic in O(log T) sequential steps.

    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> from diffmbrl.second_order import linearize, riccati
    >>> task = tasks.lqr(horizon=2)
    >>> lin = linearize(task, rollout(OpenLoop.zeros(task), task, task.initial(jax.random.key(0))))
    >>> bool(jnp.allclose(parallel_riccati(lin, jnp.zeros(())).K, riccati(lin, jnp.zeros(())).K, rtol=1e-3))
    True
    """
    A, B, c_s, c_a, H, c_T, H_T = linearization
    if A.ndim != 3:
        raise ValueError(f"A must have shape [T, n, n], got {list(A.shape)}; vmap parallel_riccati over trajectories")
    n, m = B.shape[1:]
    eye = jnp.eye(m, dtype=A.dtype)
    with jax.default_matmul_precision("highest"):
        H = H.at[:, n:, n:].add(damping * eye)
        stages, positive = jax.vmap(_stage)(A, B, c_s, c_a, H)
        end = Stretch(jnp.zeros_like(H_T), jnp.zeros_like(c_T), jnp.zeros_like(H_T), c_T, H_T)
        stretches = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), stages, end)
        joined = jax.lax.associative_scan(lambda later, earlier: join(earlier, later), stretches, reverse=True)
        K, k, q_a, Q_aa, definite = jax.vmap(_gains)(A, B, c_a, H, joined.V[1:], joined.v[1:])
    return RiccatiSolution(K, k, jnp.vdot(k, q_a, precision="highest"), jnp.all(positive) & jnp.all(definite), Q_aa)


def join(first: Stretch, second: Stretch) -> Stretch:
    r"""Join two consecutive stretches into one, for all leading axes.

    $W = (I + C_1 V_2)^{-1}$: $A = A_2 W A_1$, $b = A_2 W (b_1 - C_1 v_2) + b_2$, $C = A_2 W C_1 A_2^\top + C_2$,
    $v = A_1^\top W^\top (v_2 + V_2 b_1) + v_1$, $V = A_1^\top W^\top V_2 A_1 + V_1$.

    Args:
        first: The earlier stretches.
        second: The later stretches.

    Returns:
        The joined stretches.
    """
    n = first.A.shape[-1]
    eye = jnp.eye(n, dtype=first.A.dtype)
    right = jnp.concatenate([first.A, (first.b - batched_matvec(first.C, second.v))[..., None], first.C], axis=-1)
    solved = jnp.linalg.solve(eye + first.C @ second.V, right)
    WA, Wb, WC = solved[..., :n], solved[..., n], solved[..., n + 1 :]
    # W' V_2 = V_2 W is symmetric, and v needs no second solve: W' (v_2 + V_2 b_1) = v_2 + V_2 W (b_1 - C_1 v_2).
    v = batched_matvec(_transpose(first.A), second.v + batched_matvec(second.V, Wb)) + first.v
    V = _transpose(first.A) @ second.V @ WA + first.V
    C = second.A @ WC @ _transpose(second.A) + second.C
    return Stretch(second.A @ WA, batched_matvec(second.A, Wb) + second.b, _symmetric(C), v, _symmetric(V))


def parallel_adjoint(
    A: Float[Array, "T n n"],
    B: Float[Array, "T n m"],
    K: Float[Array, "T m n"],
    c_s: Float[Array, "T n"],
    c_a: Float[Array, "T m"],
    c_T: Float[Array, " n"],
) -> Float[Array, "T m"]:
    r"""`adjoint` by an associative scan of $\lambda_t = (A + BK)^\top\lambda_{t+1} + c_s + K^\top c_a$.

    Args:
        A: Derivatives of the next state in the state.
        B: Derivatives of the next state in the action.
        K: Gains of the policy.
        c_s: Gradients of the costs in the state.
        c_a: Gradients of the costs in the action.
        c_T: Gradient of the terminal cost.

    Returns:
        d(cost)/dw_t for every time step.
    """
    with jax.default_matmul_precision("highest"):
        maps = _transpose(A + B @ K), c_s + batched_matvec(_transpose(K), c_a)
        _, costates = _affine(maps, c_T, reverse=True)
        return c_a + batched_matvec(_transpose(B), costates[1:])


def parallel_respond(
    A: Float[Array, "T n n"], B: Float[Array, "T n m"], K: Float[Array, "T m n"], w: Float[Array, "T m"]
) -> tuple[Float[Array, "T n"], Float[Array, "T m"], Float[Array, " n"]]:
    r"""`respond` by an associative scan of $s_{t+1} = (A + BK) s_t + B w_t$.

    Args:
        A: Derivatives of the next state in the state.
        B: Derivatives of the next state in the action.
        K: Gains of the policy.
        w: Perturbations of the actions.

    Returns:
        The changes of the states s_0 .. s_{T-1}, of the actions, and of the last state s_T.
    """
    with jax.default_matmul_precision("highest"):
        _, s = _affine((A + B @ K, batched_matvec(B, w)), jnp.zeros_like(A[0, 0]), reverse=False)
        return s[:-1], batched_matvec(K, s[:-1]) + w, s[-1]


SCAN = Sweeps(riccati, adjoint, respond)
PARALLEL = Sweeps(parallel_riccati, parallel_adjoint, parallel_respond)


def _affine(maps: tuple[Array, Array], start: Array, *, reverse: bool) -> tuple[Array, Array]:
    """Iterate x -> F x + f from `start`, the first in time or (reversed) the last: all T + 1 values in the order of time."""
    constant = jnp.zeros_like(maps[0][:1]), start[None]
    ends = (maps, constant) if reverse else (constant, maps)
    maps = jax.tree.map(lambda *x: jnp.concatenate(x), *ends)
    return jax.lax.associative_scan(
        lambda x, y: (y[0] @ x[0], batched_matvec(y[0], x[1]) + y[1]), maps, reverse=reverse
    )


def _stage(A: Array, B: Array, c_s: Array, c_a: Array, H: Array) -> tuple[Stretch, Bool[Array, ""]]:
    """One time step, its action minimised away for a given costate of the next state."""
    n = A.shape[0]
    H_sa = H[:n, n:]
    solved, positive = eliminate(H[n:, n:], jnp.concatenate([H_sa.T, c_a[:, None], B.T], axis=1))
    U, Uc, UB = solved[:, :n], solved[:, n], solved[:, n + 1 :]
    stage = Stretch(A - B @ U, -B @ Uc, _symmetric(B @ UB), c_s - H_sa @ Uc, _symmetric(H[:n, :n] - H_sa @ U))
    return stage, positive


def _gains(A: Array, B: Array, c_a: Array, H: Array, V: Array, v: Array) -> tuple[Array, ...]:
    """K, k, q_a, Q_aa of one step, and whether Q_aa is positive definite, from the value function of the next state."""
    n = A.shape[0]
    Q_as, Q_aa = H[n:, :n] + B.T @ V @ A, H[n:, n:] + B.T @ V @ B
    q_a = c_a + B.T @ v
    gains, positive = eliminate(Q_aa, -jnp.concatenate([Q_as, q_a[:, None]], axis=1))
    return gains[:, :n], gains[:, n], q_a, Q_aa, positive


def batched_matvec(X: Float[Array, "*T i j"], y: Float[Array, "*T j"]) -> Float[Array, "*T i"]:
    """Multiply matrices X_t and vectors y_t for all leading axes at once."""
    return jnp.einsum("...ij,...j->...i", X, y, precision="highest")


def _transpose(X: Array) -> Array:
    return jnp.swapaxes(X, -1, -2)


def _symmetric(X: Array) -> Array:
    return (X + _transpose(X)) / 2
