"""Protocols of learned models: what a dynamics may offer beyond `core.Dynamics`, and how a model is trained.

A dynamics offers a capability by having the protocol's methods; every other dynamics, a user's own included, works without.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from diffmbrl.core import State
from diffmbrl.models.buffer import Transition


@runtime_checkable
class DynamicsWithMemory(Protocol):
    """A dynamics on larger states, which hold a state `s` of the task and a memory of the steps before it."""

    def start(self, s: Any) -> Any:
        """Return the larger state of `s` with an empty memory."""
        ...

    def remember(self, state: Any, a: Array, s_next: Any) -> Any:
        """Return the larger state after a real step to `s_next`."""
        ...


@runtime_checkable
class ParticleStepping(Protocol):
    """A dynamics that steps P particles together, because they share something: the members of an ensemble, a clock."""

    def many(self, s: State, a: Array, *, key: PRNGKeyArray | None = None) -> State:
        """Return the next states [P, ...] of states [P, ...] under one action."""
        ...


@runtime_checkable
class ProbabilisticDynamics(Protocol):
    """A dynamics that knows the distribution of its next state."""

    def moments(self, s: Any, a: Any) -> tuple[Array, Array]:
        """Return mean and standard deviation of the next state, shapes [n] and [n]."""
        ...


@runtime_checkable
class Scaling(Protocol):
    """Maps states and actions to a network's inputs, and its outputs to next states; `Normalizer` is one."""

    @property
    def size(self) -> int:
        """Number of inputs of the network."""
        ...

    def inputs(self, s: Any, a: Any) -> Array:
        """Return the inputs of the network, shape [d]."""
        ...

    def target(self, s: Any, s_next: Any) -> Array:
        """Return the output that predicts `s_next`, shape [n]."""
        ...

    def step(self, s: Any, y: Any) -> Array:
        """Return the next state that an output predicts, shape [n]."""
        ...

    def average(self, x: Any) -> Array:
        """Return the mean of x over the state variables that count in a loss, shape []."""
        ...

    def fitted(self, rows: Any, data: Any) -> Any:
        """Return the scaling with the statistics of those rows where `data` is true."""
        ...


@runtime_checkable
class Network(Protocol):
    """A network from inputs [d] to outputs, whose leaves are its weights; `MLP` is one."""

    def __call__(self, x: Any) -> Array: ...


@runtime_checkable
class RecurrentNetwork(Protocol):
    """A network with a memory, `net(h, x) -> h', y`; `GRU` and `LSTM` are."""

    def start(self) -> PyTree:
        """Return the memory before the first input."""
        ...

    def __call__(self, h: Any, x: Any) -> tuple[PyTree, Array]: ...


@runtime_checkable
class FittedUnits(Protocol):
    """Statistics of the data, which `train` fits before it trains the network."""

    def fitted(self, rows: Transition, data: Bool[Array, " N"]) -> Any:
        """Return the same with the statistics of those of N rows where `data` is true."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A model that `train` takes: it trains the leaves of `net`, fits `normalizer`, and leaves all other leaves alone."""

    net: Any
    normalizer: Any

    def row_loss(self, row: Transition) -> Float[Array, ""]:
        """Return the loss of one row of data: a transition, or a window of consecutive ones."""
        ...
