r"""How far to go along the curve of damped steps $d(\lambda) = -(N + \lambda I)^{-1} g$.

A rule has `start(dtype) -> carry` and `choose(carry, space, J, evaluate) -> carry, Choice`, where `evaluate` maps steps [k, P]
to true returns [k]; one whose step may be refused (`gate.py`) has `refuse(carry) -> carry` too, which makes the next one
shorter. `damped_update` is the update that every solver with a rule makes. Dampings are relative to the
largest eigenvalue seen, so that neither the units of the reward nor the number of steps matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, as_float
from diffmbrl.info import EvaluationCounts, Info, Quadratic
from diffmbrl.second_order.curvature import CurvatureModel, Curved
from diffmbrl.second_order.krylov import Spectral, TruncatedCG
from diffmbrl.second_order.projection import projection_gap

Evaluate = Callable[[Float[Array, "c P"]], Float[Array, " c"]]


class Choice(NamedTuple):
    """The step to take, zero where none was accepted; and all candidates, by the model and in truth."""

    step: Float[Array, " P"]
    accepted: Bool[Array, ""]
    damping: Float[Array, ""]
    dampings: Float[Array, " c"]
    predicted: Float[Array, " c"]
    returns: Float[Array, " c"]


class Proposals(NamedTuple):
    """Steps found otherwise than in one quadratic model, each with what it promises and the share of a whole step it is."""

    steps: Float[Array, "c P"]
    predicted: Float[Array, " c"]
    shares: Float[Array, " c"]
    products: Int[Array, ""]
    negative: Float[Array, ""]


@runtime_checkable
class StepGate(Protocol):
    """A condition on steps beside the return: `around` a policy, whether another may follow it."""

    def around(
        self, policy: Policy, model: Curved | CurvatureModel, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> Callable[[Policy], Bool[Array, ""]]:
        """The condition on the policies that may follow `policy`, of which `model` is the model."""
        ...


class DampingGrid(eqx.Module):
    r"""A dozen dampings of one factorisation, the true return of each from one vmapped rollout; the best is taken.

    $\lambda_j = \mu\,d_j\,\rho_{max}$. The carry $\mu$ is raised tenfold when no step of the path improves the return, and
    falls back to 1 as steps are accepted again. It replaces damping schedules and their constants.

    >>> DampingGrid().dampings.shape
    (12,)
    """

    dampings: Float[Array, " k"] = eqx.field(
        default_factory=lambda: jnp.logspace(-9, 1, 12, dtype=float), converter=as_float
    )

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        return jnp.ones((), dtype)

    def choose(
        self, carry: Float[Array, ""], space: Spectral, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        dampings = self.along(carry, space)
        choice = best_of(*jax.vmap(space.step)(dampings), dampings, J, evaluate)
        return self.next(carry, choice), choice

    def along(self, carry: Float[Array, ""], space: Spectral) -> Float[Array, " k"]:
        """The dampings of a space's path."""
        return carry * self.dampings.astype(carry.dtype) * scale(space)

    def next(self, carry: Float[Array, ""], choice: Choice) -> Float[Array, ""]:
        return jnp.where(choice.accepted, jnp.maximum(carry / 10, 1.0), self.refuse(carry))

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        return carry * 10


