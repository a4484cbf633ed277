r"""Rules that choose a step along the curve of damped steps $d(\lambda) = -(N + \lambda I)^{-1} g$.

A rule chooses by `choose(carry, space, J, evaluate) -> carry, Choice`, where `evaluate` maps steps [k, P] to true returns [k].
Dampings are relative to the largest eigenvalue, so that neither the units of the reward nor the number of
steps matter.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import as_float
from diffmbrl.second_order.krylov import Spectral, TruncatedCG

Evaluate = Callable[[Float[Array, "c P"]], Float[Array, " c"]]


class Choice(NamedTuple):
    """The step that a rule takes, and all its candidates, by the model and by true returns.

    Args:
        step: Step, zero if none was accepted.
        accepted: Whether a step was accepted.
        damping: Its damping.
        dampings: Dampings of all candidates.
        predicted: Improvements of the return that the model predicts.
        returns: True returns.
    """

    step: Float[Array, " P"]
    accepted: Bool[Array, ""]
    damping: Float[Array, ""]
    dampings: Float[Array, " c"]
    predicted: Float[Array, " c"]
    returns: Float[Array, " c"]


class Proposals(NamedTuple):
    """Candidate steps that do not come from one quadratic model.

    Args:
        steps: Steps.
        predicted: Improvements of the return that they promise.
        shares: Fractions of a full step, in the place of dampings.
        products: Number of operator products spent.
        negative: Share of negative curvature.
    """

    steps: Float[Array, "c P"]
    predicted: Float[Array, " c"]
    shares: Float[Array, " c"]
    products: Int[Array, ""]
    negative: Float[Array, ""]


class DampingGrid(eqx.Module):
    r"""Take the best of a dozen dampings of one factorisation, judged by true returns from one vmapped rollout.

    $\lambda_j = \mu\,d_j\,\rho_{max}$. The carry $\mu$ is raised tenfold when no step improves the return, and falls back to 1
    as steps are accepted again. The grid replaces damping schedules and their constants.

    Args:
        dampings: The grid $d_j$, relative to the largest eigenvalue $\rho_{max}$.

    >>> DampingGrid().dampings.shape
    (12,)
    """

    dampings: Float[Array, " k"] = eqx.field(
        default_factory=lambda: jnp.logspace(-9, 1, 12, dtype=float), converter=as_float
    )

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """The carry before the first update."""
        return jnp.ones((), dtype)

    def choose(
        self, carry: Float[Array, ""], space: Spectral, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        """The next carry, and the step."""
        dampings = self.along(carry, space)
        choice = best_of(*jax.vmap(space.step)(dampings), dampings, J, evaluate)
        return self.next(carry, choice), choice

    def along(self, carry: Float[Array, ""], space: Spectral) -> Float[Array, " k"]:
        """The dampings of a space, for the factor in the carry."""
        return carry * self.dampings.astype(carry.dtype) * scale(space)

    def next(self, carry: Float[Array, ""], choice: Choice) -> Float[Array, ""]:
        """The carry after a choice."""
        return jnp.where(choice.accepted, jnp.maximum(carry / 10, 1.0), self.refuse(carry))

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step."""
        return carry * 10


