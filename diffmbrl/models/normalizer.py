r"""What a learned model sees and says, in units of one.

$$z = \frac{(\mathrm{features}(s), a) - \mu}{\sigma},\qquad s' = s + \sigma_\Delta \circ y,\qquad
  y = \frac{s' \ominus s}{\sigma_\Delta}$$

The input z is of the task's features and the action, the target y the change of the state. Differences of angles are taken on
the circle, so a plant may count turns or wrap: an angle is a state variable that the features see only as one, that is, they
are the same a turn further on. The statistics are those of the data at the last fit and do not move between two fits.
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
    r"""Mean and deviation of the inputs, scale of the changes; before the first fit, the units of the task as they are.

    The scale of a change is its root mean square. A state variable that never changed in the data has a scale of 0 and is
    predicted never to change; an input that never varied is divided by 1.

    Shapes: s [n], a [m], features [k], d = k + m.
    Raises: `ValueError` if the task's states are not one flat array, or its features have more than one axis.

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
    turn: Float[Array, " n"]  # [rad] of an angle, 0 of what is none

    @classmethod
    def init(cls, task: Task) -> "Normalizer":
        """The units of the task as they are."""
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
        """The number of inputs."""
        return self.mean.shape[-1]

    @property
    def varies(self) -> Bool[Array, " n"]:
        """Which state variables changed at all in the data; a NaN among them is no reason to leave one out."""
        return self.scale != 0

    def inputs(self, s: Float[Array, " n"], a: Float[Array, " m"]) -> Float[Array, " d"]:
        """z, for a network."""
        return (jnp.concatenate([self.features(s), a]) - self.mean) / self.std

    def target(self, s: Float[Array, " n"], s_next: Float[Array, " n"]) -> Float[Array, " n"]:
        """y, which a network is to say; 0 for what never changed."""
        return self.difference(s, s_next) / jnp.where(self.varies, self.scale, 1) * self.varies.astype(s.dtype)

    def step(self, s: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
        """The next state of what a network says."""
        return s + self.scale * y

    def difference(self, s: Float[Array, " n"], s_next: Float[Array, " n"]) -> Float[Array, " n"]:
        """From s to s_next, angles the shorter way round."""
        change = s_next - s
        return change - self.turn * jnp.round(change / jnp.where(self.turn > 0, self.turn, 1))

    def average(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """Over the state variables that change."""
        number = jnp.maximum(jnp.sum(self.varies), 1).astype(x.dtype)
        return jnp.sum(jnp.where(self.varies, x, 0)) / number

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> "Normalizer":
        """With the statistics of those of N rows that are `data`. They stay until the next fit."""
        z = jnp.concatenate([jax.vmap(self.features)(rows.s), rows.a], axis=1)
        mean, std = standard(z, data)
        changes = jax.vmap(self.difference)(rows.s, rows.s_next)
        return Normalizer(self.features, mean, std, jnp.sqrt(masked_mean(changes**2, data)), self.turn)


def masked_mean(x: Float[Array, "N k"], data: Bool[Array, " N"]) -> Float[Array, " k"]:
    """The mean of those rows that are data."""
    return jnp.sum(jnp.where(data[:, None], x, 0), axis=0) / jnp.maximum(jnp.sum(data), 1).astype(x.dtype)


def standard(x: Float[Array, "N k"], data: Bool[Array, " N"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Mean and standard deviation of those rows that are data; 1 for the deviation of a constant."""
    mean = masked_mean(x, data)
    std = jnp.sqrt(masked_mean((x - mean) ** 2, data))
    # What is below is what rounding left of a constant's mean; NaN stays.
    return mean, jnp.where(std <= 8 * jnp.finfo(std.dtype).eps * jnp.abs(mean), 1, std)


def turns(task: Task) -> Float[Array, " n"]:
    r"""$2\pi$ for each state variable that the task's features see only as an angle, 0 for the others.

    Those features are the same a turn further on, and others before. They are looked at in a few states, as values: the
    parameters of the features may be traced.
    """
    probes = jax.random.normal(jax.random.key(0), (4, task.n), float)

    def moved(by):
        return jnp.max(jnp.abs(jax.vmap(task.features)(probes + by) - jax.vmap(task.features)(probes)))

    def turn(unit):
        is_angle = (moved(TURN * unit) < 1e-4) & (moved(unit) > 1e-3)
        return TURN * is_angle.astype(unit.dtype)

    return jax.vmap(turn)(jnp.eye(task.n))
