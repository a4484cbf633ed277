r"""A task along a trajectory: derivatives in parallel over time, then linear recursions.

This is where the sign changes: rewards r are maximised, here stand costs $c_t = -w_t r(s_t, a_t)$, $c_T = -w_T \phi(s_T)$.

$$ds_{t+1} = A_t\,ds_t + B_t\,da_t,\qquad da_t = K_t\,ds_t + dw_t$$

with `w` an additive perturbation of the actions and K the policy's gain (zero for a plan without feedback). L is the
response of (s, a) to w, and H the Hessian of the costs, one block a time step, projected to be positive semidefinite:
* `adjoint`:  $L^\top c$, the gradient of the cost with respect to w;
* `respond`:  $L w$;
* `riccati`:  $-(L^\top H L + \mu I)^{-1} L^\top c$ with K = 0, as a feedback law: the LQR problem along the trajectory;
  of `closed_loop`, the same with the policy's K.

States that are not one flat array are flattened (float leaves only). Steps after the end of an episode have zero derivatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task, Trajectory, cond_once, is_plan

SUMMED = 6  # products of stacked matrices with at most so many terms an entry are sums of outer products
INLINE = 16  # dimensions up to which tiny matrix products and eliminations are written out as arithmetic


class Linearization(NamedTuple):
    """Derivatives along one trajectory, or several stacked on a last axis; costs are weighted, negative rewards."""

    A: Float[Array, "T n n *batch"]
    B: Float[Array, "T n m *batch"]
    c_s: Float[Array, "T n *batch"]
    c_a: Float[Array, "T m *batch"]
    H: Float[Array, "T n+m n+m *batch"]  # Hessian of the cost in (s, a), positive semidefinite
    c_T: Float[Array, "n *batch"]
    H_T: Float[Array, "n n *batch"]


class RiccatiSolution(NamedTuple):
    r"""The minimiser of the LQR problem along a trajectory: $da_t = K_t\,ds_t + k_t$."""

    K: Float[Array, "T m n *batch"]
    k: Float[Array, "T m *batch"]
    slope: Float[Array, "*batch"]  # of the damped cost in the step size alpha, which is (alpha - alpha^2 / 2) * slope
    definite: Bool[Array, "*batch"]  # False where some Hessian Q_aa was not positive definite: the gains are then void
    Q_aa: Float[Array, "T m m *batch"]  # damped: the pivots of the block elimination of $L^\top H L + \mu I$


def flat_states(states: State) -> tuple[Array, Callable[[Array], State]]:
    """States with a leading axis as an array [T, n], and the inverse for one state.

    Raises: `TypeError` if a leaf is not floating point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path)
            raise TypeError(f"states must be float to be linearised; leaf {name or 's'} is {leaf.dtype}")
    if isinstance(states, jax.Array) and states.ndim == 2:
        return states, lambda x: x
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], states))
    return jax.vmap(lambda s: ravel_pytree(s)[0])(states), unravel


