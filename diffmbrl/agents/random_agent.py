"""Random actions, the lowest baseline of agents."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from diffmbrl.agents.collect import RandomActions
from diffmbrl.core import Dynamics, Task
from diffmbrl.models.buffer import Buffer, Transition


class RandomAgent(eqx.Module):
    """Takes random actions within the limits, and learns nothing.

    Args:
        warmup: Real steps before the first update.
        every: Real steps between two updates, which do nothing.
        environments: Real systems in parallel, which share these steps.

    >>> RandomAgent(every=20).warmup
    100
    """

    warmup: int = eqx.field(static=True, default=100)
    every: int = eqx.field(static=True, default=100)
    environments: int = eqx.field(static=True, default=1)

    def init(self, task: Task, key: PRNGKeyArray) -> PyTree:
        return ()

    def first(self, carry: PyTree, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: PyTree, task: Task) -> RandomActions:
        return RandomActions(task)

    def best(self, carry: PyTree, task: Task) -> RandomActions:
        return RandomActions(task)

    def model(self, carry: PyTree, task: Task) -> Dynamics | None:
        """None: it learns no model."""
        return None

    def update(
        self, carry: PyTree, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PyTree, dict[str, Array]]:
        return carry, {"size": jnp.asarray(buffer.size, jnp.int32)}
