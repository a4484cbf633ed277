"""Importing the package: what it loads, what it sets, how long it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys, time
import jax
begun = time.perf_counter()
import diffmbrl
seconds = time.perf_counter() - begun
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"seconds": seconds, "roots": sorted(roots), "flags": os.environ["XLA_FLAGS"]}))
"""


def imported(**environment: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "XLA_FLAGS": "", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(result.stdout)


def test_import_is_light():
    facts = imported()
    assert "diffmbrl" in facts["roots"]
    for heavy in ("brax", "matplotlib", "mujoco", "orbax", "tyro", "flax", "gymnasium"):
        assert heavy not in facts["roots"], heavy
    # 2 s on an idle machine; twice that on a busy one.
    assert facts["seconds"] < 4


def test_small_loops_are_compiled_whole_unless_the_user_says_otherwise():
    assert "xla_cpu_small_while_loop_byte_threshold=262144" in imported()["flags"]
    other = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1024"
    assert imported(XLA_FLAGS=other)["flags"] == other


def test_every_public_name_exists():
    import diffmbrl

    assert all(hasattr(diffmbrl, name) for name in diffmbrl.__all__)
    assert diffmbrl.__version__
