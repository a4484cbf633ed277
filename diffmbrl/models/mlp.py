r"""A network as dynamics: $s' = s + \sigma_\Delta \circ \mathrm{net}((z - \mu_z) / \sigma_z)$ with $z = (s, a)$."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from diffmbrl.core import Task
from diffmbrl.nets import MLP


class Scales(eqx.Module):
    """What the network sees and says in units of one: mean and deviation of (s, a), deviation of the change of s."""

    mean: Float[Array, " d"]
    std: Float[Array, " d"]
    delta: Float[Array, " n"]

    @classmethod
    def ones(cls, task: Task) -> "Scales":
        """The units of the task as they are."""
        n, m = task.n, task.m
        return cls(*(jnp.full(size, value, float) for size, value in [(n + m, 0.0), (n + m, 1.0), (n, 1.0)]))

    def inputs(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, " d"]:
        return (jnp.concatenate([s, a]) - self.mean) / self.std


class NetworkDynamics(eqx.Module):
    r"""A deterministic network that predicts the change of the state.

    A leading axis on every leaf makes it an ensemble: `NetworkDynamics.init` under `vmap`, in `models.Ensemble`.

    Shapes: s [n], a [m] -> [n]. States must be flat.
    Raises: `ValueError` if the task's states are not one flat array.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> task = tasks.cartpole_balance()
    >>> f = NetworkDynamics.init(task, hidden=[16, 16], key=jax.random.key(0))
    >>> f(task.initial(jax.random.key(1)), jax.numpy.zeros(1)).shape
    (4,)
    """

    net: MLP
    scales: Scales

    @classmethod
    def init(
        cls,
        task: Task,
        *,
        key: PRNGKeyArray,
        hidden: Sequence[int] = (200, 200, 200, 200),
        activation: Callable = jax.nn.silu,
        output_scale: float = 0.1,
    ) -> "NetworkDynamics":
        """Draw the weights."""
        return cls(network(task, hidden, 1, key, activation, output_scale), Scales.ones(task))

    def __call__(
        self, s: Float[Array, " n"], a: Float[Array, " m"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " n"]:
        return s + self.scales.delta * self.net(self.scales.inputs(s, a))


def network(
    task: Task, hidden: Sequence[int], heads: int, key: PRNGKeyArray, activation: Callable, output_scale: float
) -> MLP:
    """A network from (s, a) to so many vectors like s.

    Raises: `ValueError` if the task's states are not one flat array.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(task.state_shape)]
    if [len(shape) for shape in shapes] != [1]:
        found = ", ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"a network takes flat states [n]; task '{task.name}' has {found}")
    n, m = task.n, task.m
    return MLP.init(n + m, hidden, heads * n, key=key, activation=activation, output_scale=output_scale)
