r"""`metrics.jsonl`: append-only, one JSON object a line, each with a `kind`.

A NaN or an infinity is a measurement, but not JSON: it is written as the string "nan", "inf" or "-inf" and read back as
a float, except under the keys that hold words.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffmbrl.runs.manifest import CHANGED, sha256

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
WORDS = frozenset({"kind", "method", "label", "policy_kind", "when", "reason", "text", "estimator"})


class Mark(NamedTuple):
    """The length of a file at some time, in bytes, and the SHA-256 of those bytes."""

    bytes: int
    sha256: str


class Writer:
    """Appends records to a file, one flushed line each: a killed run loses at most the line being written.

    Args:
        path: The file, locked while it is open.

    Raises:
        ValueError: If another process writes it.

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
        if present and not present.endswith(b"\n"):  # end the last line of a killed run
            self.file.write(b"\n")
            present += b"\n"
        self.bytes, self.digest = len(present), hashlib.sha256(present)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, which needs a `kind`."""
        if not isinstance(record.get("kind"), str):
            raise ValueError(f"a record needs a kind, got {record!r}")
        line = json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self.file.write(line)
        self.file.flush()
        self.bytes += len(line)
        self.digest.update(line)

    def mark(self) -> Mark:
        """Return the length and SHA-256 of the lines written so far."""
        return Mark(self.bytes, self.digest.hexdigest())

    def sync(self) -> None:
        """Force all lines to disk."""
        os.fsync(self.file.fileno())

    def cut(self, mark: Mark | None) -> None:
        """Delete the lines after `mark` (None: all lines); `ValueError` if the file does not begin as the mark says."""
        self.file.seek(0)
        head = b"" if mark is None else self.file.read(mark.bytes)
        if mark is not None and (len(head), hashlib.sha256(head).hexdigest()) != mark:
            raise ValueError(f"{self.file.name} is not what was written up to byte {mark.bytes}")
        self.file.truncate(len(head))
        self.bytes, self.digest = len(head), hashlib.sha256(head)

    def _lock(self) -> None:
        """Keep a second process from writing the same run; the system releases the lock when the process ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = Path(self.file.name).parent
            raise ValueError(f"the run '{folder}' is in progress in another process: wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Read the records of a run.

    Args:
        path: The file.

    Returns: the records, and a sentence on unreadable lines, None if there are none.
    """
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


def mark_fault(path: Path, mark: Mark) -> str | None:
    """Compare the beginning of a file with a mark; return the fault in words, None if they agree."""
    if path.is_symlink() or not path.is_file():
        return "is missing" if not path.is_symlink() else "is a symbolic link"
    with path.open("rb") as file:
        data = file.read(mark.bytes)
    if len(data) < mark.bytes:
        return f"has {len(data)} bytes, fewer than the {mark.bytes} that were written"
    return None if sha256(data) == mark.sha256 else CHANGED


def to_json(value: Any) -> Any:
    """Convert a value to JSON's types: arrays as lists, paths and other objects as text, non-finite floats as strings."""
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
