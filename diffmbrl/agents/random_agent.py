"""An agent that learns nothing: random actions, the baseline below all."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from diffmbrl.agents.collect import RandomActions
from diffmbrl.core import Dynamics, Task
from diffmbrl.models.buffer import Buffer, Transition


class RandomAgent(eqx.Module):
    """Random actions within the limits, `every` real steps at a time.

    >>> RandomAgent(every=20).warmup
    100
    """

    warmup: int = eqx.field(static=True, default=100)
    every: int = eqx.field(static=True, default=100)
    environments: int = eqx.field(static=True, default=1)

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        return ()

    def first(self, carry: Any, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: Any, task: Task) -> RandomActions:
        return RandomActions(task)

    def best(self, carry: Any, task: Task) -> RandomActions:
        return RandomActions(task)

    def model(self, carry: Any, task: Task) -> Dynamics | None:
        """It learns no model."""
        return None

    def update(
        self, carry: Any, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Array]]:
        return carry, {"size": jnp.asarray(buffer.size, jnp.int32)}
