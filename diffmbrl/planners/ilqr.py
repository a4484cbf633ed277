"""The iterative linear quadratic regulator, and differential dynamic programming."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task, Trajectory, parameter, restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.planners.quadratic_models import FirstOrder, QuadraticModel, SecondOrder
from diffmbrl.planners.regularization import Damping
from diffmbrl.planners.riccati_sweeps import ActionDamped, BoxConstrained, Room
from diffmbrl.planners.search import Backtracking, Trial
from diffmbrl.policies import Affine
from diffmbrl.rollout import returns, rollout
from diffmbrl.second_order.linearize import flat_states
from diffmbrl.second_order.parallel_riccati import choose
from diffmbrl.second_order.riccati import RiccatiSolution

ROUNDING = 8  # of J, in units of its last place


class ILQR(eqx.Module):
    r"""Iterative LQR: a Riccati sweep along the trajectory, then a line search through the closed loop.

    $$a_t = \bar a_t + \alpha k_t + K_t (s_t - \bar s_t),\qquad
    [K_t\;k_t] = -(Q_{aa} + \mu I)^{-1} [Q_{as}\;q_a]$$

    The result is `Affine(K, a, s)`, the nominal trajectory with its time-varying feedback, and never has a lower return than
    the plan given. It plans from one start; use `vmap` or `plans` for many.

    Args:
        armijo: Fraction of the predicted gain that an accepted step must reach.
        damping: Rule for the damping mu: raised when no step length is accepted, lowered after a full step.
        model: Quadratic model along the trajectory: `FirstOrder()`, or `SecondOrder()` for DDP.
        sweep: Backward pass: `ActionDamped()`, `StateDamped()`, or `BoxConstrained()`, which keeps the limits of an
            `Affine.with_limits(task)` plan.
        search: Line search: `Backtracking()` or `Parallel()`.

    Raises:
        TypeError: If the policy is not an `Affine` plan, or a state has leaves that are not float.
        ValueError: If `BoxConstrained` is given a plan without limits.

    Cost: one rollout, its linearisation, a Riccati sweep (several if an action Hessian is not positive definite), and one
        rollout per trial of the line search.
    Reference: Li and Todorov 2004; Tassa, Erez, Todorov 2012, section II.

    >>> import jax
    >>> from diffmbrl import Affine, solve, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> s0 = task.initial(jax.random.key(0))
    >>> plan, history = solve(ILQR(), Affine.zeros(task), task, s0, None, steps=2)
    >>> plan.K.shape
    (20, 1, 2)
    """

    armijo: Float[Array, ""] = parameter(1e-4)
    damping: Damping = eqx.field(default_factory=Damping)
    model: Any = eqx.field(default_factory=FirstOrder)
    sweep: Any = eqx.field(default_factory=ActionDamped)
    search: Any = eqx.field(default_factory=Backtracking)

    @classmethod
    def with_limits(cls, task: Task, **options: Any) -> "ILQR":
        """Make an iLQR with `BoxConstrained()` if the task limits any action, and with the cheaper `ActionDamped()` if not.

        Args:
            task: Task whose limits decide.
            **options: Fields of `ILQR`.

        Returns:
            The solver.
        """
        limited = bool(jnp.any(jnp.isfinite(task.a_low) | jnp.isfinite(task.a_high)))
        if limited:
            options.setdefault("sweep", BoxConstrained())
        return cls(**options)

    @property
    def kind(self) -> str:
        """A solver of plans: it takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """Whether the sweep keeps the action limits; otherwise it plans on `tasks.squashed(task)`."""
        return self.sweep.limits

    def first_plan(self, task: Task) -> Affine:
        """Return the first plan, of resting actions, with limits if the sweep keeps them."""
        return Affine.with_limits(task) if self.sweep.limits else Affine.zeros(task)

    def init(self, policy: Any, task: Task) -> Float[Array, ""]:
        if not isinstance(policy, Affine):
            raise TypeError(f"ILQR improves an Affine plan, such as Affine.zeros(task); got {type(policy).__name__}")
        if self.sweep.limits and policy.low is None:
            name = type(self.sweep).__name__
            raise ValueError(
                f"{name} needs a plan with limits, and this one has none: start from Affine.with_limits(task)"
            )
        return jnp.zeros((), policy.a.dtype)

    on_objective_change = restart

    def shift(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """Return the damping of the next step of a receding horizon: lower, since the state is another."""
        return self.damping.lowered(carry)

    def update(
        self, policy: Affine, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Affine, Array, Info]:
        nominal = rollout(policy, task, s0, key)
        J = returns(nominal, task)
        model = self.model(task, nominal, key)
        room = _room(policy, nominal.a)
        damping, sweep, sweeps = self._sweep(model, carry, room)
        trial = self._search(policy, nominal, J, sweep, task, s0, key)

        lin = model.lin
        adjoint = choose(task.horizon).adjoint
        gradient = adjoint(lin.A, lin.B, jnp.zeros_like(sweep.K), lin.c_s, lin.c_a, lin.c_T)
        norm = jnp.linalg.norm(self.sweep.free(gradient, room))
        accepted = trial.accepted & jnp.isfinite(norm) & sweep.definite
        found = Affine(sweep.K, trial.a, trial.s, policy.low, policy.high)
        plan = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), found, policy)
        adapted = self.damping.after(damping, accepted, trial.tried)
        # The damping does not adapt to a result that is not finite. A predicted gain below the rounding of J cannot be
        # observed, so such a failed step shows only that the sweep was positive definite.
        finite = jnp.isfinite(J) & jnp.isfinite(norm)
        hidden = ~accepted & sweep.definite & (-sweep.slope / 2 <= ROUNDING * jnp.finfo(J.dtype).eps * jnp.abs(J))
        carry = jnp.where(finite, jnp.where(hidden, damping, adapted), carry).astype(carry.dtype)
        T = task.horizon
        info = Info(
            J=J,
            gradient_norm=norm,
            accepted=accepted,
            damping=damping,
            inner_iterations=sweeps + trial.tried,
            nonfinite=trial.nonfinite + (~finite).astype(jnp.int32),
            work=count_evaluations(
                forward=T * (2 + trial.tried), jvp=T * (task.n + task.m), sequential=2 + sweeps + trial.tried
            ),
        )
        return plan, carry, info

    def _sweep(self, model: QuadraticModel, damping: Array, room: Room | None) -> tuple[Array, RiccatiSolution, Array]:
        """Sweep with the exact Hessians if they are positive definite, otherwise with as much damping as needed."""
        lin, exact = model
        if exact is None:
            return self.damping.definite(lambda damping, _: self.sweep(lin, damping, room), damping)

        def sweep(damping, count):
            return self.sweep(lin._replace(H=jnp.where(count == 0, exact, lin.H)), damping, room)

        return self.damping.definite(sweep, damping, plain=1)

    def _search(
        self,
        policy: Affine,
        nominal: Trajectory,
        J: Array,
        sweep: RiccatiSolution,
        task: Task,
        s0: State,
        key: PRNGKeyArray | None,
    ) -> Trial:
        states, _ = flat_states(nominal.s)
        zero, one = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)

        def attempt(alpha: Array) -> Trial:
            plan = Affine(sweep.K, nominal.a + alpha * sweep.k, states, policy.low, policy.high)
            trajectory = rollout(plan, task, s0, key)
            reached = returns(trajectory, task)
            # slope < 0 is the predicted change of the cost for a small step.
            enough = reached - J >= -self.armijo.astype(J.dtype) * alpha * sweep.slope
            finite = jnp.isfinite(reached)
            accepted = finite & enough & (reached >= J)
            nonfinite = (~finite).astype(jnp.int32)
            return Trial(alpha, one, accepted, nonfinite, reached, flat_states(trajectory.s)[0], trajectory.a)

        return self.search(attempt, Trial(jnp.ones((), J.dtype), zero, jnp.array(False), zero, J, states, nominal.a))


def DDP(**options: Any) -> ILQR:
    """Make a differential dynamic programming solver: `ILQR` with the Hessians of the dynamics, `model=SecondOrder()`.

    Args:
        **options: Fields of `ILQR` other than `model`.

    Returns:
        The solver.

    >>> type(DDP().model).__name__
    'SecondOrder'
    """
    return ILQR(model=SecondOrder(), **options)


def _room(policy: Affine, a: Float[Array, "T m"]) -> Room | None:
    """Distances from each action of the plan to its lower and upper limit."""
    if policy.low is None or policy.high is None:
        return None
    return jnp.asarray(policy.low, a.dtype) - a, jnp.asarray(policy.high, a.dtype) - a
