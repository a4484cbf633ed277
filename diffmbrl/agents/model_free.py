"""Learners on the real system alone, without a model: the baselines."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from diffmbrl.agents.collect import RandomActions
from diffmbrl.core import Task
from diffmbrl.models.buffer import Buffer, Transition


class OffPolicy(eqx.Module):
    """A learner of single transitions, such as `SAC`, on a replay buffer: `updates` batches for every `every` real steps.

    All updates are one compiled scan. The numbers said are means over them.
    Raises: `ValueError` if `updates` or `batch` is below 1.

    >>> from diffmbrl.agents import SAC
    >>> OffPolicy(SAC(), every=50, updates=50).batch
    256
    """

    learner: Any
    updates: int = eqx.field(static=True, default=100)
    batch: int = eqx.field(static=True, default=256)
    warmup: int = eqx.field(static=True, default=500)
    every: int = eqx.field(static=True, default=100)
    environments: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        at_least_one(updates=self.updates, batch=self.batch)

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        return self.learner.init(task, key)

    def first(self, carry: Any, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: Any, task: Task) -> Any:
        return self.learner.policy(carry, task)

    def best(self, carry: Any, task: Task) -> Any:
        return self.learner.best(carry, task)

    def model(self, carry: Any, task: Task) -> None:
        """It learns no model."""

    def update(
        self, carry: Any, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Array]]:
        def step(carry, key):
            key_sample, key_update = jax.random.split(key)
            return self.learner.update(carry, task, buffer.sample(key_sample, self.batch), key_update)

        carry, said = jax.lax.scan(step, carry, jax.random.split(key, self.updates))
        return carry, jax.tree.map(jnp.mean, said)


class OnPolicy(eqx.Module):
    """A learner of its policy's own latest steps, such as `PPO`, on `environments` real systems side by side.

    >>> from diffmbrl.agents import PPO
    >>> OnPolicy(PPO()).every
    2048
    """

    learner: Any
    every: int = eqx.field(static=True, default=2048)
    environments: int = eqx.field(static=True, default=16)

    @property
    def warmup(self) -> int:
        """The first update's steps."""
        return self.every

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        return self.learner.init(task, key)

    def first(self, carry: Any, task: Task) -> Any:
        return self.learner.policy(carry, task)

    def policy(self, carry: Any, task: Task) -> Any:
        return self.learner.policy(carry, task)

    def best(self, carry: Any, task: Task) -> Any:
        return self.learner.best(carry, task)

    def model(self, carry: Any, task: Task) -> None:
        """It learns no model."""

    def update(
        self, carry: Any, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Array]]:
        return self.learner.update(carry, task, fresh, key)


def at_least_one(**sizes: int) -> None:
    """Raises: `ValueError` for a size that is no whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
