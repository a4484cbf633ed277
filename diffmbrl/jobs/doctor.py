"""Check an installation: versions, devices, precision, compilation cache and a gradient."""

import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import diffmbrl
from diffmbrl import tasks
from diffmbrl.core import Task
from diffmbrl.diagnostics.spectrum import in_double
from diffmbrl.policies import Neural
from diffmbrl.rollout import mean_return
from diffmbrl.runs import provenance
from diffmbrl.xla import OPTION, THRESHOLD

PACKAGES = ("jax", "jaxlib", "equinox", "jaxtyping", "optax", "numpy", "brax", "orbax-checkpoint")
# Relative to the norm of the gradient. By default, accelerators multiply matrices in less than float32.
TOLERANCES = {"float32": 1e-2, "float64": 1e-6}


def check_installation() -> tuple[bool, str]:
    """Check a gradient, and report versions, devices, precision and compilation.

    Returns:
        Whether the gradient is right, and the report.
    """
    checks = [_gradient(precision) for precision in dict.fromkeys([_precision(), "float64"])]
    facts = provenance.collect_provenance()
    devices, host = facts["device"], facts["host"]
    own = {"diffmbrl": diffmbrl.__version__, "python": platform.python_version()}
    versions = own | {name: provenance.version(name) for name in PACKAGES}
    rows = [
        ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())),
        ("platform", f"{host['system']} {host['machine']}, {host['cpus']} CPUs"),
        ("devices", f"{devices['count']} x {devices['kind']} ({devices['platform']})"),
        ("precision", f"{_precision()} (x64 {'on' if facts['x64'] else 'off'})"),
        ("matrix products", f"{facts['matmul_precision']}; always highest in dynamics, rewards and sweeps"),
        ("compilation cache", cache_state(jax.config.jax_compilation_cache_dir)),  # pyright: ignore[reportAttributeAccessIssue]
        ("small loops", small_loops(os.environ.get("XLA_FLAGS", ""), devices["platform"])),
        *[("gradient", line) for _, line in checks],
    ]
    width = max(len(name) for name, _ in rows)
    text = "\n".join(f"{name:<{width}}  {line}" for name, line in rows)
    healthy = all(passed for passed, _ in checks)
    return (
        healthy,
        f"{text}\n\n{'All is well.' if healthy else 'The gradient is wrong: do not trust results from this installation.'}",
    )


def cache_state(folder: str | None) -> str:
    """Describe the compilation cache: its folder, size and whether it can be written.

    Args:
        folder: The folder, None if there is no cache.

    Returns:
        One line.
    """
    if not folder:
        return "off: every run compiles again; set JAX_COMPILATION_CACHE_DIR"
    path = Path(folder).expanduser()
    try:
        sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()] if path.exists() else []
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=nearest):
            state = "" if path.exists() else ", not made yet"
    except OSError as error:
        return f"{path}: cannot be written ({error.strerror}); set JAX_COMPILATION_CACHE_DIR"
    return f"{path}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB{state}"


def small_loops(flags: str, backend: str) -> str:
    """Describe how XLA compiles loops over time (see `xla.py`).

    Args:
        flags: The value of XLA_FLAGS.
        backend: The platform.

    Returns:
        One line.
    """
    if backend != "cpu":
        return f"compiled as {backend} does; the option is for CPUs"
    value = flags.partition(f"{OPTION}=")[2].split(",")[0].split(" ")[0].strip("'\"")
    if value:
        return f"compiled whole up to {value} bytes a step"
    return (
        f"not compiled whole, so slower: XLA_FLAGS is {flags!r}; add {OPTION}={THRESHOLD} to xla_backend_extra_options"
    )


def _precision() -> str:
    return "float64" if jax.config.jax_enable_x64 else "float32"  # pyright: ignore[reportAttributeAccessIssue]


def _gradient(precision: str) -> tuple[bool, str]:
    """Compare automatic differentiation in one precision with central differences in float64."""
    tolerance = TOLERANCES[precision]
    what = f"{precision} against central differences, cartpole-balance T = 20"
    try:
        error = gradient_error(precision)
    except Exception as problem:  # the report must appear whatever fails
        return False, f"{what}: {type(problem).__name__}: {str(problem).splitlines()[0]} FAIL"
    passed = bool(error <= tolerance)
    return passed, f"{what}: relative error {error:.1e}, at most {tolerance:.0e} {'PASS' if passed else 'FAIL'}"


def gradient_error(precision: str) -> float:
    """Relative error of dJ/dtheta against central differences, for a small network that balances a cart-pole.

    Args:
        precision: `float32` or `float64`.

    Returns:
        |autodiff - central differences| / |central differences|.
    """
    with jax.enable_x64(precision == "float64"):
        problem = _problem()
        gradient = np.asarray(_by_autodiff(*problem), np.float64)
    with jax.enable_x64(True):
        differences = np.asarray(_by_differences(*in_double(problem)))
    return float(np.linalg.norm(gradient - differences) / np.linalg.norm(differences))


def _problem() -> tuple[Neural, Task, Any]:
    # Sampled in float32 in every precision, so that the problem is the same.
    with jax.enable_x64(False):
        task = tasks.cartpole_balance(horizon=20)
        drawn = Neural.init(task, hidden=[4], key=jax.random.key(0)), task, task.starts(jax.random.key(1), 4)
    return in_double(drawn) if jax.config.jax_enable_x64 else drawn  # pyright: ignore[reportAttributeAccessIssue]


@jax.jit
def _by_autodiff(policy: Neural, task: Task, s0: Any) -> jax.Array:
    return ravel_pytree(jax.grad(mean_return)(policy, task, s0))[0]


@jax.jit
def _by_differences(policy: Neural, task: Task, s0: Any, eps: float = 1e-5) -> jax.Array:
    theta, unravel = ravel_pytree(policy)

    def slope(direction):
        ahead, behind = (mean_return(unravel(theta + sign * eps * direction), task, s0) for sign in (1, -1))
        return (ahead - behind) / (2 * eps)

    return jax.lax.map(slope, jnp.eye(theta.size, dtype=theta.dtype))
