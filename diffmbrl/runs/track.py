"""Sinks that receive a run's records in addition to `metrics.jsonl`: TensorBoard event files and offline Weights & Biases.

    <run>/tensorboard/   tensorboard --logdir runs            <run>/wandb/   wandb sync <run>/wandb/offline-run-*

Reports are made of `metrics.jsonl` alone. A sink receives the numbers of the records by name and step. If it fails, the run
warns once and continues without it. Both packages are in the extra `track`.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from diffmbrl.choices import validate_choice
from diffmbrl.runs.metrics import to_json
from diffmbrl.runs.statistics import interquartile_mean

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
STEPS = {
    "eval": "update",
    "iteration": "real_steps",
    "result": "start",
}  # the horizontal axis of each kind of record
RETURNS = ("train", "test", "evaluation", "episodes")  # shown for each seed too


class TrackedPoint(NamedTuple):
    """Numbers of one group (a method, an agent, a start) at one step."""

    group: str
    step: int
    values: dict[str, float]


class Sink(Protocol):
    """A destination of points."""

    def write(self, point: TrackedPoint) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"))

    def write(self, point: TrackedPoint) -> None:
        for name, value in point.values.items():
            self.writer.add_scalar(f"{point.group}/{name}".replace(" ", "-"), value, point.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """An offline run in `<run>/wandb`; each group has a step of its own."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(silent=True, console="off", save_code=False, disable_git=True)
        self.run = wandb.init(
            mode="offline",
            project="diffmbrl",
            name=folder.name,
            dir=str(folder),
            config=to_json(config),
            settings=settings,
        )
        self.groups: set[str] = set()

    def write(self, point: TrackedPoint) -> None:
        group = point.group.replace(".", ",")  # a dot would be a level of its own
        if group not in self.groups:
            self.groups.add(group)
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        values = {"step": point.step} | point.values
        self.run.log({f"{group}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


SINKS: dict[str, Callable[[Path, dict[str, Any]], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_sinks(names: Sequence[str]) -> None:
    """Check the names of sinks and that their packages are installed.

    Args:
        names: Names of `--track`: `tensorboard`, `wandb`.

    Raises:
        ValueError: If a sink is unknown or named twice.
        ModuleNotFoundError: If its package is not installed.
    """
    for name in names:
        validate_choice("sink of --track", name, SINKS)
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ModuleNotFoundError(f"--track {name} needs {PACKAGES[name]}: pip install 'diffmbrl[track]'")
    if len(set(names)) != len(names):
        raise ValueError(f"each sink can be named once, got --track {' '.join(names)}")


@contextlib.contextmanager
def tracked(
    write: Callable[[dict[str, Any]], None],
    names: Sequence[str],
    folder: Path,
    config: dict[str, Any],
    note: Callable[[str], None],
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open sinks for the length of the block, and send them every record. A sink that fails is noted once and dropped.

    Args:
        write: Writes a record to `metrics.jsonl`.
        names: Names of the sinks.
        folder: The folder of the run.
        config: The configuration of the run.
        note: Shows a line to the user.

    Yields: a function that writes a record to `metrics.jsonl` and to every sink.
    """
    sinks: dict[str, Sink] = {}

    def tried(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            sinks.pop(name, None)
            note(f"--track {name} failed and is left out from here on: {type(error).__name__}: {error}")

    for name in names:
        if (made := tried(name, lambda name=name: SINKS[name](folder, config))) is not None:
            sinks[name] = made

    def both(record: dict[str, Any]) -> None:
        write(record)
        for point in points(record) if sinks else ():
            for name, sink in list(sinks.items()):
                tried(name, lambda sink=sink, point=point: sink.write(point))

    try:
        yield both
    finally:
        for name, sink in list(sinks.items()):
            tried(name, sink.close)


def points(record: dict[str, Any]) -> list[TrackedPoint]:
    """Return the numbers of a record that sinks plot; most kinds of records have none.

    Of several seeds the interquartile mean, and for returns each seed's own; of several starts or episodes their mean.

    >>> points({"kind": "eval", "method": "adam", "rate": 0.1, "update": 5, "lanes": 2, "test": [1.0, 3.0]})
    [TrackedPoint(group='adam 0.1', step=5, values={'lanes': 2.0, 'test': 2.0, 'test/seed 0': 1.0, 'test/seed 1': 3.0})]
    """
    kind = record["kind"]
    if kind == "updates":
        columns = {name: x for name in ("J", "gradient_norm") if (x := record.get(name)) is not None}
        rows = zip(*(np.asarray(x, float).tolist() for x in columns.values()), strict=True)
        return [
            TrackedPoint(f"start {record['start']}", k, dict(zip(columns, row, strict=True)))
            for k, row in enumerate(rows)
        ]
    if kind not in STEPS:
        return []
    rate = record.get("rate")
    group = "result" if kind == "result" else f"{record['method']}{'' if rate is None else f' {rate:g}'}"
    fields = {name: x for name, x in record.items() if name not in ("said", "rate", STEPS[kind])}
    values: dict[str, float] = {}
    for name, x in (fields | record.get("said", {})).items():
        values |= _numbers(name, x, each=name in RETURNS)
    return [TrackedPoint(group, int(record[STEPS[kind]]), values)]


def _numbers(name: str, value: Any, *, each: bool) -> dict[str, float]:
    if value is None or isinstance(value, str):
        return {}
    if isinstance(value, bool | int | float) or not np.shape(np.asarray(value, object)):
        return {name: float(np.asarray(value))}
    seeds = {k: float(np.mean(np.asarray(x, float))) for k, x in enumerate(value) if np.size(x)}
    if not seeds:
        return {}
    known = np.array(list(seeds.values()))
    # A number that is not finite is shown unchanged, not as minus infinity.
    mean = interquartile_mean(known) if np.all(np.isfinite(known)) else np.mean(known)
    return {name: float(mean)} | ({f"{name}/seed {k}": x for k, x in seeds.items()} if each else {})
