"""`python -m diffmbrl.jobs.sweep FOLDER POINT...`: run these points of a sweep. `diffmbrl sweep` starts it."""

import sys
from pathlib import Path

from diffmbrl.jobs.configure import configure
from diffmbrl.jobs.sweep.runner import run_points

if __name__ == "__main__":
    configure(False)  # the sweep's own precision is in its folder
    run_points(Path(sys.argv[1]), sys.argv[2:])
