"""From `config.json` back to the setting of a run, so that it can go on: every field there, of its type, and none besides."""

import json
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from diffmbrl.runs.metrics import NONFINITE

T = TypeVar("T")
WRITTEN = frozenset({"task", "job"})  # by `folder.create`


def read_config(folder: Path) -> dict[str, Any]:
    """Raises: `ValueError`, one line, if there is none that can be read."""
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


def config_from_json(kind: type[T], config: dict[str, Any], *, besides: Collection[str] = ()) -> T:
    """The setting, a NamedTuple, of a config; `besides` are names that the run wrote in it for its reader.

    A field that has a default and that an older version did not know has its default.

    Raises: `ValueError` naming the field that is missing, unknown or of another type: another version wrote it, or a hand.

    >>> from typing import NamedTuple
    >>> class Setting(NamedTuple):
    ...     task: str
    ...     rates: tuple[float, ...]
    >>> config_from_json(Setting, {"task": "lqr", "rates": [1, 0.5], "job": "compare"})
    Setting(task='lqr', rates=(1.0, 0.5))
    """
    hints = get_type_hints(kind)
    defaults = getattr(kind, "_field_defaults", {})
    if missing := [name for name in hints if name not in config and name not in defaults]:
        raise ValueError(f"config.json has no {missing[0]!r}: it does not fit the installed diffmbrl")
    if unknown := [name for name in config if name not in {*hints, *WRITTEN, *besides}]:
        raise ValueError(f"config.json has {unknown[0]!r}, which the installed diffmbrl does not know")
    return kind(**{name: _of(hint, config[name], name) for name, hint in hints.items() if name in config})


def _of(hint: Any, value: Any, name: str) -> Any:
    """The value as the type that JSON could not say."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is float and isinstance(value, str) and value in NONFINITE:
        return NONFINITE[value]
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool, type(None)) and type(value) is (type(None) if hint is None else hint):
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
    said = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ValueError(f"config.json has {name} = {json.dumps(value)[:80]}; expected {said.replace('typing.', '')}")
