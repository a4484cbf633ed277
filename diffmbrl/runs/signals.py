"""Ends that come from outside: SIGTERM, as schedulers send it, is an exception like Ctrl-C, and neither disturbs a write."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXITS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 and the signal's number, as a shell has it


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, as Ctrl-C does `KeyboardInterrupt`. Outside of the main thread nothing is changed."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    with _handled({signal.SIGTERM: stop}):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Both signals wait until the end of the block."""
    waiting: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    with _handled(dict.fromkeys(kinds, lambda number, frame: waiting.append(number))):
        yield
    if waiting:
        signal.raise_signal(waiting[0])


def exit_code(error: KeyboardInterrupt) -> int:
    """What the process ends with."""
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
