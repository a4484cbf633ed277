"""A run on disk: its folder, provenance, metrics, progress, statistics, tables, figures and report. No algorithm in it.

`folder`, `provenance` and `metrics` write what happened, `session` and `checkpoint` what it goes on from; `arms`, `statistics`,
`table` and `verdict` read it; `figures`, `gallery`, `page` and `report` show it. A report is a function of `config.json`,
`provenance.json` and `metrics.jsonl` alone, so it can be rebuilt, to the byte, from the data that a colleague sends.
"""

from diffmbrl.runs import table, verdict
from diffmbrl.runs.config import read_config, settled
from diffmbrl.runs.folder import check_out, create, running, set_status
from diffmbrl.runs.metrics import Writer, read
from diffmbrl.runs.progress import Progress
from diffmbrl.runs.report import health_text, learn_text, plan_text, rebuild, summarise, sweep_text
from diffmbrl.runs.session import EVERY, Session, underway
from diffmbrl.runs.signals import exit_code
from diffmbrl.runs.statistics import Estimate, estimate, interquartile_mean, interval
from diffmbrl.runs.track import check_sinks, tracked

__all__ = [
    "EVERY",
    "Estimate",
    "Progress",
    "Session",
    "Writer",
    "check_out",
    "check_sinks",
    "create",
    "estimate",
    "exit_code",
    "health_text",
    "interquartile_mean",
    "interval",
    "learn_text",
    "plan_text",
    "read",
    "read_config",
    "rebuild",
    "running",
    "set_status",
    "settled",
    "summarise",
    "sweep_text",
    "table",
    "tracked",
    "underway",
    "verdict",
]
