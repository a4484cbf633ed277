"""The model of an agent: an ensemble that is fitted to its buffer, again and again."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.buffer import Buffer, Transition
from diffmbrl.core import Task
from diffmbrl.models import GaussianDynamics, Training, train


class World(eqx.Module):
    """An ensemble that is fitted to a buffer: how it is made and trained, and how many of its members are used.

    `model` is a constructor, `model(task, hidden=, key=)`. Every fit goes on from the weights of the last. The `elites` best
    members on the rows held out are those that are used. Raises: `ValueError` for sizes below 1, or more elites than members.

    >>> World(members=7, elites=5).hidden
    (200, 200, 200)
    """

    training: Training = eqx.field(default_factory=Training)
    members: int = eqx.field(static=True, default=5)
    elites: int = eqx.field(static=True, default=5)
    hidden: tuple[int, ...] = eqx.field(static=True, default=(200, 200, 200))
    model: Callable = eqx.field(static=True, default=GaussianDynamics.init)

    def __check_init__(self):
        for name, number in (("members", self.members), ("elites", self.elites)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        if self.elites > self.members:
            raise ValueError(f"elites must be at most the number of members, {self.members}; got {self.elites}")

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        """Draw the members."""
        return jax.vmap(lambda k: self.model(task, hidden=self.hidden, key=k))(jax.random.split(key, self.members))

    def fit(self, members: Any, buffer: Buffer, key: PRNGKeyArray) -> tuple[Any, Any, dict[str, Array]]:
        """All members trained on, the elites among them, and what is worth a record."""
        members, curves = train(members, buffer.rows, buffer.size, key, self.training)
        best = jnp.argsort(curves.holdout)[: self.elites]
        elites = jax.tree.map(lambda x: x[best], members)
        said = {
            "model_error": jnp.mean(curves.holdout[best]),
            "disagreement": disagreement(elites, buffer.sample(key, 256)),
            "model_epochs": jnp.mean(curves.epochs.astype(curves.holdout.dtype)),
            "model_rejected": jnp.sum(curves.rejected),
        }
        return members, elites, said


def disagreement(members: Any, rows: Transition) -> Float[Array, ""]:
    """The members' deviation from their mean, relative to the change of the state: root of the mean over rows and states."""
    predicted = jax.vmap(lambda f: jax.vmap(lambda s, a: f(s, a))(rows.s, rows.a))(members)

    def relative(x, s, s_next):
        return jnp.mean(jnp.var(x, axis=0) / (jnp.var(s_next - s, axis=0) + jnp.finfo(x.dtype).eps))

    parts = jax.tree.leaves(jax.tree.map(relative, predicted, rows.s, rows.s_next))
    return jnp.sqrt(jnp.mean(jnp.stack(parts)))