class LevenbergMarquardt(eqx.Module):
    r"""One damping, adapted from the ratio of true to predicted decrease.

    $\varrho = (J(\theta + d) - J(\theta)) / (-g^\top d - \tfrac12 d^\top N d)$; the step is taken when $\varrho > 0$. The
    damping is multiplied by `grow` when $\varrho < 1/4$ and by `shrink` when $\varrho > 3/4$.

    Reference: Nocedal and Wright, Numerical Optimization, algorithm 4.1; Martens 2010, section 4.1.

    >>> float(LevenbergMarquardt().initial) > 0
    True
    """

    initial: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)
    grow: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(4.0), converter=as_float)
    shrink: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(0.5), converter=as_float)

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        return self.initial.astype(dtype)

    def choose(
        self, carry: Float[Array, ""], space: Spectral, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        damping = carry * scale(space)
        step, predicted = space.step(damping)
        reached = evaluate(step[None])[0]
        ratio = _ratio(reached, J, predicted)
        factor = jnp.where(ratio < 0.25, self.grow, jnp.where(ratio > 0.75, self.shrink, 1.0)).astype(carry.dtype)
        carry = jnp.maximum(carry * factor, jnp.finfo(carry.dtype).eps ** 2)
        return carry, _only(step, ratio > 0, damping, predicted, reached)

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        return carry * self.grow.astype(carry.dtype)


class TrustRegion(eqx.Module):
    r"""One radius for steps of `conjugate_gradients`, adapted from the ratio of true to predicted decrease.

    The step is taken when $\varrho > 0$. The radius becomes $|d| / 4$ when $\varrho < 1/4$; it doubles when $\varrho > 3/4$ and
    the step ended on the boundary. With a preconditioner the norm is its own.

    Reference: Nocedal and Wright, Numerical Optimization, algorithm 4.1.

    >>> float(TrustRegion().initial)
    1.0
    """

    initial: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        return self.initial.astype(dtype)

    def choose(
        self, carry: Float[Array, ""], found: TruncatedCG, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        reached = evaluate(found.step[None])[0]
        ratio = _ratio(reached, J, found.predicted)
        # A step of nothing says nothing of the radius: CG met what is not finite, or the gradient is zero.
        shrunk = jnp.where(found.length > 0, found.length / 4, carry)
        grown = jnp.where(found.boundary & (ratio > 0.75), 2 * carry, carry)
        return jnp.where(ratio < 0.25, shrunk, grown), _only(found.step, ratio > 0, carry, found.predicted, reached)

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        return carry / 4


def best_of(
    steps: Float[Array, "c P"],
    predicted: Float[Array, " c"],
    dampings: Float[Array, " c"],
    J: Float[Array, ""],
    evaluate: Evaluate,
    *,
    worth: Float[Array, " c"] | float = 1.0,
) -> Choice:
    """The step that improves the true return the most, each improvement times its `worth`, if one does; else none."""
    returns = evaluate(steps)
    best = jnp.argmax(jnp.where(jnp.isfinite(returns), (returns - J) * worth, -jnp.inf))
    accepted = jnp.isfinite(returns[best]) & (returns[best] > J)
    step = jnp.where(accepted, steps[best], jnp.zeros_like(steps[best]))
    return Choice(step, accepted, dampings[best], dampings, predicted, returns)


def damped_update(
    rule: Any,
    policy: Any,
    carry: Any,
    model: Curved | CurvatureModel,
    space: Spectral | TruncatedCG | Proposals | tuple[Spectral, ...],
    objective: Callable[[Any], Array],
    work: Callable[[int], EvaluationCounts],
    *,
    allows: Callable[[Any], Bool[Array, ""]] | None = None,
) -> tuple[Any, Any, Info]:
    """Move the policy as `rule` chooses in `space`, judged by `objective` (policy -> true return), and report it.

    A step whose policy `allows` does not is refused.

    Of several spaces, which share the gradient, the first is reported.
    `work` counts an update in which so many candidates were tried. A gradient that is not finite leaves no finite step: nothing
    is accepted, the carry is kept, and it is counted.
    """
    theta, unravel = ravel_pytree(policy)
    new, choice = rule.choose(
        carry, space, model.J, lambda steps: jax.vmap(lambda d: objective(unravel(theta + d)))(steps)
    )
    if allows is not None:
        allowed = allows(unravel(theta + choice.step)) | ~choice.accepted
        new = jax.tree.map(lambda x, refused: jnp.where(allowed, x, refused), new, rule.refuse(carry))
        choice = choice._replace(accepted=choice.accepted & allowed)
    finite = jnp.isfinite(model.J) & jnp.all(jnp.isfinite(model.gradient))
    accepted = choice.accepted & finite
    step = jnp.where(accepted, choice.step, jnp.zeros_like(theta))
    bad = jnp.sum(~jnp.isfinite(choice.returns), dtype=jnp.int32)
    spaces = (space,) if isinstance(space, Spectral | TruncatedCG | Proposals) else space
    seen = spaces[0]
    ritz = seen.ritz if isinstance(seen, Spectral) else jnp.zeros(0, theta.dtype)
    info = Info(
        J=model.J,
        gradient_norm=jnp.linalg.norm(model.gradient),
        accepted=accepted,
        damping=choice.damping,
        inner_iterations=jnp.sum(jnp.stack([one.products for one in spaces]), dtype=jnp.int32),
        nonfinite=bad + (~finite).astype(jnp.int32),
        work=work(choice.returns.size),
        model=Quadratic(
            ritz=ritz,
            negative=_share(ritz) if isinstance(seen, Spectral) else seen.negative.astype(theta.dtype),
            dampings=choice.dampings,
            predicted=choice.predicted,
            improved=choice.returns - model.J,
            gap=projection_gap(model, step)
            if isinstance(model, CurvatureModel)
            else jnp.full((), jnp.nan, theta.dtype),
        ),
    )
    policy = unravel(jnp.where(accepted, theta + step, theta))
    return policy, jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, carry), info


def scale(space: Spectral) -> Float[Array, ""]:
    """The largest eigenvalue; 1 for an operator without any (no curvature in the reward), whose steps follow the gradient."""
    top = jnp.max(space.values)
    return jnp.where(top > 0, top, 1.0).astype(space.values.dtype)


def _ratio(reached: Array, J: Array, predicted: Array) -> Array:
    """Of true to predicted improvement; -1 for a return that is not finite."""
    tiny = jnp.finfo(J.dtype).tiny
    return jnp.where(jnp.isfinite(reached), (reached - J) / jnp.maximum(predicted, tiny), -1.0)


def _only(step: Array, accepted: Array, damping: Array, predicted: Array, reached: Array) -> Choice:
    """The choice of a rule with one candidate."""
    taken = jnp.where(accepted, step, jnp.zeros_like(step))
    return Choice(taken, accepted, damping, damping[None], predicted[None], reached[None])


def _share(ritz: Array) -> Array:
    """Of the negative in the sum of absolute values."""
    total = jnp.sum(jnp.abs(ritz))
    return jnp.sum(jnp.maximum(-ritz, 0)) / jnp.where(total > 0, total, 1.0)
