"""The iterative linear quadratic regulator."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import Info, State, Task, Trajectory, as_float, count_work
from diffmbrl.linearize import Linearization, Sweep, adjoint, flat_states, linearize, riccati
from diffmbrl.policies import Affine
from diffmbrl.rollout import returns, rollout


class _Trial(NamedTuple):
    """A state of the line search: the last plan tried and what it earned."""

    alpha: Float[Array, ""]
    tried: Int[Array, ""]
    accepted: Bool[Array, ""]
    nonfinite: Int[Array, ""]
    J: Float[Array, ""]
    s: Float[Array, "T n"]
    a: Float[Array, "T m"]


class ILQR(eqx.Module):
    r"""Iterative LQR: a Riccati sweep along the trajectory, then a line search through the closed loop.

    $$a_t = \bar a_t + \alpha k_t + K_t (s_t - \bar s_t),\qquad
    [K_t\;k_t] = -(Q_{aa} + \mu I)^{-1} [Q_{as}\;q_a]$$

    The plan returned is `Affine(K, a, s)`: the nominal trajectory and its time-varying feedback. The first step length of
    1, 1/2, 1/4 ... that earns at least `armijo` of the predicted gain is taken; if none does, the plan stays and the damping
    mu grows. A plan is never made worse. Action limits are not enforced: plan on `tasks.squashed(task)`.

    Shapes: `s0` of one start; the plan's leaves [T, ...]; `vmap` for many. Cost: one rollout, its linearisation, a Riccati
    sweep (or several, when an action Hessian is not positive definite), one rollout for each trial.
    Raises: `TypeError` if the policy is not an `Affine` plan or a state has leaves that are not float.
    Reference: Li and Todorov 2004; Tassa, Erez, Todorov 2012, section II.

    >>> import jax
    >>> from diffmbrl import Affine, solve, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> s0 = task.initial(jax.random.key(0))
    >>> plan, history = solve(ILQR(), Affine.zeros(task), task, s0, None, steps=2)
    >>> plan.K.shape
    (20, 1, 2)
    """

    smallest: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-8), converter=as_float)
    factor: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(4.0), converter=as_float)
    armijo: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-4), converter=as_float)
    trials: int = eqx.field(static=True, default=10)

    @property
    def kind(self) -> str:
        """It takes one start."""
        return "plan"

    def init(self, policy: Any, task: Task) -> Float[Array, ""]:
        if not isinstance(policy, Affine):
            raise TypeError(f"ILQR improves an Affine plan, such as Affine.zeros(task); got {type(policy).__name__}")
        return jnp.zeros((), policy.a.dtype)

    def update(
        self, policy: Affine, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Affine, Array, Info]:
        nominal = rollout(policy, task, s0, key)
        J = returns(nominal, task)
        lin = linearize(task, nominal, key)
        damping, sweep, sweeps = self._sweep(lin, carry)
        trial = self._search(nominal, J, sweep, task, s0, key)

        gradient = adjoint(lin.A, lin.B, jnp.zeros_like(sweep.K), lin.c_s, lin.c_a, lin.c_T)
        norm = jnp.linalg.norm(gradient)
        accepted = trial.accepted & jnp.isfinite(norm) & sweep.definite
        plan = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), Affine(sweep.K, trial.a, trial.s), policy)
        # A full step lowers the damping, a failed search raises it; below `smallest` it is nothing.
        lower = jnp.where(damping / self.factor < self.smallest, 0.0, damping / self.factor)
        raised = jnp.maximum(damping * self.factor**2, self.smallest * self.factor**4)
        adapted = jnp.where(accepted, jnp.where(trial.tried <= 2, lower, damping), raised)
        # What is not finite says nothing of the damping.
        finite = jnp.isfinite(J) & jnp.isfinite(norm)
        carry = jnp.where(finite, adapted, carry).astype(carry.dtype)
        T = task.horizon
        info = Info(
            J=J,
            gradient_norm=norm,
            accepted=accepted,
            damping=damping,
            inner_iterations=sweeps + trial.tried,
            nonfinite=trial.nonfinite + (~finite).astype(jnp.int32),
            work=count_work(
                forward=T * (2 + trial.tried), jvp=T * (task.n + task.m), sequential=2 + sweeps + trial.tried
            ),
        )
        return plan, carry, info

    def _sweep(self, lin: Linearization, damping: Array) -> tuple[Array, Sweep, Array]:
        """A Riccati sweep whose action Hessians are positive definite, with as much damping as that takes."""

        def again(state):
            _, sweep, count = state
            return ~sweep.definite & (count < 20)

        def raise_damping(state):
            damping, _, count = state
            damping = jnp.maximum(damping * self.factor**2, self.smallest * self.factor**4).astype(damping.dtype)
            return damping, riccati(lin, damping), count + 1

        return jax.lax.while_loop(again, raise_damping, (damping, riccati(lin, damping), jnp.ones((), jnp.int32)))

    def _search(self, nominal: Trajectory, J: Array, sweep: Sweep, task: Task, s0: State, key: Any) -> _Trial:
        """Step lengths one after another: on a CPU cheaper than all at once, since the first mostly holds."""
        states, _ = flat_states(nominal.s)

        def attempt(trial: _Trial) -> _Trial:
            alpha = jnp.where(trial.tried == 0, 1.0, trial.alpha / 2).astype(J.dtype)
            trajectory = rollout(Affine(sweep.K, nominal.a + alpha * sweep.k, states), task, s0, key)
            reached = returns(trajectory, task)
            # slope < 0 is the predicted change of the cost for a small step.
            enough = reached - J >= -self.armijo.astype(J.dtype) * alpha * sweep.slope
            finite = jnp.isfinite(reached)
            nonfinite = trial.nonfinite + (~finite).astype(jnp.int32)
            return _Trial(
                alpha,
                trial.tried + 1,
                finite & enough & (reached >= J),
                nonfinite,
                reached,
                flat_states(trajectory.s)[0],
                trajectory.a,
            )

        zero = jnp.zeros((), jnp.int32)
        start = _Trial(jnp.ones((), J.dtype), zero, jnp.array(False), zero, J, states, nominal.a)
        return jax.lax.while_loop(lambda trial: ~trial.accepted & (trial.tried < self.trials), attempt, start)
