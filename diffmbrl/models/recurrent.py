r"""A network with a memory as dynamics: $(h', y) = \mathrm{net}(h, z)$, $s' = s + \sigma_\Delta \circ y$, net a GRU or an LSTM.

A dynamics maps one state to the next, so the memory is part of the state: `Remembered(s, h)`. `remembering(task, f)` is the
task on such states, on which rollouts, planners and derivatives work as with any other dynamics.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from diffmbrl.core import State, Task
from diffmbrl.models.buffer import Transition
from diffmbrl.models.normalizer import Normalizer
from diffmbrl.models.protocols import RecurrentNetwork
from diffmbrl.nets import GRU
from diffmbrl.tasks.transforms.plant import OfState, remade


class Remembered(NamedTuple):
    """A state of the task, and the network's memory of the steps before it.

    Args:
        s: State of the task, shape [n].
        h: Memory of the network.
    """

    s: State
    h: PyTree


class RecurrentDynamics(eqx.Module):
    r"""Recurrent dynamics that predict the change of the state from the steps since the start of the memory.

    It is trained on windows (`train` with rows [capacity, k, ...]): the memory is empty at the start of each window, and the
    network then reads the true states one after another.

    Args:
        net: Recurrent network from memory and inputs to the scaled change, such as a `GRU`.
        normalizer: Scaling of inputs and outputs.

    Raises:
        ValueError: If the task's states are not one flat array, or if it is trained on single transitions.

    Reference: Cho et al. 2014 (GRU); Hochreiter and Schmidhuber 1997 (LSTM).

    >>> import jax
    >>> from diffmbrl import OpenLoop, rollout, tasks
    >>> task = tasks.pendulum(horizon=10)
    >>> f = RecurrentDynamics.init(task, hidden=16, key=jax.random.key(0))
    >>> model = remembering(task, f)
    >>> rollout(OpenLoop.zeros(model), model, model.initial(jax.random.key(1))).s.s.shape
    (10, 2)
    """

    net: RecurrentNetwork
    normalizer: Normalizer

    @classmethod
    def init(cls, task: Task, *, key: PRNGKeyArray, hidden: int = 64, draw: Callable = GRU.init) -> "RecurrentDynamics":
        """Draw the weights of an untrained model.

        Args:
            task: Task whose states, actions and features the model takes.
            key: Key of the weights.
            hidden: Number of hidden units.
            draw: Constructor of the network: `GRU.init`, `LSTM.init` or another with the same arguments.

        Returns:
            The model.

        Raises:
            ValueError: If the task's states are not one flat array.
        """
        normalizer = Normalizer.init(task)
        return cls(draw(normalizer.size, hidden, task.n, key=key), normalizer)

    def start(self, s: Float[Array, " n"]) -> Remembered:
        """Return a state with an empty memory."""
        return Remembered(s, self.net.start())

    def __call__(self, state: Remembered, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> Remembered:
        h, y = self.net(state.h, self.normalizer.inputs(state.s, a))
        return Remembered(self.normalizer.step(state.s, y), h)

    def remember(self, state: Remembered, a: Float[Array, " m"], s_next: Float[Array, " n"]) -> Remembered:
        """Return the true next state of a real step, with the memory of that step."""
        return Remembered(s_next, self(state, a).h)

    def loss(self, s: Float[Array, "k n"], a: Float[Array, "k m"], s_next: Float[Array, "k n"]) -> Float[Array, ""]:
        """Squared error of the scaled change, averaged over the state variables and the steps of a window."""

        def step(h, x):
            s, a, s_next = x
            h, y = self.net(h, self.normalizer.inputs(s, a))
            return h, self.normalizer.average((self.normalizer.target(s, s_next) - y) ** 2)

        return jnp.mean(jax.lax.scan(step, self.net.start(), (s, a, s_next))[1])

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Loss of a window of transitions."""
        if row.a.ndim == 1:
            raise ValueError("a recurrent model is trained on windows [capacity, k, ...], got single transitions")
        return self.loss(row.s, row.a, row.s_next)


def remembering(task: Task, f: RecurrentDynamics) -> Task:
    """Put recurrent dynamics into a task: rewards, features and ends are those of the state alone.

    Args:
        task: Task whose states f predicts.
        f: Recurrent dynamics.

    Returns:
        The task on `Remembered` states, which start with an empty memory. A policy of `task` that sees features,
        such as `Neural`, fits it.
    """
    return remade(
        task,
        task.horizon,
        dynamics=f,
        reward=OfState(task.reward),
        initial=_Empty(task.initial, f.net.start()),
        features=OfState(task.features),
        along=OfState,
    )


class _Empty(eqx.Module):
    inner: Callable
    h: PyTree

    def __call__(self, key: PRNGKeyArray) -> Remembered:
        return Remembered(self.inner(key), self.h)
