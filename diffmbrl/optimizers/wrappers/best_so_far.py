"""The best policy that a solver has visited."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from diffmbrl.core import Policy, Solver, State, Task, where
from diffmbrl.info import Info, count_evaluations
from diffmbrl.rollout import mean_return


class Walk(NamedTuple):
    """The solver's current policy, which need not be its best, and its carry."""

    policy: Any
    inner: Any


class BestSoFar(eqx.Module):
    r"""Return the policy with the largest return among all that a policy solver visits.

    $$\theta_{i+1} = \begin{cases} \vartheta_{i+1} & J(\vartheta_{i+1}) > J(\theta_i) \\ \theta_i & \text{else} \end{cases},
    \qquad \vartheta_{i+1} = \mathrm{solver}(\vartheta_i),\quad \vartheta_0 = \theta_0$$

    The solver continues from its own policy vartheta: a schedule of discounts may cross worse policies on its way to better
    ones, or lose a good one. `Info` is the solver's, except J, the return of theta, and `accepted`, whether theta changed.

    Args:
        solver: The policy solver.

    Raises:
        ValueError: If `solver` is a planner, whose plans are each judged on their own.

    Cost: the solver's and two rollouts.
    Reference: Chamberlain et al. 1982, the watchdog technique (steps need not improve; the best point is what one returns to).

    >>> import jax, optax
    >>> from diffmbrl import OptaxSolver, Neural, solve, tasks
    >>> task = tasks.pendulum_swingup(horizon=20)
    >>> key = jax.random.key(0)
    >>> wild = BestSoFar(OptaxSolver(optax.sgd, learning_rate=1.0))
    >>> policy, history = solve(wild, Neural.init(task, key=key), task, task.starts(key, 8), None, steps=5)
    >>> bool((history.info.J[1:] >= history.info.J[:-1]).all())
    True
    """

    solver: Solver

    def __init__(self, solver: Solver):
        if solver.kind != "policy":
            raise ValueError(f"BestSoFar judges policies by many starts; {type(solver).__name__} plans from one")
        self.solver = solver

    @property
    def kind(self) -> str:
        """Always "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> Walk:
        return Walk(policy, self.solver.init(policy, task))

    def on_objective_change(self, policy: Policy, carry: Walk, task: Task) -> Walk:
        """Continue from the best policy under the old objective; its return is measured again at the next update."""
        return Walk(policy, self.solver.on_objective_change(policy, carry.inner, task))

    def update(
        self, policy: Any, carry: Walk, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, Walk, Info]:
        reached, inner, info = self.solver.update(carry.policy, carry.inner, task, s0, key=key)
        # Both under the same noise: a return of an earlier update may be of other noise or other starts.
        J, J_reached = mean_return(policy, task, s0, key), mean_return(reached, task, s0, key)
        better = jnp.isfinite(J_reached) & ~(J_reached <= J)  # than what is not finite, anything finite
        best = where(better, reached, policy)
        steps = 2 * jax.tree.leaves(s0)[0].shape[0] * task.horizon
        work = jax.tree.map(jnp.add, info.work, count_evaluations(forward=steps, sequential=1))
        return best, Walk(reached, inner), info._replace(J=J, accepted=better, work=work)
