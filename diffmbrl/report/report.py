"""`report.html`: one self-contained file with the result of a run, its figures and the command that repeats it.

A new job's report is one module with `contents` and `text` (`skeleton.py`), and one row of `REPORTS`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from diffmbrl.report import compare_report, health_report, learn_report, plan_report, skeleton, sweep_report
from diffmbrl.report.skeleton import Contents, Record, RunData
from diffmbrl.report.table import Summary
from diffmbrl.runs import metrics
from diffmbrl.runs.folder import write_atomic


class JobReport(NamedTuple):
    """The report of one job.

    Args:
        contents: Returns what the page says; draws the figures.
        text: Returns the table and the sentences for the terminal.
    """

    contents: Callable[[RunData], Contents]
    text: Callable[[RunData], str]


REPORTS = {
    "compare": JobReport(compare_report.contents, compare_report.text),
    "diagnose": JobReport(health_report.contents, health_report.text),
    "learn": JobReport(learn_report.contents, learn_report.text),
    "plan": JobReport(plan_report.contents, plan_report.text),
    "sweep": JobReport(sweep_report.contents, sweep_report.text),
}


def summarise(folder: Path) -> Summary:
    """Summarise a comparison from its metrics.

    Args:
        folder: The folder of the run.

    Returns: the summary; `table.text` formats it and `verdict.sentences` interprets it.
    """
    return compare_report.summarise(metrics.read_metrics(folder / "metrics.jsonl")[0])


def summary_text(folder: Path) -> str:
    """Format the result of a run for the terminal: its table and the sentences.

    Args:
        folder: The folder of the run.

    Returns: lines of text.

    Raises:
        ValueError: If the folder is not a run or its files cannot be read.
    """
    run = _read(Path(folder))
    return _report_of(run).text(run)


def rebuild(folder: Path) -> Path:
    """Draw `figures/` and write `report.html` from the run's config, provenance and metrics alone.

    The same data give the same bytes.

    Args:
        folder: The folder of the run.

    Returns: the path of the report.

    Raises:
        ValueError: If the folder is not a run or its files cannot be read.

    >>> rebuild(Path("runs/cartpole-balance-compare-1b2c3d4e"))  # doctest: +SKIP
    PosixPath('runs/cartpole-balance-compare-1b2c3d4e/report.html')
    """
    folder = Path(folder)
    run = _read(folder)
    path = folder / "report.html"
    try:
        write_atomic(path, skeleton.compose_page(run, _report_of(run).contents(run)))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{str(folder)!r} does not hold what a run of {run.config.get('job')!r} writes ({what})"
        ) from error
    return path


def _report_of(run: RunData) -> JobReport:
    return REPORTS.get(str(run.config.get("job")), REPORTS["compare"])


def _read(folder: Path) -> RunData:
    for needed in ("config.json", "metrics.jsonl"):
        if not (folder / needed).is_file():
            raise ValueError(f"{str(folder)!r} is not a run: it has no {needed}")
    config = _json(folder / "config.json")
    provenance = _json(folder / "provenance.json") if (folder / "provenance.json").is_file() else None
    records, damage = metrics.read_metrics(folder / "metrics.jsonl")
    remarks = [damage] if damage else []
    remarks += ["provenance.json is missing: what this ran on is not known."] if provenance is None else []
    remarks += [str(record.get("text", "")) for record in records if record.get("kind") == "note"]
    remarks += [
        f"When the run was resumed: {remark}."
        for entry in skeleton.resumed(provenance or {})
        for remark in entry["remarks"]
    ]
    return RunData(config, provenance or {}, records, remarks, folder / "figures")


def _json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {str(path)!r}: it holds no object")
    return value
