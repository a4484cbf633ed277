"""The folder of a run: `runs/<task>-<job>-<hash>/`, and what is written in it before and after the work.

    config.json      the resolved configuration
    provenance.json  code, versions, device and seeds (provenance.py)
    status.json      running, finished, failed or interrupted
    metrics.jsonl    one line per measurement (metrics.py)
    figures/         PNG and SVG
    report.html      one self-contained page
    policies/, agents/, buffers/   final arrays (arrays.py)
    checkpoints/     states to resume from (checkpoint.py)

Nothing is pickled. A file is written under a temporary name and then renamed, so a reader never finds half of one.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffmbrl.runs import provenance
from diffmbrl.runs.metrics import to_json
from diffmbrl.runs.signals import Terminated

ROOT = Path("runs")
STATUSES = ("running", "finished", "failed", "interrupted")


def check_out(out: Path | None) -> None:
    """Check that a run can be written to a folder, and leave nothing behind.

    Args:
        out: The folder; None for a new one under `runs/`.

    Raises:
        ValueError: If `out` is a file, is not empty, leads through a file, or cannot be written; the text names the path.
    """
    path = ROOT if out is None else Path(out)
    try:
        if path.is_dir():
            if out is not None and any(path.iterdir()):
                raise ValueError(f"the folder {str(path)!r} is not empty: choose a new one or empty it")
        elif os.path.lexists(path):
            raise ValueError(f"{str(path)!r} is not a folder: choose a new path")
        ancestor = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not ancestor.is_dir():
            raise ValueError(
                f"{str(path)!r} leads through {str(ancestor)!r}, which is not a folder: choose another path"
            )
        # Permission bits are wrong on read-only and virtual file systems and for root, so try.
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=ancestor))
    except OSError as error:
        raise ValueError(f"cannot write to {str(path)!r} ({error.strerror}): choose another folder") from None


def create(out: Path | None, task: str, job: str, config: dict[str, Any]) -> Path:
    """Create the folder of a run and record its configuration, provenance and start.

    The default name ends with 8 hexadecimal digits of the configuration's SHA-256; a second run of the same one adds `-2`.

    Args:
        out: The folder; None for a new one under `runs/`.
        task: The name of the task.
        job: The name of the job.
        config: The resolved configuration, fit for JSON.

    Returns: the folder.

    Raises:
        ValueError: If `check_out` refuses `out`, before anything is written.

    >>> folder = create(None, "lqr", "compare", {"seeds": 5})  # doctest: +SKIP
    >>> folder  # doctest: +SKIP
    PosixPath('runs/lqr-compare-5e4c4ac6')
    """
    check_out(out)
    resolved = to_json({"task": task, "job": job, **config})
    started = now()
    facts = provenance.collect_provenance(seeds=config.get("seeds"), time=started)
    path = _fresh(task, job, resolved) if out is None else Path(out)
    path.mkdir(parents=True, exist_ok=True)
    (path / "figures").mkdir(exist_ok=True)
    write_json(path / "config.json", resolved)
    write_json(path / "provenance.json", facts)
    write_json(path / "status.json", {"status": "running", "reason": None, "started": started, "ended": None})
    return path


def set_status(folder: Path, status: str, *, reason: str | None = None, **facts: Any) -> None:
    """Record the status of a run in `status.json`; the time of its start is preserved.

    Args:
        folder: The folder of the run.
        status: `running`, `finished`, `failed` or `interrupted`.
        reason: The error of a run that failed or was interrupted.
        **facts: Further entries.

    Raises:
        ValueError: If the status is unknown.
    """
    if status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
    try:
        started = json.loads((folder / "status.json").read_text(encoding="utf-8")).get("started")
    except (OSError, ValueError):
        started = None
    ended = None if status == "running" else now()
    write_json(folder / "status.json", {"status": status, "reason": reason, "started": started, "ended": ended} | facts)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """Mark a run as finished at the end of the block, interrupted on Ctrl-C or SIGTERM, failed on any other exception.

    Args:
        folder: The folder of the run.

    Yields: a dictionary; its entries are recorded in `status.json` too.
    """
    facts: dict[str, Any] = {}
    try:
        yield facts
    except KeyboardInterrupt as error:
        by = "by SIGTERM" if isinstance(error, Terminated) else "by the user"
        _ended(folder, "interrupted", f"interrupted {by}", facts)
        raise
    except BaseException as error:
        _ended(folder, "failed", f"{type(error).__name__}: {error}", facts)
        raise
    set_status(folder, "finished", **facts)


def _ended(folder: Path, status: str, reason: str, facts: dict[str, Any]) -> None:
    """Set the final status; on a full disk the run's own exception says more than a failure to record it."""
    with contextlib.suppress(OSError):
        set_status(folder, status, reason=reason, **facts)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(to_json(value), indent=2, ensure_ascii=False) + "\n")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write all of the content or none of it, even in a crash: a temporary file, synced, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would keep the file from a colleague
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _fresh(task: str, job: str, resolved: dict[str, Any]) -> Path:
    """Create a folder under the first free name of this configuration."""
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()[:8]
    stem = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in (task, job))
    number = 1
    while True:
        path = ROOT / (f"{stem}-{digest}" if number == 1 else f"{stem}-{digest}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def now() -> str:
    """Return the present time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
