"""One policy solver after another: the first finds a basin, the second its optimum."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from diffmbrl.core import Policy, Solver, State, Task, cond_once, where
from diffmbrl.info import Info, in_last_stage, is_finite


class RelayCarry(NamedTuple):
    """Both carries and the number of updates made; `then` is initialised again at its first update."""

    first: Any
    then: Any
    updates: Int[Array, ""]


class Sequential(eqx.Module):
    r"""Make `updates` updates with one policy solver, and all further ones with another from the policy found.

    $$\theta_{i+1} = \mathrm{first}(\theta_i)\ \ (i < \text{updates}),\qquad
      \theta_{i+1} = \mathrm{then}(\theta_i)\ \ \text{after that}$$

    No local method leaves the basin that it begins in: a method that explores finds a good one, and a second-order method
    on the exact objective finds its optimum. `Info` has the fields that both solvers report.

    Args:
        first: The solver of the first updates. If its J or gradient is not finite, `then` takes over at once from the last
            finite policy, and `Info.nonfinite` counts it.
        then: The solver of all others, initialised at the handover.
        updates: Number of updates of `first`.

    Raises:
        ValueError: If `updates` is below 1, or a solver is a planner.

    Cost: that of the solver whose turn it is.
    Reference: Levine and Koltun 2013 (a search that guides, then an optimisation of the policy itself).

    >>> import jax, optax
    >>> from diffmbrl import OptaxSolver, GaussNewton, Neural, solve, tasks
    >>> task = tasks.pendulum_swingup(horizon=20)
    >>> key = jax.random.key(0)
    >>> solver = Sequential(OptaxSolver(optax.adam, learning_rate=1e-2), GaussNewton(), updates=3)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 8), None, steps=5)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    first: Solver
    then: Solver
    updates: Int[Array, ""]

    def __init__(self, first: Solver, then: Solver, *, updates: int):
        if updates < 1:
            raise ValueError(f"updates must be at least 1, got {updates}")
        for solver in (first, then):
            if solver.kind != "policy":
                raise ValueError(f"Sequential passes on a policy; {type(solver).__name__} plans from one start")
        self.first, self.then, self.updates = first, then, jnp.asarray(updates, jnp.int32)

    @property
    def kind(self) -> str:
        """Always "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> RelayCarry:
        return RelayCarry(self.first.init(policy, task), self.then.init(policy, task), jnp.zeros((), jnp.int32))

    def on_objective_change(self, policy: Policy, carry: RelayCarry, task: Task) -> RelayCarry:
        """Tell the solver whose turn it is; the turn and the count of updates stay."""
        leading = carry.updates < self.updates
        first = where(leading, self.first.on_objective_change(policy, carry.first, task), carry.first)
        then = where(leading, carry.then, self.then.on_objective_change(policy, carry.then, task))
        return carry._replace(first=first, then=then)

    def update(
        self, policy: Any, carry: RelayCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, RelayCarry, Info]:
        def lead(policy, carry):
            moved, first, info = self.first.update(policy, carry.first, task, s0, key=key)
            info = info._replace(final=jnp.zeros((), bool))  # the second solver's objective is still to come
            lost = ~is_finite(info)
            updates = jnp.where(lost, self.updates, carry.updates)
            return where(lost, policy, moved), carry._replace(first=first, updates=updates), info

        def follow(policy, carry):
            afresh = self.then.init(policy, task)
            then = jax.tree.map(lambda x, y: jnp.where(carry.updates == self.updates, x, y), afresh, carry.then)
            policy, then, info = self.then.update(policy, then, task, s0, key=key)
            return policy, carry._replace(then=then), info._replace(final=in_last_stage(info))

        forms = [jax.eval_shape(turn, policy, carry)[2] for turn in (lead, follow)]
        shared = [name for name in Info._fields if all(getattr(form, name) is not None for form in forms)]

        def known(info):
            return info._replace(**{name: None for name in Info._fields if name not in shared})

        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), known(forms[0]))

        def reported(turn):
            def one(state):
                policy, carry, info = turn(*state[:2])
                return policy, carry, known(info)

            return one

        leading = carry.updates < self.updates
        policy, carry, info = cond_once(leading, reported(lead), (policy, carry, blank))
        lost = jnp.where(carry.updates >= self.updates, info.nonfinite, 0)
        policy, carry, info = cond_once(carry.updates >= self.updates, reported(follow), (policy, carry, info))
        info = info._replace(nonfinite=info.nonfinite + lost)
        return policy, carry._replace(updates=carry.updates + 1), info
