"""Gauss-Newton on the policy's parameters through the rollout."""

from typing import Any

import equinox as eqx
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.info import Info, count_evaluations
from diffmbrl.optimizers.damping import DampingGrid, LevenbergMarquardt, StepGate, damped_update
from diffmbrl.optimizers.systems import Krylov, LinearSystem
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import gauss_newton


class GaussNewton(eqx.Module):
    r"""Gauss-Newton on the policy's parameters through the rollout.

    $$\theta \leftarrow \theta + d(\lambda),\quad d(\lambda) = -(G^\top M G + \lambda I)^{-1} G^\top g$$

    averaged over the starts, where G stacks $d\pi/d\theta$ over time, M is the LQR Hessian along the trajectory and g the
    gradient of the cost in the actions (`curvature.py`). `system` says how it is solved, for every damping from one
    factorisation: `Krylov(rank)` by products, `Dense()` with the matrix, `SquareRoot()` without squaring its condition,
    `Sigma(sigma)` with slack between the planner's actions and the policy's, `Preconditioned(...)` in the metric of an
    approximation. `damping` says which is taken: `DampingGrid()` the best
    of a dozen by their true returns, `LevenbergMarquardt()` one, adapted by the reduction ratio. On an `OpenLoop` plan the step
    is iLQR's, without its feedback.

    The return never falls: a step that does not improve it is not taken, and the damping grows. With a `gate`, neither is one
    that makes the closed loop much more sensitive.

    Shapes: policy leaves any; `s0` [B, ...]. Cost: one rollout, its linearisation, `rank` products (each about .7 of a BPTT
    gradient) or one dense pass, and B rollouts for each damping tried. `chunk` is `curvature.gauss_newton`'s.
    Raises: `TypeError` if a state has leaves that are not float.
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
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> Any:
        return self.damping.start(ravel_pytree(policy)[0].dtype)

    def update(
        self, policy: Any, carry: Any, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Any, Info]:
        model = gauss_newton(policy, task, s0, key, chunk=self.chunk)
        space = self.system(model, policy, task, key)
        steps = model.g.shape[0] * model.g.shape[-1]

        gated = int(self.gate is not None)

        def work(candidates):
            return count_evaluations(
                # The rollout, its linearisation, the candidates; and the gate's rollout, linearised.
                forward=steps * (2 + candidates + 2 * gated),
                jvp=steps * (task.n + task.m) * (1 + gated),
                # Rollout and adjoint, the products' linear recursions, and the candidates all at once.
                sequential=2 + self.system.passes(model.gradient.size) + 1 + 3 * gated,
            )

        allows = None if self.gate is None else self.gate.around(policy, model, task, s0, key)
        return damped_update(
            self.damping, policy, carry, model, space, lambda pi: mean_return(pi, task, s0, key), work, allows=allows
        )
