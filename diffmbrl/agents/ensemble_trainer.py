"""The model of an agent: an ensemble that is fitted to its buffer, again and again."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.models import Ensemble, GaussianDynamics, Training, disagreement, elites, train
from diffmbrl.models.buffer import Buffer


class EnsembleTrainer(eqx.Module):
    """An ensemble that is fitted to a buffer: how it is made and trained, and how many of its members are used.

    `model` is a constructor, `model(task, hidden=, key=)`. Every fit goes on from the weights of the last. The `elites` best
    members on the rows held out are those that are used. Raises: `ValueError` for sizes below 1, or more elites than members.

    >>> EnsembleTrainer(members=7, elites=5).hidden
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

    def first(self, members: Any) -> Any:
        """Those used before any fit: the first ones."""
        return jax.tree.map(lambda x: x[: self.elites], members)

    def fit(self, members: Any, buffer: Buffer, key: PRNGKeyArray) -> tuple[Any, Any, dict[str, Array]]:
        """All members trained on, the elites among them, and what is worth a record."""
        members, curves = train(members, buffer.rows, buffer.size, key, self.training)
        best = elites(members, curves.holdout, self.elites)
        rows, ensemble = buffer.sample(key, 256), Ensemble(best)
        apart = jax.vmap(lambda s, a: disagreement(ensemble, s, a))(rows.s, rows.a)
        said = {
            "model_error": jnp.mean(jnp.sort(curves.holdout)[: self.elites]),
            "disagreement": jnp.sqrt(jnp.mean(jnp.square(apart))),
            "model_epochs": jnp.mean(curves.epochs.astype(curves.holdout.dtype)),
            "model_rejected": jnp.sum(curves.rejected),
        }
        return members, best, said
