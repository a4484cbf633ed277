"""The report of one update of a solver, and tests of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int


class EvaluationCounts(NamedTuple):
    """Counts of evaluations of the dynamics f, and of passes over the horizon.

    Args:
        forward: Steps of f.
        jvp: Tangents pushed through f.
        vjp: Cotangents pulled through f.
        sequential: Passes over the horizon that run one after another, whatever their batch: rollouts, reverse passes and
            linear recursions. They bound the time on a device with cores to spare.
    """

    forward: Int[Array, "*batch"]
    jvp: Int[Array, "*batch"]
    vjp: Int[Array, "*batch"]
    sequential: Int[Array, "*batch"]


def count_evaluations(
    forward: ArrayLike = 0, jvp: ArrayLike = 0, vjp: ArrayLike = 0, sequential: ArrayLike = 0
) -> EvaluationCounts:
    """Convert Python or traced whole numbers to `EvaluationCounts`.

    Args:
        forward, jvp, vjp, sequential: The counts.

    Returns:
        The counts as int32 arrays.
    """
    return EvaluationCounts(*(jnp.asarray(x, jnp.int32) for x in (forward, jvp, vjp, sequential)))


class Quadratic(NamedTuple):
    """The quadratic model of a second-order method, reported at no cost beyond the step.

    Args:
        ritz: Ritz values or eigenvalues of the curvature, shape [*batch, k]; k = 0 for truncated CG.
        negative: Share of the negative ones in the sum of their absolute values, shape [*batch].
        dampings: Dampings or radii of the candidate steps, shape [*batch, c].
        predicted: Improvement of J that the model predicts for each candidate, shape [*batch, c].
        improved: True improvement of J by each candidate, shape [*batch, c].
        gap: Projection gap of the step taken (`projection.py`), shape [*batch]; NaN for methods without the matrix M.
    """

    ritz: Float[Array, "*batch k"]
    negative: Float[Array, "*batch"]
    dampings: Float[Array, "*batch c"]
    predicted: Float[Array, "*batch c"]
    improved: Float[Array, "*batch c"]
    gap: Float[Array, "*batch"]


class Info(NamedTuple):
    """The report of one update, measured at the policy that the update was given; shapes are [*batch].

    Args:
        J: Return under the objective in force, which in a stage of a continuation is not the task's.
        gradient_norm: |dJ/dtheta|; None for a method that takes no gradient.
        accepted: Whether the update changed the policy.
        damping: Damping of the step taken; 0 for a method without one.
        inner_iterations: Krylov dimensions, line-search trials or backward passes.
        nonfinite: Number of non-finite returns and gradients met, those of rejected candidates included.
        work: Evaluations that the update took.
        model: Quadratic model, of second-order policy methods.
        violation: Largest violation of a constraint, of methods that enforce constraints.
        merit: Value that the line search raises, where it is not J but counts gaps and constraints too.
        final: Whether the objective in force was the last of its schedule; None without a schedule.
    """

    J: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"] | None
    accepted: Bool[Array, "*batch"]
    damping: Float[Array, "*batch"]
    inner_iterations: Int[Array, "*batch"]
    nonfinite: Int[Array, "*batch"]
    work: EvaluationCounts
    model: Quadratic | None = None
    violation: Float[Array, "*batch"] | None = None
    merit: Float[Array, "*batch"] | None = None
    final: Bool[Array, "*batch"] | None = None


def is_finite(info: Info) -> Bool[Array, "*batch"]:
    """Whether J and the gradient of an update are finite; if not, a run ends.

    Args:
        info: The report of an update.

    Returns:
        True where both are finite, shape [*batch].
    """
    finite = jnp.isfinite(info.J)
    return finite if info.gradient_norm is None else finite & jnp.isfinite(info.gradient_norm)


def in_last_stage(info: Info) -> Bool[Array, "*batch"]:
    """Whether the objective of an update was the last of its schedule, in which alone a run can converge.

    Args:
        info: The report of an update.

    Returns:
        True in the last stage, or without a schedule, shape [*batch].
    """
    return jnp.ones(jnp.shape(info.J), bool) if info.final is None else info.final
