"""Many settings of one job as a table: `points` reads them from a file, `groups` finds which compile together, `work` runs a
group as one program, `runner` runs what is missing, in processes or on a cluster, and collects it."""

from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint, read_sweep
from diffmbrl.jobs.sweep.runner import sweep

__all__ = ["SweepFile", "SweepPoint", "read_sweep", "sweep"]
