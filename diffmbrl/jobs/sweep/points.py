"""A sweep's file, and the points that it asks for.

The file is TOML, which names nothing but tables, text and numbers, so reading it can do no more than that:

    job = "compare"                  # or "learn"

    [setting]                        # of every point; `param` and `option` are tables of their own
    task = "pendulum-swingup"
    seeds = 5

    [grid]                           # every combination
    method = ["adam", "muon"]
    param.u_max = [2.0, 3.0]

    [random]                         # so many draws for each combination
    points = 8
    lr = { low = 1e-3, high = 1e-1, scale = "log" }

A point is one value of everything, and is named by the hash of it: with more values, or more draws, the points that were
there are the same points, and are not run again.
"""

import hashlib
import itertools
import json
import math
import re
import tomllib
import types
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import numpy as np

from diffmbrl.choices import validate_choice
from diffmbrl.jobs.configs import CompareConfig, LearnConfig, options_of

CONFIGS: dict[str, type[Any]] = {"compare": CompareConfig, "learn": LearnConfig}
# A sweep compares equal numbers of updates: no time limit, unless its file sets one.
DEFAULTS = {"budget": math.inf}


def _keys(config: type[Any]) -> dict[str, type]:
    """The keys of a sweep and the types of their values: the options of a job, one element of those that are tuples."""
    found: dict[str, type] = {}
    for name, (option, kind) in options_of(config).items():
        parts = [part for part in get_args(kind) if part is not type(None)]
        if option.swept and get_origin(kind) is not dict:
            scalar = parts[0] if get_origin(kind) in (Union, types.UnionType) or option.single else kind
            found[option.single or name] = list if get_origin(scalar) is tuple else scalar
    return found


def _tables(config: type[Any]) -> dict[str, str]:
    """The tables of a sweep, whose entries have names of their own, and their fields."""
    found = options_of(config).items()
    return {option.flag or name: name for name, (option, kind) in found if option.swept and get_origin(kind) is dict}


JOBS = {job: _keys(config) for job, config in CONFIGS.items()}
TABLES = {job: tuple(_tables(config)) for job, config in CONFIGS.items()}
NEEDED = {"compare": ("task", "method"), "learn": ("task", "agent")}
TOP = ("job", "name", "x64", "replicas", "setting", "grid", "random")
RANGE = ("low", "high", "scale")
SCALES = ("linear", "log")
MOST = 10_000  # points of a sweep
REPLICAS = 128  # of one program by default: points times seeds


class SweepPoint(NamedTuple):
    """One setting of the job: everything that it depends on."""

    name: str  # a hash of the rest
    setting: dict[str, Any]  # by flat names, such as `lr` and `param.mass`


class SweepFile(NamedTuple):
    """The sweep that a file describes."""

    name: str
    job: str
    x64: bool
    replicas: int  # of one program at most: points times seeds
    varied: tuple[str, ...]  # the settings that points differ in
    points: tuple[SweepPoint, ...]


def read_sweep(path: Path) -> SweepFile:
    """The sweep of a file.

    Raises: `ValueError`, one line, for a file that is no TOML, a key that is none of a sweep's or of the job's, naming the
    nearest, a value that is not of its kind, and one that is given twice.
    """
    path = Path(path)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise ValueError(
            f"{str(path)!r} is YAML, whose tags may name any Python object; a sweep is TOML: write it as "
            f"{path.with_suffix('.toml').name!r}"
        )
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror})") from None
    except ValueError as error:  # TOML's and UTF-8's errors both
        raise ValueError(f"{str(path)!r} is not TOML: {error}") from None
    return parse(given, name=path.stem)


def parse(given: dict[str, Any], *, name: str = "sweep") -> SweepFile:
    """The sweep of what a file holds.

    >>> found = parse({"job": "compare", "setting": {"task": "lqr", "method": "adam"}, "grid": {"lr": [0.1, 0.2]}})
    >>> [point.setting["lr"] for point in found.points]
    [0.1, 0.2]
    """
    for key in given:
        validate_choice("key of a sweep", key, TOP)
    job = validate_choice("job", _of("job", given.get("job", "compare"), str), JOBS)
    name = _of("name", given.get("name", name), str)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            f"name must be of letters, digits, '.', '_' and '-', at most 100 and the first no mark; got {name!r}"
        )
    x64, replicas = _of("x64", given.get("x64", False), bool), _of("replicas", given.get("replicas", REPLICAS), int)
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {replicas}")
    setting, grid, drawn = (
        _flat(_of(part, given.get(part, {}), dict), job, part) for part in ("setting", "grid", "random")
    )
    count, seed = drawn.pop("points", 1 if not drawn else None), drawn.pop("seed", 0)
    if count is None:
        raise ValueError("[random] needs points, the number of draws for each combination of the grid: points = 16")
    if _of("[random] points", count, int) < 1 or _of("[random] seed", seed, int) < 0:
        raise ValueError(f"[random] takes at least 1 of points and a seed of at least 0, got {count} and {seed}")
    for one, other in itertools.combinations((setting, grid, drawn), 2):
        for twice in one.keys() & other.keys():
            raise ValueError(f"{twice} is given twice: have it in one of [setting], [grid] and [random]")
    kinds = {key: _kind(key, job) for key in (*setting, *grid, *drawn)}
    setting = {key: _of(key, value, kinds[key]) for key, value in setting.items()}
    grid = {key: _values(key, value, kinds[key]) for key, value in grid.items()}
    ranges = {key: _range(key, value, kinds[key]) for key, value in drawn.items()}
    for key in NEEDED[job]:
        if key not in kinds:
            raise ValueError(f'a sweep of {job} needs a {key}: {key} = "..." in [setting], or some in [grid]')
    if (total := math.prod(map(len, grid.values())) * count) > MOST:
        raise ValueError(f"this makes {total:,} points; a sweep has at most {MOST:,}")
    found = {}
    for combination in itertools.product(*grid.values()):
        for i in range(count):
            values = {key: _draw(key, given, seed, i) for key, given in ranges.items()}
            point = make_point(job, x64, setting | dict(zip(grid, combination, strict=True)) | values)
            found[point.name] = point
    return SweepFile(name, job, x64, replicas, (*grid, *ranges), tuple(found.values()))


