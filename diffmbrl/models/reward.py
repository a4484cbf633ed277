r"""A learned reward and a learned end, for tasks that do not give theirs. Both are trained by `train`, as ensembles or alone.

$$\hat r(s, a) = \mu_r + \sigma_r\,\mathrm{net}(z(s, a)),\qquad \hat p(s) = \mathrm{sigmoid}(\mathrm{net}(x(s)))$$
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.models.buffer import Transition
from diffmbrl.models.normalizer import Normalizer, standard
from diffmbrl.nets import MLP


class RewardUnits(eqx.Module):
    """The inputs of a model of the dynamics, and mean and deviation of the rewards."""

    inner: Normalizer
    mean: Float[Array, ""]
    std: Float[Array, ""]

    def inputs(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, " d"]:
        """z, for a network."""
        return self.inner.inputs(s, a)

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "RewardUnits":
        """With the statistics of those rows that are data."""
        mean, std = standard(rows.r[:, None], data)
        return RewardUnits(self.inner.fitted(rows, data), mean[0], std[0])


class RewardModel(eqx.Module):
    """A network as reward: takes the place of `task.reward`.

    Shapes: s [n], a [m] -> []. Raises: `ValueError` if the task's states are not one flat array.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> r = RewardModel.init(task, hidden=[16], key=jax.random.key(0))
    >>> r(task.initial(jax.random.key(1)), jax.numpy.zeros(1)).shape
    ()
    """

    net: Any
    normalizer: RewardUnits

    @classmethod
    def init(
        cls, task: Task, *, key: PRNGKeyArray, hidden: Sequence[int] = (200, 200), activation: Callable = jax.nn.silu
    ) -> "RewardModel":
        """Draw the weights."""
        units = RewardUnits(Normalizer.init(task), jnp.zeros((), float), jnp.ones((), float))
        return cls(MLP.init(units.inner.size, hidden, 1, key=key, activation=activation, output_scale=0.1), units)

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.normalizer.mean + self.normalizer.std * self.net(self.normalizer.inputs(s, a))[0]

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """The squared error as a share of the rewards' variance; of a window, the mean over its steps."""
        r = self(row.s, row.a) if row.a.ndim == 1 else jax.vmap(self)(row.s, row.a)
        return jnp.mean(((row.r - r) / self.normalizer.std) ** 2)


class EndUnits(eqx.Module):
    """Mean and deviation of the features of next states."""

    features: Callable
    mean: Float[Array, " k"]
    std: Float[Array, " k"]

    def inputs(self, s: State) -> Float[Array, " k"]:
        """x, for a network."""
        return (self.features(s) - self.mean) / self.std

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "EndUnits":
        """With the statistics of those rows that are data."""
        return EndUnits(self.features, *standard(jax.vmap(self.features)(rows.s_next), data))


class EndModel(eqx.Module):
    """A network as the end of an episode, which is where its probability is above one half: takes the place of `task.done`.

    Shapes: s [n] -> [] Bool. A data set without an end teaches it that there is none.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> done = EndModel.init(task, hidden=[16], key=jax.random.key(0))
    >>> done(task.initial(jax.random.key(1))).dtype
    dtype('bool')
    """

    net: Any
    normalizer: EndUnits

    @classmethod
    def init(
        cls, task: Task, *, key: PRNGKeyArray, hidden: Sequence[int] = (200, 200), activation: Callable = jax.nn.silu
    ) -> "EndModel":
        """Draw the weights."""
        size = Normalizer.init(task).size - task.m
        units = EndUnits(task.features, jnp.zeros(size, float), jnp.ones(size, float))
        return cls(MLP.init(size, hidden, 1, key=key, activation=activation, output_scale=0.1), units)

    def logit(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        """The logarithm of the odds that s is past the end."""
        return self.net(self.normalizer.inputs(s))[0]

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return self.logit(s) > 0

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """The cross-entropy of `done` given the next state; of a window, the mean over its steps."""
        logit = self.logit(row.s_next) if row.a.ndim == 1 else jax.vmap(self.logit)(row.s_next)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logit, row.done.astype(logit.dtype)))
