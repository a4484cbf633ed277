"""Many settings of one job as a table.

`points` reads them from a file, `groups` finds those that compile together, `work` runs a group as one program, and `runner`
runs the missing points, in processes or on a cluster, and collects the results.
"""

from diffmbrl.jobs.sweep.points import SweepFile, SweepPoint, read_sweep
from diffmbrl.jobs.sweep.runner import sweep

__all__ = ["SweepFile", "SweepPoint", "read_sweep", "sweep"]
