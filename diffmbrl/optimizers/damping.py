r"""How far to go along the curve of damped steps $d(\lambda) = -(N + \lambda I)^{-1} g$.

A rule has two functions, `start(dtype) -> carry` and `choose(carry, space, J, evaluate) -> carry, Choice`, where `evaluate`
maps steps [k, P] to true returns [k]; `take` is the update that every solver with a rule makes. Dampings are relative to the
largest eigenvalue seen, so that neither the units of the reward nor the number of steps matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from diffmbrl.core import Info, Work, as_float
from diffmbrl.curvature import Curved, Model
from diffmbrl.krylov import Spectral

Evaluate = Callable[[Float[Array, "k P"]], Float[Array, " k"]]


class Choice(NamedTuple):
    """The step to take; zero where none was accepted."""

    step: Float[Array, " P"]
    accepted: Bool[Array, ""]
    damping: Float[Array, ""]
    rollouts: Int[Array, ""]  # steps whose true return was evaluated
    nonfinite: Int[Array, ""]  # of which the return was not finite


class Path(eqx.Module):
    r"""A dozen dampings of one factorisation, the true return of each from one vmapped rollout; the best is taken.

    $\lambda_j = \mu\,d_j\,\rho_{max}$. The carry $\mu$ is raised tenfold when no step of the path improves the return, and
    falls back to 1 as steps are accepted again. It replaces damping schedules and their constants.

    >>> Path().dampings.shape
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
        dampings = carry * self.dampings.astype(carry.dtype) * scale(space)
        steps, _ = jax.vmap(space.step)(dampings)
        choice = best_of(steps, dampings, J, evaluate)
        return jnp.where(choice.accepted, jnp.maximum(carry / 10, 1.0), carry * 10), choice


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
        finite = jnp.isfinite(reached)
        ratio = jnp.where(finite, (reached - J) / jnp.maximum(predicted, jnp.finfo(J.dtype).tiny), -1.0)
        factor = jnp.where(ratio < 0.25, self.grow, jnp.where(ratio > 0.75, self.shrink, 1.0)).astype(carry.dtype)
        accepted = ratio > 0
        taken = jnp.where(accepted, step, jnp.zeros_like(step))
        smallest = jnp.finfo(carry.dtype).eps ** 2
        carry = jnp.maximum(carry * factor, smallest)
        return carry, Choice(taken, accepted, damping, jnp.ones((), jnp.int32), (~finite).astype(jnp.int32))


def best_of(
    steps: Float[Array, "k P"], dampings: Float[Array, " k"], J: Float[Array, ""], evaluate: Evaluate
) -> Choice:
    """The step of highest true return, if that is above J; else none."""
    returns = evaluate(steps)
    finite = jnp.isfinite(returns)
    best = jnp.argmax(jnp.where(finite, returns, -jnp.inf))
    accepted = finite[best] & (returns[best] > J)
    step = jnp.where(accepted, steps[best], jnp.zeros_like(steps[best]))
    count = jnp.asarray(steps.shape[0], jnp.int32)
    return Choice(step, accepted, dampings[best], count, jnp.sum(~finite, dtype=jnp.int32))


def take(
    rule: Any,
    policy: Any,
    carry: Any,
    model: Curved | Model,
    space: Spectral,
    objective: Callable[[Any], Array],
    work: Callable[[Array], Work],
) -> tuple[Any, Any, Info]:
    """Move the policy as `rule` chooses in `space`, judged by `objective` (policy -> true return), and report it.

    `work` counts an update in which so many candidates were tried. A gradient that is not finite leaves no finite step: nothing
    is accepted, the carry is kept, and it is counted.
    """
    theta, unravel = ravel_pytree(policy)
    new, choice = rule.choose(
        carry, space, model.J, lambda steps: jax.vmap(lambda d: objective(unravel(theta + d)))(steps)
    )
    finite = jnp.isfinite(model.J) & jnp.all(jnp.isfinite(model.gradient))
    accepted = choice.accepted & finite
    info = Info(
        J=model.J,
        gradient_norm=jnp.linalg.norm(model.gradient),
        accepted=accepted,
        damping=choice.damping,
        inner_iterations=space.products,
        nonfinite=choice.nonfinite + (~finite).astype(jnp.int32),
        work=work(choice.rollouts),
    )
    policy = unravel(jnp.where(accepted, theta + choice.step, theta))
    return policy, jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, carry), info


def scale(space: Spectral) -> Float[Array, ""]:
    """The largest eigenvalue; 1 for an operator without any (no curvature in the reward), whose steps follow the gradient."""
    top = jnp.max(space.values)
    return jnp.where(top > 0, top, 1.0).astype(space.values.dtype)
