r"""Backward passes of iLQR: kinds of damping, with or without limits on the actions.

A sweep takes a linearisation, the damping $\mu$ and the room $(l_t, h_t)$ left to each action, and returns a
`RiccatiSolution`. `free` turns a gradient in the actions into the residual of the optimality conditions.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.parallel_riccati import Sweeps, choose
from diffmbrl.second_order.riccati import RiccatiSolution
from diffmbrl.second_order.small_matrices import eliminate, matmul, matvec, transpose

Room = tuple[Float[Array, "T m"], Float[Array, "T m"]]  # low - a and high - a of a plan's limits


class ActionDamped(eqx.Module):
    r"""Riccati sweep that penalises changes of actions (Levenberg-Marquardt): $-(M + \mu I)^{-1} g$. It knows no action limits.

    Args:
        recursion: `parallel_riccati.SCAN` or `PARALLEL`; None to choose by horizon and device.
    """

    recursion: Sweeps | None = eqx.field(static=True, default=None)
    limits: ClassVar[bool] = False

    def __call__(self, lin: Linearization, damping: Float[Array, ""], room: Room | None) -> RiccatiSolution:
        return _riccati(self.recursion, lin, damping)

    def free(self, gradient: Float[Array, "T m"], room: Room | None) -> Float[Array, "T m"]:
        return gradient


class StateDamped(eqx.Module):
    r"""Riccati sweep that penalises changes of states, to stay near the old trajectory: $-(M + \mu L_s^\top L_s)^{-1} g$.

    The penalty bounds large effects whatever the scale of the actions. Unlike Tassa's, V contains the penalty, so all gains
    minimise the same quadratic. It knows no action limits.

    Args:
        recursion: `parallel_riccati.SCAN` or `PARALLEL`; None to choose by horizon and device.

    Reference: Tassa, Erez, Todorov 2012, equation 10.
    """

    recursion: Sweeps | None = eqx.field(static=True, default=None)
    limits: ClassVar[bool] = False

    def __call__(self, lin: Linearization, damping: Float[Array, ""], room: Room | None) -> RiccatiSolution:
        F = jnp.concatenate([lin.A, lin.B], axis=2)
        H = lin.H + damping * jax.vmap(lambda F: matmul(transpose(F), F))(F)
        return _riccati(self.recursion, lin._replace(H=H), jnp.zeros_like(damping))

    def free(self, gradient: Float[Array, "T m"], room: Room | None) -> Float[Array, "T m"]:
        return gradient


class BoxConstrained(eqx.Module):
    r"""Riccati sweep with action limits: each time step solves a quadratic program by Newton's method projected onto the box.

    $$k_t = \arg\min_{l_t \le k \le h_t} \tfrac12 k^\top (Q_{aa} + \mu I) k + q_a^\top k$$

    An action at an active limit gets no feedback; the others get that of the problem without it. The sweep is
    sequential in time, since the active limits of a step are known only once the later steps are solved.

    Args:
        iterations: Largest number of projected Newton steps per time step; m steps mostly suffice.
        halvings: Largest number of halvings of such a step.

    Reference: Tassa, Mansard, Todorov 2014, section III; Bertsekas 1982.
    """

    iterations: int = eqx.field(static=True, default=20)
    halvings: int = eqx.field(static=True, default=10)
    limits: ClassVar[bool] = True

    def __call__(self, lin: Linearization, damping: Float[Array, ""], room: Room | None) -> RiccatiSolution:
        A, B, c_s, c_a, H, c_T, H_T = lin
        n, m = B.shape[1:]
        eye = jnp.eye(m, dtype=A.dtype)

        def step(carry, x):
            V, v, slope, definite = carry
            F, c_s, c_a, H, low, high = x
            FT = transpose(F)
            Q, q = H + matmul(FT, matmul(V, F)), jnp.concatenate([c_s, c_a]) + matvec(FT, v)
            Q_sa, Q_aa, q_a = Q[:n, n:], Q[n:, n:] + damping * eye, q[n:]
            k, clamped, positive = self.minimise(Q_aa, q_a, low, high)
            K, _ = _solve_free(Q_aa, -transpose(Q_sa), clamped)
            KT = transpose(K)
            V = Q[:n, :n] + matmul(KT, matmul(Q_aa, K)) + matmul(Q_sa, K) + matmul(KT, transpose(Q_sa))
            v = q[:n] + matvec(KT, matvec(Q_aa, k) + q_a) + matvec(Q_sa, k)
            carry = ((V + transpose(V)) / 2, v, slope + jnp.sum(k * q_a), definite & positive)
            return carry, (K, k, Q_aa)

        start = (H_T, c_T, jnp.zeros((), A.dtype), jnp.array(True))
        xs = (jnp.concatenate([A, B], axis=2), c_s, c_a, H, *_given(room))
        (_, _, slope, definite), (K, k, Q_aa) = jax.lax.scan(step, start, xs, reverse=True)
        return RiccatiSolution(K, k, slope, definite, Q_aa)

    def minimise(
        self, Q: Float[Array, "m m"], q: Float[Array, " m"], low: Float[Array, " m"], high: Float[Array, " m"]
    ) -> tuple[Float[Array, " m"], Bool[Array, " m"], Bool[Array, ""]]:
        """Return the minimum in the box, which of its limits are active, and whether Q is positive definite."""

        def value(k):
            return jnp.sum(k * (matvec(Q, k) / 2 + q))

        def active(k, gradient):
            return ((k <= low) & (gradient > 0)) | ((k >= high) & (gradient < 0))

        def going(state):
            *_, i, moved = state
            # If Q is not positive definite there is no minimum, and the sweep is invalid.
            return moved & positive & (i < self.iterations)

        def newton(state):
            k, i, _ = state
            gradient = matvec(Q, k) + q
            clamped = active(k, gradient)
            free = jnp.where(clamped, 0.0, gradient).astype(q.dtype)
            direction, _ = _solve_free(Q, -free[:, None], clamped)

            # The body decides once whether to continue. If the loop's test computed the condition again, with different
            # rounding, the loop could run forever under `vmap`, for a replica that never moves.
            def halve(search):
                length, j, _ = search
                length, j = length / 2, j + 1
                trial = jnp.clip(k + length * direction[:, 0], low, high)
                too_long = value(trial) > value(k) + 0.1 * jnp.sum(free * (trial - k))
                return length, j, too_long & (j < self.halvings)

            before = (jnp.full((), 2, q.dtype), jnp.full((), -1, jnp.int32), jnp.array(True))
            length, j, _ = jax.lax.while_loop(lambda search: search[2], halve, before)
            trial = jnp.clip(k + length * direction[:, 0], low, high)
            better = (j < self.halvings) & jnp.any(trial != k)
            # A full step inside the box is exact if the same limits stay active; another would only chase rounding.
            whole = (j == 0) & jnp.all(trial == k + direction[:, 0])
            settled = whole & jnp.all(active(trial, matvec(Q, trial) + q) == clamped)
            return jnp.where(better, trial, k), i + 1, better & ~settled

        _, positive = eliminate(Q, q[:, None])
        start = (jnp.clip(jnp.zeros_like(q), low, high), jnp.zeros((), jnp.int32), jnp.array(True))
        k, *_ = jax.lax.while_loop(going, newton, start)
        return k, active(k, matvec(Q, k) + q), positive

    def free(self, gradient: Float[Array, "T m"], room: Room | None) -> Float[Array, "T m"]:
        """Return the gradient without the parts that push against an active limit: zero exactly if complementarity holds."""
        low, high = _given(room)
        pushing = ((low >= 0) & (gradient > 0)) | ((high <= 0) & (gradient < 0))
        return jnp.where(pushing, jnp.zeros_like(gradient), gradient)


def _riccati(recursion: Sweeps | None, lin: Linearization, damping: Float[Array, ""]) -> RiccatiSolution:
    return (choose(lin.A.shape[0]) if recursion is None else recursion).riccati(lin, damping)


def _solve_free(Q: Float[Array, "m m"], R: Float[Array, "m k"], clamped: Bool[Array, " m"]) -> tuple[Array, Array]:
    """Return Q^-1 R in the free coordinates alone, and zero in the others."""
    free = ~clamped
    eye = jnp.eye(Q.shape[0], dtype=Q.dtype)
    masked = jnp.where(free[:, None] & free[None, :], Q, eye)
    return eliminate(masked, jnp.where(free[:, None], R, jnp.zeros_like(R)))


def _given(room: Room | None) -> Room:
    if room is None:
        raise ValueError(
            "BoxConstrained needs a plan with limits, and this one has none: start from Affine.with_limits(task)"
        )
    return room
