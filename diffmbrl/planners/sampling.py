"""Planners that draw sequences of actions, score them, and draw better ones."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import State, Task, as_float, is_concrete
from diffmbrl.devices import check_divisible, gathered
from diffmbrl.info import Info, count_evaluations
from diffmbrl.planners.distributions import TruncatedNormal
from diffmbrl.planners.refit import CEM
from diffmbrl.planners.scoring import check_plan, clouded, plan_returns, with_actions
from diffmbrl.policies import Affine, OpenLoop
from diffmbrl.rollout import rollout


class SamplingCarry(NamedTuple):
    """What is drawn from next, and what is drawn again."""

    mean: Float[Array, "*batch T m"]
    std: Float[Array, "*batch T m"]
    elites: Float[Array, "*batch k T m"]  # the best of the last update, best first
    start: Float[Array, "*batch m"]  # the standard deviation that a search begins with


class Sampling(eqx.Module):
    r"""Draw sequences around a mean, score them by rollouts, and refit the mean and deviation to what they earned.

    $$a^i \sim \mathrm{draw}(\mu, \sigma),\quad J_i = J(a^i),\quad (\mu, \sigma) \leftarrow \mathrm{refit}(\mu, \sigma, a, J)$$

    One update is one such iteration; the parts are modules to compose:

    | | draw | refit | keep |
    |---|---|---|---|
    | random shooting | `Even()` | `Best()` | |
    | predictive sampling | `Normal()` | `Best()` | |
    | CEM | `TruncatedNormal()` | `CEM(elites=)` | |
    | iCEM | `Coloured(exponent)` | `CEM(elites=)` | some elites |
    | MPPI | `Normal()` | `MPPI(temperature)` | |

    Scored are `samples` sequences: the plan that the update was given, `keep` elites of the update before, and the rest drawn
    anew; then the refitted mean. The plan returned is the best of them all, so with deterministic dynamics it is never worse
    than the one given, and the mean of the search stays in the carry. Under noise or particles all are scored by the same
    draws, and the plan given is scored anew at every update.

    The deviation of a search begins at `share` of the width of an action's limits, and at `std` where it has none. Actions are
    always within the limits. `particles` scores the mean return of so many particles (`models.particles`), whose futures
    through stochastic dynamics or an `Ensemble` differ; None follows one state. Dynamics and reward are never differentiated.

    With a `mesh` (`devices.mesh_of`) its devices share the rollouts of the `samples`, and all of them have the returns: sent
    around once an update, never within a rollout. The plans are those of one device, to rounding.

    For a receding horizon, `shift(carry)` moves the search one step on: the mean and the elites lose their first action and
    repeat their last, and the deviation begins anew.

    Shapes: `s0` of one start; plans `OpenLoop` or `Affine` (of which the actions it takes are the start, and whose gains become
    0); `vmap` for many. Cost: two rollouts one after another, of `samples` and 2 sequences of `particles` each; for an `Affine`
    plan one more.
    Raises: `ValueError` without a key, for more kept than samples, samples that the devices do not divide, or where an action
    has no limits and `std` is not given; `TypeError` for a policy that is not such a plan.
    Reference: Rubinstein and Kroese 2004 (CEM); Williams et al. 2017 (MPPI); Pinneri et al. 2020 (iCEM).

    >>> import jax
    >>> from diffmbrl import OpenLoop, solve, tasks
    >>> task = tasks.pendulum(horizon=20)
    >>> key, s0 = jax.random.key(0), jax.numpy.array([0.3, 0.0])
    >>> plan, history = solve(Sampling(samples=32), OpenLoop.zeros(task), task, s0, key, steps=5)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    refit: Any
    draw: Any
    share: Float[Array, ""]
    std: Float[Array, "*m"] | None
    samples: int = eqx.field(static=True)
    keep: int = eqx.field(static=True)
    particles: int | None = eqx.field(static=True)
    mesh: Mesh | None = eqx.field(static=True)

    def __init__(
        self,
        refit: Any = None,
        *,
        draw: Any = None,
        samples: int = 256,
        keep: int = 0,
        particles: int | None = None,
        share: float | Array = 0.25,
        std: Any = None,
        mesh: Mesh | None = None,
    ):
        self.draw = TruncatedNormal() if draw is None else draw
        self.refit = CEM(elites=max(1, samples // 10)) if refit is None else refit
        self.share, self.std = as_float(share), None if std is None else as_float(std)
        self.samples, self.keep, self.particles, self.mesh = samples, keep, particles, mesh
        if keep < 0 or samples < keep + 2:
            raise ValueError(
                f"samples must be at least 2 more than the {keep} kept: the plan given and one drawn; got {samples}"
            )
        elites = getattr(self.refit, "elites", 1)
        if elites > samples:
            raise ValueError(f"elites must be at most samples = {samples}, got {elites}")
        if particles is not None and particles < 1:
            raise ValueError(f"particles must be at least 1, or None for the state itself; got {particles}")
        if not (bool(self.share > 0) and (self.std is None or bool(jnp.all(self.std > 0)))):
            raise ValueError(f"share and std must be positive, got {share} and {std}")
        if mesh is not None:
            check_divisible(samples, mesh.size, "samples")

    @property
    def kind(self) -> str:
        """It takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """Always: samples lie within them."""
        return True

    def first_plan(self, task: Task) -> OpenLoop:
        """The plan of resting actions: it has no use for feedback."""
        return OpenLoop.zeros(task)

    def init(self, policy: Any, task: Task) -> SamplingCarry:
        check_plan(policy, task, type(self).__name__)
        limited = jnp.isfinite(task.a_low) & jnp.isfinite(task.a_high)
        limits = (task.a_low, task.a_high)
        if self.std is None and is_concrete(limits) and not np.all(np.isfinite(limits)):
            raise ValueError(
                f"task '{task.name}' has no limits on some action, {task.a_low} to {task.a_high}: say how far to look for "
                "it, Sampling(std=...)"
            )
        a = _within(policy.a, task)
        width = jnp.where(limited, task.a_high - task.a_low, 0).astype(a.dtype)
        without = jnp.full((), jnp.nan, a.dtype) if self.std is None else self.std.astype(a.dtype)
        start = jnp.where(limited, self.share.astype(a.dtype) * width, without)
        elites = jnp.broadcast_to(a, (self.keep, *a.shape))
        return SamplingCarry(a, jnp.broadcast_to(start, a.shape), elites, start)

    def on_objective_change(self, policy: Any, carry: SamplingCarry, task: Task) -> SamplingCarry:
        """The search goes on when the objective changes: of a growing horizon, what is planned stays and the rest is open."""
        return carry

    def shift(self, carry: SamplingCarry) -> SamplingCarry:
        """The carry for the next step of a receding horizon, whose plan has moved on by one step."""

        def on(x):
            return jnp.concatenate([x[..., 1:, :], x[..., -1:, :]], axis=-2)

        std = jnp.broadcast_to(carry.start[..., None, :], carry.std.shape)
        return carry._replace(mean=on(carry.mean), std=std, elites=on(carry.elites))

    def update(
        self, policy: Any, carry: SamplingCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, SamplingCarry, Info]:
        if key is None:
            raise ValueError(f"{type(self).__name__} draws its samples: give it a key, not None")
        T = task.horizon
        # The rollouts' noise at step t is drawn by fold_in(key, t), t < T.
        key_draw = jax.random.fold_in(key, T)
        cloud, starts = clouded(task, s0, self.particles)
        given = policy.a if isinstance(policy, OpenLoop) else rollout(policy, task, s0, key, remat=None).a

        fresh = self.samples - 1 - self.keep
        drawn = self.draw(key_draw, fresh, carry.mean, carry.std, task.a_low, task.a_high)
        # Whole, to be learned from: of a divided one, XLA divides what a refit does with it, down to each sum of a bisection.
        sequences = gathered(jnp.concatenate([_within(given, task)[None], carry.elites, drawn]), self.mesh)
        J, nonfinite = plan_returns(sequences, cloud, starts, key, mesh=self.mesh)
        found = jnp.any(jnp.isfinite(J))

        mean, std = self.refit(carry.mean, carry.std, sequences, J)
        mean = _within(mean, task)
        # The plan as it was given, which the limits may have cut among the samples.
        (J_given, J_mean), nonfinite_others = plan_returns(jnp.stack([given, mean]), cloud, starts, key)
        best = jnp.argmax(J)
        a = jnp.where(J_mean > J[best], mean, sequences[best])
        elites = sequences[jax.lax.top_k(J, self.keep)[1]]

        # Where nothing is finite there is nothing to learn.
        def keep(new, old):
            return jax.tree.map(lambda x, y: jnp.where(found, x, y).astype(y.dtype), new, old)

        plan = keep(with_actions(policy, a), policy)
        changed = [jnp.any(x != y) for x, y in zip(jax.tree.leaves(plan), jax.tree.leaves(policy), strict=True)]
        count = self.particles or 1
        rolled = (self.samples + 2) * count + int(isinstance(policy, Affine))
        info = Info(
            J=jnp.where(jnp.isfinite(J_given), J_given, jnp.nan),
            gradient_norm=None,
            accepted=jnp.any(jnp.stack(changed)),
            damping=jnp.zeros_like(J_given),
            inner_iterations=jnp.ones((), jnp.int32),
            nonfinite=nonfinite + nonfinite_others,
            work=count_evaluations(forward=T * rolled, sequential=2 + int(isinstance(policy, Affine))),
        )
        return plan, keep(SamplingCarry(mean, std, elites, carry.start), carry), info


def _within(a: Float[Array, "T m"], task: Task) -> Float[Array, "T m"]:
    return jnp.clip(a, task.a_low, task.a_high)
