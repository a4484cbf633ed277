"""Several first policies at once for some updates; the best of them continues alone."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from diffmbrl.core import Policy, Solver, State, Task, cond_once
from diffmbrl.info import Info, count_evaluations, is_finite
from diffmbrl.optimizers.wrappers.minibatch import in_turn
from diffmbrl.rollout import mean_return


class RacedCarry(NamedTuple):
    """All entrants; once the race is over, the first of them is the winner."""

    policies: Any  # [entrants, ...]
    carries: Any
    updates: Int[Array, ""]


class MultiStart(eqx.Module):
    r"""Run a policy solver from several first policies at once; after `updates` updates the best continues alone.

    $$\theta^{(1)} = \theta,\quad \theta^{(k)} = \text{the entries of each leaf of } \theta \text{, shuffled};\qquad
    k^* = \arg\max_k J(\theta^{(k)})$$

    A local method ends in the basin that it began in, and the quality of the basin shows early. The policy returned is the best
    of the entrants and of the one given, judged on all starts, so the return never falls and a trained policy wins its race.
    `Info` is the winner's, except J, the return of the given policy on all starts, and the work of all entrants.

    Args:
        solver: The policy solver. Around a `Continuation`, each entrant has its own stages, and the task itself judges.
        entrants: Number of first policies.
        updates: Number of updates before the choice.
        starts: Number of starts that an update of the race sees, the next ones at each update.
        key: Key of the shuffles; `jax.random.key(0)` by default.

    Raises:
        ValueError: If `entrants`, `updates` or `starts` is below 1, or `solver` is a planner.

    Cost: each update of the race, `entrants` updates of the solver on `starts` starts, and a rollout of all starts for each.
    Reference: Jamieson and Talwalkar 2016 (successive halving, here of one round).

    >>> import jax
    >>> from diffmbrl import GaussNewton, Neural, solve, tasks
    >>> task = tasks.pendulum_swingup(horizon=20)
    >>> key = jax.random.key(0)
    >>> solver = MultiStart(GaussNewton(), entrants=3, updates=2, starts=4)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 8), None, steps=4)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    solver: Solver
    updates: Int[Array, ""]
    key: PRNGKeyArray
    entrants: int = eqx.field(static=True)
    starts: int = eqx.field(static=True)

    def __init__(
        self,
        solver: Solver,
        *,
        entrants: int = 4,
        updates: int = 20,
        starts: int = 64,
        key: PRNGKeyArray | None = None,
    ):
        for name, number in (("entrants", entrants), ("updates", updates), ("starts", starts)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if solver.kind != "policy":
            raise ValueError("a race is of policies, judged by many starts; a planner has only one start")
        self.solver, self.entrants, self.starts = solver, entrants, starts
        self.updates = jnp.asarray(updates, jnp.int32)
        self.key = jax.random.key(0) if key is None else key

    @property
    def kind(self) -> str:
        """Always "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> RacedCarry:
        keys = jax.random.split(self.key, self.entrants - 1)
        others = jax.vmap(lambda k: _shuffled(policy, k))(keys)
        policies = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), policy, others)
        carries = jax.vmap(lambda pi: self.solver.init(pi, task))(policies)
        return RacedCarry(policies, carries, jnp.zeros((), jnp.int32))

    def on_objective_change(self, policy: Policy, carry: RacedCarry, task: Task) -> RacedCarry:
        """Tell the solver of every entrant; a race that is over stays over, and its winner continues from `policy`."""
        racing = carry.updates < self.updates
        policies = jax.tree.map(
            lambda entrants, x: jnp.where(racing, entrants, entrants.at[0].set(x)), carry.policies, policy
        )
        carries = jax.vmap(lambda pi, inner: self.solver.on_objective_change(pi, inner, task))(policies, carry.carries)
        return carry._replace(carries=carries)

    def update(
        self, policy: Any, carry: RacedCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, RacedCarry, Info]:
        blank = jax.eval_shape(lambda: self._alone(policy, carry, task, s0, key))[2]
        info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)

        racing = carry.updates < self.updates
        state = cond_once(racing, lambda state: self._race(state[0], state[1], task, s0, key), (policy, carry, info))
        return cond_once(~racing, lambda state: self._alone(state[0], state[1], task, s0, key), state)

    def _alone(self, policy: Any, carry: RacedCarry, task: Task, s0: State, key: PRNGKeyArray | None):
        inner = jax.tree.map(lambda x: x[0], carry.carries)
        policy, inner, info = self.solver.update(policy, inner, task, s0, key=key)
        carries = jax.tree.map(lambda all, x: all.at[0].set(x), carry.carries, inner)
        return policy, carry._replace(carries=carries, updates=carry.updates + 1), info

    def _race(self, policy: Any, carry: RacedCarry, task: Task, s0: State, key: PRNGKeyArray | None):
        batch = jax.tree.leaves(s0)[0].shape[0]
        # If there are few starts, all entrants see all of them.
        some = (task, s0) if batch <= self.starts else in_turn(task, s0, carry.updates, self.starts)

        def update(policy, inner):
            return self.solver.update(policy, inner, *some, key=key)

        policies, carries, infos = jax.vmap(update)(carry.policies, carry.carries)
        before = mean_return(policy, task, s0, key)
        J = jax.vmap(lambda pi: mean_return(pi, task, s0, key))(policies)
        finite = jnp.isfinite(J) & is_finite(infos)
        best = jnp.argmax(jnp.where(finite, J, -jnp.inf))
        # If no entrant is finite, keep the previous state.
        going = jnp.isfinite(before) & jnp.any(finite)
        better = going & (J[best] > before)
        info = jax.tree.map(lambda x: x[best], infos)
        work = jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.int32), infos.work)
        extra = count_evaluations(forward=batch * task.horizon * (self.entrants + 1), sequential=1)
        work = jax.tree.map(jnp.add, work._replace(sequential=jnp.max(infos.work.sequential)), extra)
        nonfinite = jnp.sum(infos.nonfinite, dtype=jnp.int32) + (~jnp.isfinite(before)).astype(jnp.int32)
        info = info._replace(J=before, accepted=better, nonfinite=nonfinite, work=work)
        # The last update of the race puts the winner first.
        over = carry.updates + 1 >= self.updates
        order = jnp.where(over, jnp.full(self.entrants, best), jnp.arange(self.entrants))
        winner = jax.tree.map(lambda x, old: jnp.where(better, x[best], old), policies, policy)
        policies, carries = jax.tree.map(lambda x: x[order], (policies, carries))
        moved = RacedCarry(policies, carries, carry.updates + 1)
        return winner, jax.tree.map(lambda new, old: jnp.where(going, new, old), moved, carry), info


def _shuffled(policy: Any, key: PRNGKeyArray) -> Any:
    leaves, tree = jax.tree.flatten(policy)
    keys = jax.random.split(key, len(leaves))
    mixed = [jax.random.permutation(k, x.ravel()).reshape(x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, mixed)
