"""How a model-free learner practises in a model: on batches mixed from imagined and real rows, or on imagined streams."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diffmbrl.agents.imagine import imagine
from diffmbrl.agents.model_free import at_least_one
from diffmbrl.core import Task, parameter
from diffmbrl.models.buffer import Buffer, Transition, flat


class OffPolicyPractice(eqx.Module):
    r"""Batches of rows that any policy may have made, for SAC.

    `rounds` times the policy as it is takes `steps` steps in the model on each of `branches` lanes, and the learner makes
    `updates / rounds` updates. A row of a batch is real with probability `real`, else one of the latest imagined; if that is
    not finite, a real one takes its place.

    Cost: `updates` updates and `branches steps rounds` rows of the model.
    Raises: `ValueError` for sizes below 1, or `updates` that `rounds` does not divide.
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
        self, learner: Any, state: Any, task: Task, members: Any, buffer: Buffer, length: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[Any, dict[str, Array]]:  # fmt: skip
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

        return _said(jax.lax.scan(one_round, state, jax.random.split(key, self.rounds)))

    def mixed(self, rows: Transition, keep: Bool[Array, " N"], buffer: Buffer, key: PRNGKeyArray) -> Transition:
        """A batch of rows imagined, [N, ...], and real."""
        key_real, key_imagined, key_which = jax.random.split(key, 3)
        real = buffer.sample(key_real, self.batch)
        chosen = jax.random.randint(key_imagined, (self.batch,), 0, keep.shape[0])
        use_real = (jax.random.uniform(key_which, (self.batch,), self.real.dtype) < self.real) | ~keep[chosen]

        def pick(x, y):
            return jnp.where(use_real.reshape(-1, *[1] * (x.ndim - 1)), x, y[chosen])

        return jax.tree.map(pick, real, rows)


class OnPolicyPractice(eqx.Module):
    """`updates` updates, each on imagined streams [`branches`, `steps`] of the policy as it is, for PPO.

    They are made of branches, at whose ends the critic says what is to come. A row that is not finite does not count.

    Cost: `branches steps updates` rows of the model, and the updates on them. Raises: `ValueError` for sizes below 1.
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
        self, learner: Any, state: Any, task: Task, members: Any, buffer: Buffer, length: Int[Array, ""],
        key: PRNGKeyArray,
    ) -> tuple[Any, dict[str, Array]]:  # fmt: skip
        def step(state, key):
            key_branches, key_update = jax.random.split(key)
            policy = learner.policy(state, task)
            sizes = {"branches": self.branches, "steps": self.steps, "length": length}
            rows, keep = imagine(policy, task, members, buffer, key_branches, **sizes)
            state, losses = learner.update(state, task, rows, key_update)
            return state, (losses, jnp.sum(~keep, dtype=jnp.int32))

        return _said(jax.lax.scan(step, state, jax.random.split(key, self.updates)))


def _said(scanned: tuple[Any, tuple[dict[str, Array], Array]]) -> tuple[Any, dict[str, Array]]:
    """The last state, the last losses and all rows that were not finite."""
    state, (losses, rejected) = scanned
    return state, {name: x[-1] for name, x in losses.items()} | {"imagined_rejected": jnp.sum(rejected)}
