"""Manifests: the size and SHA-256 of every file that was written, and one canonical JSON text for each value.

A manifest is written after the files that it names, so a complete manifest proves complete files.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHANGED = "is not what was written: its SHA-256 is another"


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": found}


def fault(path: Path, expected: dict[str, Any]) -> str | None:
    """Compare a file with its digest.

    Args:
        path: The file.
        expected: Its SHA-256 and, except in manifests of older runs, its size in bytes.

    Returns: the fault in words, None if the file is what was written.
    """
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected.get("bytes", size):
        return f"has {size} bytes instead of {expected['bytes']}"
    return None if digest(path)["sha256"] == expected.get("sha256") else CHANGED


def canonical(value: Any) -> bytes:
    """Encode a value as JSON in the only way that readers accept, so that no byte changes unseen."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def sealed(manifest: dict[str, Any]) -> bytes:
    """Encode a manifest with its own SHA-256 added under `own`."""
    return canonical(manifest | {"own": sha256(canonical(manifest))})


def seal_holds(manifest: dict[str, Any]) -> bool:
    """Tell whether the SHA-256 under `own` is that of the rest of the manifest."""
    rest = {name: x for name, x in manifest.items() if name != "own"}
    return manifest.get("own") == sha256(canonical(rest))


def read_canonical(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that `canonical` encoded; None if the file cannot be read or holds anything else."""
    try:
        data = path.read_bytes()
        value = json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and canonical(value) == data else None


def files_below(folder: Path) -> Iterator[str]:
    """Yield the relative path of every file below a folder.

    Raises:
        ValueError: If an entry is a link, or neither a file nor a folder; the text starts with the entry's relative path.
    """
    for top, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(top) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                kind = "a symbolic link" if path.is_symlink() else "neither a file nor a folder"
                raise ValueError(f"{path.relative_to(folder)} is {kind}")
        yield from ((Path(top) / name).relative_to(folder).as_posix() for name in names)
