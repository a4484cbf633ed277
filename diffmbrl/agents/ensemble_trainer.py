"""The model of an agent: an ensemble that is fitted to the agent's buffer before each of its updates."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from diffmbrl.core import Task
from diffmbrl.models import Ensemble, GaussianDynamics, Training, disagreement, elites, train
from diffmbrl.models.buffer import Buffer


class EnsembleTrainer(eqx.Module):
    """Makes an ensemble of dynamics, fits it to a buffer and selects its best members.

    Every fit continues from the weights of the last one.

    Args:
        training: How the members are trained.
        members: The number of members that are trained.
        elites: The number of members that are used: those with the lowest loss on the held-out rows.
        hidden: The widths of the hidden layers.
        model: Constructor of a member, `model(task, hidden=, key=)`.

    Raises:
        ValueError: If a number is below 1, or there are more elites than members.

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

    def init(self, task: Task, key: PRNGKeyArray) -> PyTree:
        """Draw the members.

        Args:
            task: The task, whose states and actions the members take.
            key: The random key.

        Returns:
            The members, with a leading axis on every leaf.
        """
        return jax.vmap(lambda k: self.model(task, hidden=self.hidden, key=k))(jax.random.split(key, self.members))

    def first(self, members: PyTree) -> PyTree:
        """Select the members to use before any fit: the first ones.

        Args:
            members: All members.

        Returns:
            As many of them as there are elites.
        """
        return jax.tree.map(lambda x: x[: self.elites], members)

    def fit(self, members: PyTree, buffer: Buffer, key: PRNGKeyArray) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Train the members on a buffer.

        Args:
            members: All members, from whose weights training continues.
            buffer: The real transitions.
            key: The random key.

        Returns:
            All members, the elites among them, and metrics: `model_error` (the elites' mean loss on held-out rows),
            `disagreement` of the elites, `model_epochs` and `model_rejected`.
        """
        members, curves = train(members, buffer.rows, buffer.size, key, self.training)
        best = elites(members, curves.holdout, self.elites)
        rows, ensemble = buffer.sample(key, 256), Ensemble(best)
        apart = jax.vmap(lambda s, a: disagreement(ensemble, s, a))(rows.s, rows.a)
        metrics = {
            "model_error": jnp.mean(jnp.sort(curves.holdout)[: self.elites]),
            "disagreement": jnp.sqrt(jnp.mean(jnp.square(apart))),
            "model_epochs": jnp.mean(curves.epochs.astype(curves.holdout.dtype)),
            "model_rejected": jnp.sum(curves.rejected),
        }
        return members, best, metrics
