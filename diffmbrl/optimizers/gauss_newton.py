"""Gauss-Newton on the policy's parameters through the rollout."""

import equinox as eqx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Policy, State, Task, restart
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damped_update import StepGate, damped_update
from diffmbrl.optimizers.damping import DampingGrid, LevenbergMarquardt
from diffmbrl.optimizers.systems import Krylov, LinearSystem
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import gauss_newton


class GaussNewton(eqx.Module):
    r"""Gauss-Newton on the policy's parameters through the rollout.

    $$\theta \leftarrow \theta + d(\lambda),\quad d(\lambda) = -(G^\top M G + \lambda I)^{-1} G^\top g$$

    averaged over the starts: G stacks $d\pi/d\theta$ over time, M is the LQR Hessian along the trajectory and g the gradient of
    the cost in the actions (`curvature.py`). A step that does not improve the return is rejected, and the damping grows, so the
    return never falls. On an `OpenLoop` plan the step is iLQR's, without its feedback.

    Args:
        system: Solution of the system for every damping: `Krylov` by products, `Dense` with the matrix, `SquareRoot` without
            squaring its condition number, `Sigma` with slack between the planner's actions and the policy's.
        damping: Choice of the damping: `DampingGrid` takes the best of a dozen by their true returns, `LevenbergMarquardt`
            adapts one by the reduction ratio.
        gate: Condition on steps besides the return, or None.
        chunk: Number of time steps in one batch through the network (`curvature.gauss_newton`).

    Raises:
        TypeError: If a state has leaves that are not float.

    Cost: One rollout, its linearisation, `rank` products (each about .7 of a BPTT gradient) or one dense pass, and B rollouts
    for each damping tried.
    Reference: Schraudolph 2002, section 3; Martens 2010, section 4; Levenberg 1944, Marquardt 1963.

    >>> import jax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> policy, history = solve(GaussNewton(), Neural.init(task, key=key), task, task.starts(key, 8), key, steps=3)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    system: LinearSystem = eqx.field(default_factory=Krylov)
    damping: DampingGrid | LevenbergMarquardt = eqx.field(default_factory=DampingGrid)
    gate: StepGate | None = None
    chunk: int | None = eqx.field(static=True, default=None)

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> Float[Array, ""]:
        return self.damping.start(ravel_pytree(policy)[0].dtype)

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: Float[Array, ""], task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, Float[Array, ""], Info]:
        model = gauss_newton(policy, task, s0, key, chunk=self.chunk)
        space = self.system(model, policy, task, key)
        steps = model.g.shape[0] * model.g.shape[-1]

        gated = int(self.gate is not None)

        def work(candidates):
            return count_evaluations(
                # The rollout, its linearisation and the candidates; the gate's rollout and its linearisation.
                forward=steps * (2 + candidates + 2 * gated),
                jvp=steps * (task.n + task.m) * (1 + gated),
                # Rollout and adjoint, the linear recursions of the products, and all candidates at once.
                sequential=2 + self.system.passes(model.gradient.size) + 1 + 3 * gated,
            )

        allows = None if self.gate is None else self.gate.around(policy, model, task, s0, key)
        return damped_update(
            self.damping, policy, carry, model, space, lambda pi: mean_return(pi, task, s0, key), work, allows=allows
        )
