"""Signals that end a run: SIGTERM, which schedulers send, raises an exception as Ctrl-C does; both wait for a write."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 plus the number of the signal, as in a shell


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM inside the block. Outside of the main thread nothing changes."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    with _handled({signal.SIGTERM: stop}):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Delay both signals until the end of the block."""
    waiting: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    with _handled(dict.fromkeys(kinds, lambda number, frame: waiting.append(number))):
        yield
    if waiting:
        signal.raise_signal(waiting[0])


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that was interrupted.

    Args:
        error: The exception of Ctrl-C or SIGTERM.

    Returns: 130 for Ctrl-C, 143 for SIGTERM.
    """
    return EXITS[signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT]


@contextlib.contextmanager
def _handled(handlers: dict[Any, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
