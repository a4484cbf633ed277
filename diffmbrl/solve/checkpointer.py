"""Hooks by which a loop saves its state, so that another process can resume it.

A loop that can be resumed holds its whole state in a tree of arrays and a few plain numbers:

    numbers = checkpointer.restored                            # of the checkpoint to resume from; None: start
    state = start() if numbers is None else checkpointer.restore(like)
    while ...:
        state = ...
        checkpointer.save(state, done=done, spent=spent)

`runs.session` writes the checkpoints to disk.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import PyTree


@runtime_checkable
class Checkpointer(Protocol):
    """Saves the state of a loop, and restores it."""

    @property
    def restored(self) -> dict[str, Any] | None:
        """The numbers of the checkpoint to resume from, until it is restored; None to start."""
        ...

    def restore(self, like: PyTree) -> PyTree:
        """The arrays of that checkpoint, in the structure of `like`, whose leaves may be shapes."""
        ...

    def save(self, state: PyTree, **numbers: Any) -> None:
        """Save all that the loop needs to resume. Arrays must not be changed in place afterwards."""
        ...


class NoCheckpoints:
    """No-op hook: never checkpoints."""

    restored: dict[str, Any] | None = None

    def restore(self, like: PyTree) -> PyTree:
        raise ValueError("there is no checkpoint to restore")

    def save(self, state: PyTree, **numbers: Any) -> None:
        pass
