"""Models of one set of transitions in several forms, with and without bounded Jacobians, and how they are fitted."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffmbrl.core import Task
from diffmbrl.models import (
    NetworkDynamics,
    Normalizer,
    RecurrentDynamics,
    SimplexMLP,
    Training,
    bounded_spectrum,
    train,
)
from diffmbrl.models.buffer import Transition, flat
from diffmbrl.models.normalizer import standard
from diffmbrl.nets import GRU, LSTM
from experiments.learned import annealed_adam


class Whole(eqx.Module):
    """The features, and the state itself: who is to say where an angle is must know how often it has turned."""

    features: Callable

    def __call__(self, s):
        return jnp.concatenate([self.features(s), s])


class Absolute(eqx.Module):
    """A normaliser whose target is the next state, at mean 0 and deviation 1, instead of the change."""

    inner: Normalizer
    mean: jax.Array
    std: jax.Array

    @classmethod
    def init(cls, task: Task) -> "Absolute":
        seen = eqx.tree_at(lambda t: t.features, task, Whole(task.features))
        return cls(Normalizer.init(seen), jnp.zeros(task.n), jnp.ones(task.n))

    @property
    def size(self):
        return self.inner.size

    def inputs(self, s, a):
        return self.inner.inputs(s, a)

    def target(self, s, s_next):
        return (s_next - self.mean) / self.std

    def step(self, s, y):
        return self.mean + self.std * y

    def average(self, x):
        return jnp.mean(x)

    def fitted(self, rows, data):
        return Absolute(self.inner.fitted(rows, data), *standard(rows.s_next, data))


class Arm(NamedTuple):
    """A form of model: how it is drawn, whether it sees windows, and the largest norm of its matrices, if it has one."""

    draw: Callable
    bound: float | None = None
    remembers: bool = False


def _network(task: Task, key: Any, units: int, **options: Any) -> NetworkDynamics:
    options |= {"hidden": (units, units), "activation": jnp.tanh, "output_scale": 1.0}
    return NetworkDynamics.init(task, key=key, **options)


def _plain(task: Task, key: Any, units: int) -> NetworkDynamics:
    return _network(task, key, units, normalizer=Absolute.init(task))


def _recurrent(task: Task, key: Any, units: int, *, draw: Callable) -> RecurrentDynamics:
    # As many weights as two layers of `units`, roughly: a GRU has 3 of h x h, an LSTM 4.
    return RecurrentDynamics.init(task, key=key, hidden=units // 2, draw=draw)


ARMS = {
    "plain": Arm(_plain),
    "plain, bounded": Arm(_plain, bound=1.0),
    "residual": Arm(_network),
    "residual, bounded": Arm(_network, bound=1.0),
    "residual, simplex": Arm(partial(_network, draw=SimplexMLP.init)),
    "GRU": Arm(partial(_recurrent, draw=GRU.init), remembers=True),
    "LSTM": Arm(partial(_recurrent, draw=LSTM.init), remembers=True),
}


def fitted(arm: Arm, task: Task, windows: Transition, key: Any, *, units: int, epochs: int) -> Any:
    """A model of the form, trained on windows [episodes, length] of transitions, or on each of them alone."""
    rows = windows if arm.remembers else flat(windows)
    count = rows.a.shape[0]
    batch = max(1, 256 // windows.a.shape[1]) if arm.remembers else 256
    steps = -(-round(0.9 * count) // batch) * epochs
    limits: dict[str, Any] = {"epochs": epochs, "patience": epochs, "batch": batch, "bootstrap": False}
    if arm.bound is None:
        training = Training(annealed_adam, rate=5e-3, steps=steps, **limits)
    else:
        training = Training(_bounded, rate=5e-3, steps=steps, bound=arm.bound, **limits)
    key_net, key = jax.random.split(key)
    f = jax.tree.map(lambda x: x[None], arm.draw(task, key_net, units))
    trained, curves = train(f, rows, count, key, training)
    assert not np.any(curves.rejected)
    return jax.tree.map(lambda x: x[0], trained)


def _bounded(rate: Any, steps: int, bound: Any) -> optax.GradientTransformation:
    return bounded_spectrum(annealed_adam, rate=rate, steps=steps, bound=bound)
