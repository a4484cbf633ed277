"""A run on disk: its folder, provenance, metrics, progress, statistics, tables, figures and report. No algorithm in it.

`folder`, `provenance` and `metrics` write what happened; `arms`, `statistics`, `table` and `verdict` read it; `figures`,
`gallery`, `page` and `report` show it. A report is a function of `config.json`, `provenance.json` and `metrics.jsonl`
alone, so it can be rebuilt, to the byte, from the data that a colleague sends.
"""

from diffmbrl.runs import table, verdict
from diffmbrl.runs.folder import check_out, create, running, set_status
from diffmbrl.runs.metrics import Writer, read
from diffmbrl.runs.progress import Progress
from diffmbrl.runs.report import health_text, learn_text, plan_text, rebuild, summarise, sweep_text
from diffmbrl.runs.statistics import Estimate, estimate, interquartile_mean, interval

__all__ = [
    "Estimate",
    "Progress",
    "Writer",
    "check_out",
    "create",
    "estimate",
    "health_text",
    "interquartile_mean",
    "interval",
    "learn_text",
    "plan_text",
    "read",
    "rebuild",
    "running",
    "set_status",
    "summarise",
    "sweep_text",
    "table",
    "verdict",
]
