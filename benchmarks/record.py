"""Results: a JSON file beside a printed table, with where and when they were measured."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffmbrl.runs.folder import write_atomic
from diffmbrl.runs.metrics import to_json
from diffmbrl.runs.provenance import collect_provenance

try:
    import fcntl
except ImportError:  # Windows, where one process at a time must do
    fcntl = None  # type: ignore[assignment]

RESULTS = Path(__file__).parent / "results"


def path(name: str, *, quick: bool) -> Path:
    """`results/NAME.json`, or `NAME-quick.json` for a quick run."""
    return RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")


def save(name: str, result: dict[str, Any], *, quick: bool) -> Path:
    """Write the results file of a benchmark; one that says the same keeps its provenance, where and when it was measured."""
    RESULTS.mkdir(exist_ok=True)
    file, result = path(name, quick=quick), to_json(result)
    if file.exists() and json.loads(file.read_text())["result"] == result:
        return file
    provenance = collect_provenance(seeds=None, time=None)
    provenance.pop("argv", None)
    text = json.dumps({"result": result, "provenance": to_json(provenance)}, indent=1)
    # A list of numbers or names takes one line, not one for each.
    text = re.sub(r"\[\n +([^\[\]{}]*?)\n *\]", lambda found: "[" + re.sub(r",\n +", ", ", found[1]) + "]", text)
    write_atomic(file, text + "\n")
    return file


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Reading results and writing them again without another process of ours in between; it waits."""
    RESULTS.mkdir(exist_ok=True)
    if fcntl is None:
        yield
        return
    folder = os.open(RESULTS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Columns of text, numbers to the right."""
    cells = [head, *([cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
