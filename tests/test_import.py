"""Importing the package: what it loads, what it sets, and that it computes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys
import diffmbrl
from jax._src.xla_bridge import backends_are_initialized
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"computed": backends_are_initialized(), "roots": sorted(roots), "flags": os.environ["XLA_FLAGS"]}))
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
    # What is computed brings the devices up, and then neither their number nor other processes can be asked for.
    assert not facts["computed"]


def test_small_loops_are_compiled_whole_unless_the_user_says_otherwise():
    assert "xla_cpu_small_while_loop_byte_threshold=262144" in imported()["flags"]
    other = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1024"
    assert imported(XLA_FLAGS=other)["flags"] == other


def test_every_public_name_exists():
    import diffmbrl

    assert all(hasattr(diffmbrl, name) for name in diffmbrl.__all__)
    assert diffmbrl.__version__
