"""Read `config.json` and restore a job's config from it, field by field with its type."""

import json
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffmbrl.runs.metrics import NONFINITE

T = TypeVar("T")
WRITTEN = frozenset({"task", "job"})  # by `folder.create`


def read_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a run.

    Args:
        folder: The run folder.

    Returns:
        Its entries.

    Raises:
        ValueError: If there is none that can be read, in one line.
    """
    path = Path(folder) / "config.json"
    if path.is_symlink():
        raise ValueError(f"'{path}' is a symbolic link: a run's config is in its own folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(f"'{folder}' is not a run: it has no config.json that can be read") from None
    if not isinstance(config, dict):
        raise ValueError(f"'{folder}' is not a run: its config.json holds no object")
    return config


def config_from_json(
    kind: type[T], config: dict[str, Any], *, optional: Collection[str] = (), ignored: Collection[str] = ()
) -> T:
    """Restore a config, a frozen dataclass, from the entries of its `config.json`.

    Args:
        kind: The dataclass.
        config: The entries.
        optional: Fields that an earlier version did not write; one that is missing has its default.
        ignored: Further entries, which the run wrote for its reader.

    Returns:
        The config, an instance of `kind`.

    Raises:
        ValueError: If a field is missing, unknown or of another type; another version or a person wrote it.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Config:
    ...     task: str
    ...     rates: tuple[float, ...] = ()
    >>> config_from_json(Config, {"task": "lqr", "rates": [1, 0.5], "job": "compare"})
    Config(task='lqr', rates=(1.0, 0.5))
    """
    hints = get_type_hints(kind)
    if missing := [name for name in hints if name not in config and name not in optional]:
        raise ValueError(f"config.json has no {missing[0]!r}: it does not fit the installed diffmbrl")
    if unknown := [name for name in config if name not in {*hints, *WRITTEN, *ignored}]:
        raise ValueError(f"config.json has {unknown[0]!r}, which the installed diffmbrl does not know")
    return kind(**{name: _of(hint, config[name], name) for name, hint in hints.items() if name in config})


def _of(hint: Any, value: Any, name: str) -> Any:
    """Convert a value of JSON to a type that JSON does not have."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is float and isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool, type(None)) and type(value) is (type(None) if hint is None else hint):
        return value
    if origin is Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_of(parts[0], item, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _of(parts[1], item, name) for key, item in value.items()}
    if origin in (Union, types.UnionType):
        for part in parts:
            try:
                return _of(part, value, name)
            except ValueError:
                continue
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"config.json has {name} = {json.dumps(value)[:80]}; expected {expected.replace('typing.', '')}")
