"""Running an experiment: its module's four pieces, the parts that are kept on the way, and the files that come out.

A module has `EXPECTED` (a sentence), `FULL` and `QUICK` (its sizes), and three functions:

    measure(size, parts) -> yields numbers      after each part that is worth a figure; float64
    conclude(numbers) -> str                    what came out, from the numbers alone
    paint(numbers) -> Figure                    likewise: what computes never plots

so that a figure or a sentence is made again (`--redraw`) without measuring again.
"""

import importlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffmbrl.report import figures
from diffmbrl.runs.folder import write_atomic
from diffmbrl.runs.metrics import Writer, read_metrics, to_json
from diffmbrl.runs.provenance import collect_provenance

RESULTS = Path(__file__).parent / "results"
DIGITS = 5  # kept of each number
SUFFIXES = (".json", ".png", ".svg")
SO_FAR = "-so-far"  # after the name of what is not whole yet


class Parts:
    """What an experiment has measured so far, so that one that takes hours can be stopped and goes on where it was.

    `parts(key, compute)` is the value kept under `key`, which names everything that it depends on, or else `compute()`, which
    is then kept. A value is what its JSON says, whether it was measured now or before.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "parts.jsonl"
    >>> Parts(path)({"T": 10}, lambda: {"x": np.array([1.0, np.inf])})
    {'x': [1.0, inf]}
    >>> Parts(path)({"T": 10}, lambda: None)
    {'x': [1.0, inf]}
    """

    def __init__(self, path: Path):
        self.path = path
        self.kept = {_name(r["key"]): r["value"] for r in read_metrics(path)[0]} if path.exists() else {}

    def __call__(self, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
        name = _name(key)
        if name not in self.kept:
            begun = time.process_time()
            value = compute()
            print(f"{name}: {time.process_time() - begun:.0f} s of CPU", file=sys.stderr, flush=True)
            with Writer(self.path) as writer:
                writer.write({"kind": "part", "key": key, "value": rounded(to_json(value))})
            self.kept[name] = [r["value"] for r in read_metrics(self.path)[0]][-1]
        return self.kept[name]


def run(name: str, *, quick: bool, fresh: bool = False, size: Any = None, folder: Path = RESULTS) -> Path:
    """Measure, draw and conclude; files NAME.png, .svg and .json in `folder` (NAME-quick.* for a quick run).

    Until all is measured, what there is stands in NAME-so-far.*, and the files of an earlier run stay as they are. `size` takes
    the place of the module's. Parts that an earlier run has left are used again unless `fresh`.
    """
    module = importlib.import_module(f"experiments.{name}")
    folder.mkdir(exist_ok=True)
    stem = _stem(name, quick)
    path = folder / f"{stem}.parts.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    size = size or (module.QUICK if quick else module.FULL)
    so_far, measured = folder / f"{stem}{SO_FAR}", False
    with jax.enable_x64(True):
        for numbers in module.measure(size, Parts(path)):
            provenance = collect_provenance(seeds=None, time=None)
            provenance.pop("argv", None)
            _save(so_far, module, rounded(to_json(numbers)), to_json(size._asdict()), provenance)
            measured = True
    if not measured:
        raise ValueError(f"measure of experiments/{name}.py yielded no numbers")
    for suffix in SUFFIXES:
        so_far.with_name(so_far.name + suffix).replace(folder / f"{stem}{suffix}")
    return _tell(folder / f"{stem}.json")


def redraw(name: str, *, quick: bool, folder: Path = RESULTS) -> Path:
    """The figure and the conclusion of saved numbers. Raises: `FileNotFoundError` if there are none."""
    path = folder / f"{_stem(name, quick)}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run `python -m experiments {name}` first")
    saved = json.loads(path.read_text())
    module = importlib.import_module(f"experiments.{name}")
    _save(path.with_suffix(""), module, saved["numbers"], saved["choices"], saved["provenance"])
    return _tell(path)


def rounded(value: Any) -> Any:
    """Floats to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def array(values: Any) -> np.ndarray:
    """Saved numbers, "nan" and "inf" among them, as an array of floats."""
    return np.array(values, dtype=float)


def _tell(path: Path) -> Path:
    """Prints what was expected and what came out."""
    saved = json.loads(path.read_text())
    print(f"expected: {saved['expected']}\nfound: {saved['found']}")
    return path


def _save(stem: Path, module: Any, numbers: Any, choices: Any, provenance: Any) -> None:
    """JSON, PNG and SVG."""
    import matplotlib

    found = module.conclude(numbers)
    head = {"question": (module.__doc__ or "").split("\n")[0], "expected": module.EXPECTED, "found": found}
    saved = head | {"choices": choices, "numbers": numbers, "provenance": provenance}
    write_atomic(stem.with_name(stem.name + ".json"), _compact(saved) + "\n")
    with matplotlib.rc_context(figures.settings(stem.name.removesuffix(SO_FAR))):
        figure = module.paint(numbers)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    write_atomic(stem.with_name(stem.name + ".png"), _few_colours(png))
    write_atomic(stem.with_name(stem.name + ".svg"), svg.getvalue())


def _few_colours(png: io.BytesIO) -> bytes:
    """The picture with a palette of 128 colours, a third of the size."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


def _compact(value: Any, depth: int = 0) -> str:
    """JSON with one line for each list of numbers."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    pad = " " * (depth + 1)
    items = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {_compact(item, depth + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n" + " " * depth + "}"


def _stem(name: str, quick: bool) -> str:
    return f"{name}-quick" if quick else name


def _name(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
