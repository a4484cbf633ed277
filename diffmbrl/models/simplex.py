r"""Latents on a product of simplices: each group of so many units is a softmax, nonnegative with a sum of 1.

What lies between a network's input and its read-out is then bounded, and so are the read-out and the Jacobian, whatever the
input is. A network whose last hidden layer it is takes the place of an `MLP` (`draw=SimplexMLP.init`).
Reference: Hansen et al. 2024 (TD-MPC2), section 3.1, SimNorm; Lavoie et al. 2022.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.nets import MLP


def simplex(x: Float[Array, " units"], group: int) -> Float[Array, " units"]:
    """A softmax over each group of units.

    >>> simplex(jnp.array([0.0, 0.0, 5.0, 5.0]), 2).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return jax.nn.softmax(x.reshape(-1, group), axis=1).ravel()


def check_groups(hidden: int, group: int) -> None:
    if group < 2 or hidden % group:
        raise ValueError(f"units are divided into groups of at least 2: {hidden} units, groups of {group}")


class SimplexMLP(eqx.Module):
    r"""$x \mapsto W\,\mathrm{simplex}(\mathrm{encoder}(x)) + b$.

    Raises: `ValueError` if there is no hidden layer, or the units of the last are no multiple of `group`.

    >>> net = SimplexMLP.init(3, [32, 16], 2, key=jax.random.key(0))
    >>> net(jnp.ones(3)).shape
    (2,)
    """

    encoder: MLP
    readout: MLP
    group: int = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        key: PRNGKeyArray,
        activation: Callable = jnp.tanh,
        output_scale: float = 1.0,
        group: int = 8,
    ) -> "SimplexMLP":
        """Draw the weights, as `MLP.init`."""
        if not hidden:
            raise ValueError("the simplices are of the last hidden layer: give at least one")
        check_groups(hidden[-1], group)
        key_encoder, key_readout = jax.random.split(key)
        encoder = MLP.init(inputs, hidden[:-1], hidden[-1], key=key_encoder, activation=activation)
        return cls(encoder, MLP.init(hidden[-1], [], outputs, key=key_readout, output_scale=output_scale), group)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.readout(simplex(self.encoder(x), self.group))