class LevenbergMarquardt(eqx.Module):
    r"""Adapt one damping by the ratio of true to predicted decrease.

    $\varrho = (J(\theta + d) - J(\theta)) / (-g^\top d - \tfrac12 d^\top N d)$; the step is taken when $\varrho > 0$.

    Args:
        initial: First damping, relative to the largest eigenvalue.
        grow: Factor on the damping when $\varrho < 1/4$, or when the step is refused.
        shrink: Factor on the damping when $\varrho > 3/4$.

    Reference: Nocedal and Wright, Numerical Optimization, algorithm 4.1; Martens 2010, section 4.1.

    >>> float(LevenbergMarquardt().initial) > 0
    True
    """

    initial: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1e-3), converter=as_float)
    grow: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(4.0), converter=as_float)
    shrink: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(0.5), converter=as_float)

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """The carry before the first update."""
        return self.initial.astype(dtype)

    def choose(
        self, carry: Float[Array, ""], space: Spectral, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        """The next carry, and the step."""
        damping = carry * scale(space)
        step, predicted = space.step(damping)
        reached = evaluate(step[None])[0]
        ratio = _ratio(reached, J, predicted)
        factor = jnp.where(ratio < 0.25, self.grow, jnp.where(ratio > 0.75, self.shrink, 1.0)).astype(carry.dtype)
        carry = jnp.maximum(carry * factor, jnp.finfo(carry.dtype).eps ** 2)
        return carry, _only(step, ratio > 0, damping, predicted, reached)

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step."""
        return carry * self.grow.astype(carry.dtype)


class TrustRegion(eqx.Module):
    r"""Adapt the radius of `conjugate_gradients` by the ratio of true to predicted decrease.

    The step is taken when $\varrho > 0$. The radius becomes $|d| / 4$ when $\varrho < 1/4$, and doubles when $\varrho > 3/4$
    and the step ends on the boundary. Lengths are in the norm of the preconditioner, if there is one.

    Args:
        initial: First radius.

    Reference: Nocedal and Wright, Numerical Optimization, algorithm 4.1.

    >>> float(TrustRegion().initial)
    1.0
    """

    initial: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(1.0), converter=as_float)

    def start(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """The carry before the first update."""
        return self.initial.astype(dtype)

    def choose(
        self, carry: Float[Array, ""], found: TruncatedCG, J: Float[Array, ""], evaluate: Evaluate
    ) -> tuple[Array, Choice]:
        """The next carry, and the step."""
        reached = evaluate(found.step[None])[0]
        ratio = _ratio(reached, J, found.predicted)
        # A step of length 0 carries no information about the radius: a product was not finite, or the gradient is zero.
        shrunk = jnp.where(found.length > 0, found.length / 4, carry)
        grown = jnp.where(found.boundary & (ratio > 0.75), 2 * carry, carry)
        return jnp.where(ratio < 0.25, shrunk, grown), _only(found.step, ratio > 0, carry, found.predicted, reached)

    def refuse(self, carry: Float[Array, ""]) -> Float[Array, ""]:
        """The carry after a refused step."""
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
    """Choose the step that improves the true return most, or none if no step improves it.

    Args:
        steps: Candidates.
        predicted: Improvements that the model predicts.
        dampings: Dampings of the candidates.
        J: Return before the step.
        evaluate: Function from steps to true returns.
        worth: Factors on the improvements when they are compared.

    Returns:
        The choice.
    """
    returns = evaluate(steps)
    best = jnp.argmax(jnp.where(jnp.isfinite(returns), (returns - J) * worth, -jnp.inf))
    accepted = jnp.isfinite(returns[best]) & (returns[best] > J)
    step = jnp.where(accepted, steps[best], jnp.zeros_like(steps[best]))
    return Choice(step, accepted, dampings[best], dampings, predicted, returns)


def scale(space: Spectral) -> Float[Array, ""]:
    """The largest eigenvalue of a space: the unit of dampings.

    Args:
        space: Eigenvectors or Ritz vectors.

    Returns:
        The largest eigenvalue; 1 if none is positive (a reward without curvature), so that steps follow the gradient.
    """
    top = jnp.max(space.values)
    return jnp.where(top > 0, top, 1.0).astype(space.values.dtype)


def _ratio(reached: Array, J: Array, predicted: Array) -> Array:
    """The ratio of true to predicted improvement; -1 for a return that is not finite."""
    tiny = jnp.finfo(J.dtype).tiny
    return jnp.where(jnp.isfinite(reached), (reached - J) / jnp.maximum(predicted, tiny), -1.0)


def _only(step: Array, accepted: Array, damping: Array, predicted: Array, reached: Array) -> Choice:
    """The choice of a rule with one candidate."""
    taken = jnp.where(accepted, step, jnp.zeros_like(step))
    return Choice(taken, accepted, damping, damping[None], predicted[None], reached[None])
