"""Run points of a sweep: `python -m diffmbrl.jobs.sweep FOLDER POINT...`, which `diffmbrl sweep` starts."""

import sys
from pathlib import Path

from diffmbrl.jobs.configure import configure
from diffmbrl.jobs.sweep.runner import run_points

if __name__ == "__main__":
    configure(False)  # the sweep's folder says which precision to use
    run_points(Path(sys.argv[1]), sys.argv[2:])
