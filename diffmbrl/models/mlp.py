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
from diffmbrl.nets import MLP


class NetworkDynamics(eqx.Module):
    r"""A deterministic network that predicts the change of the state.

    A leading axis on every leaf makes it an ensemble: `NetworkDynamics.init` under `vmap`, in `models.Ensemble`. `fit.train`
    fits it. `normalizer` says what goes in and out; any module with its methods takes its place.

    Shapes: s [n], a [m] -> [n]. States must be flat.
    Raises: `ValueError` if the task's states are not one flat array.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> f = NetworkDynamics.init(task, hidden=[16, 16], key=jax.random.key(0))
    >>> f(task.initial(jax.random.key(1)), jax.numpy.zeros(1)).shape
    (4,)
    """

    net: Any
    normalizer: Any

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
        normalizer: Any = None,
    ) -> "NetworkDynamics":
        """Draw the weights; `draw` is `MLP.init`, or another network's function of the same arguments.

        `normalizer` is `Normalizer.init(task)` unless given.
        """
        normalizer = Normalizer.init(task) if normalizer is None else normalizer
        net = draw(normalizer.size, hidden, task.n, key=key, activation=activation, output_scale=output_scale)
        return cls(net, normalizer)

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        return self.normalizer.step(s, self.net(self.normalizer.inputs(s, a)))

    def loss(self, s: Float[Array, " n"], a: Float[Array, " m"], s_next: Float[Array, " n"]) -> Float[Array, ""]:
        """The squared error of the scaled change, averaged over the state variables."""
        y = self.net(self.normalizer.inputs(s, a))
        return self.normalizer.average((self.normalizer.target(s, s_next) - y) ** 2)

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """The loss of one transition, or of a window of them through its own rollout."""
        return rolled(self, row)


def rolled(f: Any, row: Transition) -> Float[Array, ""]:
    r"""The loss of a transition; of a window of k in a row, $\frac1k \sum_j \ell(\hat s_j, a_j, s_{j+1})$.

    $\hat s_0 = s_0$ and $\hat s_{j+1} = f(\hat s_j, a_j)$: what the model makes of its own predictions.
    """
    if row.a.ndim == 1:
        return f.loss(row.s, row.a, row.s_next)

    def step(s, x):
        a, s_next = x
        return f(s, a), f.loss(s, a, s_next)

    return jnp.mean(jax.lax.scan(step, row.s[0], (row.a, row.s_next))[1])
