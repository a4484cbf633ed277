r"""Checkpoints of a run, from which it resumes to the same numbers: `checkpoints/<step>/`.

    arrays/          the leaves of a tree, written by orbax
    host.json        numbers and words of the loop on the host
    manifest.json    size and SHA-256 of every file; path, dtype and shape of every leaf; length and SHA-256 of `metrics.jsonl`

orbax reads each array from the devices where it lies, shard by shard, and writes it while the loop continues. All files go
into a hidden folder and are synced; then the manifest is written, and the folder renamed to its number. A numbered folder is
therefore complete, whenever the process is killed. Nothing is pickled. A checkpoint is restored only if every file is what
was written and no entry leads out of its folder.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from diffmbrl.runs import arrays, sharded
from diffmbrl.runs import manifest as manifests
from diffmbrl.runs.metrics import Mark, mark_fault

FORMAT = 1
KEEP = 3  # the latest checkpoints: two remain if one is damaged
FIELDS = {"format", "step", "files", "leaves", "metrics", "own"}
Tree = TypeVar("Tree")


class Checkpoint(NamedTuple):
    """A checkpoint whose files were verified.

    Args:
        folder: Its folder, `checkpoints/<step>`.
        step: Its number.
        host: Numbers and words of the loop on the host.
        leaves: Path, dtype and shape of every leaf.
        metrics: Length and SHA-256 of `metrics.jsonl` at that time, None if it was not given.
    """

    folder: Path
    step: int
    host: dict[str, Any]
    leaves: list[dict[str, Any]]
    metrics: Mark | None


def save_checkpoint(
    place: Path, step: int, tree: PyTree, host: dict[str, Any], *, metrics: Mark | None = None, keep: int = KEEP
) -> Path:
    """Write a tree of arrays and the host's numbers as `place/<step>`, and delete all but the latest checkpoints.

    Args:
        place: The folder of the checkpoints, created if it is missing.
        step: The number of the checkpoint; an earlier one of that number is replaced.
        tree: Arrays of JAX or numpy; random keys are stored as numbers with the name of their implementation.
        host: Numbers and words, fit for JSON.
        metrics: Length and SHA-256 of the run's `metrics.jsonl` at this point.
        keep: The number of checkpoints to keep.

    Returns: the folder of the checkpoint.

    Raises:
        TypeError: If a leaf is not an array.
        ValueError: If `place` is a symbolic link.
        OSError: If it cannot be written; earlier checkpoints are unchanged.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> place = Path(tempfile.mkdtemp()) / "checkpoints"
    >>> tree = {"theta": jnp.ones(3), "key": jax.random.key(0)}
    >>> found, _ = newest_valid(save_checkpoint(place, 1, tree, {"done": 64}).parent)
    >>> found.host, restore_checkpoint(found, tree)["theta"]
    ({'done': 64}, Array([1., 1., 1.], dtype=float32))

    Cost: one copy of each shard to the host and one write; files and folders are synced.
    """
    return start_checkpoint(place, step, tree, host, metrics=metrics, keep=keep)()


def start_checkpoint(
    place: Path, step: int, tree: PyTree, host: dict[str, Any], *, metrics: Mark | None = None, keep: int = KEEP
) -> Callable[[], Path]:
    """Begin `save_checkpoint`: copy the arrays to the host and let orbax write them in the background.

    Args:
        place, step, tree, host, metrics, keep: As for `save_checkpoint`.

    Returns: a function that waits for orbax, writes the manifest and publishes the checkpoint. Any thread may call it, once.

    Raises:
        TypeError, ValueError, OSError: As `save_checkpoint`; the returned function raises `OSError` too.
    """
    named = arrays.named_leaves(tree)
    for path, leaf in named.items():
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or leaf.dtype == object:
            raise TypeError(f"a checkpoint holds arrays; {path or 'its one leaf'} is {type(leaf).__name__}")
    target, partial = place / str(step), place / f".saving-{step}-{os.getpid()}"
    _refuse_link(place)
    leaves = arrays.describe_leaves(named)
    with _failing(place, step, partial):
        place.mkdir(exist_ok=True)
        for stale in place.glob(".saving-*"):
            _remove(stale)
        partial.mkdir()
        numbers = {f"leaf{i}": sharded.laid_out(arrays.key_numbers(leaf)) for i, leaf in enumerate(named.values())}
        written = sharded.start_writing(partial / "arrays", {name: x for name, x in numbers.items() if x.size})

    def finish() -> Path:
        with _failing(place, step, partial):
            written()
            (partial / "host.json").write_bytes(manifests.canonical(host))
            files = {name: manifests.digest(partial / name) for name in sorted(manifests.files_below(partial))}
            mark = None if metrics is None else metrics._asdict()
            manifest = {"format": FORMAT, "step": step, "files": files, "leaves": leaves, "metrics": mark}
            _sync(partial)
            (partial / "manifest.json").write_bytes(manifests.sealed(manifest))
            _sync(partial)
            if os.path.lexists(target):
                _remove(target)  # damaged, or of an earlier process of the run
            os.rename(partial, target)
            _sync_one(place)
        prune(place, keep)
        return target

    return finish


def newest_valid(place: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that passes verification.

    Args:
        place: The folder of the checkpoints.

    Returns: the checkpoint, None if there are no checkpoints, and the fault of each newer one in words.

    Raises:
        ValueError: If there are checkpoints and none is valid, naming the fault of each; if `place` is a symbolic link.
    """
    _refuse_link(place)
    wrong = []
    for step in reversed(_steps(place)):
        try:
            return verify(place / str(step)), wrong
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"no checkpoint in {str(place)!r} is valid: {'; '.join(wrong)}")
    return None, []


