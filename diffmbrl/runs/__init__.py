"""The store of a run: its folder, config, provenance, metrics, checkpoints, progress and statistics. No algorithm is in here.

`folder`, `provenance` and `metrics` record what happened; `session`, `checkpoint` and `arrays` save and restore state.
"""

from diffmbrl.runs.config import config_from_json, read_config
from diffmbrl.runs.folder import check_out, create, running, set_status
from diffmbrl.runs.metrics import Writer, read_metrics
from diffmbrl.runs.progress import Progress
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
    "config_from_json",
    "create",
    "estimate",
    "exit_code",
    "interquartile_mean",
    "interval",
    "read_config",
    "read_metrics",
    "running",
    "set_status",
    "tracked",
    "underway",
]
