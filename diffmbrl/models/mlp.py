r"""A network as dynamics: $s' = s + \sigma_\Delta \circ \mathrm{net}(z)$, z the normalised features and action."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.models.buffer import Transition
from diffmbrl.models.normalizer import Normalizer
from diffmbrl.models.protocols import Network, Scaling
from diffmbrl.nets import MLP


class NetworkDynamics(eqx.Module):
    r"""Deterministic dynamics that predict the change of the state with a network.

    $$s' = s + \sigma_\Delta \circ \mathrm{net}(z(s, a))$$

    Make one with `NetworkDynamics.init`, several for an `Ensemble` with `init` under `vmap`, and fit them with `train`.

    Args:
        net: Network from the inputs z to the scaled change, shape [n].
        normalizer: Scaling of inputs and outputs, a `Normalizer` or another `protocols.Scaling`.

    Raises:
        ValueError: If the task's states are not one flat array (from `init`).

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> f = NetworkDynamics.init(task, hidden=[16, 16], key=jax.random.key(0))
    >>> f(task.initial(jax.random.key(1)), jax.numpy.zeros(1)).shape
    (4,)
    """

    net: Network
    normalizer: Scaling

    @classmethod
    def init(
        cls,
        task: Task,
        *,
        key: PRNGKeyArray,
        hidden: Sequence[int] = (200, 200, 200, 200),
        activation: Callable = jax.nn.silu,
        output_scale: float = 0.1,
        draw: Callable = MLP.init,
        normalizer: Scaling | None = None,
    ) -> "NetworkDynamics":
        """Draw the weights of an untrained model.

        Args:
            task: Task whose states, actions and features the model takes.
            key: Key of the weights.
            hidden: Widths of the hidden layers.
            activation: Activation function of the hidden layers.
            output_scale: Factor on the weights of the last layer.
            draw: Constructor of the network, with the arguments of `MLP.init`.
            normalizer: Scaling before the first fit; None for `Normalizer.init(task)`.

        Returns:
            The model.

        Raises:
            ValueError: If the task's states are not one flat array.
        """
        normalizer = Normalizer.init(task) if normalizer is None else normalizer
        net = draw(normalizer.size, hidden, task.n, key=key, activation=activation, output_scale=output_scale)
        return cls(net, normalizer)

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        return self.normalizer.step(s, self.net(self.normalizer.inputs(s, a)))

    def loss(self, s: Float[Array, " n"], a: Float[Array, " m"], s_next: Float[Array, " n"]) -> Float[Array, ""]:
        """Squared error of the scaled change, averaged over the state variables."""
        y = self.net(self.normalizer.inputs(s, a))
        return self.normalizer.average((self.normalizer.target(s, s_next) - y) ** 2)

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Loss of one transition, or of a window of transitions along the model's own rollout."""
        return rolled(self, row)


def rolled(f: Any, row: Transition) -> Float[Array, ""]:
    r"""Loss of a transition, or of a window of k transitions along the model's own predictions.

    $$\frac1k \sum_j \ell(\hat s_j, a_j, s_{j+1}),\qquad \hat s_0 = s_0,\quad \hat s_{j+1} = f(\hat s_j, a_j)$$

    Args:
        f: Dynamics with a `loss(s, a, s_next)`.
        row: One transition, or a window with a leading axis of k.

    Returns:
        The loss, shape [].
    """
    if row.a.ndim == 1:
        return f.loss(row.s, row.a, row.s_next)

    def step(s, x):
        a, s_next = x
        return f(s, a), f.loss(s, a, s_next)

    return jnp.mean(jax.lax.scan(step, row.s[0], (row.a, row.s_next))[1])
