"""Compiled programs of a process that compiles many: kept as long as they may serve again, forgotten before they are too many.

Every compiled program maps memory, and a process may have 65,530 mappings (Linux's default); beyond, XLA crashes. Long before
that it is slow: JAX keeps over a gigabyte of a thousand small programs, and the next one takes twice as long to compile.
"""

import gc
from pathlib import Path

import jax

MOST_MAPPINGS = 6_000


def forget_programs(beyond: int = MOST_MAPPINGS) -> None:
    """Clear JAX's caches if the process has more than `beyond` mappings of memory (where the system tells: Linux)."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > beyond:
        jax.clear_caches()
        gc.collect()
