"""Multiple shooting with states as variables: closes the gaps between steps and meets constraints."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import State, Task, Trajectory, parameter, restart, where
from diffmbrl.info import Info, count_evaluations
from diffmbrl.planners import augmented_lagrangian as constraint
from diffmbrl.planners.augmented_lagrangian import Each
from diffmbrl.planners.regularization import Damping
from diffmbrl.planners.search import Backtracking
from diffmbrl.policies import Affine
from diffmbrl.rollout import returns, rollout, step_keys, transition
from diffmbrl.second_order.kkt import KKTStep, solve_with_gaps
from diffmbrl.second_order.linearize import Linearization, linearize
from diffmbrl.second_order.parallel_riccati import choose
from diffmbrl.second_order.riccati import RiccatiSolution


class ShootingCarry(NamedTuple):
    """Damping, merit and multipliers, carried from one update to the next.

    Args:
        damping: Damping mu of the Riccati sweep.
        weight: Weight nu of the gaps in the merit.
        penalty: Penalty rho of the augmented Lagrangian.
        tolerance: Relative gain below which multipliers and penalty are updated.
        unmet: Largest residual of a constraint at their last update.
        multipliers: Multipliers of the constraints.
    """

    damping: Float[Array, ""]
    weight: Float[Array, ""]
    penalty: Float[Array, ""]
    tolerance: Float[Array, ""]
    unmet: Float[Array, ""]
    multipliers: Each


class _Trial(NamedTuple):
    """A state of the line search: the last trajectory tried and its merit."""

    alpha: Float[Array, ""]
    tried: Int[Array, ""]
    accepted: Bool[Array, ""]
    nonfinite: Int[Array, ""]
    merit: Float[Array, ""]
    trajectory: Trajectory
    s: Float[Array, "T n"]


class MultipleShooting(eqx.Module):
    r"""Multiple shooting: gap-closing DDP with an augmented Lagrangian for constraints.

    The plan's `s` and `a` are the variables. The gaps $d_{t+1} = f(s_t, a_t) - s_{t+1}$, $d_0$ that of the start, enter the
    Riccati sweep as affine terms, and a step of length alpha leaves the fraction 1 - alpha of each:

    $$s_0' = s_0^{\rm given} - (1-\alpha)d_0,\quad a_t' = a_t + \alpha k_t + K_t(s_t' - s_t),\quad
    s_{t+1}' = f(s_t', a_t') - (1-\alpha)d_{t+1}$$

    alpha is the first of 1, 1/2, 1/4 ... that raises the merit $J - AL - \nu\sum|d|$ enough, with nu large enough to make the
    step a direction of ascent. The first plan may have states that the dynamics do not follow: `Affine(K, a, s)` with K
    = 0. After a full step no gap is left; without constraints such a plan never gets worse.

    The augmented Lagrangian covers the task's `constraints` and the finite limits of its actions. If constraints cannot be met,
    `Info.violation` is the largest violation on the way. `Info.J` is the return of following the plan from the start,
    `Info.merit` the merit of the plan's own states and actions, and `Info.gradient_norm` the norm of the KKT residual:
    the Lagrangian's gradient in the actions, the gaps, and h and min(-g, multiplier) of the constraints.

    Args:
        armijo: Fraction of the predicted gain of the merit that an accepted step must reach.
        penalty: First penalty rho of the augmented Lagrangian.
        growth: Factor by which the penalty grows when a constraint's residual has not fallen by four.
        largest: Largest penalty; its square bounds the multipliers.
        tolerance: First relative gain below which multipliers and penalty are updated; each update divides it by
            ten.
        damping: Rule for the damping of the Riccati sweep.
        trials: Largest number of step lengths of a line search.

    Raises:
        TypeError: If the policy is not an `Affine` plan.
        ValueError: If the task's episodes can end.

    Cost: that of iLQR and three linear passes.
    Reference: Mastalli et al. 2020 (Crocoddyl), section III; Nocedal and Wright 2006, section 18.3 for nu and 17.4 for
        the multipliers; Howell, Jackson, Manchester 2019.

    >>> from diffmbrl import solve, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> s0 = task.initial(jax.random.key(0))
    >>> plan, history = solve(MultipleShooting(), Affine.zeros(task), task, s0, None, steps=2)
    >>> bool(history.info.accepted[0]), plan.K.shape
    (True, (20, 1, 2))
    """

    armijo: Float[Array, ""] = parameter(1e-4)
    penalty: Float[Array, ""] = parameter(10.0)
    growth: Float[Array, ""] = parameter(5.0)
    largest: Float[Array, ""] = parameter(1e3)
    tolerance: Float[Array, ""] = parameter(1e-2)
    damping: Damping = eqx.field(default_factory=Damping)
    trials: int = eqx.field(static=True, default=10)

    @property
    def kind(self) -> str:
        """A solver of plans: it takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """Never: it plans on `tasks.squashed(task)`."""
        return False

    def first_plan(self, task: Task) -> Affine:
        """Return the first plan, of resting actions and without feedback."""
        return Affine.zeros(task)

    def init(self, policy: Any, task: Task) -> ShootingCarry:
        if not isinstance(policy, Affine):
            got = type(policy).__name__
            raise TypeError(f"MultipleShooting improves an Affine plan, such as Affine.zeros(task); got {got}")
        if task.done is not None:
            raise ValueError(
                f"episodes of task '{task.name}' can end (task.done); MultipleShooting plans to the horizon"
            )
        dtype = policy.a.dtype
        zero = jnp.zeros((), dtype)
        s0 = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), task.state_shape)
        return ShootingCarry(
            damping=zero,
            weight=zero,
            penalty=self.penalty.astype(dtype),
            tolerance=self.tolerance.astype(dtype),
            unmet=jnp.full((), jnp.inf, dtype),
            multipliers=constraint.none(task, s0, dtype),
        )

    on_objective_change = restart

    def shift(self, carry: ShootingCarry) -> ShootingCarry:
        """Return the same carry: multipliers, penalty and damping belong to the problem, not to a time step."""
        return carry

    def update(
        self, policy: Affine, carry: ShootingCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Affine, ShootingCarry, Info]:
        followed = rollout(policy, task, s0, key)
        J = returns(followed, task)
        nodes, gaps = _nodes(policy, task, s0, key)
        values = constraint.constraint_values(task, nodes)
        forces = constraint.estimates(values, carry.multipliers, carry.penalty)
        lin, first = constraint.with_constraints(linearize(task, nodes, key), task, nodes, forces, carry.penalty)
        sweeps = choose(task.horizon)
        damping, sweep, count = self.damping.definite(lambda damping, _: sweeps.riccati(lin, damping), carry.damping)
        step = solve_with_gaps(lin, sweep, gaps, damping=damping, sweeps=sweeps)

        total = jnp.sum(jnp.abs(gaps))
        slope, curvature = _model(lin, step)
        # Nocedal and Wright (18.36), with their rho at 1/2.
        needed = jnp.where(total > 0, (slope + curvature / 2) / jnp.where(total > 0, total / 2, 1.0), 0.0)
        weight = jnp.maximum(carry.weight, needed.astype(J.dtype))
        descent = slope - weight * total
        merit = returns(nodes, task) - constraint.cost(values, carry.multipliers, carry.penalty) - weight * total

        def worth(trajectory: Trajectory, share: Array) -> Array:
            added = constraint.cost(constraint.constraint_values(task, trajectory), carry.multipliers, carry.penalty)
            return returns(trajectory, task) - added - weight * share * total

        # With active constraints J itself may fall, and the rounding of a merit with a large penalty would end the search
        # long before the KKT residual is small.
        pressed = jnp.any(jnp.concatenate([y.ravel() != 0 for y in jax.tree.leaves(forces)]))
        slack = jnp.where(pressed, 10 * jnp.finfo(J.dtype).eps * (1 + jnp.abs(merit)), 0.0).astype(J.dtype)
        trial = self._search(policy, nodes, gaps, sweep, step, (merit, descent, slack, worth), task, s0, key)
        zero_gain = jnp.zeros_like(sweep.K)
        gradient = sweeps.adjoint(first.A, first.B, zero_gain, first.c_s, first.c_a, first.c_T)
        unmet = jax.tree.leaves(constraint.residual(values, forces))
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in [gradient, gaps, *unmet]))
        finite = jnp.isfinite(J) & jnp.isfinite(norm) & jnp.isfinite(merit)
        accepted = trial.accepted & finite & sweep.definite
        # Gains are valid near the plan's states. While gaps are open the rollout is elsewhere, and feedback may diverge.
        gains = jnp.where((total > 0) & (trial.alpha < 1), jnp.zeros_like(sweep.K), sweep.K)
        plan = where(accepted, Affine(gains, trial.trajectory.a, trial.s, policy.low, policy.high), policy)

        adapted = self.damping.after(damping, accepted, trial.tried)
        reached = where(accepted, trial.trajectory, nodes)
        progress = carry._replace(damping=adapted.astype(J.dtype), weight=weight)
        least = jnp.maximum(carry.tolerance, 10 * jnp.finfo(J.dtype).eps) * (1 + jnp.abs(merit))
        slight = (-descent / 2 <= least) | (accepted & (trial.merit - merit <= least))
        progress = where(slight, self._renewed(progress, constraint.constraint_values(task, reached)), progress)
        carry = where(finite, progress, carry)  # ignore a result that is not finite
        T = task.horizon
        info = Info(
            J=J,
            gradient_norm=norm,
            accepted=accepted,
            damping=damping,
            inner_iterations=count + trial.tried,
            nonfinite=trial.nonfinite + (~finite).astype(jnp.int32),
            work=count_evaluations(
                forward=T * (2 + trial.tried), jvp=T * (task.n + task.m), sequential=5 + count + trial.tried
            ),
            violation=constraint.largest_violation(constraint.constraint_values(task, followed)),
            merit=merit,
        )
        return plan, carry, info

    def _search(
        self, policy: Affine, nodes: Trajectory, gaps: Array, sweep: RiccatiSolution, step: KKTStep, model: Any, task: Task,
        s0: State, key: PRNGKeyArray | None,
    ) -> _Trial:  # fmt: skip
        merit, descent, slack, worth = model
        zero, one = jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)

        def attempt(alpha: Array) -> _Trial:
            plan = Affine(sweep.K, policy.a + alpha * step.k, policy.s, policy.low, policy.high)
            trajectory, s = _shoot(plan, (1 - alpha) * gaps, task, s0, key)
            reached = worth(trajectory, 1 - alpha)
            finite = jnp.isfinite(reached)
            enough = reached - merit >= -self.armijo.astype(merit.dtype) * alpha * descent - slack
            accepted = finite & enough & (reached >= merit - slack)
            return _Trial(alpha, one, accepted, (~finite).astype(jnp.int32), reached, trajectory, s)

        start = _Trial(jnp.ones((), merit.dtype), zero, jnp.array(False), zero, merit, nodes, policy.s)
        return Backtracking(self.trials)(attempt, start)

    def _renewed(self, carry: ShootingCarry, values: Each) -> ShootingCarry:
        """Update the multipliers, and raise the penalty if the residual of the constraints has not fallen by four."""
        forces = constraint.estimates(values, carry.multipliers, carry.penalty)
        largest = self.largest.astype(carry.penalty.dtype)
        moved = jax.tree.map(lambda new, old: (new - old) / carry.penalty, forces, carry.multipliers)
        unmet = jnp.max(jnp.concatenate([jnp.abs(x).ravel() for x in jax.tree.leaves(moved)]), initial=0.0)
        penalty = jnp.where(unmet > carry.unmet / 4, jnp.minimum(carry.penalty * self.growth, largest), carry.penalty)
        renewed = carry._replace(
            penalty=penalty.astype(carry.penalty.dtype),
            tolerance=(carry.tolerance / 10).astype(carry.tolerance.dtype),
            unmet=unmet,
            multipliers=constraint.bounded(forces, largest**2),
        )
        # Constraints met to rounding need no update, which would raise the penalty further and let the multipliers drift.
        return where(unmet > jnp.finfo(unmet.dtype).eps ** 0.75, renewed, carry)


