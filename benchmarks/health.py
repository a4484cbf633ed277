"""CPU time and memory of a health record: `diffmbrl diagnose cartpole-swingup`, five horizons to 400, in a process of its own.

CPU seconds of the whole command, from importing to the report: cold with an empty compilation cache, then warm with the one
that it left.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import save, table

TASK = "cartpole-swingup"
HORIZONS = (10, 50, 100, 200, 400)


def run(*, quick: bool) -> None:
    horizons = (5, 10) if quick else HORIZONS
    with tempfile.TemporaryDirectory() as place:
        seconds = {name: diagnose(Path(place), name, horizons) for name in ("cold", "warm")}
    print(table(["compilation cache", "CPU s", "wall-clock s"], [[name, *pair] for name, pair in seconds.items()]))
    found = {name: {"cpu": cpu, "wall": wall} for name, (cpu, wall) in seconds.items()}
    save("health", {"task": TASK, "horizons": horizons, "seconds": found}, quick=quick)


def diagnose(place: Path, name: str, horizons: tuple[int, ...]) -> tuple[float, float]:
    """CPU and wall-clock seconds of the command."""
    words = [TASK, "--horizons", *map(str, horizons), "--out", str(place / name)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    before, begun = _spent(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "diffmbrl.cli.main", "diagnose", *words],
        env=os.environ | cache,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout)
    return _spent() - before, time.perf_counter() - begun


def _spent() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
