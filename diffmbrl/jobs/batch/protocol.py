"""The protocol that batched runs of policies and of plans share."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import PyTree

from diffmbrl.solve.checkpointer import Checkpointer


@runtime_checkable
class BatchedRuns(Protocol):
    """Runs of one method, one replica for each variant and seed (and for each start, of planners).

    Args:
        count: The number of replicas.
        parameters: The number of parameters of one policy or plan.
    """

    count: int
    parameters: int

    def compile(self) -> float:
        """Compile an update; returns the seconds that it took."""
        ...

    def advance(self, done: int, updates: int) -> None:
        """Make `updates` further updates of every replica, after the first `done`."""
        ...

    @property
    def state(self) -> PyTree:
        """Everything that changes from update to update."""
        ...

    def restore(self, checkpointer: Checkpointer) -> None:
        """Restore the state that a checkpoint holds; it was saved after at least one update."""
        ...

    def returns(self) -> dict[str, np.ndarray]:
        """Mean returns `train` and `test`, `success` if the task defines it, and `nonfinite` so far, [variants, seeds]."""
        ...

    def evaluate(self) -> dict[str, np.ndarray]:
        """`returns` with the reports of the last updates and, of policies, the spread of their gradients."""
        ...

    def profile(self, variant: int) -> np.ndarray:
        """Root mean square of dJ/da_t over a variant's seeds and starts, [T]."""
        ...

    def spectrum(self, variant: int) -> np.ndarray:
        """Eigenvalues of the Gauss-Newton matrix of a variant's first seed."""
        ...

    def path(self, variant: int) -> dict[str, np.ndarray] | None:
        """The candidate steps of the first update of a variant's first seed; None for a method without a model."""
        ...

    def broken(self, variant: int) -> str | None:
        """Where a replica of a variant met a non-finite value and stopped, or None."""
        ...
