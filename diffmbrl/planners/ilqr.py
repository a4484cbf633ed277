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

    The plan returned is `Affine(K, a, s)`: the nominal trajectory and its time-varying feedback. A step length that earns at
    least `armijo` of the predicted gain is taken; if none does, the plan stays and the damping mu grows, by `factor` squared,
    up to `largest`. A full step divides mu by `factor`; below `smallest` it is nothing. A plan is never made worse.

    It is put together from
    * `model`: `FirstOrder()`, or `SecondOrder()`, which is DDP: the dynamics' Hessians where the sweep is positive definite
      with them (`DDP()` makes one);
    * `sweep`: `ActionDamped()`, `StateDamped()`, or `BoxConstrained()`, which keeps the limits of the plan it is given, an
      `Affine.with_limits(task)` (`ILQR.with_limits(task)` makes one where the task has limits); the others know of no
      limits, and run parallel in time where that pays (`choose`), or as their `recursion` says;
    * `search`: `Backtracking()` or `Parallel()`.

    Shapes: `s0` of one start; the plan's leaves [T, ...]; `vmap` for many, or `plans`. Cost: one rollout, its linearisation, a
    Riccati sweep (or several, when an action Hessian is not positive definite), one rollout for each trial.
    Raises: `TypeError` if the policy is not an `Affine` plan or a state has leaves that are not float; `ValueError` if
    `BoxConstrained` is given a plan without limits.
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
        """With `BoxConstrained()` if the task limits any action, and without, which is cheaper, if not."""
        limited = bool(jnp.any(jnp.isfinite(task.a_low) | jnp.isfinite(task.a_high)))
        if limited:
            options.setdefault("sweep", BoxConstrained())
        return cls(**options)

    @property
    def kind(self) -> str:
        """It takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """Whether its sweep does; otherwise it plans on `tasks.squashed(task)`."""
        return self.sweep.limits

    def first_plan(self, task: Task) -> Affine:
        """The plan of resting actions that it starts from, with limits if it keeps them."""
        return Affine.with_limits(task) if self.sweep.limits else Affine.zeros(task)

    def init(self, policy: Any, task: Task) -> Float[Array, ""]:
        if not isinstance(policy, Affine):
            raise TypeError(f"ILQR improves an Affine plan, such as Affine.zeros(task); got {type(policy).__name__}")
        if self.sweep.limits and policy.low is None:
            name = type(self.sweep).__name__
            raise ValueError(
                f"{name} keeps the limits of its plan, and this one has none: start from Affine.with_limits(task)"
            )
        return jnp.zeros((), policy.a.dtype)

    on_objective_change = restart

    def shift(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The damping for the next step of a receding horizon: lower, since it is of another state."""
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
        # What is not finite says nothing of the damping. A step that fails to gain what J's rounding would hide says nothing
        # but that its sweep was definite.
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
        """A sweep whose action Hessians are positive definite: with the exact ones if they are, else as damped as it takes."""
        lin, exact = model
        if exact is None:
            return self.damping.definite(lambda damping, _: self.sweep(lin, damping, room), damping)

        def sweep(damping, count):
            return self.sweep(lin._replace(H=jnp.where(count == 0, exact, lin.H)), damping, room)

        return self.damping.definite(sweep, damping, plain=1)

    def _search(
        self, policy: Affine, nominal: Trajectory, J: Array, sweep: RiccatiSolution, task: Task, s0: State, key: Any
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
    """Differential dynamic programming: `ILQR` with the Hessians of the dynamics, `model=SecondOrder()`.

    >>> type(DDP().model).__name__
    'SecondOrder'
    """
    return ILQR(model=SecondOrder(), **options)


def _room(policy: Affine, a: Float[Array, "T m"]) -> Room | None:
    """What the limits of the plan leave to each of its actions."""
    if policy.low is None or policy.high is None:
        return None
    return jnp.asarray(policy.low, a.dtype) - a, jnp.asarray(policy.high, a.dtype) - a