def _flat(given: dict[str, Any], job: str, part: str) -> dict[str, Any]:
    """Tables of `param` and `option` as dotted names; every other name known."""
    out: dict[str, Any] = {}
    also = ("points", "seed") if part == "random" else ()
    for key, value in given.items():
        head, dot, _ = key.partition(".")
        if head in TABLES[job] and not dot:
            out |= {f"{key}.{inner}": x for inner, x in _of(f"[{part}.{key}]", value, dict).items()}
        elif head in TABLES[job]:
            out[key] = value
        else:
            out[validate_choice(f"key of [{part}] of a sweep of {job}", key, (*JOBS[job], *TABLES[job], *also))] = value
    return out


def _kind(key: str, job: str) -> type:
    return float if key.partition(".")[0] in TABLES[job] else JOBS[job][key]


def _of(key: str, value: Any, kind: type) -> Any:
    """The value, of its kind; a whole number does for a float."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and not key.startswith("option."):
        value = float(value)
    whole = kind is float and key.startswith("option.") and type(value) is int  # an option may be a size
    if type(value) is not kind and not whole:
        words = {
            str: "text",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            list: "a list",
            dict: "a table",
        }
        raise ValueError(f"{key} must be {words[kind]}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number, got {value!r}")
    if isinstance(value, list) and not (value and all(type(x) is int for x in value)):
        raise ValueError(f"{key} must be a list of whole numbers, got {value!r}")
    return value


def _values(key: str, value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"[grid] has lists of values: {key} = [...]; got {value!r}")
    values = [_of(key, x, kind) for x in value]
    if any(values[i] in values[:i] for i in range(len(values))):
        raise ValueError(f"[grid] {key} has a value twice: {value!r}")
    return values


def _range(key: str, value: Any, kind: type) -> tuple[Any, Any, str]:
    if kind not in (int, float) or not isinstance(value, dict) or not {"low", "high"} <= value.keys():
        raise ValueError(f'[random] draws numbers: {key} = {{ low = 1e-3, high = 1e-1, scale = "log" }}; got {value!r}')
    for name in value:
        validate_choice(f"key of the range of {key}", name, RANGE)
    low, high = (_of(f"{key}.{end}" if kind is int else key, value[end], kind) for end in ("low", "high"))
    scale = validate_choice(f"scale of {key}", _of(f"scale of {key}", value.get("scale", "linear"), str), SCALES)
    if not low < high or (scale == "log" and low <= 0):
        raise ValueError(
            f"{key} is drawn from low to high, low below high (and above 0 if log); got {low:g} to {high:g}"
        )
    return low, high, scale


def _draw(key: str, given: tuple[Any, Any, str], seed: int, i: int) -> Any:
    """Draw i of this setting: of its own name and number alone, so that a longer sweep begins with the shorter one."""
    low, high, scale = given
    u = np.random.default_rng([seed, zlib.crc32(key.encode()), i]).uniform()
    if isinstance(low, int) and isinstance(high, int):
        # Each whole number has its cell of the scale.
        ends = (low - 0.5, high + 0.5) if scale == "linear" else (math.log(low - 0.5), math.log(high + 0.5))
        x = ends[0] + u * (ends[1] - ends[0])
        return min(max(round(x if scale == "linear" else math.exp(x)), low), high)
    if scale == "log":
        low, high = math.log(low), math.log(high)
    x = low + u * (high - low)
    # Six digits: what a table shows is what was run.
    return float(f"{math.exp(x) if scale == 'log' else x:.6g}")


def make_point(job: str, x64: bool, setting: dict[str, Any]) -> SweepPoint:
    """A setting under its name."""
    text = json.dumps({"job": job, "x64": x64} | dict(sorted(setting.items())), sort_keys=True)
    return SweepPoint(hashlib.sha256(text.encode()).hexdigest()[:12], setting)


def point_config(job: str, x64: bool, setting: dict[str, Any]) -> Any:
    """Make the config of a point, as the job itself takes it.

    Args:
        job: The job of the sweep.
        x64: Whether the sweep computes in float64.
        setting: The point's values, by flat names.

    Returns:
        An instance of the job's config class.

    >>> point_config("compare", False, {"task": "lqr", "method": "adam", "lr": 0.1, "param.mass": 2.0}).rates
    (0.1,)
    """
    config, tables = CONFIGS[job], _tables(CONFIGS[job])
    values: dict[str, Any] = {"x64": x64} | DEFAULTS | {name: {} for name in tables.values()}
    fields = {option.single or name: (name, option) for name, (option, _) in options_of(config).items()}
    for key, value in setting.items():
        table, dot, inner = key.partition(".")
        if dot:
            values[tables[table]][inner] = value
        else:
            name, option = fields[key]
            values[name] = (value,) if option.single else tuple(value) if isinstance(value, list) else value
    return config(**values)
