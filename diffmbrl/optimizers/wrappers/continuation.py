"""A schedule of easier objectives around any solver: by the clock, by progress, or by the measured growth."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import Planner, Policy, Solver, State, Task, is_planner, reweighted
from diffmbrl.info import EvaluationCounts, Info, count_evaluations, in_last_stage
from diffmbrl.second_order.sensitivity import growth, sensitivity, trust

DISCOUNTS = (0.8, 0.9, 0.95, 0.98, 1.0)
SHARES = (0.10, 0.16, 0.16, 0.16, 0.42)
TRUSTED = (
    (0.9, 0.95, 0.98, 1.0, 1.0, 1.0),
    (10.0, 10.0, 10.0, 10.0, 30.0, jnp.inf),
    (0.36, 0.13, 0.13, 0.15, 0.08, 0.15),
)
MADE_FOR = 100  # steps: the shortest horizon to which the discounts of `TRUSTED` apply unchanged
TOLERANCE, PATIENCE = 0.02, 5  # progress below 2% in 5 updates ends a stage of `trusted`
HELD = 0.9  # share of the starts whose growth must allow the next discount


class ContinuationCarry(NamedTuple):
    """The inner solver's carry, and the place in the schedule."""

    inner: Any
    updates: Int[Array, ""]  # made in all
    stage: Int[Array, ""]
    made: Int[Array, ""]  # updates made in this stage
    mark: Float[Array, ""]  # J at the last check for progress, when `made` was a multiple of the patience


