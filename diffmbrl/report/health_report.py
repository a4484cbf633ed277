"""The report of a diagnosis: the verdict, the numbers behind it horizon by horizon, and their figures."""

import math
from pathlib import Path
from typing import Any

from diffmbrl.render import page
from diffmbrl.render.page import cell, escape, prose
from diffmbrl.report import frame, health_figures, words
from diffmbrl.report.plan_report import of_kind
from diffmbrl.report.table import aligned

Record = dict[str, Any]

# Name on the terminal, name and explanation in the report, key of the record, how it is written.
COLUMNS = (
    ("state", "state", "the first thing that is wrong, or good", "state", str),
    ("|g|", "|gradient|", "of the mean over the starts", "plain_norm", words.format_number),
    ("SNR", "SNR", "signal-to-noise of one rollout's gradient: |mean|² over the trace of its covariance", "plain_snr", None),
    ("top 1%", "top 1%", "share of that variance in the top 1% of samples", "plain_tail", words.format_share),
    ("float32", "float32", "relative error of the float32 gradient", "float32", None),
    ("differences", "differences", "relative error against central differences in float64", "difference", None),
    ("dt / 2", "dt / 2", "relative change when the integrator's step is halved", "refinement", None),
    ("bias z", "bias z", "pathwise against score-function gradient of the smoothed return, in standard errors", "bias_z", None),
    ("SNR score", "SNR of the score function", "of the likelihood ratio, on the smoothed return", "score_snr", None),
    ("growth", "growth a step", "of perturbations in the closed loop", "growth", None),
    ("condition", "condition", "of the Gauss-Newton matrix, at least", "condition", None),
    ("first 10%", "first 10%", "share of the gradient from the first tenth of the steps", "early", words.format_share),
)  # fmt: skip


def compose(config: Record, provenance: Record, records: list[Record], remarks: list[str], folder: Path) -> str:
    """The page; draws `folder` on the way."""
    task, job = str(config.get("task", "run")), str(config.get("job", "run"))
    rows, verdicts = of_kind(records, "health"), of_kind(records, "verdict")
    parts = [frame.header(task, job, config, provenance), f'<p class="lead">{prose(headline(records))}</p>']
    if verdicts:
        parts.append(page.items([str(reason) for reason in verdicts[0]["reasons"]], kind="more"))
        parts.append(f'<p class="note">{prose(_suggested(config, verdicts[0]))}</p>')
    if remarks:
        parts.append(f'<aside class="care">\n<h3>To bear in mind</h3>\n{page.items(remarks)}\n</aside>')
    if rows:
        parts += ["<h2>Each horizon</h2>", _table(rows)]
        pictures = health_figures.health_pictures(rows, verdicts[0] if verdicts else {}, folder)
        shown = "\n".join(frame.figure(picture) for picture in pictures)
        parts += ["<h2>Figures</h2>", f'<div class="figures">\n{shown}\n</div>']
    parts += ["<h2>To repeat it</h2>", frame.reproduce(config, provenance)]
    parts += ["<h2>Configuration and provenance</h2>", frame.facts(config, provenance)]
    return page.document(f"{task} \u00b7 {job}", "\n".join(parts))


def headline(records: list[Record]) -> str:
    """The verdict in a sentence or two."""
    verdicts = of_kind(records, "verdict")
    return str(verdicts[0]["headline"]) if verdicts else "The diagnosis has not ended."


def text(config: Record, records: list[Record]) -> str:
    """A screen for the terminal: the numbers, the verdict, its reasons."""
    rows, verdicts = of_kind(records, "health"), of_kind(records, "verdict")
    if not rows or not verdicts:
        return headline(records)
    lines = [["T", *(name for name, *_ in COLUMNS)], *([str(r["horizon"]), *_cells(r)] for r in rows)]
    reasons = [f"* {reason}" for reason in verdicts[0]["reasons"]]
    return "\n".join([aligned(lines), "", headline(records), *reasons, "", _suggested(config, verdicts[0])])


def _suggested(config: Record, verdict: Record) -> str:
    window = "" if verdict["window"] is None else f" with {verdict['window']} steps"
    safe = "none that was tested" if verdict["safe"] is None else f"{verdict['safe']} steps"
    return (
        f"Suggested: {verdict['estimator']}{window}. Safe horizon (float32 right to {verdict['float32_bound']:.0%}, gradient "
        "above the "
        f"noise of {verdict['batch']} rollouts): {safe}. Policy: {config.get('of')}. {words.seconds(verdict['seconds'])} in "
        "all."
    )


def _cells(row: Record) -> list[str]:
    return [(write or _short)(row[key]) for _, _, _, key, write in COLUMNS]


def _short(x: float | None) -> str:
    """Two or three digits, whatever the size."""
    if x is None or math.isnan(x):
        return words.NONE
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return f"{x:.3g}" if x == 0 or 1e-2 <= abs(x) < 1e4 else f"{x:.0e}"


def _table(rows: list[Record]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("T", *(name for _, name, *_ in COLUMNS)))
    body = "\n".join(
        f"<tr><th>{escape(str(row['horizon']))}</th>{''.join(cell(x) for x in _cells(row))}</tr>" for row in rows
    )
    note = "; ".join(f"{name}: {meaning}" for _, name, meaning, *_ in COLUMNS) + ". A dash: not measured."
    shown = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return page.scroll("Each horizon", shown) + f'<p class="note">{prose(note[0].upper() + note[1:])}</p>'
