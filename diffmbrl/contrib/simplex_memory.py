"""Recurrent networks whose memory lies on a product of simplices."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.models.simplex import check_groups, simplex
from diffmbrl.nets import GRU


class SimplexMemory(eqx.Module):
    """A GRU or LSTM whose hidden state is brought onto the simplices after each step; an LSTM's cell state is left as it is.

    Raises: `ValueError` if the units are no multiple of `group`.

    >>> import jax, jax.numpy as jnp
    >>> net = SimplexMemory.init(3, 16, 2, key=jax.random.key(0))
    >>> h, y = net(net.start(), jnp.ones(3))
    >>> round(float(h.sum()), 4), y.shape
    (2.0, (2,))
    """

    net: Any
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
        """Draw the weights; `draw` is `GRU.init` or `LSTM.init`."""
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
