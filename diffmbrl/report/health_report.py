"""The report of a diagnosis: the verdict, the numbers behind it for each horizon, and their figures."""

import math

from diffmbrl.render.page import cell, escape
from diffmbrl.report import health_figures, skeleton, words
from diffmbrl.report.skeleton import Contents, Record, RunData, of_kind
from diffmbrl.report.table import aligned

# Name on the terminal, name and explanation in the report, key of the record, formatter.
COLUMNS = (
    ("state", "state", "the first fault that was found, or good", "state", str),
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


def contents(run: RunData) -> Contents:
    """Tabulate the horizons and draw their figures."""
    rows, verdicts = run.of_kind("health"), run.of_kind("verdict")
    found = verdicts[0] if verdicts else {}
    return Contents(
        lead=[headline(run.records), *map(str, found.get("reasons", []))],
        note=_suggested(run.config, found) if found else "",
        tables=[("Each horizon", _table(rows))] if rows else [],
        pictures=health_figures.health_pictures(rows, found, run.figures) if rows else [],
    )


def headline(records: list[Record]) -> str:
    """Return the verdict in a sentence or two."""
    verdicts = of_kind(records, "verdict")
    return str(verdicts[0]["headline"]) if verdicts else "The diagnosis has not ended."


def text(run: RunData) -> str:
    """Return the table for the terminal, then the verdict and its reasons."""
    rows, verdicts = run.of_kind("health"), run.of_kind("verdict")
    if not rows or not verdicts:
        return headline(run.records)
    lines = [["T", *(name for name, *_ in COLUMNS)], *([str(r["horizon"]), *_cells(r)] for r in rows)]
    reasons = [f"* {reason}" for reason in verdicts[0]["reasons"]]
    return "\n".join([aligned(lines), "", headline(run.records), *reasons, "", _suggested(run.config, verdicts[0])])


def _suggested(config: Record, verdict: Record) -> str:
    window = "" if verdict["window"] is None else f" with {verdict['window']} steps"
    safe = "none that was tested" if verdict["safe"] is None else f"{verdict['safe']} steps"
    return (
        f"Suggested: {verdict['estimator']}{window}. Safe horizon (float32 right to {verdict['float32_bound']:.0%}, gradient "
        "above the "
        f"noise of {verdict['batch']} rollouts): {safe}. Policy: {config.get('of')}. {words.seconds(verdict['seconds'])} in "
        "total."
    )


def _cells(row: Record) -> list[str]:
    return [(write or _short)(row[key]) for _, _, _, key, write in COLUMNS]


def _short(x: float | None) -> str:
    """Format with two or three digits."""
    if x is None or math.isnan(x):
        return words.NONE
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return f"{x:.3g}" if x == 0 or 1e-2 <= abs(x) < 1e4 else f"{x:.0e}"


def _table(rows: list[Record]) -> str:
    head = skeleton.columns(("T", *(name for _, name, *_ in COLUMNS)))
    lines = [f"<tr><th>{escape(str(row['horizon']))}</th>{''.join(cell(x) for x in _cells(row))}</tr>" for row in rows]
    note = "; ".join(f"{name}: {meaning}" for _, name, meaning, *_ in COLUMNS) + ". A dash: not measured."
    return skeleton.table("Each horizon", head, lines, note[0].upper() + note[1:])
