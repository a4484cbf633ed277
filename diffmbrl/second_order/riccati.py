r"""Linear recursions along a trajectory: adjoint, response of the closed loop, Riccati sweep.

$$ds_{t+1} = A_t\,ds_t + B_t\,da_t,\qquad da_t = K_t\,ds_t + dw_t$$

with w an additive perturbation of the actions and K the policy's gain, zero for a plan without feedback. Let L be the response
of (s, a) to w, c the gradients and H the positive semidefinite Hessians of the costs:
* `adjoint` gives $L^\top c$, the gradient of the cost in w;
* `respond` gives $L w$;
* `riccati` gives $-(L^\top H L + \mu I)^{-1} L^\top c$ for K = 0 as a feedback law, and for the policy's K if the linearisation
  is that of `closed_loop`.

Trajectories may be stacked along a last axis, which is several times faster than `vmap` on a CPU: the arithmetic then runs over
contiguous numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.small_matrices import eliminate, matmul, matvec, transpose


class RiccatiSolution(NamedTuple):
    r"""The minimiser of the LQR problem along a trajectory, $da_t = K_t\,ds_t + k_t$.

    Args:
        K: Gains.
        k: Changes of the actions without feedback.
        slope: Derivative of the damped cost in the step size alpha at 0; the cost changes by (alpha - alpha^2 / 2) times it.
        definite: Whether all Q_aa are positive definite. Where not, the gains are void.
        Q_aa: Damped Hessians in the actions, the pivots of the block elimination of $L^\top H L + \mu I$.
    """

    K: Float[Array, "T m n *batch"]
    k: Float[Array, "T m *batch"]
    slope: Float[Array, "*batch"]
    definite: Bool[Array, "*batch"]
    Q_aa: Float[Array, "T m m *batch"]


def adjoint(
    A: Float[Array, "T n n *batch"],
    B: Float[Array, "T n m *batch"],
    K: Float[Array, "T m n *batch"],
    c_s: Float[Array, "T n *batch"],
    c_a: Float[Array, "T m *batch"],
    c_T: Float[Array, "n *batch"],
) -> Float[Array, "T m *batch"]:
    r"""Gradient of the cost in the perturbations of the actions along the closed loop, $g = L^\top c$.

    $$g_t = c_{a,t} + B_t^\top \lambda_{t+1},\qquad \lambda_t = c_{s,t} + A_t^\top \lambda_{t+1} + K_t^\top g_t,\qquad
    \lambda_T = c_T$$

    Args:
        A: Derivatives of the next state in the state.
        B: Derivatives of the next state in the action.
        K: Gains of the policy.
        c_s: Gradients of the costs in the state.
        c_a: Gradients of the costs in the action.
        c_T: Gradient of the terminal cost.

    Returns:
        d(cost)/dw_t for every time step.

    >>> ones = jnp.ones((2, 1, 1))
    >>> adjoint(ones, ones, 0 * ones, jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.ones(1)).ravel().tolist()
    [2.0, 1.0]
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
    r"""Response $L w$ of the closed loop when w is added to the actions.

    Args:
        A: Derivatives of the next state in the state.
        B: Derivatives of the next state in the action.
        K: Gains of the policy.
        w: Perturbations of the actions.

    Returns:
        The changes of the states s_0 .. s_{T-1}, of the actions, and of the last state s_T.

    >>> ones = jnp.ones((2, 1, 1))
    >>> s, a, s_T = respond(ones, ones, -ones, jnp.ones((2, 1)))
    >>> s.ravel().tolist(), a.ravel().tolist(), s_T.tolist()
    ([0.0, 1.0], [1.0, 0.0], [1.0])
    """

    def step(s, x):
        A, B, K, w = x
        a = matvec(K, s) + w
        return matvec(A, s) + matvec(B, a), (s, a)

    start = jnp.zeros((A.shape[1], *A.shape[3:]), A.dtype)
    s_T, (s, a) = jax.lax.scan(step, start, (A, B, K, w))
    return s, a, s_T


def closed_loop(lin: Linearization, K: Float[Array, "T m n *batch"]) -> Linearization:
    r"""Rewrite a linearisation in terms of (s, w), where $da = K\,ds + w$.

    $A + BK$, $c_s + K^\top c_a$ and $Z^\top H Z$ with $Z = (I, 0; K, I)$. `riccati` of the result gives
    $-(M + \mu I)^{-1} g$, a planner's step in deviations from the policy's actions; $M = L^\top H L$, $g = L^\top c$.

    Args:
        lin: Derivatives along the trajectory.
        K: Gains of the policy.

    Returns:
        The same costs and dynamics, with w in the place of the action.

    >>> from diffmbrl import Linear, rollout, tasks
    >>> from diffmbrl.second_order import feedback, linearize
    >>> task = tasks.lqr(horizon=5)
    >>> policy = Linear.zeros(task)
    >>> trajectory = rollout(policy, task, task.initial(jax.random.key(0)))
    >>> closed_loop(linearize(task, trajectory), feedback(policy, trajectory)).A.shape
    (5, 2, 2)
    """
    n = lin.A.shape[1]

    def step(A, B, c_s, c_a, H, K):
        # Z^T H Z by its blocks: XLA would compute every product with the ones and zeros of Z.
        HZ = H[:, :n] + matmul(H[:, n:], K)
        H_as = HZ[n:]
        H_ss = HZ[:n] + matmul(transpose(K), H_as)
        above, below = jnp.concatenate([H_ss, transpose(H_as)], axis=1), jnp.concatenate([H_as, H[n:, n:]], axis=1)
        return A + matmul(B, K), c_s + matvec(transpose(K), c_a), jnp.concatenate([above, below])

    A, c_s, H = jax.vmap(step)(lin.A, lin.B, lin.c_s, lin.c_a, lin.H, K)
    return lin._replace(A=A, c_s=c_s, H=H)


def riccati(linearization: Linearization, damping: Float[Array, ""]) -> RiccatiSolution:
    r"""Solve the LQR problem along a trajectory by dynamic programming, backwards in time.

    $$Q = H_t + [A\;B]^\top V [A\;B],\quad q = c_t + [A\;B]^\top v,\quad K_t = -(Q_{aa} + \mu I)^{-1} Q_{as},\;
    k_t = -(Q_{aa} + \mu I)^{-1} q_a$$

    V and v follow from the gains for the damped Q, so that the actions of the closed loop are exactly
    $-(L^\top H L + \mu I)^{-1} L^\top c$. Without a gradient (c = 0) this is the Riccati recursion.

    Args:
        linearization: Derivatives along the trajectory, with positive semidefinite Hessians.
        damping: mu, added to the diagonal of every Q_aa.

    Returns:
        The feedback law, and whether the damped problem is convex.

    Cost: O(T (n + m)^3) arithmetic in T sequential steps.
    Reference: Tassa, Erez, Todorov 2012, section II; the damping of the actions is that of Levenberg and Marquardt.

    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> from diffmbrl.second_order import linearize
    >>> task = tasks.lqr(horizon=5)
    >>> lin = linearize(task, rollout(OpenLoop.zeros(task), task, task.initial(jax.random.key(0))))
    >>> riccati(lin, jnp.zeros(())).K.shape
    (5, 1, 2)
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
