"""Provenance: code, versions, device, precision and command line, enough to distinguish two runs and to repeat one."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("diffmbrl", "jax", "jaxlib", "numpy", "optax", "equinox", "brax")
ENVIRONMENT = ("JAX_PLATFORMS", "XLA_FLAGS")


def collect_provenance(*, seeds: Any = None, time: str | None = None) -> dict[str, Any]:
    """Return commit, versions, devices, precision, seeds, command line and time, all fit for JSON."""
    import jax

    devices = jax.devices()
    return {
        "time": time,
        "command": command(sys.argv),
        "argv": list(sys.argv),
        "git": git(Path(__file__).parents[1]),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "host": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore[reportAttributeAccessIssue]
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",  # pyright: ignore[reportAttributeAccessIssue]
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "seeds": seeds,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return sentences on the differences of two provenances that can change numbers."""

    def of(facts: dict[str, Any]) -> dict[str, Any]:
        found = {name: (facts.get("versions") or {}).get(name) for name in PACKAGES}
        found |= {name: (facts.get("environment") or {}).get(name) for name in ENVIRONMENT}
        found["the commit"] = (facts.get("git") or {}).get("commit")
        return found | {"the device": (facts.get("device") or {}).get("kind")}

    pairs = {name: (old, of(now)[name]) for name, old in of(before).items()}
    return [f"{name} was {old}, is {new}: numbers may differ" for name, (old, new) in pairs.items() if old != new]


def version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(package: Path) -> dict[str, Any] | None:
    """Return the commit of the package's source and whether files differ from it; None outside of a checkout.

    An installed copy may lie inside another repository (a `.venv`), so the source itself must be tracked.
    """
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "--verify", "HEAD")
    if tracked is None or commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--", "."))}


def command(argv: list[str]) -> str:
    """Return the command line that repeats the run, without the folder of the program."""
    program = Path(argv[0])
    if program.name == "__main__.py":
        head = ["python", "-m", program.parent.name]
    elif program.suffix == ".py":
        head = ["python", program.name]
    else:
        head = [program.name]
    return shlex.join([*head, *argv[1:]])


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
