"""What is settled before anything is computed."""

import os
from pathlib import Path

DEFAULT_CACHE = Path("~/.cache/diffmbrl/xla")


def configure(x64: bool, devices: int = 1) -> None:
    """Precision, devices, and a compilation cache that outlives the process."""
    import jax

    from diffmbrl.devices import init_distributed

    init_distributed(devices)
    jax.config.update("jax_enable_x64", x64)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(DEFAULT_CACHE.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