def linearize(task: Task, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> Linearization:
    r"""A, B, the gradients and Hessians of the costs along one trajectory; no time step waits for another (`each_step`).

    `key` must be the rollout's, so that noisy dynamics are linearised at the noise that was drawn.
    Cost per step: n + m tangents of f, one gradient and n + m Hessian columns of r.

    >>> import jax
    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> task = tasks.lqr(horizon=5)
    >>> linearize(task, rollout(OpenLoop.zeros(task), task, task.initial(jax.random.key(0)))).A.shape
    (5, 2, 2)
    """
    x, unravel = flat_states(trajectory.s)
    x_T = ravel_pytree(trajectory.s_T)[0]
    n = x.shape[1]

    def step(z, t):
        key_s = None if key is None else jax.random.split(jax.random.fold_in(key, t))[1]
        return ravel_pytree(task.dynamics(unravel(z[:n]), z[n:], key=key_s))[0]

    def jacobian(z, t):
        # What the tangents share is evaluated once, before them; of numpy's eye XLA knows the zeros.
        _, push = jax.linearize(lambda z: step(z, t), z)
        return jax.vmap(push, out_axes=1)(np.eye(z.size, dtype=z.dtype))

    def cost(z, w):
        return -w * task.reward(unravel(z[:n]), z[n:])

    def final(s):
        def cost_T(s):
            return -task.weights[-1] * task.terminal(unravel(s))

        return jax.grad(cost_T)(s), jax.hessian(cost_T)(s)

    alive = trajectory.alive
    # A step after the end is replaced by the start before anything is evaluated: see rollout.py.
    z = jnp.concatenate([x, trajectory.a], axis=1)
    z = z if task.done is None else jnp.where(alive[:-1, None], z, z[0])
    with jax.default_matmul_precision("highest"):
        F = each_step(jacobian, task)(z, jnp.arange(task.horizon))
        c, H = (jax.vmap(derivative(cost))(z, task.weights[:-1]) for derivative in (jax.grad, jax.hessian))
        c_T, H_T = final(jnp.where(alive[-1], x_T, x[0]) if task.done is not None else x_T)
    if task.done is not None:
        held = jnp.eye(n, z.shape[1], dtype=z.dtype)
        F = jnp.where(alive[:-1, None, None], F, held)
        H = jnp.where(alive[:-1, None, None], H, jnp.zeros_like(H))
        c = jnp.where(alive[:-1, None], c, jnp.zeros_like(c))
        c_T, H_T = jax.tree.map(lambda y: jnp.where(alive[-1], y, jnp.zeros_like(y)), (c_T, H_T))
    # One projection for all: jaxlib's batched eigh waits on XLA's thread pool, and two of them at a time can lock it for good.
    H = project(jnp.concatenate([H, jnp.pad(H_T, (0, H.shape[-1] - n))[None]]))
    return Linearization(F[:, :, :n], F[:, :, n:], c[:, :n], c[:, n:], H[:-1], c_T, H[-1, :n, :n])


def each_step(f: Callable[..., Array], task: Task) -> Callable[..., Array]:
    """f at every time step: all at once, or on a CPU one after another where the dynamics are arithmetic alone.

    XLA makes one function of such a loop there, where all steps at once are a kernel for each quantity: up to a third faster,
    and half as long to compile (12-state quadrotor). Matrices, as networks have, are multiplied by all steps at once.
    """
    matrices = any(jnp.ndim(x) > 1 for x in jax.tree.leaves(task.dynamics))
    if matrices or jax.default_backend() != "cpu":
        return jax.vmap(f)
    return lambda *given: jax.lax.map(lambda x: f(*x), given)


def feedback(policy: Any, trajectory: Trajectory, key: PRNGKeyArray | None = None) -> Float[Array, "T m n"]:
    """K_t = dpi/ds along one trajectory, all time steps at once; zero after the end of the episode."""
    x, unravel = flat_states(trajectory.s)

    def gain(pi, s, t, alive):
        key_a = None if key is None else jax.random.split(jax.random.fold_in(key, t))[0]
        K = jax.jacrev(lambda s: pi(unravel(s), key=key_a))(jnp.where(alive, s, x[0]))
        return jnp.where(alive, K, jnp.zeros_like(K))

    axes = (0 if is_plan(policy) else None, 0, 0, 0)
    return jax.vmap(gain, in_axes=axes)(policy, x, jnp.arange(x.shape[0]), trajectory.alive[:-1])


def project(H: Float[Array, "N d d"]) -> Float[Array, "N d d"]:
    """The nearest positive semidefinite matrices, in the Frobenius norm.

    Costs are mostly diagonal or convex in (s, a), and an eigendecomposition of thousands of tiny matrices is dear: it is run
    only if some matrix is neither diagonal nor positive semidefinite by Gershgorin's discs.
    """
    H = (H + jnp.swapaxes(H, -1, -2)) / 2
    diagonal = jnp.diagonal(H, axis1=-2, axis2=-1)
    radius = jnp.sum(jnp.abs(H), axis=-1) - jnp.abs(diagonal)
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)
    clipped = jnp.maximum(diagonal, 0)[..., None] * eye
    is_diagonal = jnp.all(radius == 0, axis=-1)
    easy = is_diagonal | jnp.all(diagonal >= radius, axis=-1)
    result = jnp.where(is_diagonal[..., None, None], clipped, H)

    def eigen(result):
        # Of `result`, which is H where it matters: of H itself XLA would hoist it out of the loop and run it always.
        values, vectors = jnp.linalg.eigh(result)
        full = jnp.einsum("...ij,...j,...kj->...ik", vectors, jnp.maximum(values, 0), vectors, precision="highest")
        return jnp.where(easy[..., None, None], result, full)

    return cond_once(~jnp.all(easy), eigen, result)


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


