"""Practice of a model-free learner in a model: on batches of imagined and real rows, or on imagined streams."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.agents.imagine import imagine
from diffmbrl.agents.model_free import Learner, at_least_one
from diffmbrl.core import Task, parameter
from diffmbrl.models.buffer import Buffer, Transition, flat


@runtime_checkable
class Practice(Protocol):
    """Lets a learner practise in an ensemble after each fit."""

    def __call__(
        self, learner: Learner, state: Any, task: Task, members: Any, buffer: Buffer, length: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[Any, dict[str, Array]]:  # fmt: skip
        """The learner's state after practising on branches of `length` steps from states of the buffer, and metrics."""
        ...


class OffPolicyPractice(eqx.Module):
    r"""Practice on batches of single rows, for learners from rows of any policy such as SAC.

    In each round the current policy takes `steps` steps in the model on each branch, and the learner then makes
    `updates / rounds` updates. A non-finite imagined row of a batch is replaced by a real one.

    Args:
        real: The probability that a row of a batch is real; else it is one of the latest imagined rows.
        updates: The number of updates after each fit.
        batch: The number of rows of an update.
        rounds: The number of rounds, which divides `updates`.
        branches: The number of branches in parallel.
        steps: The number of steps of each branch in a round; a branch that ends is followed by another.

    Raises:
        ValueError: If a size is below 1, or `rounds` does not divide `updates`.

    Cost: `updates` updates and `branches steps rounds` rows of the model.
    Reference: Janner et al. 2019, algorithm 2.

    >>> OffPolicyPractice(updates=200, rounds=4).batch
    256
    """

    real: Float[Array, ""] = parameter(0.05)
    updates: int = eqx.field(static=True, default=1000)
    batch: int = eqx.field(static=True, default=256)
    rounds: int = eqx.field(static=True, default=4)
    branches: int = eqx.field(static=True, default=400)
    steps: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        at_least_one(
            updates=self.updates, batch=self.batch, rounds=self.rounds, branches=self.branches, steps=self.steps
        )
        if self.updates % self.rounds:
            raise ValueError(f"updates ({self.updates}) must be a multiple of rounds ({self.rounds})")

    def __call__(
        self, learner: Learner, state: PyTree, task: Task, members: PyTree, buffer: Buffer, length: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[PyTree, dict[str, Array]]:  # fmt: skip
        def one_round(state, key):
            key_branches, key_updates = jax.random.split(key)
            policy = learner.policy(state, task)
            sizes = {"branches": self.branches, "steps": self.steps, "length": length}
            rows, keep = flat(imagine(policy, task, members, buffer, key_branches, **sizes))

            def step(state, key):
                key_mix, key_update = jax.random.split(key)
                return learner.update(state, task, self.mixed(rows, keep, buffer, key_mix), key_update)

            state, losses = jax.lax.scan(step, state, jax.random.split(key_updates, self.updates // self.rounds))
            return state, (jax.tree.map(jnp.mean, losses), jnp.sum(~keep, dtype=jnp.int32))

        return _summed(jax.lax.scan(one_round, state, jax.random.split(key, self.rounds)))

    def mixed(self, rows: Transition, keep: Bool[Array, " N"], buffer: Buffer, key: PRNGKeyArray) -> Transition:
        """Draw a batch of imagined and real rows.

        Args:
            rows: Imagined rows, [N, ...].
            keep: Which of them are finite, shape [N].
            buffer: The real transitions.
            key: The random key.

        Returns:
            The batch, [batch, ...].
        """
        key_real, key_imagined, key_which = jax.random.split(key, 3)
        real = buffer.sample(key_real, self.batch)
        chosen = jax.random.randint(key_imagined, (self.batch,), 0, keep.shape[0])
        use_real = (jax.random.uniform(key_which, (self.batch,), self.real.dtype) < self.real) | ~keep[chosen]

        def pick(x, y):
            return jnp.where(use_real.reshape(-1, *[1] * (x.ndim - 1)), x, y[chosen])

        return jax.tree.map(pick, real, rows)


class OnPolicyPractice(eqx.Module):
    """Practice on imagined streams of the current policy, for learners such as PPO.

    Streams consist of branches, at whose ends the critic estimates the remaining return. A non-finite row does not count.

    Args:
        updates: The number of updates after each fit, each on new streams.
        branches: The number of streams in parallel.
        steps: The number of steps of each stream.

    Raises:
        ValueError: If a size is below 1.

    Cost: `branches steps updates` rows of the model, and the updates on them.
    Reference: Kurutach et al. 2018, algorithm 2.

    >>> OnPolicyPractice(updates=2).steps
    25
    """

    updates: int = eqx.field(static=True, default=10)
    branches: int = eqx.field(static=True, default=100)
    steps: int = eqx.field(static=True, default=25)

    def __check_init__(self):
        at_least_one(updates=self.updates, branches=self.branches, steps=self.steps)

    def __call__(
        self, learner: Learner, state: PyTree, task: Task, members: PyTree, buffer: Buffer, length: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[PyTree, dict[str, Array]]:  # fmt: skip
        def step(state, key):
            key_branches, key_update = jax.random.split(key)
            policy = learner.policy(state, task)
            sizes = {"branches": self.branches, "steps": self.steps, "length": length}
            rows, keep = imagine(policy, task, members, buffer, key_branches, **sizes)
            state, losses = learner.update(state, task, rows, key_update)
            return state, (losses, jnp.sum(~keep, dtype=jnp.int32))

        return _summed(jax.lax.scan(step, state, jax.random.split(key, self.updates)))


def _summed(scanned: tuple[PyTree, tuple[dict[str, Array], Array]]) -> tuple[PyTree, dict[str, Array]]:
    """The last state, the last losses, and the number of non-finite rows."""
    state, (losses, rejected) = scanned
    return state, {name: x[-1] for name, x in losses.items()} | {"imagined_rejected": jnp.sum(rejected)}
