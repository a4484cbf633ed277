"""A run in progress: its records, its progress, and the checkpoints from which `diffmbrl resume` continues.

A run is a sequence of arms (methods, agents, starts). Each arm is a loop that offers its state after every chunk of work
(`solve/checkpointer.py`). A checkpoint holds the latest offered state: the arm, its state, and the length of `metrics.jsonl`.
Finished arms are in the records alone.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import PyTree

from diffmbrl.devices import to_local
from diffmbrl.runs import checkpoint, provenance
from diffmbrl.runs.checkpoint import Checkpoint
from diffmbrl.runs.config import read_config
from diffmbrl.runs.folder import now, running, set_status, write_json
from diffmbrl.runs.metrics import Mark, Writer
from diffmbrl.runs.progress import Progress
from diffmbrl.runs.signals import terminable, undisturbed
from diffmbrl.runs.track import tracked

EVERY = 30.0  # seconds between two checkpoints
SHARE = 0.01  # of the run's time at most is spent on checkpoints: slow ones become less frequent
Arm = TypeVar("Arm")
Tree = TypeVar("Tree")


class _Offer(NamedTuple):
    """A state that a checkpoint could hold."""

    arm: int
    state: PyTree
    numbers: dict[str, Any] | None  # None: the arm has not begun
    metrics: Mark
    seconds: float


class Session:
    """The records, progress and checkpoints of one run; the `Checkpointer` of its loops.

    A checkpoint is written in the background while the loop continues: the next one, and the end of the run, wait for it.
    Of several processes the first alone writes, so that its last state is saved even if only it was interrupted.

    Args:
        folder: The folder of the run.
        writer: The writer of `metrics.jsonl`.
        write: Writes a record to all sinks.
        progress: Shows how far the run is.
        every: Seconds between two checkpoints; 0 saves every offered state before the loop continues. The last state is
            always saved.
        found: The checkpoint to resume from, None to begin.
        facts: Dictionary recorded in `status.json`; receives the number of checkpoints and the seconds that the run waited.
    """

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        write: Callable[[dict[str, Any]], None],
        progress: Progress,
        every: float,
        found: Checkpoint | None,
        facts: dict[str, Any],
    ):
        self.folder, self.progress, self.write = folder, progress, write
        self._writer, self._every = writer, every
        self._found, self._step = found, 0 if found is None else found.step
        self._arm = 0 if found is None else found.host["arm"]
        self._latest: _Offer | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[float, Future[float]] | None = None  # when it began, and when it ends
        self._saved, self._took = time.monotonic(), 0.0
        self._facts = facts
        self._opened, self._written, self._waited = time.monotonic(), 0, 0.0
        self._before = 0.0 if found is None else found.host["seconds"]  # spent on the present arm by earlier processes
        self._begun = time.monotonic()
        self.begins = found is None  # no record exists yet

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the present arm, summed over all processes that ran it."""
        return self._before + time.monotonic() - self._begun

    def arms(self, arms: Iterable[Arm]) -> Iterator[Arm]:
        """Iterate over the arms that are not finished.

        Args:
            arms: All arms, in the same order in every process of the run.

        Yields: the arms from the one in the checkpoint on.
        """
        first = self._arm
        for index, arm in enumerate(arms):
            if index < first:
                self.progress.number += 1
                continue
            self._arm = index
            if index > first:
                self._before, self._begun = 0.0, time.monotonic()
                self._offered(None, None)
            yield arm
            self._found = None

    @property
    def restored(self) -> dict[str, Any] | None:
        """The numbers saved with the state that the present arm resumes from; None if it begins."""
        return None if self._found is None else self._found.host["numbers"]

    def restore(self, like: Tree) -> Tree:
        """Read the state that the present arm resumes from.

        Args:
            like: A tree of its structure: arrays, or the shapes that `jax.eval_shape` returns.

        Returns: the state.

        Raises:
            ValueError: If there is no checkpoint, or it does not fit `like`.
        """
        if self._found is None:
            raise ValueError("there is no checkpoint to restore")
        state = checkpoint.restore_checkpoint(self._found, like)
        self._found = None
        return state

    def save(self, state: PyTree, **numbers: Any) -> None:
        """Offer the state of the present arm; a checkpoint of it is begun if one is due.

        Args:
            state: Arrays on any devices, all that the arm needs to continue. They must not be changed in place afterwards.
            **numbers: Plain numbers and words that the arm needs too.

        Raises:
            OSError: If this checkpoint or the previous one cannot be written.
        """
        # Each process holds shards that the others lack, and may have to save them alone.
        self._offered(to_local(state) if jax.process_count() > 1 else state, numbers)

    def write_latest(self) -> None:
        """Save the latest offered state, unless it is saved already, and wait until it is on disk.

        Raises:
            OSError: If it cannot be written.
        """
        self._begin()
        self._wait()

    def close(self) -> None:
        """Release the thread that writes checkpoints, after the last one."""
        self._background.shutdown()

    def _offered(self, state: PyTree, numbers: dict[str, Any] | None) -> None:
        if jax.process_index() > 0:
            return
        self._latest = _Offer(self._arm, state, numbers, self._writer.mark(), self.seconds)
        if self._writing is not None and self._writing[1].done():
            self._wait()
        if not self._every:
            self.write_latest()
        elif self._writing is None and time.monotonic() - self._saved >= max(self._every, self._took / SHARE):
            self._begin()

    def _begin(self) -> None:
        """Begin to save the latest offered state, after the previous checkpoint is on disk."""
        with undisturbed():
            self._wait()
            offer, self._latest = self._latest, None
            if offer is None:
                return
            begun = time.monotonic()
            host = {"arm": offer.arm, "numbers": offer.numbers, "seconds": offer.seconds}
            place, step = self.folder / "checkpoints", self._step + 1
            with self._named_failure():
                self._writer.sync()
                finish = checkpoint.start_checkpoint(place, step, offer.state, host, metrics=offer.metrics)

            def finished() -> float:
                finish()
                return time.monotonic()

            self._writing = begun, self._background.submit(finished)
            self._waited += time.monotonic() - begun

    def _wait(self) -> None:
        """Wait until the checkpoint that is being written is on disk."""
        if self._writing is None:
            return
        with undisturbed(), self._named_failure():
            started = time.monotonic()
            (begun, writing), self._writing = self._writing, None
            self._saved = writing.result()
            self._step, self._written = self._step + 1, self._written + 1
            self._took, self._waited = self._saved - begun, self._waited + time.monotonic() - started
            spent = {"seconds": round(self._waited, 3), "of": round(time.monotonic() - self._opened, 3)}
            self._facts["checkpoints"] = {"written": self._written, **spent}

    @contextlib.contextmanager
    def _named_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            left = f"; checkpoint {self._step} is valid" if self._step else ""
            raise OSError(f"{error}{left}; free the disk, then: diffmbrl resume {self.folder}") from error


