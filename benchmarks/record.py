"""Results: a JSON file beside a printed table, with where and when they were measured."""

import json
from pathlib import Path
from typing import Any

from diffmbrl.runs.metrics import to_json
from diffmbrl.runs.provenance import collect

RESULTS = Path(__file__).parent / "results"


def save(name: str, result: dict[str, Any], *, quick: bool) -> Path:
    """Write `results/NAME.json` (`NAME-quick.json` for a quick run)."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-quick.json" if quick else f"{name}.json")
    provenance = collect(seeds=None, time=None)
    provenance.pop("argv", None)
    path.write_text(json.dumps(to_json({"result": result, "provenance": provenance}), indent=1) + "\n")
    return path


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Columns of text, numbers to the right."""
    cells = [head, *([cell if isinstance(cell, str) else f"{cell:.3g}" for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