def verify(folder: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its manifest.

    Args:
        folder: The folder of the checkpoint, `checkpoints/<step>`.

    Returns: the checkpoint.

    Raises:
        ValueError: If a file is missing, foreign, a link, or of another size or content; the text names the file.
    """

    def wrong(name: str, what: str) -> ValueError:
        return ValueError(f"checkpoint {folder.name}: {name} {what}")

    if folder.is_symlink() or not folder.is_dir():
        raise wrong("its folder", "is a symbolic link" if folder.is_symlink() else "is not a folder")
    try:
        found = set(manifests.files_below(folder))  # refuses links before any file is read
    except ValueError as error:
        raise ValueError(f"checkpoint {folder.name}: {error}") from None
    if "manifest.json" not in found:
        raise wrong("manifest.json", "is missing")
    manifest = _read(folder, "manifest.json")
    if not manifests.seal_holds(manifest):
        raise wrong("manifest.json", "is not what was written: its own SHA-256 is another")
    if set(manifest) != FIELDS or manifest["format"] != FORMAT:
        raise wrong("manifest.json", f"is of another format than this version reads ({FORMAT})")
    if manifest["step"] != int(folder.name):
        raise wrong("manifest.json", f"is of checkpoint {manifest['step']}")
    for name, expected in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise wrong(f"manifest.json: {name!r}", "leads out of the folder")
        if what := manifests.fault(folder / name, expected):
            raise wrong(name, what)
    if foreign := sorted(found - set(manifest["files"]) - {"manifest.json"}):
        raise wrong(foreign[0], "is not in the manifest")
    mark = None if manifest["metrics"] is None else Mark(**manifest["metrics"])
    if mark is not None and (what := mark_fault(folder.parents[1] / "metrics.jsonl", mark)):
        raise wrong("its metrics.jsonl", what)
    return Checkpoint(folder, manifest["step"], _read(folder, "host.json"), manifest["leaves"], mark)


def restore_checkpoint(found: Checkpoint, like: Tree) -> Tree:
    """Read the tree of a verified checkpoint. Nothing is cast.

    Args:
        found: The checkpoint.
        like: A tree of the wanted structure, dtypes and shapes: arrays, or the shapes that `jax.eval_shape` returns.

    Returns: the tree; a leaf is numpy's where `like` has numpy's, a random key where it has a key, otherwise JAX's.

    Raises:
        ValueError: If a leaf is missing, unknown, or of another dtype or shape; the text names it.
    """
    wanted = {path: (str(leaf.dtype), list(leaf.shape)) for path, leaf in arrays.named_leaves(like).items()}
    stored = {leaf["path"]: (leaf["dtype"], leaf["shape"]) for leaf in found.leaves}
    if gap := arrays.mismatch(stored, wanted):
        has, needs = ("nothing" if x is None else f"{x[0]}{x[1]}" for x in gap[1:])
        raise ValueError(
            f"checkpoint {found.step} does not fit this run: for {gap[0]} it has {has}, needed is {needs}; another version "
            "of the code or another config wrote it"
        )
    names = {leaf["path"]: f"leaf{i}" for i, leaf in enumerate(found.leaves) if 0 not in leaf["shape"]}
    loaded = sharded.read(found.folder / "arrays", list(names.values())) if names else {}
    return arrays.unflatten_like(like, {path: loaded[name] for path, name in names.items()})


def set_aside(place: Path, step: int) -> None:
    """Rename all checkpoints after `step`, which are damaged, so that new checkpoints take their numbers."""
    for later in [other for other in _steps(place) if other > step]:
        aside = place / f"damaged-{later}"
        if os.path.lexists(aside):
            _remove(aside)
        os.rename(place / str(later), aside)


def prune(place: Path, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints."""
    for old in _steps(place)[:-keep]:
        _remove(place / str(old))


@contextlib.contextmanager
def _failing(place: Path, step: int, partial: Path) -> Iterator[None]:
    """Turn any error into an `OSError` that names the checkpoint, and delete the files written so far."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        # orbax raises errors of several types for a full disk.
        raise OSError(f"checkpoint {step} cannot be written to {str(place)!r}: {_reason(error)}") from error


def _steps(place: Path) -> list[int]:
    """Numbers of the checkpoints in a folder, increasing; entries with other names are not checkpoints."""
    if not place.is_dir():
        return []
    return sorted(int(entry.name) for entry in place.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", entry.name))


def _refuse_link(place: Path) -> None:
    if place.is_symlink():
        raise ValueError(f"{str(place)!r} is a symbolic link: a run's checkpoints are in its own folder")


def _read(folder: Path, name: str) -> dict[str, Any]:
    value = manifests.read_canonical(folder / name)
    if value is None:
        raise ValueError(f"checkpoint {folder.name}: {name} is not what was written")
    return value


def _sync(folder: Path) -> None:
    """Force every file and folder below to disk."""
    for top, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(top) / name)
        _sync_one(Path(top))


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def _reason(error: Exception) -> str:
    """An error in one line, in the system's own words where it has them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return "No space left on device" if "No space left on device" in text else text[:300]