@contextlib.contextmanager
def underway(
    folder: Path,
    arms: int,
    *,
    report: Callable[[Path], Any],
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
    resumed: bool = False,
) -> Iterator[Session]:
    """Run or resume in a folder: status, records, checkpoints and report are in order however the block ends.

    Args:
        folder: The folder of the run, which `create` made.
        arms: The number of arms.
        report: Writes the report of a folder; called at the end.
        stream: Where progress is shown, standard output if None.
        every: Seconds between two checkpoints; 0 saves every offered state before its loop continues.
        track: Names of the sinks that receive the records too (`tracked`).
        resumed: Continue from the newest valid checkpoint, if there is one.

    Yields: the session.

    Raises:
        ValueError: If the run has checkpoints and none is valid, or another process runs it.
        OSError: If a checkpoint cannot be written.
    """
    if resumed and (folder / "metrics.jsonl").is_symlink():
        raise ValueError(f"'{folder / 'metrics.jsonl'}' is a symbolic link: a run's records are in its own folder")
    with Writer(folder / "metrics.jsonl") as writer:
        found, remarks = _resumption(folder, writer) if resumed else (None, [])
        try:
            with (
                terminable(),
                running(folder) as facts,
                Progress(arms, stream=stream) as progress,
                tracked(writer.write, track, folder, read_config(folder) if track else {}, progress.note) as write,
            ):
                for remark in remarks:
                    progress.note(remark)
                with contextlib.closing(Session(folder, writer, write, progress, every, found, facts)) as run:
                    try:
                        yield run
                    except BaseException as error:
                        _last(run, error)
                        raise
                    run.write_latest()
                checkpoint.prune(folder / "checkpoints", keep=1)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says more
                report(folder)
            raise
    report(folder)


def _last(run: Session, error: BaseException) -> None:
    """Save the latest state before an exception is raised; a failure to do so is noted on it."""
    try:
        run.write_latest()
    except OSError as other:
        if str(other) != str(error):
            error.add_note(str(other))
        return
    if isinstance(error, KeyboardInterrupt):
        error.add_note(f"to continue: diffmbrl resume {run.folder}")


def _resumption(folder: Path, writer: Writer) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume from, cut the records back to it, and record the resumption in the provenance."""
    place = folder / "checkpoints"
    found, wrong = checkpoint.newest_valid(place)
    step = None if found is None else found.step
    remarks = [f"left out as damaged: {what}" for what in wrong]
    writer.cut(None if found is None else found.metrics)
    if found is not None:
        checkpoint.set_aside(place, found.step)
    path = folder / "provenance.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    here = provenance.collect_provenance(time=now())
    remarks += provenance.differences(facts, here)
    entry = {name: here[name] for name in ("time", "command", "git", "versions", "device")}
    entry |= {"checkpoint": step, "remarks": remarks}
    write_json(path, facts | {"resumed": [*facts.get("resumed", []), entry]})
    set_status(folder, "running")
    begun = "from the beginning: there was no checkpoint" if found is None else f"from checkpoint {step}"
    return found, [*remarks, f"resumed {begun}"]
