"""A run under way: its records, its progress, and checkpoints from which `diffmbrl resume` goes on.

A run is a row of arms (methods, agents, starts), one after another, each of them a loop that shows its state when it is looked
at (`solve/checkpointer.py`). A checkpoint is the latest look: which arm, its state, and how far `metrics.jsonl` was.
Arms that are over are in the records alone.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffmbrl.runs import checkpoint, provenance
from diffmbrl.runs.config import read_config
from diffmbrl.runs.folder import now, running, set_status, write_json
from diffmbrl.runs.metrics import Mark, Writer
from diffmbrl.runs.progress import Progress
from diffmbrl.runs.signals import terminable, undisturbed
from diffmbrl.runs.track import tracked

EVERY = 30.0  # seconds between two checkpoints
SHARE = 0.01  # of the time at most, if a checkpoint takes so long that this is less often
Arm = TypeVar("Arm")


class _Look(NamedTuple):
    arm: int
    state: Any
    numbers: dict[str, Any] | None  # None: the arm has not begun
    metrics: Mark
    seconds: float


class Session:
    """What the loops of a run are given; it is their `Looks`.

    `every` seconds a look is kept as a checkpoint (0: each look), and the last one when the run ends, however it ends. How many
    there were, and the seconds that they took of those of this process, is in `status.json`.
    """

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        write: Callable[[dict], None],
        progress: Progress,
        every: float,
        kept: checkpoint.Kept | None,
        facts: dict[str, Any],
    ):
        self.folder, self.progress, self.write = folder, progress, write
        self._writer, self._every = writer, every
        self._kept, self._step = kept, 0 if kept is None else kept.step
        self._arm = 0 if kept is None else kept.host["arm"]
        self._latest: _Look | None = None
        self._saved, self._took = time.monotonic(), 0.0
        self._facts = facts  # for the run's status
        self._opened, self._written, self._saving = time.monotonic(), 0, 0.0
        self._before = 0.0 if kept is None else kept.host["seconds"]  # spent on the present arm by other processes
        self._begun = time.monotonic()
        self.begins = kept is None  # nothing is recorded yet

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the present arm, of all its processes together."""
        return self._before + time.monotonic() - self._begun

    def arms(self, arms: Iterable[Arm]) -> Iterator[Arm]:
        """Those that are not over yet."""
        first = self._arm
        for index, arm in enumerate(arms):
            if index < first:
                self.progress.number += 1
                continue
            self._arm = index
            if index > first:
                self._before, self._begun = 0.0, time.monotonic()
                self._seen(None, None)
            yield arm
            self._kept = None

    @property
    def restored(self) -> dict[str, Any] | None:
        """The numbers of the look that the present arm goes on from; None: it begins."""
        return None if self._kept is None else self._kept.host["numbers"]

    def restore(self, like: Any) -> Any:
        """The arrays of that look, in the form of `like`."""
        if self._kept is None:
            raise ValueError("there is no checkpoint to restore")
        state = checkpoint.restore_checkpoint(self._kept, like)
        self._kept = None
        return state

    def save(self, state: Any, **numbers: Any) -> None:
        """All that the present arm needs to go on; kept as a checkpoint if it is time."""
        self._seen(state, numbers)

    def write_latest(self) -> None:
        """Keep the latest look as a checkpoint, if it is not yet."""
        look, self._latest = self._latest, None
        if look is None:
            return
        begun = time.monotonic()
        host = {"arm": look.arm, "numbers": look.numbers, "seconds": look.seconds}
        with undisturbed():
            self._writer.sync()
            place = self.folder / "checkpoints"
            try:
                checkpoint.save_checkpoint(place, self._step + 1, look.state, host, metrics=look.metrics)
            except OSError as error:
                left = f"; checkpoint {self._step} is valid" if self._step else ""
                raise OSError(f"{error}{left}; when that is mended: diffmbrl resume {self.folder}") from error
            self._step += 1
        self._saved = time.monotonic()
        self._took = self._saved - begun
        self._written, self._saving = self._written + 1, self._saving + self._took
        spent = {"seconds": round(self._saving, 3), "of": round(self._saved - self._opened, 3)}
        self._facts["checkpoints"] = {"written": self._written, **spent}

    def _seen(self, state: Any, numbers: dict[str, Any] | None) -> None:
        self._latest = _Look(self._arm, state, numbers, self._writer.mark(), self.seconds)
        if time.monotonic() - self._saved >= (max(self._every, self._took / SHARE) if self._every else 0):
            self.write_latest()


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
    """Run or go on in `folder`; status, records, checkpoints and report are in order whatever ends it.

    `report` writes the report of the folder; `track` are the sinks that get the records too.

    Raises: `ValueError` if there is something to go on from that cannot be, or if another process runs it.
    """
    if resumed and (folder / "metrics.jsonl").is_symlink():
        raise ValueError(f"'{folder / 'metrics.jsonl'}' is a symbolic link: a run's records are in its own folder")
    with Writer(folder / "metrics.jsonl") as writer:
        kept, remarks = _kept(folder, writer) if resumed else (None, [])
        try:
            with (
                terminable(),
                running(folder) as facts,
                Progress(arms, stream=stream) as progress,
                tracked(writer.write, track, folder, read_config(folder) if track else {}, progress.note) as write,
            ):
                for remark in remarks:
                    progress.note(remark)
                run = Session(folder, writer, write, progress, every, kept, facts)
                try:
                    yield run
                except BaseException as error:
                    _last(run, error)
                    raise
                run.write_latest()
                checkpoint.prune(folder / "checkpoints", keep=1)
        except BaseException:
            with contextlib.suppress(Exception):  # the one that is on its way says more
                report(folder)
            raise
    report(folder)


def _last(run: Session, error: BaseException) -> None:
    """The latest look, before an exception goes on; what prevents that is added to it."""
    try:
        run.write_latest()
    except OSError as other:
        error.add_note(str(other))
        return
    if isinstance(error, KeyboardInterrupt):
        error.add_note(f"to go on: diffmbrl resume {run.folder}")


def _kept(folder: Path, writer: Writer) -> tuple[checkpoint.Kept | None, list[str]]:
    """The checkpoint to go on from, the records cut back to it, and remarks on what was found; all of it in the provenance."""
    place = folder / "checkpoints"
    kept, wrong = checkpoint.newest_valid(place)
    step = None if kept is None else kept.step
    remarks = [f"left out as damaged: {what}" for what in wrong]
    writer.cut(None if kept is None else kept.metrics)
    if kept is not None:
        checkpoint.set_aside(place, kept.step)
    path = folder / "provenance.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    here = provenance.collect_provenance(time=now())
    remarks += provenance.differences(facts, here)
    entry = {name: here[name] for name in ("time", "command", "git", "versions", "device")}
    entry |= {"checkpoint": step, "remarks": remarks}
    write_json(path, facts | {"resumed": [*facts.get("resumed", []), entry]})
    set_status(folder, "running")
    begun = "from the beginning: there was no checkpoint" if kept is None else f"from checkpoint {step}"
    return kept, [*remarks, f"resumed {begun}"]