class Continuation(eqx.Module):
    r"""Solve a sequence of tasks whose weights are $w_t \gamma_k^t\,[t < h_k]\,u_{i,t}$, each from the last one's solution.

    Over a long horizon the largest curvature grows with the products of closed-loop Jacobians; it stays bounded for every T
    while $\gamma \rho^2 < 1$, with $\rho$ the closed loop's growth per step. Discounting first finds a policy that tames
    $\rho$, after which the full objective is well conditioned. In the last stage $\gamma = 1$ and $h > T$, and the objective is
    exact, unlike truncation. Stages are traced, so one compile serves them all; at each stage the inner solver is told by
    `on_objective_change`. `discounted`, `measured`, `trusted`, `resumed` and `growing` make default schedules.

    Args:
        solver: The policy solver or planner that makes the updates.
        discounts: Discount gamma_k of each stage, shape [k].
        lengths: Number of updates of each stage, shape [k]; stage k ends after `lengths[0] + ... + lengths[k]` updates in all
            at the latest, and the last one never.
        horizons: Number of steps h_k of each stage, shape [k]; at most T excludes the terminal reward. Beyond T by default.
        trusts: Bounds kappa_k of each stage, shape [k]: the weight u of start i falls where the measured sensitivity of its
            closed loop grows beyond kappa_k times the usual one (`sensitivity.trust`), so that the few starts that still fail
            do not dominate the mean. For policies only.
        kappa: End a stage as soon as the closed loop allows the next discount, gamma_{k+1} rho^2 <= kappa for nine tenths of
            the starts (`sensitivity.growth`). For policies only.
        tolerance: End a stage when J has risen by less than this share of |J| in `patience` updates.
        patience: Number of updates between two such checks.

    Raises:
        ValueError: If the schedule is empty, of unequal lengths, has a discount outside (0, 1], a bound below 1 or a stage
            without updates or steps, the patience is below 1, kappa is not positive, or a planner is given `trusts` or `kappa`.

    Cost: the inner solver's; with `trusts` or `kappa` also a rollout and its linearisation at each update.
    Reference: Allgower and Georg 1990 (continuation); Kakade 2001 (optimising with a lower discount).

    >>> import optax
    >>> from diffmbrl.optimizers import OptaxSolver
    >>> Continuation.discounted(OptaxSolver(optax.adam, learning_rate=1e-2), steps=50).lengths.tolist()
    [5, 8, 8, 8, 21]
    """

    solver: Solver
    discounts: Float[Array, " k"]
    horizons: Int[Array, " k"]
    lengths: Int[Array, " k"]
    trusts: Float[Array, " k"] | None
    kappa: Float[Array, ""] | None
    tolerance: Float[Array, ""]
    patience: Int[Array, ""]

    def __init__(
        self,
        solver: Solver,
        *,
        discounts: Any,
        lengths: Any,
        horizons: Any = None,
        trusts: Any = None,
        kappa: Any = None,
        tolerance: Any = -jnp.inf,
        patience: int = PATIENCE,
    ):
        self.solver = solver
        self.discounts = jnp.asarray(discounts, float)
        self.lengths = jnp.asarray(lengths, jnp.int32)
        beyond = jnp.full(self.discounts.shape, jnp.iinfo(jnp.int32).max, jnp.int32)
        self.horizons = beyond if horizons is None else jnp.asarray(horizons, jnp.int32)
        self.trusts = None if trusts is None else jnp.asarray(trusts, float)
        self.kappa = None if kappa is None else jnp.asarray(kappa, float)
        self.tolerance = jnp.asarray(tolerance, float)
        self.patience = jnp.asarray(patience, jnp.int32)
        self._check(trusts, kappa, patience)

    def _check(self, trusts: Any, kappa: Any, patience: Any) -> None:
        if self.trusts is not None and (self.trusts.shape != self.lengths.shape or not bool(jnp.all(self.trusts >= 1))):
            raise ValueError(
                f"trusts needs one bound of at least 1 for each of {self.lengths.size} stages, got {trusts}"
            )
        if self.kind == "plan" and not (self.trusts is None and self.kappa is None):
            raise ValueError("trusts and kappa compare the starts of a policy; a plan has only one: use horizons")
        if self.kappa is not None and not bool(self.kappa > 0):
            raise ValueError(f"kappa must be positive, got {kappa}")
        if bool(self.patience < 1):
            raise ValueError(f"patience must be at least 1 update, got {patience}")
        shapes = {self.discounts.shape, self.lengths.shape, self.horizons.shape}
        if len(shapes) != 1 or self.discounts.ndim != 1 or not self.discounts.size:
            raise ValueError(
                f"a schedule needs as many discounts as lengths (and horizons), at least one; got {self.discounts.size}, "
                f"{self.lengths.size} and {self.horizons.size}"
            )
        if not bool(jnp.all((self.discounts > 0) & (self.discounts <= 1))):
            raise ValueError(f"discounts must lie in (0, 1], got {self.discounts.tolist()}")
        if not bool(jnp.all((self.lengths > 0) & (self.horizons > 0))):
            raise ValueError(
                f"every stage needs at least one update and one step, got lengths {self.lengths.tolist()} "
                f"and horizons {self.horizons.tolist()}"
            )

    @classmethod
    def discounted(
        cls, solver: Solver, steps: int, *, discounts: Any = DISCOUNTS, shares: Any = SHARES
    ) -> "Continuation":
        """Make a schedule of discounts.

        Args:
            solver: The inner solver.
            steps: Number of updates of all stages.
            discounts: Discount of each stage.
            shares: Share of the updates that each stage takes, at least one update.

        Returns:
            The solver with its schedule.

        Raises:
            ValueError: If there are fewer updates than stages.
        """
        return cls(solver, discounts=discounts, lengths=_lengths(shares, steps))

    @classmethod
    def trusted(cls, solver: Solver, steps: int, *, horizon: int) -> "Continuation":
        r"""Make the schedule for second-order policy methods: discounts from .9, and bounds on sensitivity to near the end.

        Unstable systems need most of the updates at .9; systems at rest, such as a hanging pole, gain nothing there. Hence a
        stage ends when its progress does. Over less than a hundred steps the discounts are $\gamma^{100/T}$, so that no more is
        left of the terminal reward than at T = 100: balancing a cart-pole from 64 starts at T = 50, Krylov-Newton ends at a
        cost of 6.9 on held-out starts with these discounts, and of 24.6 with those of T = 100 (medians of five seeds).

        Args:
            solver: The inner policy solver.
            steps: Number of updates of all stages.
            horizon: The task's horizon T.

        Returns:
            The solver with its schedule.

        Raises:
            ValueError: If there are fewer updates than stages.
        """
        discounts, trusts, shares = _trusted(horizon)
        lengths = _lengths(shares, steps)
        return cls(solver, discounts=discounts, trusts=trusts, lengths=lengths, tolerance=TOLERANCE)

    @classmethod
    def resumed(cls, solver: Solver, steps: int, *, horizon: int) -> "Continuation":
        """Make a schedule for a trained policy: two sevenths of the updates without discounts, then the stages of `trusted`.

        A discount may lead out of a basin that only noise has found; without one, the few starts that fail may fail for good.
        Which is better shows only at the end: wrap it in `BestSoFar`. No stage ends early.

        Args:
            solver: The inner policy solver.
            steps: Number of updates of all stages.
            horizon: The task's horizon T.

        Returns:
            The solver with its schedule.

        Raises:
            ValueError: If there are fewer updates than stages.
        """
        discounts, trusts, shares = _trusted(horizon)
        lengths = _lengths((1 / 7, 1 / 7, *(5 / 7 * share for share in shares)), steps)
        return cls(solver, discounts=(1.0, 1.0, *discounts), trusts=(30.0, jnp.inf, *trusts), lengths=lengths)

    @classmethod
    def measured(cls, solver: Solver, steps: int, *, kappa: float = 1.0) -> "Continuation":
        r"""Make the schedule of `discounted`, each stage entered as soon as the closed loop allows it.

        Args:
            solver: The inner policy solver.
            steps: Number of updates of all stages.
            kappa: Bound on the measured growth, $\gamma_{k+1} \rho^2 \le \kappa$.

        Returns:
            The solver with its schedule.

        Raises:
            ValueError: If there are fewer updates than stages, or kappa is not positive.
        """
        return cls(solver, discounts=DISCOUNTS, lengths=_lengths(SHARES, steps), kappa=kappa)

    @classmethod
    def growing(cls, solver: Solver, steps: int, *, horizon: int, stages: int = 20) -> "Continuation":
        """Make the schedule for plans: horizons that grow evenly to `horizon`, without discounts.

        A plan has no feedback before its first sweep, so from resting actions an unstable system leaves the region of interest
        long before T, which a discount does not prevent; each new piece of a growing plan starts where the last one ended.
        Median cost of iLQR from zero actions on `cartpole-balance`, T = 100, 100 updates, 64 starts: .36, against 14 without
        stages and 27 with discounts. Stages need enough updates: on `cartpole-swingup` the mean cost of 32 starts is 20.6 after
        100 updates in twenty stages, 10.2 after 200 and 6.0 after 300 (without stages 9.3).

        Args:
            solver: The inner planner.
            steps: Number of updates of all stages.
            horizon: The task's horizon T.
            stages: Number of stages, at most `steps` and `horizon`.

        Returns:
            The planner with its schedule.
        """
        stages = max(1, min(stages, steps, horizon))
        horizons = [-(-horizon * (k + 1) // stages) for k in range(stages)]
        lengths = [steps * (k + 1) // stages - steps * k // stages for k in range(stages)]
        return cls(solver, discounts=[1.0] * stages, lengths=lengths, horizons=horizons[:-1] + [horizon + 1])

    @property
    def kind(self) -> str:
        """The inner solver's."""
        return self.solver.kind

    @property
    def keeps_limits(self) -> bool:
        """The inner solver's."""
        return self._planner.keeps_limits

    def first_plan(self, task: Task) -> Any:
        """The inner planner's first plan."""
        return self._planner.first_plan(task)

    def shift(self, carry: ContinuationCarry) -> ContinuationCarry:
        """The carry for the next step of a receding horizon: the inner planner's is shifted, the schedule stays."""
        return carry._replace(inner=self._planner.shift(carry.inner))

    @property
    def _planner(self) -> Planner:
        if not is_planner(self.solver):
            raise TypeError(
                f"{type(self.solver).__name__} improves policies; only a planner, such as ILQR(), has plans"
            )
        return self.solver

    def init(self, policy: Any, task: Task) -> ContinuationCarry:
        zero = jnp.zeros((), jnp.int32)
        mark = jnp.full((), -jnp.inf, task.weights.dtype)
        return ContinuationCarry(self.solver.init(policy, task), zero, zero, zero, mark)

    def on_objective_change(self, policy: Policy, carry: ContinuationCarry, task: Task) -> ContinuationCarry:
        """Run the schedule again from its first stage, and tell the inner solver."""
        inner = self.solver.on_objective_change(policy, carry.inner, task)
        return self.init(policy, task)._replace(inner=inner)

    def update(
        self, policy: Any, carry: ContinuationCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, ContinuationCarry, Info]:
        _, updates, stage, made, mark = carry
        fresh = self.solver.on_objective_change(policy, carry.inner, task)
        inner = jax.tree.map(lambda new, old: jnp.where(made == 0, new, old), fresh, carry.inner)
        eased = self.in_force(policy, task, s0, stage, key=key)
        allowed = self._allowed(policy, task, s0, stage, key)
        policy, inner, info = self.solver.update(policy, inner, eased, s0, key=key)
        last = stage >= self.lengths.size - 1
        info = info._replace(
            work=jax.tree.map(jnp.add, info.work, self._work(task, s0)), final=last & in_last_stage(info)
        )
        # Info.J is measured before the update, so at a check it is the result of the `patience` updates since the last one.
        checking = made % self.patience == 0
        rise = self.tolerance.astype(mark.dtype) * jnp.abs(mark)
        stalled = checking & (made > 0) & (info.J.astype(mark.dtype) - mark < rise)
        ends = jnp.cumulative_sum(self.lengths, dtype=jnp.int32)[stage]
        over = ~last & (stalled | allowed | (updates + 1 >= ends))
        mark = jnp.where(checking, info.J.astype(mark.dtype), mark)
        made = jnp.where(over, 0, made + 1)
        return policy, ContinuationCarry(inner, updates + 1, stage + over.astype(jnp.int32), made, mark), info

    def in_force(
        self, policy: Any, task: Task, s0: State, stage: Int[Array, ""] | int, *, key: PRNGKeyArray | None = None
    ) -> Task:
        """The task with the objective of a stage, at this policy and from these starts."""
        weights = self.weights(task, stage)
        if self.trusts is not None:
            weights = weights * trust(sensitivity(policy, task, s0, key), self.trusts[stage])
        return reweighted(task, weights)

    def weights(self, task: Task, stage: Int[Array, ""] | int) -> Float[Array, " T1"]:
        """The weights over time of a stage, without trust."""
        t, dtype = jnp.arange(task.horizon + 1, dtype=jnp.int32), task.weights.dtype
        within = (t < self.horizons[stage]).astype(dtype)
        return task.weights * self.discounts[stage].astype(dtype) ** t.astype(dtype) * within

    def _allowed(self, policy: Any, task: Task, s0: State, stage: Int[Array, ""], key: PRNGKeyArray | None) -> Array:
        """Whether the measured growth allows the next stage's discount."""
        if self.kappa is None:
            return jnp.zeros((), bool)
        following = self.discounts[jnp.minimum(stage + 1, self.discounts.size - 1)]
        rho = growth(policy, task, s0, key)
        held = following.astype(rho.dtype) * rho**2 <= self.kappa.astype(rho.dtype)
        return jnp.mean(held.astype(rho.dtype)) >= HELD

    def _work(self, task: Task, s0: State) -> EvaluationCounts:
        """The evaluations that trust and kappa add: a rollout, its linearisation and a recursion of n x n matrices."""
        if self.trusts is None and self.kappa is None:
            return count_evaluations()
        steps = jax.tree.leaves(s0)[0].shape[0] * task.horizon
        return count_evaluations(forward=2 * steps, jvp=steps * (task.n + task.m), sequential=2)


def _trusted(horizon: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Discounts, bounds and shares of the stages of trust."""
    discounts, trusts, shares = TRUSTED
    power = max(1.0, MADE_FOR / horizon)
    return tuple(discount**power for discount in discounts), trusts, shares


def _lengths(shares: Any, steps: int) -> list[int]:
    if steps < len(shares):
        raise ValueError(f"{len(shares)} stages need at least {len(shares)} updates, got {steps}")
    lengths = [max(1, round(share * steps)) for share in shares[:-1]]
    while sum(lengths) >= steps:  # leave at least one of few updates for the last stage
        lengths[lengths.index(max(lengths))] -= 1
    return [*lengths, steps - sum(lengths)]
