"""Settings that every test runs under, and what several of them need.

Shapes and dtypes in the annotations of diffmbrl are checked at every call: `--jaxtyping-packages` in pyproject.toml.
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the environment, so that the processes that a test starts have them too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("MPLBACKEND", "agg")
# Most of the tests' time is XLA's, which compiles in a third of it without optimisation and with its older emitters.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
EMITTERS = "--xla_cpu_use_fusion_emitters"
# A flag that XLA does not know ends the process: only where it is known.
if EMITTERS not in os.environ.get("XLA_FLAGS", "") and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EMITTERS}=false".strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from experiments.programs import forget_programs  # noqa: E402

# Again, for a JAX that a plugin of pytest imported before the lines above.
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
# A float32 that meets a float64, or an integer a float, is a mistake.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline: the first example compiles. The same examples each time: a test that fails, fails again.
hypothesis.settings.register_profile("diffmbrl", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("diffmbrl")

# Tracing makes millions of objects and hardly a cycle: with Python's thresholds looking for them takes a twelfth of its time.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of every later collection of garbage: most of the objects, and all to stay."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is held against every task is slow for Brax's: each takes tens of seconds to compile. test_brax.py is not."""
    for item in items:
        given = getattr(item, "callspec", None)
        name = given.params.get("name", "") if given else ""
        if isinstance(name, str) and name.startswith("brax-") and item.path.name != "test_brax.py":
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder for a command, which may set the precision."""
    monkeypatch.chdir(tmp_path)
    x64 = jax.config.jax_enable_x64
    yield tmp_path
    jax.config.update("jax_enable_x64", x64)


@pytest.fixture(autouse=True)
def _after_a_test() -> Iterator[None]:
    yield
    forget_programs()


@pytest.fixture(autouse=True, scope="module")
def _after_a_file() -> Iterator[None]:
    """The next file has shapes of its own."""
    yield
    forget_programs(beyond=1_500)
