"""Gradient shooting: first-order and quasi-Newton methods on the actions of a plan."""

from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import Dynamics, Reward, State, Task, as_float, restart
from diffmbrl.info import EvaluationCounts, Info, count_evaluations
from diffmbrl.optimizers.optax_solver import OptaxCarry, OptaxSolver
from diffmbrl.planners.scoring import check_plan, clouded, with_actions
from diffmbrl.policies import Affine, OpenLoop, centre_and_half
from diffmbrl.rollout import rollout

NEAR = 1e-3  # how near to a limit, in half widths, the logit of an action can start


class Tanh(eqx.Module):
    r"""Action limits by $a = c + h \tanh z$ over free z: every method keeps them, and slows down close to them."""

    def actions(self, z: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        centre, half = centre_and_half(low, high)
        return jnp.where(_limited(low, high), centre + half * jnp.tanh(z), z)

    def variables(self, a: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        """Return the z of given actions; those on a limit or beyond it start just within it."""
        centre, half = centre_and_half(low, high)
        inside = jnp.clip((a - centre) / half, NEAR - 1, 1 - NEAR)
        return jnp.where(_limited(low, high), jnp.arctanh(inside), a)

    def project(self, z: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        return z


class Projection(eqx.Module):
    """Action limits by projection after every step: each action moves to the nearest one within the limits."""

    def actions(self, z: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        return z

    def variables(self, a: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        return jnp.clip(a, low, high)

    def project(self, z: Float[Array, "*b m"], low: Float[Array, " m"], high: Float[Array, " m"]) -> Array:
        return jnp.clip(z, low, high)


class ShootingCarry(NamedTuple):
    """Sequences that are improved together, and which of them is the plan."""

    z: Float[Array, "*batch k T m"]
    inner: OptaxCarry
    best: Int[Array, "*batch"]
    begun: Bool[Array, "*batch"]


class Shooting(eqx.Module):
    r"""Gradient steps on sequences of actions: $z \leftarrow z + \mathrm{rule}(\nabla_z (-J))$, $a_t = \mathrm{limits}(z_t)$.

    The plan returned is the step of the sequence that was best before it. With one sequence it is as monotone as the rule:
    L-BFGS is, Adam is not. A sequence whose gradient is not finite stays unchanged. An `Affine` plan gives its actions as the
    start and loses its gains.

    Args:
        descend: Rule with its gradient estimator, such as `OptaxSolver(optax.lbfgs)`.
        limits: How actions keep the task's limits: `Tanh()` (default) or `Projection()`.
        starts: Number k of sequences improved together: the given plan and k - 1 drawn around it in the first
            update.
        spread: Standard deviation of that draw, in z.
        particles: Number of particles whose mean return is improved (`models.particles`); None for a single state.

    Raises:
        ValueError: If `starts` or `particles` is below 1, `spread` is not positive, or several starts have no key.
        TypeError: If `descend` is not an `OptaxSolver`, or the policy is not an `OpenLoop` or `Affine` plan.

    Cost: k gradients in parallel, or that for each line-search trial; for an `Affine` plan one rollout more.
    Reference: Betts 1998, section 3 (direct single shooting).

    >>> import jax, optax
    >>> from diffmbrl import OptaxSolver, OpenLoop, solve, tasks
    >>> task = tasks.lqr(horizon=20)
    >>> s0 = task.initial(jax.random.key(0))
    >>> plan, history = solve(Shooting(OptaxSolver(optax.lbfgs)), OpenLoop.zeros(task), task, s0, None, steps=10)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    descend: OptaxSolver
    limits: Tanh | Projection
    spread: Float[Array, ""]
    starts: int = eqx.field(static=True)
    particles: int | None = eqx.field(static=True)

    def __init__(
        self,
        descend: Any,
        *,
        limits: Any = None,
        starts: int = 1,
        spread: float | Array = 1.0,
        particles: int | None = None,
    ):
        if not isinstance(descend, OptaxSolver):
            raise TypeError(
                "descend must be a rule on a gradient, OptaxSolver(optax.adam, learning_rate=1e-2); "
                f"got {type(descend).__name__}"
            )
        if not isinstance(limits, Tanh | Projection | None):
            raise TypeError(f"limits must be Tanh() or Projection(), got {type(limits).__name__}")
        if starts < 1:
            raise ValueError(f"starts must be at least 1, got {starts}")
        if particles is not None and particles < 1:
            raise ValueError(f"particles must be at least 1, or None for the state itself; got {particles}")
        self.descend, self.limits = descend, Tanh() if limits is None else limits
        self.spread, self.starts, self.particles = as_float(spread), starts, particles
        if not bool(jnp.all(self.spread > 0)):
            raise ValueError(f"spread must be positive, got {spread}")

    @property
    def kind(self) -> str:
        """A solver of plans: it takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """True: `limits` keeps them."""
        return True

    def first_plan(self, task: Task) -> OpenLoop:
        """Return the first plan, of resting actions and without feedback."""
        return OpenLoop.zeros(task)

    def init(self, policy: Any, task: Task) -> ShootingCarry:
        check_plan(policy, task, type(self).__name__)
        z = self.limits.variables(policy.a, task.a_low, task.a_high)
        z = jnp.broadcast_to(z, (self.starts, *z.shape))
        inner = jax.vmap(lambda z: self.descend.init(OpenLoop(z), task))(z)
        return ShootingCarry(z, inner, jnp.zeros((), jnp.int32), jnp.zeros((), bool))

    on_objective_change = restart

    def shift(self, carry: ShootingCarry) -> ShootingCarry:
        """Return the carry for the next step of a receding horizon: shifted sequences, and the rule's memory as before."""
        z = jnp.concatenate([carry.z[..., 1:, :], carry.z[..., -1:, :]], axis=-2)
        return carry._replace(z=z)

    def update(
        self, policy: Any, carry: ShootingCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, ShootingCarry, Info]:
        if key is None and self.starts > 1:
            raise ValueError(f"{type(self).__name__} draws {self.starts - 1} of its starts: give it a key, not None")
        low, high = task.a_low, task.a_high
        given = policy.a if isinstance(policy, OpenLoop) else rollout(policy, task, s0, key, remat=None).a
        z = self._sequences(given, carry, task, key)
        cloud, start = clouded(task, s0, self.particles)
        cloud = self._free(cloud)
        batch = jax.tree.map(lambda x: x[None], start)

        def one(z, inner):
            moved, inner, info = self.descend.update(OpenLoop(z), inner, cloud, batch, key=key)
            # The state of a line search belongs to the point before the projection.
            projected = self.limits.project(moved.a, low, high)
            stale = jnp.any(projected != moved.a)
            fingerprint = jnp.where(stale, jnp.nan, inner.fingerprint).astype(inner.fingerprint.dtype)
            return projected, inner._replace(fingerprint=fingerprint), info

        moved, inner, infos = jax.vmap(one)(z, carry.inner)
        norms = cast(Array, infos.gradient_norm)
        finite = jnp.isfinite(infos.J) & jnp.isfinite(norms)
        found = jnp.any(finite)
        best = jnp.argmax(jnp.where(finite, infos.J, -jnp.inf)).astype(jnp.int32)

        def keep(new, old):
            return jax.tree.map(lambda x, y: jnp.where(found, x, y).astype(y.dtype), new, old)

        a = self.limits.actions(moved[best], low, high)
        plan = keep(with_actions(policy, a), policy)
        changed = [jnp.any(x != y) for x, y in zip(jax.tree.leaves(plan), jax.tree.leaves(policy), strict=True)]
        info = Info(
            J=infos.J[carry.best],
            gradient_norm=norms[carry.best],
            accepted=jnp.any(jnp.stack(changed)),
            damping=jnp.zeros_like(infos.J[0]),
            inner_iterations=jnp.sum(infos.inner_iterations, dtype=jnp.int32),
            nonfinite=jnp.sum(infos.nonfinite, dtype=jnp.int32),
            work=self._work(infos.work, policy, task),
        )
        return plan, keep(ShootingCarry(moved, inner, best, jnp.ones((), bool)), carry), info

    def _sequences(self, given: Array, carry: ShootingCarry, task: Task, key: PRNGKeyArray | None) -> Array:
        """Sequences of the carry, with the given plan in its place; in the first update, drawn around the plan."""
        low, high = task.a_low, task.a_high
        own = carry.z[carry.best]
        unchanged = jnp.all(self.limits.actions(own, low, high) == given)
        own = jnp.where(unchanged, own, self.limits.variables(given, low, high))
        z = carry.z
        if self.starts > 1 and key is not None:
            # The rollouts' noise at step t is drawn by fold_in(key, t), t < T.
            noise = jax.random.normal(jax.random.fold_in(key, task.horizon), z.shape, z.dtype)
            drawn = self.limits.project(own + self.spread.astype(z.dtype) * noise, low, high)
            z = jnp.where(carry.begun, z, drawn)
        return z.at[carry.best].set(own)

    def _free(self, task: Task) -> Task:
        """The task whose actions are z."""
        return eqx.tree_at(
            lambda t: (t.dynamics, t.reward),
            task,
            (
                _FreeDynamics(task.dynamics, self.limits, task.a_low, task.a_high),
                _FreeReward(task.reward, self.limits, task.a_low, task.a_high),
            ),
        )

    def _work(self, work: EvaluationCounts, policy: Any, task: Task) -> EvaluationCounts:
        """Sequences run in parallel: they add to the work but not to its sequential depth."""
        count = self.particles or 1
        forward, jvp, vjp = (jnp.sum(x, dtype=jnp.int32) * count for x in work[:3])
        once = int(isinstance(policy, Affine))
        return count_evaluations(forward + once * task.horizon, jvp, vjp, jnp.max(work.sequential) + once)


class _FreeDynamics(eqx.Module):
    """s' = f(s, limits(z))."""

    inner: Dynamics
    limits: Tanh | Projection
    low: Float[Array, " m"]
    high: Float[Array, " m"]

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        return self.inner(s, self.limits.actions(a, self.low, self.high), key=key)


class _FreeReward(eqx.Module):
    """r(s, limits(z))."""

    inner: Reward
    limits: Tanh | Projection
    low: Float[Array, " m"]
    high: Float[Array, " m"]

    def __call__(self, s: State, a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.inner(s, self.limits.actions(a, self.low, self.high))


def _limited(low: Array, high: Array) -> Array:
    return jnp.isfinite(low) & jnp.isfinite(high)
