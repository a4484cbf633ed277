"""Arrays that lie on devices, written to files and read by orbax: shard by shard, in the background."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np


def laid_out(leaf: jax.Array | np.ndarray | np.generic) -> jax.Array | np.ndarray:
    """Return an array as `start_writing` takes it: on its devices, or numpy's if several processes run.

    With several processes orbax expects each of them to write shards, but the state is saved by one process alone.
    """
    return leaf if isinstance(leaf, jax.Array) and jax.process_count() == 1 else np.asarray(leaf)


def start_writing(folder: Path, values: Mapping[str, jax.Array | np.ndarray]) -> Callable[[], None]:
    """Copy arrays to the host, shard by shard, and write them to a new folder in the background.

    Args:
        folder: The folder, which must not exist. It is not created if there are no values, which orbax refuses.
        values: Arrays with at least one element each, by name.

    Returns: a function that waits until all files are written, and raises the error if one was not.
    """
    if not values:
        return lambda: None
    import orbax.checkpoint as ocp  # heavy: not for every command

    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:  # without barriers that wait for the others
        own = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix="diffmbrl"
        )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, multiprocessing_options=options)  # all leaves in a few files
    orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=options)
    with _quiet():
        orbax.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(values)))

    def wait() -> None:
        with _quiet():
            try:
                orbax.wait_until_finished()
            finally:
                orbax.close()

    return wait


def read(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Read whole arrays to the host, without a cast.

    Args:
        folder: A folder that `start_writing` wrote.
        names: The names of all its arrays.

    Returns: the arrays by name.
    """
    import orbax.checkpoint as ocp

    blank = dict.fromkeys(names, 0)
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet(), ocp.PyTreeCheckpointer(use_ocdbt=True) as orbax:
        return orbax.restore(folder.absolute(), args=ocp.args.PyTreeRestore(item=blank, restore_args=plain))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax, which logs every step."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
