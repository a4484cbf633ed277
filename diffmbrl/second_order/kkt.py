r"""The LQR problem along a trajectory with gaps in its dynamics: a Newton step on states, actions and costates together.

$$\min \sum_t \tfrac12 z_t^\top (H_t + \mu I_a) z_t + c_t^\top z_t,\qquad
ds_{t+1} = A_t\,ds_t + B_t\,da_t + d_{t+1},\quad ds_0 = d_0$$

with z = (ds, da). The gains and pivots do not depend on the gaps, so the sweep of `riccati` is the factorisation of this KKT
system, and a right-hand side costs three linear passes: the closed loop's response to the gaps, an adjoint, a response.
Multiple shooting closes its gaps with it. The implicit derivative of a plan is the same step with the derivatives of the
problem in the place of c and d.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.parallel_riccati import SCAN, Sweeps
from diffmbrl.second_order.riccati import RiccatiSolution
from diffmbrl.second_order.small_matrices import eliminate, matvec


class KKTStep(NamedTuple):
    """The minimiser, also as a feedback law da = K ds + k.

    Args:
        s: Changes of the states s_0 .. s_{T-1}.
        a: Changes of the actions.
        s_T: Change of the last state.
        k: Changes of the actions without feedback.
    """

    s: Float[Array, "T n"]
    a: Float[Array, "T m"]
    s_T: Float[Array, " n"]
    k: Float[Array, "T m"]


def solve_with_gaps(
    lin: Linearization,
    sweep: RiccatiSolution,
    gaps: Float[Array, "T1 n"],
    *,
    damping: Float[Array, ""] | float = 0.0,
    sweeps: Sweeps = SCAN,
) -> KKTStep:
    """Solve the LQR problem with gaps from the factorisation of a Riccati sweep.

    The step is linear in c and d, and JAX differentiates it as such.

    Args:
        lin: Derivatives along the trajectory, with the linear terms c.
        sweep: Result of `riccati`, of which the gains and pivots are used.
        gaps: Gaps d_0 .. d_T of the dynamics.
        damping: Damping with which `sweep` was computed.
        sweeps: The recursions, by a scan or in parallel over time.

    Returns:
        The step.

    Cost: Three linear passes over the horizon.

    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> from diffmbrl.second_order import linearize, riccati
    >>> task = tasks.lqr(horizon=5)
    >>> lin = linearize(task, rollout(OpenLoop.zeros(task), task, task.initial(jax.random.key(0))))
    >>> solve_with_gaps(lin, riccati(lin, jnp.zeros(())), jnp.zeros((6, 2))).a.shape
    (5, 1)
    """
    A, B, c_s, c_a, H, c_T, H_T = lin
    n = A.shape[1]
    # The closed loop's response to the gaps; the rest of the step starts at 0 and has none. In open loop an unstable system
    # would blow the gaps up and cancel them again.
    moved, moved_a, moved_T = _drift(A, B, sweep.K, gaps)
    # For all steps at once a product of matrices is one kernel; written out as arithmetic it took six times as long.
    Hz = jnp.einsum("tij,tj->ti", H, jnp.concatenate([moved, moved_a], axis=1), precision="highest")
    q_a = sweeps.adjoint(
        A, B, sweep.K, c_s + Hz[:, :n], c_a + Hz[:, n:] + damping * moved_a, c_T + matvec(H_T, moved_T)
    )
    # Elimination mixes Q and its right-hand side: only with the inverse does JAX see that k is linear in q.
    eye = jnp.eye(B.shape[2], dtype=A.dtype)
    k = -jax.vmap(lambda Q, q: matvec(eliminate(Q, eye)[0], q))(sweep.Q_aa, q_a)
    s, a, s_T = sweeps.respond(A, B, sweep.K, k)
    return KKTStep(moved + s, moved_a + a, moved_T + s_T, k)


def _drift(A: Array, B: Array, K: Array, gaps: Array) -> tuple[Array, Array, Array]:
    """The closed loop's response to d_0 .. d_T: states [T, n], actions [T, m] and the last state."""

    def step(s, x):
        A, B, K, d = x
        a = matvec(K, s)
        return matvec(A, s) + matvec(B, a) + d, (s, a)

    s_T, (s, a) = jax.lax.scan(step, gaps[0], (A, B, K, gaps[1:]))
    return s, a, s_T
