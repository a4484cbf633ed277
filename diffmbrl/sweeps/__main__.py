"""`python -m diffmbrl.sweeps FOLDER POINT...`: run these points of a sweep. `diffmbrl sweep` starts it."""

import sys
from pathlib import Path

from diffmbrl.configure import configure
from diffmbrl.sweeps.runner import work

if __name__ == "__main__":
    configure(False)  # the sweep's own precision is in its folder
    work(Path(sys.argv[1]), sys.argv[2:])
