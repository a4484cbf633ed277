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
    """Search distribution, and the elites kept for the next update.

    Args:
        mean: Mean of the sequences, shape [T, m].
        std: Standard deviation of the sequences, shape [T, m].
        elites: Best sequences of the last update, the best first, shape [keep, T, m].
        start: Standard deviation with which a search begins, shape [m].
    """

    mean: Float[Array, "*batch T m"]
    std: Float[Array, "*batch T m"]
    elites: Float[Array, "*batch k T m"]
    start: Float[Array, "*batch m"]


class Sampling(eqx.Module):
    r"""Draw sequences around a mean, score them by rollouts, and refit mean and deviation to the returns.

    $$a^i \sim \mathrm{draw}(\mu, \sigma),\quad J_i = J(a^i),\quad (\mu, \sigma) \leftarrow \mathrm{refit}(\mu, \sigma, a, J)$$

    One update is one such iteration; the parts are modules to compose:

    | | draw | refit | keep |
    |---|---|---|---|
    | random shooting | `Uniform()` | `ArgMax()` | |
    | predictive sampling | `Normal()` | `ArgMax()` | |
    | CEM | `TruncatedNormal()` | `CEM(elites=)` | |
    | iCEM | `Coloured(exponent)` | `CEM(elites=)` | some elites |
    | MPPI | `Normal()` | `MPPI(temperature)` | |

    An update scores the given plan, `keep` elites of the last update, and new samples for the rest; then the refitted mean. It
    returns the best of them all, so with deterministic dynamics the plan never gets worse. All are scored by the same noise and
    particles. Actions always keep their limits, and dynamics and reward are never differentiated. An `Affine` plan gives its
    actions as the start and loses its gains.

    Args:
        refit: Update of the distribution: `CEM` (default, with a tenth of the samples as elites), `MPPI` or
            `ArgMax`.
        draw: Distribution: `TruncatedNormal()` (default), `Normal()`, `Uniform()` or `Coloured(exponent)`.
        samples: Number N of sequences scored per update.
        keep: Number of elites scored again in the next update.
        particles: Number of particles whose mean return scores a sequence (`models.particles`); None for a single
            state.
        share: Standard deviation with which a search begins, relative to the width of the action limits.
        std: Standard deviation with which a search begins for actions without limits, one number or shape [m].
        mesh: Devices that share the rollouts (`devices.mesh_of`); None for one. The plans agree with those of one
            device to rounding.

    Raises:
        ValueError: If there is no key, `keep` exceeds samples - 2, the devices do not divide the samples, or an
            action has no limits and `std` is None.
        TypeError: If the policy is not an `OpenLoop` or `Affine` plan.

    Cost: two rollouts one after another, of `samples` and of 2 sequences, times `particles`; for an `Affine` plan one more.
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
        """A solver of plans: it takes one start."""
        return "plan"

    @property
    def keeps_limits(self) -> bool:
        """True: samples lie within the limits."""
        return True

    def first_plan(self, task: Task) -> OpenLoop:
        """Return the first plan, of resting actions and without feedback."""
        return OpenLoop.zeros(task)

    def init(self, policy: Any, task: Task) -> SamplingCarry:
        check_plan(policy, task, type(self).__name__)
        limited = jnp.isfinite(task.a_low) & jnp.isfinite(task.a_high)
        limits = (task.a_low, task.a_high)
        if self.std is None and is_concrete(limits) and not np.all(np.isfinite(limits)):
            raise ValueError(
                f"task '{task.name}' has no limits on some action, {task.a_low} to {task.a_high}: give the width of "
                "the search, Sampling(std=...)"
            )
        a = _within(policy.a, task)
        width = jnp.where(limited, task.a_high - task.a_low, 0).astype(a.dtype)
        without = jnp.full((), jnp.nan, a.dtype) if self.std is None else self.std.astype(a.dtype)
        start = jnp.where(limited, self.share.astype(a.dtype) * width, without)
        elites = jnp.broadcast_to(a, (self.keep, *a.shape))
        return SamplingCarry(a, jnp.broadcast_to(start, a.shape), elites, start)

    def on_objective_change(self, policy: Any, carry: SamplingCarry, task: Task) -> SamplingCarry:
        """Keep the search when the objective changes: under a growing horizon, the part already planned stays."""
        return carry

    def shift(self, carry: SamplingCarry) -> SamplingCarry:
        """Return the carry for the next step of a receding horizon, shifted by one step."""

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
        # Gathered before the refit, whose sums XLA would otherwise divide among the devices, down to each of a bisection.
        sequences = gathered(jnp.concatenate([_within(given, task)[None], carry.elites, drawn]), self.mesh)
        J, nonfinite = plan_returns(sequences, cloud, starts, key, mesh=self.mesh)
        found = jnp.any(jnp.isfinite(J))

        mean, std = self.refit(carry.mean, carry.std, sequences, J)
        mean = _within(mean, task)
        # The given plan itself, which the limits may have clipped among the samples.
        (J_given, J_mean), nonfinite_others = plan_returns(jnp.stack([given, mean]), cloud, starts, key)
        best = jnp.argmax(J)
        a = jnp.where(J_mean > J[best], mean, sequences[best])
        elites = sequences[jax.lax.top_k(J, self.keep)[1]]

        # If no return is finite, keep the previous state.
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
