"""Process-wide JAX configuration."""

import os
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/diffmbrl/xla")


def configure(x64: bool, devices: int = 1) -> None:
    """Set the precision, the devices and a persistent compilation cache, before JAX computes anything.

    Args:
        x64: Compute in float64.
        devices: The number of devices.
    """
    import jax

    from diffmbrl.devices import init_distributed

    init_distributed(devices)
    jax.config.update("jax_enable_x64", x64)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(DEFAULT_CACHE.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