def matmul(X: Float[Array, "i j *batch"], Y: Float[Array, "j k *batch"]) -> Float[Array, "i k *batch"]:
    """X Y as arithmetic alone, which fuses into a scan's step where a tiny matrix product does not.

    Of stacked trajectories a sum of few outer products, which runs along the stack (64 of them, T = 100: `spread` of the planar
    quadrotor, n = 6, 9 times faster). Of one, or of many products, a reduction: of the sum XLA makes one long expression for
    each entry there, at n = 12 two to fourteen times slower.
    """
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,jk...->ik...", X, Y, precision="highest")
    if X.ndim > 2 and X.shape[1] <= SUMMED:
        return sum((X[:, j, None] * Y[j] for j in range(1, X.shape[1])), X[:, 0, None] * Y[0])
    return jnp.sum(X[:, :, None] * Y, axis=1)


def matvec(X: Float[Array, "i j *batch"], y: Float[Array, "j *batch"]) -> Float[Array, "i *batch"]:
    """X y, likewise, with any axes after both; of stacked trajectories a sum at any size (n = 12: 3 times faster)."""
    if X.shape[1] > INLINE:
        return jnp.einsum("ij...,j...->i...", X, y, precision="highest")
    if X.ndim > 2:
        return sum((X[:, j] * y[j] for j in range(1, X.shape[1])), X[:, 0] * y[0])
    return jnp.sum(X * y, axis=1)


def transpose(X: Float[Array, "i j *batch"]) -> Float[Array, "j i *batch"]:
    return jnp.swapaxes(X, 0, 1)


def eliminate(Q: Float[Array, "m m *batch"], R: Float[Array, "m k *batch"]) -> tuple[Array, Array]:
    """Q^-1 R for a symmetric Q, and whether Q is positive definite, with any axes after the matrices' two.

    Small systems by Gauss-Jordan elimination without pivoting, stable for a positive definite matrix, whose pivots are then
    all positive (they are the D of L D L'): plain arithmetic, where LAPACK's call alone costs more than the work.
    """
    m = Q.shape[0]
    if m > INLINE:
        Q, R = (jnp.moveaxis(X, (0, 1), (-2, -1)) for X in (Q, R))
        factor = jnp.linalg.cholesky(Q)
        solution = jax.scipy.linalg.cho_solve((factor, True), R)
        return jnp.moveaxis(solution, (-2, -1), (0, 1)), jnp.all(jnp.isfinite(factor), axis=(-2, -1))
    rows = jnp.concatenate([Q, R], axis=1)
    # Of numpy, a constant of the program: XLA would compute it in kernels of their own before the loop.
    index = np.arange(m).reshape(m, *(1,) * (rows.ndim - 1))
    positive = jnp.ones(Q.shape[2:], bool)
    for i in range(m):
        positive = positive & (rows[i, i] > 0)
        pivot_row = rows[i] / rows[i, i]
        rows = jnp.where(index == i, pivot_row, rows - rows[:, i : i + 1] * pivot_row)
    return rows[:, m:], positive
