"""What an update reports of itself, and what is read off that."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class EvaluationCounts(NamedTuple):
    """Work done: steps of f, tangents pushed through f, cotangents pulled through f; and how much of it was sequential.

    `sequential` counts passes over the horizon that run one after another, whatever their batch: rollouts, reverse passes and
    the linear recursions of second-order methods alike. It is what bounds the time on a device with cores to spare.
    """

    forward: Int[Array, "*batch"]
    jvp: Int[Array, "*batch"]
    vjp: Int[Array, "*batch"]
    sequential: Int[Array, "*batch"]


def count_evaluations(forward: Any = 0, jvp: Any = 0, vjp: Any = 0, sequential: Any = 0) -> EvaluationCounts:
    """A `EvaluationCounts` from Python or traced whole numbers."""
    return EvaluationCounts(*(jnp.asarray(x, jnp.int32) for x in (forward, jvp, vjp, sequential)))


class Quadratic(NamedTuple):
    """What a second-order method knows of its quadratic model, at no cost beyond the step."""

    ritz: Float[Array, "*batch k"]  # Ritz values or eigenvalues of the curvature, as they are; none for truncated CG
    negative: Float[Array, "*batch"]  # share of negative ones in the sum of their absolute values
    dampings: Float[Array, "*batch c"]  # of the candidates: dampings of a path, radii, or one
    predicted: Float[Array, "*batch c"]  # improvement of J that the model promises each of them
    improved: Float[Array, "*batch c"]  # and its true improvement
    gap: Float[Array, "*batch"]  # projection gap of the step taken (`projection.py`); NaN without the planner's M


class Info(NamedTuple):
    """What a person needs to know of one update. All are measured at the policy that the update was given."""

    J: Float[Array, "*batch"]  # return of the objective in force (a continuation stage's, not always the task's)
    gradient_norm: Float[Array, "*batch"] | None  # |dJ/dtheta|; None for a method that takes no gradient
    accepted: Bool[Array, "*batch"]  # whether the update changed the policy
    damping: Float[Array, "*batch"]  # the damping of the step taken; 0 for a method without one
    inner_iterations: Int[Array, "*batch"]  # Krylov dimensions, line-search trials, backward passes
    nonfinite: Int[Array, "*batch"]  # non-finite returns or gradients met, the rejected candidates' included
    work: EvaluationCounts
    model: Quadratic | None = None  # of second-order policy methods
    violation: Float[Array, "*batch"] | None = None  # largest violation of a constraint, of methods that enforce them
    merit: Float[Array, "*batch"] | None = None  # what a line search raises where that is not J: gaps, constraints too
    # Of a schedule: whether the objective in force was its last, so that to have converged is to be done.
    final: Bool[Array, "*batch"] | None = None


def is_finite(info: Info) -> Bool[Array, "*batch"]:
    """Whether J and the gradient of an update are finite; a run ends where they are not."""
    finite = jnp.isfinite(info.J)
    return finite if info.gradient_norm is None else finite & jnp.isfinite(info.gradient_norm)


def in_last_stage(info: Info) -> Bool[Array, "*batch"]:
    """Whether the objective of an update was the last of its schedule, where there is one; only there a run can converge."""
    return jnp.ones(jnp.shape(info.J), bool) if info.final is None else info.final
