"""Recurrent networks whose memory lies on a product of simplices."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.models.simplex import check_groups, simplex
from diffmbrl.nets import GRU, LSTM


class SimplexMemory(eqx.Module):
    """A GRU or LSTM whose hidden state is normalised onto simplices after each step; an LSTM's cell state is not.

    `RecurrentDynamics.init(..., draw=SimplexMemory.init)` takes it in the place of a GRU.

    Args:
        net: GRU or LSTM.
        group: Number of units in a simplex.

    >>> import jax, jax.numpy as jnp
    >>> net = SimplexMemory.init(3, 16, 2, key=jax.random.key(0))
    >>> h, y = net(net.start(), jnp.ones(3))
    >>> round(float(h.sum()), 4), y.shape
    (2.0, (2,))
    """

    net: GRU | LSTM
    group: int = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        key: PRNGKeyArray,
        draw: Callable = GRU.init,
        group: int = 8,
    ) -> "SimplexMemory":
        """Draw the weights.

        Args:
            inputs: Number of inputs.
            hidden: Number of units.
            outputs: Number of outputs.
            key: Key of the weights.
            draw: `GRU.init` or `LSTM.init`.
            group: Number of units in a simplex.

        Returns:
            The network.

        Raises:
            ValueError: If the number of units is no multiple of `group`.
        """
        check_groups(hidden, group)
        return cls(draw(inputs, hidden, outputs, key=key), group)

    def start(self) -> Any:
        """The memory before the first input."""
        return self._normalised(self.net.start())

    def __call__(self, memory: Any, x: Float[Array, " in"]) -> tuple[Any, Float[Array, " out"]]:
        memory = self._normalised(self.net.cell(x, memory))
        return memory, self.net.readout(memory[0] if isinstance(memory, tuple) else memory)

    def _normalised(self, memory: Any) -> Any:
        if isinstance(memory, tuple):
            return simplex(memory[0], self.group), memory[1]
        return simplex(memory, self.group)
