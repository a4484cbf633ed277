r"""Learned models of the reward and of the end of an episode, for tasks that do not give them; `train` trains both.

$$\hat r(s, a) = \mu_r + \sigma_r\,\mathrm{net}(z(s, a)),\qquad \hat p(s) = \mathrm{sigmoid}(\mathrm{net}(x(s)))$$
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from diffmbrl.core import State, Task
from diffmbrl.models.buffer import Transition
from diffmbrl.models.normalizer import Normalizer, standard
from diffmbrl.models.protocols import Network
from diffmbrl.nets import MLP


class RewardUnits(eqx.Module):
    """Scaling of a reward model: the inputs of a dynamics model, and mean and standard deviation of the rewards."""

    inner: Normalizer
    mean: Float[Array, ""]
    std: Float[Array, ""]

    def inputs(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, " d"]:
        """Return the inputs z of the network."""
        return self.inner.inputs(s, a)

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "RewardUnits":
        """Return the same with the statistics of those rows where `data` is true."""
        mean, std = standard(rows.r[:, None], data)
        return RewardUnits(self.inner.fitted(rows, data), mean[0], std[0])


class RewardModel(eqx.Module):
    r"""Learned reward $\hat r(s, a) = \mu_r + \sigma_r\,\mathrm{net}(z(s, a))$, which can replace `task.reward`.

    Args:
        net: Network from the inputs z to the standardised reward, shape [1].
        normalizer: Scaling of inputs and rewards.

    Raises:
        ValueError: If the task's states are not one flat array (from `init`).

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> r = RewardModel.init(task, hidden=[16], key=jax.random.key(0))
    >>> r(task.initial(jax.random.key(1)), jax.numpy.zeros(1)).shape
    ()
    """

    net: Network
    normalizer: RewardUnits

    @classmethod
    def init(
        cls, task: Task, *, key: PRNGKeyArray, hidden: Sequence[int] = (200, 200), activation: Callable = jax.nn.silu
    ) -> "RewardModel":
        """Draw the weights of an untrained model.

        Args:
            task: Task whose states, actions and features the model takes.
            key: Key of the weights.
            hidden: Widths of the hidden layers.
            activation: Activation function of the hidden layers.

        Returns:
            The model.

        Raises:
            ValueError: If the task's states are not one flat array.
        """
        units = RewardUnits(Normalizer.init(task), jnp.zeros((), float), jnp.ones((), float))
        return cls(MLP.init(units.inner.size, hidden, 1, key=key, activation=activation, output_scale=0.1), units)

    def __call__(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, ""]:
        return self.normalizer.mean + self.normalizer.std * self.net(self.normalizer.inputs(s, a))[0]

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Squared error relative to the variance of the rewards; for a window, the mean over its steps."""
        r = self(row.s, row.a) if row.a.ndim == 1 else jax.vmap(self)(row.s, row.a)
        return jnp.mean(((row.r - r) / self.normalizer.std) ** 2)


class EndUnits(eqx.Module):
    """Scaling of an end model: mean and standard deviation of the features of next states."""

    features: Callable
    mean: Float[Array, " k"]
    std: Float[Array, " k"]

    def inputs(self, s: State) -> Float[Array, " k"]:
        """Return the inputs x of the network."""
        return (self.features(s) - self.mean) / self.std

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "EndUnits":
        """Return the same with the statistics of those rows where `data` is true."""
        return EndUnits(self.features, *standard(jax.vmap(self.features)(rows.s_next), data))


class EndModel(eqx.Module):
    """Learned end of an episode, which can replace `task.done`: true where its probability exceeds one half.

    A data set without an end teaches it that episodes never end.

    Args:
        net: Network from the inputs x to the log odds, shape [1].
        normalizer: Scaling of the inputs.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.pendulum()
    >>> done = EndModel.init(task, hidden=[16], key=jax.random.key(0))
    >>> done(task.initial(jax.random.key(1))).dtype
    dtype('bool')
    """

    net: Network
    normalizer: EndUnits

    @classmethod
    def init(
        cls, task: Task, *, key: PRNGKeyArray, hidden: Sequence[int] = (200, 200), activation: Callable = jax.nn.silu
    ) -> "EndModel":
        """Draw the weights of an untrained model.

        Args:
            task: Task whose states, actions and features the model takes.
            key: Key of the weights.
            hidden: Widths of the hidden layers.
            activation: Activation function of the hidden layers.

        Returns:
            The model.

        Raises:
            ValueError: If the task's states are not one flat array.
        """
        size = Normalizer.init(task).size - task.m
        units = EndUnits(task.features, jnp.zeros(size, float), jnp.ones(size, float))
        return cls(MLP.init(size, hidden, 1, key=key, activation=activation, output_scale=0.1), units)

    def logit(self, s: Float[Array, " n"]) -> Float[Array, ""]:
        """Log odds that s is past the end."""
        return self.net(self.normalizer.inputs(s))[0]

    def __call__(self, s: Float[Array, " n"]) -> Bool[Array, ""]:
        return self.logit(s) > 0

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Cross-entropy of `done` given the next state; for a window, the mean over its steps."""
        logit = self.logit(row.s_next) if row.a.ndim == 1 else jax.vmap(self.logit)(row.s_next)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logit, row.done.astype(logit.dtype)))