def _nodes(policy: Affine, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Trajectory, Float[Array, "T1 n"]]:
    """Return the plan's own states and actions as a trajectory, and its gaps d_0 .. d_T; d_T is 0, as s_T is no variable."""
    given, unravel = ravel_pytree(s0)

    def step(s, a, t):
        r, after = transition(task, unravel(s), a, step_keys(key, t)[1])
        return ravel_pytree(after)[0], r

    after, r = jax.vmap(step)(policy.s, policy.a, jnp.arange(task.horizon))
    before = jnp.concatenate([given[None], after[:-1]])
    gaps = before - policy.s
    # Rounding is no gap: the trial that closed it was a scan, which XLA may compile to other arithmetic.
    small = 16 * jnp.finfo(gaps.dtype).eps * (1 + jnp.abs(before))
    gaps = jnp.where(jnp.abs(gaps) <= small, jnp.zeros_like(gaps), gaps)
    alive = jnp.ones(task.horizon + 1, bool)
    nodes = Trajectory(jax.vmap(unravel)(policy.s), policy.a, r, alive, unravel(after[-1]))
    return nodes, jnp.concatenate([gaps, jnp.zeros_like(gaps[:1])])


def _shoot(
    plan: Affine, left: Float[Array, "T1 n"], task: Task, s0: State, key: PRNGKeyArray | None
) -> tuple[Trajectory, Array]:
    """Roll out the closed loop with the given gaps between its steps; return the trajectory and its flat states."""
    given, unravel = ravel_pytree(s0)

    def step(x, inputs):
        plan_t, gap, t = inputs
        s, a = unravel(x), plan_t(x)
        r, after = transition(task, s, a, step_keys(key, t)[1])
        return ravel_pytree(after)[0] - gap, (x, a, r)

    times = jnp.arange(task.horizon)
    last, (x, a, r) = jax.lax.scan(step, given - left[0], (plan, left[1:], times))
    return Trajectory(jax.vmap(unravel)(x), a, r, jnp.ones(task.horizon + 1, bool), unravel(last)), x


def _model(lin: Linearization, step: KKTStep) -> tuple[Array, Array]:
    """Return c' z and z' H z of the cost, constraints included, along the full step."""
    z = jnp.concatenate([step.s, step.a], axis=1)
    c = jnp.concatenate([lin.c_s, lin.c_a], axis=1)
    Hz = jnp.einsum("tij,tj->ti", lin.H, z, precision="highest")
    slope = jnp.sum(c * z) + jnp.sum(lin.c_T * step.s_T)
    return slope, jnp.sum(z * Hz) + jnp.einsum("i,ij,j->", step.s_T, lin.H_T, step.s_T, precision="highest")
