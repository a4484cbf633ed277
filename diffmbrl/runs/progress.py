"""Progress of a run of several arms: live bars on a terminal, otherwise one plain line a second for readable logs."""

import sys
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 1.0  # seconds between plain lines


class Progress:
    """Shows the running arm, its number of updates and a short text.

    Args:
        total_arms: The number of arms.
        stream: Where to write, standard output if None.
        clock: Returns the time in seconds.

    >>> with Progress(1) as progress:
    ...     progress.arm("adam", 400)
    ...     progress.update(400, "return -0.81")
    [1/1] adam
    [1/1] adam 400/400  return -0.81
    """

    def __init__(self, total_arms: int, *, stream: Any = None, clock: Callable[[], float] = time.monotonic):
        self.stream = sys.stdout if stream is None else stream
        self.total, self.clock = total_arms, clock
        self.number, self.name, self.steps, self.last = 0, "", 0, 0.0
        self.bars: Any = _bars(self.stream) if self.stream.isatty() else None
        self.bar: Any = None

    def arm(self, name: str, steps: int) -> None:
        """Begin the next arm, which makes `steps` updates."""
        self.number, self.name, self.steps, self.last = self.number + 1, name, steps, self.clock()
        if self.bars is None:
            self._line("")
        else:
            self.bar = self.bars.add_task(_plain(self._head()), total=steps, text="compiling")

    def update(self, step: int, text: str = "") -> None:
        """Show that the arm has made `step` updates; the last one is always shown."""
        if self.bars is not None:
            self.bars.update(self.bar, completed=step, text=_plain(text))
        elif step >= self.steps or self.clock() - self.last >= INTERVAL:
            self.last = self.clock()
            self._line(f" {step}/{self.steps}" + (f"  {text}" if text else ""))

    def note(self, text: str) -> None:
        """Print a line that is not overwritten."""
        if self.bars is None:
            print(text, file=self.stream, flush=True)
        else:
            self.bars.console.print(_plain(text))

    def __enter__(self) -> "Progress":
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def _head(self) -> str:
        return f"[{self.number}/{self.total}] {self.name}"

    def _line(self, text: str) -> None:
        print(self._head() + text, file=self.stream, flush=True)


def _plain(text: str) -> str:
    """Escape brackets, which are markup to rich."""
    from rich.markup import escape

    return escape(text)


def _bars(stream: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Bars(*columns, console=Console(file=stream), refresh_per_second=4)
