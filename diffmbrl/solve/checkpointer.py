"""What a loop shows when the host looks at it, so that it can go on from there in another process.

A loop that can be continued keeps everything it needs between two looks in a tree of arrays and a few plain numbers:

    kept = checkpointer.restored                              # the numbers of the look to go on from; None: from the beginning
    state = begin() if kept is None else checkpointer.restore(like)
    while ...:
        state = ...
        checkpointer.save(state, done=done, spent=spent)

What it derives from its setting it sets up anew. `runs.session` keeps the looks as checkpoints.
"""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Checkpointer(Protocol):
    """Who looks."""

    @property
    def restored(self) -> dict[str, Any] | None:
        """The numbers of the look that the loop goes on from, until it has restored it; None: it begins."""
        ...

    def restore(self, like: Any) -> Any:
        """The arrays of that look, in the form of `like`, which may be shapes."""
        ...

    def save(self, state: Any, **numbers: Any) -> None:
        """This is all that the loop needs to go on. Arrays must not be changed in place afterwards."""
        ...


class NoCheckpoints:
    """Nobody looks: a loop that runs in one piece."""

    restored: dict[str, Any] | None = None

    def restore(self, like: Any) -> Any:
        raise ValueError("there is nothing to restore")

    def save(self, state: Any, **numbers: Any) -> None:
        pass
