"""Model-free learners on the real system: the baselines."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from diffmbrl.agents.collect import RandomActions
from diffmbrl.core import Policy, Task
from diffmbrl.models.buffer import Buffer, Transition


@runtime_checkable
class Learner(Protocol):
    """Learns a policy from transitions, real or imagined, as `SAC` and `PPO` do. Its hyperparameters are leaves."""

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        """The state before the first update."""
        ...

    def policy(self, state: Any, task: Task) -> Policy:
        """The stochastic policy, which collects."""
        ...

    def best(self, state: Any, task: Task) -> Policy:
        """The policy without noise, which is evaluated."""
        ...

    def update(self, state: Any, task: Task, rows: Transition, key: PRNGKeyArray, /) -> tuple[Any, dict[str, Array]]:
        """The state after learning from a batch [N, ...] or from streams of steps [N, h, ...], and metrics."""
        ...


class OffPolicy(eqx.Module):
    """A learner from single transitions, such as `SAC`, on a replay buffer of real steps.

    All updates between two collections are one compiled scan; the metrics are means over them.

    Args:
        learner: The learner.
        updates: The number of updates after every `every` real steps.
        batch: The number of transitions of an update.
        warmup: Real steps before the first update.
        every: Real steps between two rounds of updates.
        environments: Real systems in parallel, which share these steps.

    Raises:
        ValueError: If `updates` or `batch` is below 1.

    >>> from diffmbrl.agents import SAC
    >>> OffPolicy(SAC(), every=50, updates=50).batch
    256
    """

    learner: Learner
    updates: int = eqx.field(static=True, default=100)
    batch: int = eqx.field(static=True, default=256)
    warmup: int = eqx.field(static=True, default=500)
    every: int = eqx.field(static=True, default=100)
    environments: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        at_least_one(updates=self.updates, batch=self.batch)

    def init(self, task: Task, key: PRNGKeyArray) -> PyTree:
        return self.learner.init(task, key)

    def first(self, carry: PyTree, task: Task) -> RandomActions:
        return RandomActions(task)

    def policy(self, carry: PyTree, task: Task) -> Policy:
        return self.learner.policy(carry, task)

    def best(self, carry: PyTree, task: Task) -> Policy:
        return self.learner.best(carry, task)

    def model(self, carry: PyTree, task: Task) -> None:
        """None: it learns no model."""

    def update(
        self, carry: PyTree, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PyTree, dict[str, Array]]:
        def step(carry, key):
            key_sample, key_update = jax.random.split(key)
            return self.learner.update(carry, task, buffer.sample(key_sample, self.batch), key_update)

        carry, metrics = jax.lax.scan(step, carry, jax.random.split(key, self.updates))
        return carry, jax.tree.map(jnp.mean, metrics)


class OnPolicy(eqx.Module):
    """A learner from the latest steps of its own policy, such as `PPO`, on several real systems in parallel.

    Args:
        learner: The learner.
        every: Real steps between two updates, which the systems share.
        environments: The number of real systems.

    >>> from diffmbrl.agents import PPO
    >>> OnPolicy(PPO()).every
    2048
    """

    learner: Learner
    every: int = eqx.field(static=True, default=2048)
    environments: int = eqx.field(static=True, default=16)

    @property
    def warmup(self) -> int:
        """Real steps before the first update: `every`."""
        return self.every

    def init(self, task: Task, key: PRNGKeyArray) -> PyTree:
        return self.learner.init(task, key)

    def first(self, carry: PyTree, task: Task) -> Policy:
        return self.learner.policy(carry, task)

    def policy(self, carry: PyTree, task: Task) -> Policy:
        return self.learner.policy(carry, task)

    def best(self, carry: PyTree, task: Task) -> Policy:
        return self.learner.best(carry, task)

    def model(self, carry: PyTree, task: Task) -> None:
        """None: it learns no model."""

    def update(
        self, carry: PyTree, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[PyTree, dict[str, Array]]:
        return self.learner.update(carry, task, fresh, key)


def at_least_one(**sizes: int) -> None:
    """Raise a `ValueError` for a size that is not a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
