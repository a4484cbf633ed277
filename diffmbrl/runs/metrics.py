r"""`metrics.jsonl`: append-only, one JSON object a line, each with a `kind`.

A NaN or an infinity is a measurement, but not JSON: it is written as the string "nan", "inf" or "-inf" and read back as
a float, everywhere but under the keys that hold words.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
WORDS = frozenset({"kind", "method", "label", "policy_kind", "when", "reason", "text", "estimator"})


class Writer:
    """Appends records to a file; each is flushed, so a killed run loses at most the line being written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    >>> with Writer(path) as metrics:
    ...     metrics.write({"kind": "eval", "J": np.array([1.0, np.nan])})
    >>> read(path)
    ([{'kind': 'eval', 'J': [1.0, nan]}], None)
    """

    def __init__(self, path: Path):
        self.file = Path(path).open("a+b")  # noqa: SIM115 (closed by close)
        if self.file.tell() > 0:
            self.file.seek(-1, 2)
            if self.file.read(1) != b"\n":  # a killed run's last line: leave it alone, and apart from ours
                self.file.write(b"\n")

    def write(self, record: dict[str, Any]) -> None:
        """One line."""
        if not isinstance(record.get("kind"), str):
            raise ValueError(f"a record needs a kind, got {record!r}")
        self.file.write(json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> tuple[list[dict[str, Any]], str | None]:
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
