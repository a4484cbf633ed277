"""Newton's method on the policy's parameters by truncated conjugate gradients in a trust region."""

from collections.abc import Callable

import equinox as eqx
import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, as_float, restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damped_update import StepGate, damped_update
from diffmbrl.optimizers.damping import TrustRegion
from diffmbrl.optimizers.systems import Preconditioner
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import CurvatureModel, Curved, Vector, hessian
from diffmbrl.second_order.krylov import conjugate_gradients


class NewtonCG(eqx.Module):
    r"""Newton-CG with Steihaug's trust region on $-J(\theta)$.

    $$d \approx \arg\min_{|d| \le \Delta} g^\top d + \tfrac12 d^\top N d$$

    by conjugate gradients, which end at a small residual, at the boundary, or at a direction of negative curvature, which they
    follow to the boundary. `KrylovNewton` judges a dozen dampings by their returns; this solver trusts one radius. The return
    never falls.

    Args:
        region: Rule that adapts the radius.
        tolerance: Residual, relative to |g|, at which conjugate gradients end.
        iterations: Largest number of products in one update.
        curvature: Model of -J whose matrix is N: `hessian`, or `gauss_newton`.
        preconditioner: Approximation of the Gauss-Newton matrix, in whose norm the radius then is; None for the identity.
        gate: Condition on steps besides the return, or None.

    Raises:
        TypeError: If a preconditioner is given for the true Hessian.

    Cost: Up to `iterations` products (2.4 BPTT gradients each of the Hessian, .7 of Gauss-Newton), and B rollouts.
    Reference: Steihaug 1983; Nocedal and Wright, Numerical Optimization, algorithms 4.1 and 7.2.

    >>> import jax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy, history = solve(NewtonCG(), Neural.init(task, key=key), task, task.starts(key, 8), key, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    region: TrustRegion = eqx.field(default_factory=TrustRegion)
    tolerance: Float[Array, ""] = eqx.field(default_factory=lambda: as_float(0.1), converter=as_float)
    iterations: int = eqx.field(static=True, default=30)
    curvature: Callable[..., Curved | CurvatureModel] = eqx.field(static=True, default=hessian)
    preconditioner: Preconditioner | None = None
    gate: StepGate | None = None

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> Float[Array, ""]:
        return self.region.start(ravel_pytree(policy)[0].dtype)

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, Float[Array, ""], Info]:
        model = self.curvature(policy, task, s0, key)
        found = conjugate_gradients(
            model.product,
            model.gradient,
            radius=carry,
            tolerance=self.tolerance,
            iterations=self.iterations,
            preconditioner=self._inverse(model, policy, task, key),
        )
        steps = jax.tree.leaves(s0)[0].shape[0] * task.horizon
        # Rollouts that the gate linearises: the candidate's, and the policy's where the model has none.
        gated = 0 if self.gate is None else 2 - isinstance(model, CurvatureModel)

        def work(candidates):
            forward, tangents = steps * (2 + candidates + 2 * gated), steps * (task.n + task.m)
            if isinstance(model, CurvatureModel):
                return count_evaluations(
                    forward=forward,
                    jvp=tangents * (1 + gated),
                    sequential=2 + 2 * found.products + 1 + int(self.preconditioner is not None) + 3 * gated,
                )
            return count_evaluations(
                forward=forward,
                jvp=steps * found.products + tangents * gated,
                vjp=steps * (1 + found.products),
                sequential=3 + 2 * found.products + 1 + 3 * gated,
            )

        allows = None if self.gate is None else self.gate.around(policy, model, task, s0, key)
        return damped_update(
            self.region, policy, carry, model, found, lambda pi: mean_return(pi, task, s0, key), work, allows=allows
        )

    def _inverse(
        self, model: Curved | CurvatureModel, policy: Policy, task: Task, key: PRNGKeyArray | None
    ) -> Callable[[Vector], Vector] | None:
        if self.preconditioner is None:
            return None
        if not isinstance(model, CurvatureModel):
            raise TypeError(
                f"{type(self.preconditioner).__name__} approximates the Gauss-Newton matrix: "
                "NewtonCG(curvature=gauss_newton, preconditioner=...), or leave the preconditioner out"
            )
        return self.preconditioner(model, policy, task, key).inverse
