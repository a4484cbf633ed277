r"""A network with two heads as dynamics: $s' = s + \sigma_\Delta \circ (\mu(z) + e^{\ell(z)} \epsilon)$, with normal noise."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.models.buffer import Transition
from diffmbrl.models.mlp import rolled
from diffmbrl.models.normalizer import Normalizer
from diffmbrl.models.protocols import Network
from diffmbrl.nets import MLP


class GaussianDynamics(eqx.Module):
    r"""Stochastic dynamics that predict mean and log standard deviation of the change of the state.

    $$s' = s + \sigma_\Delta \circ (\mu(z) + e^{\ell(z)} \epsilon),\qquad \epsilon \sim N(0, I)$$

    The noise is drawn from the key, by reparameterisation; without a key the model is at its mean. Two softplus functions bound
    the log standard deviation, which would be arbitrary where there are no data.

    Args:
        net: Network from the inputs z to mean and log standard deviation of the scaled change, shape [2 n].
        normalizer: Scaling of inputs and outputs.
        log_std_low: Lower bound of the log standard deviation, relative to the scale of the change, shape [n].
        log_std_high: Upper bound, shape [n].

    Raises:
        ValueError: If the task's states are not one flat array (from `init`).

    Reference: Chua et al. 2018 (PETS), sections 4.1 and A.1.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> f = GaussianDynamics.init(task, hidden=[16, 16], key=jax.random.key(0))
    >>> s, a = task.initial(jax.random.key(1)), jax.numpy.zeros(1)
    >>> bool((f(s, a, key=jax.random.key(2)) != f(s, a)).all())
    True
    """

    net: Network
    normalizer: Normalizer
    log_std_low: Float[Array, " n"]
    log_std_high: Float[Array, " n"]

    @classmethod
    def init(
        cls,
        task: Task,
        *,
        key: PRNGKeyArray,
        hidden: Sequence[int] = (200, 200, 200, 200),
        activation: Callable = jax.nn.silu,
        output_scale: float = 0.1,
        log_std: tuple[float, float] = (-10.0, 0.5),
        draw: Callable = MLP.init,
    ) -> "GaussianDynamics":
        """Draw the weights of an untrained model.

        Args:
            task: Task whose states, actions and features the model takes.
            key: Key of the weights.
            hidden: Widths of the hidden layers.
            activation: Activation function of the hidden layers.
            output_scale: Factor on the weights of the last layer.
            log_std: Lower and upper bound of the log standard deviation, relative to the scale of the change.
            draw: Constructor of the network, with the arguments of `MLP.init`.

        Returns:
            The model.

        Raises:
            ValueError: If the bounds are crossed, or the task's states are not one flat array.
        """
        low, high = log_std
        if not low < high:
            raise ValueError(f"log_std must be a lower and a higher bound, got {low:g} and {high:g}")
        normalizer = Normalizer.init(task)
        net = draw(normalizer.size, hidden, 2 * task.n, key=key, activation=activation, output_scale=output_scale)
        return cls(net, normalizer, jnp.full(task.n, low, float), jnp.full(task.n, high, float))

    def heads(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Mean and log standard deviation of the scaled change."""
        mean, raw = self._outputs(s, a)
        raw = self.log_std_high - jax.nn.softplus(self.log_std_high - raw)
        return mean, self.log_std_low + jax.nn.softplus(raw - self.log_std_low)

    def moments(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Mean and standard deviation of the next state."""
        mean, raw = self._outputs(s, a)
        # The exponential of what `heads` bounds, in closed form: two softplus took an eighth of CEM's time on an ensemble.
        low, high = jnp.exp(self.log_std_low), jnp.exp(self.log_std_high)
        std = low + high * jax.nn.sigmoid(raw - self.log_std_high)
        return self.normalizer.step(s, mean), self.normalizer.scale * std

    def _outputs(self, s: Array, a: Array) -> list[Array]:
        """Outputs of the network: the mean, and the unbounded log standard deviation."""
        return jnp.split(self.net(self.normalizer.inputs(s, a)), 2)

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        mean, std = self.moments(s, a)
        return mean if key is None else mean + std * jax.random.normal(key, mean.shape, mean.dtype)

    def loss(self, s: Float[Array, " n"], a: Float[Array, " m"], s_next: Float[Array, " n"]) -> Float[Array, ""]:
        r"""Negative log-likelihood of the scaled change, without its constant.

        $$\ell + \tfrac12 (y - \mu)^2 e^{-2\ell}$$

        averaged over the state variables.
        """
        mean, log_std = self.heads(s, a)
        error = (self.normalizer.target(s, s_next) - mean) * jnp.exp(-log_std)
        return self.normalizer.average(log_std + error**2 / 2)

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Loss of one transition, or of a window of transitions along the model's own rollout at its mean."""
        return rolled(self, row)
