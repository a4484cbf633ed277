r"""Latents on a product of simplices: each group of units is a softmax, nonnegative with a sum of 1.

The latents of a network are then bounded for every input, and so are its read-out and its Jacobian.
Reference: Hansen et al. 2024 (TD-MPC2), section 3.1, SimNorm; Lavoie et al. 2022.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.nets import MLP


def simplex(x: Float[Array, " units"], group: int) -> Float[Array, " units"]:
    """Normalise each group of units by a softmax.

    Args:
        x: Units.
        group: Number of units in a simplex.

    Returns:
        The normalised units.

    >>> simplex(jnp.array([0.0, 0.0, 5.0, 5.0]), 2).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    return jax.nn.softmax(x.reshape(-1, group), axis=1).ravel()


def check_groups(hidden: int, group: int) -> None:
    """Refuse units that do not divide into groups.

    Args:
        hidden: Number of units.
        group: Number of units in a simplex.

    Raises:
        ValueError: If `group` is below 2 or does not divide `hidden`.
    """
    if group < 2 or hidden % group:
        raise ValueError(f"units are divided into groups of at least 2: {hidden} units, groups of {group}")


class SimplexMLP(eqx.Module):
    r"""A network whose last hidden layer lies on simplices, $x \mapsto W\,\mathrm{simplex}(\mathrm{encoder}(x)) + b$.

    `NetworkDynamics.init(..., draw=SimplexMLP.init)` takes it in the place of an `MLP`.

    Args:
        encoder: Network of all hidden layers.
        readout: Affine map from the simplices to the outputs.
        group: Number of units in a simplex.

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
        """Draw the weights, as `MLP.init`.

        Args:
            inputs: Number of inputs.
            hidden: Sizes of the hidden layers, at least one.
            outputs: Number of outputs.
            key: Key of the weights.
            activation: Activation function of the layers before the last.
            output_scale: Scale of the read-out's weights.
            group: Number of units in a simplex.

        Returns:
            The network.

        Raises:
            ValueError: If there is no hidden layer, or the units of the last are no multiple of `group`.
        """
        if not hidden:
            raise ValueError("the simplices are of the last hidden layer: give at least one")
        check_groups(hidden[-1], group)
        key_encoder, key_readout = jax.random.split(key)
        encoder = MLP.init(inputs, hidden[:-1], hidden[-1], key=key_encoder, activation=activation)
        return cls(encoder, MLP.init(hidden[-1], [], outputs, key=key_readout, output_scale=output_scale), group)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.readout(simplex(self.encoder(x), self.group))
