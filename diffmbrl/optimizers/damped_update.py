"""The update of every solver that chooses its step by a rule of `damping.py`."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task
from diffmbrl.info import EvaluationCounts, Info, Quadratic
from diffmbrl.optimizers.damping import Choice, Evaluate, Proposals
from diffmbrl.second_order.curvature import CurvatureModel, Curved
from diffmbrl.second_order.krylov import Spectral, TruncatedCG
from diffmbrl.second_order.projection import projection_gap

Carry = TypeVar("Carry")


@runtime_checkable
class StepRule(Protocol[Carry]):
    """A choice among the steps of a space, by their true returns."""

    def choose(self, carry: Carry, space: Any, J: Float[Array, ""], evaluate: Evaluate, /) -> tuple[Carry, Choice]:
        """The next carry, and the step."""
        ...

    def refuse(self, carry: Carry, /) -> Carry:
        """The carry after a refused step, which makes the next one shorter."""
        ...


@runtime_checkable
class StepGate(Protocol):
    """A condition on steps besides the return."""

    def around(
        self, policy: Policy, model: Curved | CurvatureModel, task: Task, s0: State, key: PRNGKeyArray | None
    ) -> Callable[[Policy], Bool[Array, ""]]:
        """Build the condition on the policies that may follow `policy`.

        Args:
            policy: Current policy.
            model: Its model.
            task: Task.
            s0: Start states, leaves of shape [B, ...].
            key: Key of the noise in policy and dynamics.

        Returns:
            The condition, a function of the next policy.
        """
        ...


def damped_update(
    rule: StepRule[Carry],
    policy: Policy,
    carry: Carry,
    model: Curved | CurvatureModel,
    space: Spectral | TruncatedCG | Proposals | tuple[Spectral, ...],
    objective: Callable[[Policy], Array],
    work: Callable[[int], EvaluationCounts],
    *,
    allows: Callable[[Policy], Bool[Array, ""]] | None = None,
) -> tuple[Policy, Carry, Info]:
    """Move a policy by the step that a rule chooses, and report the update.

    A gradient that is not finite leaves no finite step: the policy and the carry stay, and `Info.nonfinite` counts it.

    Args:
        rule: Rule that chooses the step.
        policy: Policy or plan.
        carry: The rule's carry.
        model: Value and gradient of -J at the policy.
        space: Space in which the rule chooses. Of several, which share the gradient, `Info` reports the first.
        objective: Function from a policy to its true return.
        work: Function from the number of candidates to the evaluations that the update spent.
        allows: Condition on the next policy; a step that violates it is refused.

    Returns:
        The policy, the rule's carry, and the report.
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


def _share(ritz: Array) -> Array:
    """The share of the negative eigenvalues in the sum of absolute values."""
    total = jnp.sum(jnp.abs(ritz))
    return jnp.sum(jnp.maximum(-ritz, 0)) / jnp.where(total > 0, total, 1.0)
