r"""Linear recursions along a trajectory: the adjoint, the response of the closed loop, and the Riccati sweep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.small_matrices import eliminate, matmul, matvec, transpose


class RiccatiSolution(NamedTuple):
    r"""The minimiser of the LQR problem along a trajectory: $da_t = K_t\,ds_t + k_t$."""

    K: Float[Array, "T m n *batch"]
    k: Float[Array, "T m *batch"]
    slope: Float[Array, "*batch"]  # of the damped cost in the step size alpha, which is (alpha - alpha^2 / 2) * slope
    definite: Bool[Array, "*batch"]  # False where some Hessian Q_aa was not positive definite: the gains are then void
    Q_aa: Float[Array, "T m m *batch"]  # damped: the pivots of the block elimination of $L^\top H L + \mu I$


def adjoint(
    A: Float[Array, "T n n *batch"],
    B: Float[Array, "T n m *batch"],
    K: Float[Array, "T m n *batch"],
    c_s: Float[Array, "T n *batch"],
    c_a: Float[Array, "T m *batch"],
    c_T: Float[Array, "n *batch"],
) -> Float[Array, "T m *batch"]:
    r"""$L^\top c$: with costs' gradients c along the closed loop, the gradient d(cost)/dw_t.

    $g_t = c_{a,t} + B_t^\top \lambda_{t+1}$, $\lambda_t = c_{s,t} + A_t^\top \lambda_{t+1} + K_t^\top g_t$, $\lambda_T = c_T$.

    Trajectories may be stacked along a last axis, which is several times faster than `vmap` on a CPU: the arithmetic then
    runs over contiguous numbers.
    """

    def step(costate, x):
        A, B, K, c_s, c_a = x
        g = c_a + matvec(transpose(B), costate)
        return c_s + matvec(transpose(A), costate) + matvec(transpose(K), g), g

    return jax.lax.scan(step, c_T, (A, B, K, c_s, c_a), reverse=True)[1]


def respond(
    A: Float[Array, "T n n *batch"],
    B: Float[Array, "T n m *batch"],
    K: Float[Array, "T m n *batch"],
    w: Float[Array, "T m *batch"],
) -> tuple[Float[Array, "T n *batch"], Float[Array, "T m *batch"], Float[Array, "n *batch"]]:
    r"""$L w$: the change of states, actions and last state of the closed loop when w is added to the actions.

    Trajectories may be stacked along a last axis, as for `adjoint`.
    """

    def step(s, x):
        A, B, K, w = x
        a = matvec(K, s) + w
        return matvec(A, s) + matvec(B, a), (s, a)

    start = jnp.zeros((A.shape[1], *A.shape[3:]), A.dtype)
    s_T, (s, a) = jax.lax.scan(step, start, (A, B, K, w))
    return s, a, s_T


def closed_loop(lin: Linearization, K: Float[Array, "T m n *batch"]) -> Linearization:
    r"""The same costs and dynamics in terms of (s, w), with $da = K\,ds + w$.

    $A + BK$, $c_s + K^\top c_a$ and $Z^\top H Z$ with $Z = (I, 0; K, I)$. Then `riccati` gives $-(M + \mu I)^{-1} g$, the step
    of a planner whose actions are deviations from the policy's, for $M = L^\top H L$ and $g = L^\top c$ of the closed loop.
    """
    n = lin.A.shape[1]

    def step(A, B, c_s, c_a, H, K):
        # Z^T H Z by its blocks: of its products with the ones and zeros of Z, XLA would work out each.
        HZ = H[:, :n] + matmul(H[:, n:], K)
        H_as = HZ[n:]
        H_ss = HZ[:n] + matmul(transpose(K), H_as)
        above, below = jnp.concatenate([H_ss, transpose(H_as)], axis=1), jnp.concatenate([H_as, H[n:, n:]], axis=1)
        return A + matmul(B, K), c_s + matvec(transpose(K), c_a), jnp.concatenate([above, below])

    A, c_s, H = jax.vmap(step)(lin.A, lin.B, lin.c_s, lin.c_a, lin.H, K)
    return lin._replace(A=A, c_s=c_s, H=H)


def riccati(linearization: Linearization, damping: Float[Array, ""]) -> RiccatiSolution:
    r"""Solve the LQR problem along a trajectory by dynamic programming, backwards in time, in O(T (n + m)^3).

    $$Q = H_t + [A\;B]^\top V [A\;B],\quad q = c_t + [A\;B]^\top v,\quad K_t = -(Q_{aa} + \mu I)^{-1} Q_{as},\;
    k_t = -(Q_{aa} + \mu I)^{-1} q_a$$

    and V, v follow from the gains for the damped Q, so that the actions of the closed loop are exactly
    $-(L^\top H L + \mu I)^{-1} L^\top c$. With no gradient (c = 0) this is the Riccati recursion. `damping` is mu.

    Trajectories may be stacked along a last axis, as for `adjoint`.

    Reference: Tassa, Erez, Todorov 2012, section II; the damping of the actions is that of Levenberg and Marquardt.
    """
    A, B, c_s, c_a, H, c_T, H_T = linearization
    n, m = B.shape[1:3]
    batch = A.shape[3:]
    eye = np.eye(m, dtype=A.dtype).reshape(m, m, *(1,) * len(batch))

    def step(carry, x):
        V, v, slope, definite = carry
        F, c_s, c_a, H = x
        Q = H + matmul(transpose(F), matmul(V, F))
        FTv = matvec(transpose(F), v)
        q_s, q_a = c_s + FTv[:n], c_a + FTv[n:]
        Q_sa, Q_aa = Q[:n, n:], Q[n:, n:] + damping * eye
        gains, positive = eliminate(Q_aa, -jnp.concatenate([transpose(Q_sa), q_a[:, None]], axis=1))
        K, k = gains[:, :n], gains[:, n]
        V = Q[:n, :n] + matmul(Q_sa, K)
        return ((V + transpose(V)) / 2, q_s + matvec(Q_sa, k), slope + jnp.sum(k * q_a, axis=0), definite & positive), (
            K,
            k,
            Q_aa,
        )

    start = (H_T, c_T, jnp.zeros(batch, A.dtype), jnp.ones(batch, bool))
    F = jnp.concatenate([A, B], axis=2)
    (_, _, slope, definite), (K, k, Q_aa) = jax.lax.scan(step, start, (F, c_s, c_a, H), reverse=True)
    return RiccatiSolution(K, k, slope, definite, Q_aa)
