"""Mini-batches of a pool of starts, with noise that is the same for several updates."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from diffmbrl.core import Solver, State, Task, reweighted
from diffmbrl.info import Info


class SampledCarry(NamedTuple):
    """The inner solver's carry, and how many updates were made."""

    inner: Any
    updates: Int[Array, ""]


class MiniBatch(eqx.Module):
    r"""Run a policy solver on a mini-batch of the starts, the next one after every few updates.

    Update i sees starts $b\,\text{size}, \dots$ of the pool, $b = \lfloor i / \text{every} \rfloor$, cyclically, and noise
    drawn from the key of block b. Within a block all updates and all candidates of an update face the same noise (common random
    numbers), so that a line search or a damping path compares policies and not draws; the solver's carry lives on.

    Args:
        solver: The policy solver. A second-order method needs large batches: few starts do not determine its curvature.
        size: Number of starts in a mini-batch. A pool of `size` times the number of blocks gives each block fresh ones.
        every: Number of updates of a block.
        key: Key of the noise; `jax.random.key(0)` by default.

    Raises:
        ValueError: If `size` or `every` is below 1, the pool is smaller than `size`, or `solver` is a planner.

    Reference: Byrd, Chin, Nocedal, Wu 2012 (sample sizes of second-order methods); Ng and Jordan 2000 (fixed noise).

    >>> import jax
    >>> from diffmbrl import GaussNewton, Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> solver = MiniBatch(GaussNewton(), size=8, every=2)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 32), None, steps=4)
    >>> history.updates
    4
    """

    solver: Solver
    key: PRNGKeyArray
    size: int = eqx.field(static=True)
    every: int = eqx.field(static=True)

    def __init__(self, solver: Solver, *, size: int, every: int = 1, key: PRNGKeyArray | None = None):
        for name, number in (("size", size), ("every", every)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if solver.kind != "policy":
            raise ValueError("mini-batches are of starts, and a planner has only one")
        self.solver, self.size, self.every = solver, size, every
        self.key = jax.random.key(0) if key is None else key

    @property
    def kind(self) -> str:
        """Always "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> SampledCarry:
        return SampledCarry(self.solver.init(policy, task), jnp.zeros((), jnp.int32))

    def on_objective_change(self, policy: Any, carry: SampledCarry, task: Task) -> SampledCarry:
        """Begin with the first block again, and tell the inner solver."""
        return SampledCarry(self.solver.on_objective_change(policy, carry.inner, task), jnp.zeros((), jnp.int32))

    def update(
        self, policy: Any, carry: SampledCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, SampledCarry, Info]:
        pool = jax.tree.leaves(s0)[0].shape[0]
        if pool < self.size:
            raise ValueError(f"a mini-batch of {self.size} needs as many starts, got {pool}")
        block = carry.updates // self.every
        task, batch = in_turn(task, s0, block, self.size)
        # No key asks for no noise.
        noise = None if key is None else jax.random.fold_in(self.key, block)
        policy, inner, info = self.solver.update(policy, carry.inner, task, batch, key=noise)
        return policy, SampledCarry(inner, carry.updates + 1), info


def in_turn(task: Task, s0: State, turn: Int[Array, ""], size: int) -> tuple[Task, State]:
    """The task with the weights of `size` starts from number `turn * size` on, cyclically, and those starts."""
    pool = jax.tree.leaves(s0)[0].shape[0]
    chosen = (turn * size + jnp.arange(size, dtype=jnp.int32)) % pool
    if task.weights.ndim == 2:
        task = reweighted(task, task.weights[chosen])
    return task, jax.tree.map(lambda x: x[chosen], s0)
