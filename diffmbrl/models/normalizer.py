r"""Normalisation of the inputs and outputs of a learned model.

$$z = \frac{(\mathrm{features}(s), a) - \mu}{\sigma},\qquad s' = s + \sigma_\Delta \circ y,\qquad
  y = \frac{s' \ominus s}{\sigma_\Delta}$$

The input z is of the task's features and the action, the target y the change of the state. Differences of angles are taken on
the circle, so a plant may count turns or wrap: an angle is a state variable of which the features have a period of one turn.
The statistics are those of the data at the last fit and do not change between two fits.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diffmbrl.core import Task
from diffmbrl.models.buffer import Transition

TURN = 2 * jnp.pi


class Normalizer(eqx.Module):
    r"""Mean and deviation of a model's inputs, and scale of the changes of the state.

    Args:
        features: Features of the task, from a state to shape [k].
        mean: Mean of features and actions, shape [d] with d = k + m.
        std: Their standard deviation, shape [d]; 1 for an input that never varied.
        scale: Root mean square of the change of each state variable, shape [n]; a variable of scale 0 is predicted
            never to change.
        turn: Length of a full turn [rad] for an angle, 0 for any other variable, shape [n].

    Raises:
        ValueError: If the task's states are not one flat array, or its features have more than one axis (from
            `init`).

    >>> import jax
    >>> from diffmbrl import tasks
    >>> normalizer = Normalizer.init(tasks.pendulum())
    >>> [round(float(x), 3) for x in normalizer.turn], normalizer.size
    ([6.283, 0.0], 4)
    >>> s, wrapped = jax.numpy.array([3.1, 0.5]), jax.numpy.array([-3.1, 0.5])
    >>> [round(float(x), 3) for x in normalizer.target(s, wrapped)]
    [0.083, 0.0]
    """

    features: Callable
    mean: Float[Array, " d"]
    std: Float[Array, " d"]
    scale: Float[Array, " n"]
    turn: Float[Array, " n"]

    @classmethod
    def init(cls, task: Task) -> "Normalizer":
        """Return the normaliser of a task before the first fit: means of 0 and scales of 1."""
        shapes = [leaf.shape for leaf in jax.tree.leaves(task.state_shape)]
        if [len(shape) for shape in shapes] != [1]:
            found = ", ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"a network takes flat states [n]; task '{task.name}' has {found}")
        features = jax.eval_shape(task.features, task.state_shape).shape
        if len(features) != 1:
            raise ValueError(f"the features of task '{task.name}' have shape {list(features)}; expected one axis")
        d = features[0] + task.m
        return cls(task.features, jnp.zeros(d, float), jnp.ones(d, float), jnp.ones(task.n, float), turns(task))

    @property
    def size(self) -> int:
        """Number of inputs of the network."""
        return self.mean.shape[-1]

    @property
    def varies(self) -> Bool[Array, " n"]:
        """Which state variables changed in the data, shape [n]; a variable with a NaN counts as one that changed."""
        return self.scale != 0

    def inputs(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, " d"]:
        """Return the inputs z of the network, shape [d]."""
        return (jnp.concatenate([self.features(s), a]) - self.mean) / self.std

    def target(self, s: Float[Array, " n"], s_next: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the output y that predicts `s_next`, shape [n]; 0 for a variable that never changed."""
        return self.difference(s, s_next) / jnp.where(self.varies, self.scale, 1) * self.varies.astype(s.dtype)

    def step(self, s: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the next state that an output y predicts, shape [n]."""
        return s + self.scale * y

    def difference(self, s: Float[Array, " n"], s_next: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return the change from s to s_next, shape [n]; angles take the shorter way round."""
        change = s_next - s
        return change - self.turn * jnp.round(change / jnp.where(self.turn > 0, self.turn, 1))

    def average(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """Return the mean of x over the state variables that changed in the data."""
        number = jnp.maximum(jnp.sum(self.varies), 1).astype(x.dtype)
        return jnp.sum(jnp.where(self.varies, x, 0)) / number

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "Normalizer":
        """Return the normaliser with the statistics of those of N rows where `data` is true."""
        z = jnp.concatenate([jax.vmap(self.features)(rows.s), rows.a], axis=1)
        mean, std = standard(z, data)
        changes = jax.vmap(self.difference)(rows.s, rows.s_next)
        return Normalizer(self.features, mean, std, jnp.sqrt(masked_mean(changes**2, data)), self.turn)


def masked_mean(x: Float[Array, "N k"], data: Bool[Array, " N"]) -> Float[Array, " k"]:
    """Mean of those rows where `data` is true."""
    return jnp.sum(jnp.where(data[:, None], x, 0), axis=0) / jnp.maximum(jnp.sum(data), 1).astype(x.dtype)


def standard(x: Float[Array, "N k"], data: Bool[Array, " N"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Mean and standard deviation of those rows where `data` is true; a constant has a deviation of 1."""
    mean = masked_mean(x, data)
    std = jnp.sqrt(masked_mean((x - mean) ** 2, data))
    # A deviation this small is rounding of a constant's mean; NaN stays.
    return mean, jnp.where(std <= 8 * jnp.finfo(std.dtype).eps * jnp.abs(mean), 1, std)


def turns(task: Task) -> Float[Array, " n"]:
    r"""$2\pi$ for each state variable that the task's features see only as an angle, 0 for the others.

    The features are evaluated in a few random states and must be the same a full turn further on, but not 1 rad further
    on. The test is on values, so the parameters of the features may be traced.
    """
    probes = jax.random.normal(jax.random.key(0), (4, task.n), float)

    def moved(by):
        return jnp.max(jnp.abs(jax.vmap(task.features)(probes + by) - jax.vmap(task.features)(probes)))

    def turn(unit):
        is_angle = (moved(TURN * unit) < 1e-4) & (moved(unit) > 1e-3)
        return TURN * is_angle.astype(unit.dtype)

    return jax.vmap(turn)(jnp.eye(task.n))
