r"""`metrics.jsonl`: append-only, one JSON object a line, each with a `kind`.

A NaN or an infinity is a measurement, but not JSON: it is written as the string "nan", "inf" or "-inf" and read back as
a float, everywhere but under the keys that hold words.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
WORDS = frozenset({"kind", "method", "label", "policy_kind", "when", "reason", "text", "estimator"})


class Mark(NamedTuple):
    """How far a file was: its first `bytes`, and their SHA-256."""

    bytes: int
    sha256: str


class Writer:
    """Appends records to a file; each is flushed, so a killed run loses at most the line being written.

    The file is locked while it is open. Raises: `ValueError` if another process has it open so.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with Writer(path) as metrics:
    ...     metrics.write({"kind": "eval", "J": np.array([1.0, np.nan])})
    >>> read_metrics(path)
    ([{'kind': 'eval', 'J': [1.0, nan]}], None)
    """

    def __init__(self, path: Path):
        self.file = Path(path).open("a+b")  # noqa: SIM115 (closed by close)
        try:
            self._lock()
        except ValueError:
            self.file.close()
            raise
        self.file.seek(0)
        present = self.file.read()
        if present and not present.endswith(b"\n"):  # a killed run's last line: leave it alone, and apart from ours
            self.file.write(b"\n")
            present += b"\n"
        self.bytes, self.digest = len(present), hashlib.sha256(present)

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        if not isinstance(record.get("kind"), str):
            raise ValueError(f"a record needs a kind, got {record!r}")
        line = json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self.bytes += len(line)
        self.digest.update(line)

    def mark(self) -> Mark:
        """Everything that is written so far."""
        return Mark(self.bytes, self.digest.hexdigest())

    def sync(self) -> None:
        """All of it on disk, not only with the system."""
        os.fsync(self.file.fileno())

    def cut(self, mark: Mark | None) -> None:
        """Forget what was written after `mark` (None: everything). Raises: `ValueError` if the file does not begin so."""
        self.file.seek(0)
        kept = b"" if mark is None else self.file.read(mark.bytes)
        if mark is not None and (len(kept), hashlib.sha256(kept).hexdigest()) != mark:
            raise ValueError(f"{self.file.name} is not what was written up to byte {mark.bytes}")
        self.file.truncate(len(kept))
        self.bytes, self.digest = len(kept), hashlib.sha256(kept)

    def _lock(self) -> None:
        """Two processes that write one run would spoil it; the lock goes with the process, however it ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = Path(self.file.name).parent
            raise ValueError(f"the run '{folder}' is under way in another process: wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records, and a note on the lines that could not be read (None if all could)."""
    records, broken = [], []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # JSON's and UTF-8's errors both
            record = None
        if isinstance(record, dict):
            records.append({key: _revive(key, value) for key, value in record.items()})
        else:
            broken.append(number)
    if not broken:
        return records, None
    if broken == [len(lines)]:
        return records, f"the last line of {Path(path).name} (line {broken[0]}) is cut short and was left out"
    return records, f"{Path(path).name}: unreadable lines left out: {', '.join(map(str, broken))}"


def marked(path: Path, mark: Mark) -> str | None:
    """What is wrong with a file that should begin as `mark` says; None if it does."""
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.is_symlink() else "is a symbolic link"
    with path.open("rb") as file:
        data = file.read(mark.bytes)
    if len(data) < mark.bytes:
        return f"has {len(data)} bytes, fewer than the {mark.bytes} that were written"
    return (
        None if hashlib.sha256(data).hexdigest() == mark.sha256 else "is not what was written: its SHA-256 is another"
    )


def to_json(value: Any) -> Any:
    """The value in JSON's types: arrays as lists, paths and other objects as text, non-finite floats as strings."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "__array__"):  # numpy's and JAX's arrays and scalars
        return to_json(np.asarray(value).tolist())
    return str(value)


def _revive(key: str, value: Any) -> Any:
    if isinstance(value, str) and key not in WORDS:
        return NONFINITE.get(value, value)
    if isinstance(value, list):
        return [_revive(key, item) for item in value]
    if isinstance(value, dict):
        return {name: _revive(name, item) for name, item in value.items()}
    return value
