r"""Checkpoints of a run, from which it goes on to the same numbers: `checkpoints/<step>/`.

    arrays/          the leaves of a tree, by orbax          host.json    numbers and words of the loop on the host
    manifest.json    size and SHA-256 of every file, path, dtype and shape of every leaf, and what `metrics.jsonl` held

Everything is written into a hidden folder beside, synced, the manifest last, and the folder is then renamed: under its number
there is a whole checkpoint or none. Nothing is pickled. A checkpoint is read only if every file is what was written, and
nothing in it leads out of its folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.runs.metrics import Mark, marked

FORMAT = 1
KEEP = 3  # the latest, so that a damaged one has two behind it
FIELDS = {"format", "step", "files", "leaves", "metrics", "own"}


class Kept(NamedTuple):
    """A checkpoint whose files are all as they were written."""

    folder: Path
    step: int
    host: dict[str, Any]
    leaves: list[dict[str, Any]]  # path, dtype, shape
    metrics: Mark | None


def save_checkpoint(
    place: Path, step: int, tree: Any, host: dict[str, Any], *, metrics: Mark | None = None, keep: int = KEEP
) -> Path:
    """Write a tree of arrays and what the host knows as `place/<step>`, and drop all but the latest `keep`.

    Leaves are arrays of JAX or numpy; random keys are stored as their numbers and their kind. `metrics` is how far the run's
    `metrics.jsonl` was. Cost: one copy to the host, one write; files and folders are synced.
    Raises: `TypeError` for a leaf that is not an array; `OSError` if it cannot be written, which leaves those of before alone.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "checkpoints"
    >>> tree = {"theta": jnp.ones(3), "key": jax.random.key(0)}
    >>> kept, _ = newest_valid(save_checkpoint(place, 1, tree, {"done": 64}).parent)
    >>> kept.host, restore_checkpoint(kept, tree)["theta"]
    ({'done': 64}, Array([1., 1., 1.], dtype=float32))
    """
    named = _named(tree)
    for path, leaf in named.items():
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or leaf.dtype == object:
            raise TypeError(f"a checkpoint holds arrays; {path or 'its one leaf'} is {type(leaf).__name__}")
    target, partial = place / str(step), place / f".saving-{step}-{os.getpid()}"
    _own(place)
    try:
        place.mkdir(exist_ok=True)
        for stale in place.glob(".saving-*"):
            _remove(stale)
        partial.mkdir()
        arrays = {f"leaf{i}": np.asarray(_numbers(leaf)) for i, leaf in enumerate(named.values())}
        arrays = {name: x for name, x in arrays.items() if x.size}  # orbax refuses what has no numbers
        if arrays:
            with _checkpointer() as orbax:
                orbax.save((partial / "arrays").absolute(), arrays)
        (partial / "host.json").write_bytes(_canonical(host))
        files = {name: _digest(partial / name) for name in sorted(_files(partial))}
        leaves = [{"path": p, "dtype": str(x.dtype), "shape": list(x.shape)} for p, x in named.items()]
        mark = None if metrics is None else metrics._asdict()
        manifest = {"format": FORMAT, "step": step, "files": files, "leaves": leaves, "metrics": mark}
        manifest["own"] = hashlib.sha256(_canonical(manifest)).hexdigest()
        _sync(partial)
        (partial / "manifest.json").write_bytes(_canonical(manifest))
        _sync(partial)
        if os.path.lexists(target):
            _remove(target)  # damaged, or one that a resumed run comes by again
        os.rename(partial, target)
        _sync_one(place)
    except Exception as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        # orbax gives a full disk another type on each of its ways.
        raise OSError(f"checkpoint {step} cannot be written to {str(place)!r}: {_reason(error)}") from error
    prune(place, keep)
    return target


def newest_valid(place: Path) -> tuple[Kept | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one; None if there is none at all.

    Raises: `ValueError` if there are some and none is valid, naming what is wrong with each, or if `place` is a link.
    """
    _own(place)
    wrong = []
    for step in reversed(_steps(place)):
        try:
            return verify(place / str(step)), wrong
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError(f"no checkpoint in {str(place)!r} is valid: {'; '.join(wrong)}")
    return None, []


def verify(folder: Path) -> Kept:
    """The checkpoint in a folder `checkpoints/<step>`, every file of it compared with its manifest.

    Raises: `ValueError` naming the file that is missing, foreign, of another size or content, or a link.
    """

    def wrong(name: str, what: str) -> ValueError:
        return ValueError(f"checkpoint {folder.name}: {name} {what}")

    if folder.is_symlink() or not folder.is_dir():
        raise wrong("its folder", "is a symbolic link" if folder.is_symlink() else "is not a folder")
    found = set(_files(folder))  # refuses links before anything is read
    if "manifest.json" not in found:
        raise wrong("manifest.json", "is missing")
    manifest = _read(folder, "manifest.json")
    own = manifest.get("own")
    if own != hashlib.sha256(_canonical({name: x for name, x in manifest.items() if name != "own"})).hexdigest():
        raise wrong("manifest.json", "is not what was written: its own SHA-256 is another")
    if set(manifest) != FIELDS or manifest["format"] != FORMAT:
        raise wrong("manifest.json", f"is of another format than this version reads ({FORMAT})")
    if manifest["step"] != int(folder.name):
        raise wrong("manifest.json", f"is of checkpoint {manifest['step']}")
    for name, expected in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise wrong(f"manifest.json: {name!r}", "leads out of the folder")
        if name not in found:
            raise wrong(name, "is missing")
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise wrong(name, f"has {size} bytes instead of {expected['bytes']}")
        if _digest(folder / name) != expected:
            raise wrong(name, "is not what was written: its SHA-256 is another")
    if foreign := sorted(found - set(manifest["files"]) - {"manifest.json"}):
        raise wrong(foreign[0], "is not in the manifest")
    mark = None if manifest["metrics"] is None else Mark(**manifest["metrics"])
    if mark is not None and (what := marked(folder.parents[1] / "metrics.jsonl", mark)):
        raise wrong("the metrics.jsonl that it goes on from", what)
    return Kept(folder, manifest["step"], _read(folder, "host.json"), manifest["leaves"], mark)


def restore_checkpoint(kept: Kept, like: Any) -> Any:
    """The tree that was saved, in the form of `like`: arrays, or `jax.ShapeDtypeStruct`s, as `jax.eval_shape` makes them.

    A leaf that is numpy's in `like` is numpy's again, every other one JAX's; random keys are keys. Nothing is cast.
    Raises: `ValueError` naming the leaf that is missing, too many, or of another dtype or shape.
    """
    wanted = {path: (str(leaf.dtype), list(leaf.shape)) for path, leaf in _named(like).items()}
    found = {leaf["path"]: (leaf["dtype"], leaf["shape"]) for leaf in kept.leaves}
    if wanted != found:
        path = next(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
        has, needs = ("nothing" if x is None else f"{x[0]}{x[1]}" for x in (found.get(path), wanted.get(path)))
        raise ValueError(
            f"checkpoint {kept.step} does not fit what this run is: for {path or 'its one leaf'} it has {has}, needed is "
            f"{needs}; the installed code or the config is not the one that it was written by"
        )
    names = {leaf["path"]: f"leaf{i}" for i, leaf in enumerate(kept.leaves) if 0 not in leaf["shape"]}
    arrays = _load(kept.folder / "arrays", list(names.values())) if names else {}
    values = [_revived(arrays.get(names.get(path, "")), leaf) for path, leaf in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def set_aside(place: Path, step: int) -> None:
    """Rename what stands after `step`, all of it damaged, so that new checkpoints have its numbers."""
    for later in [other for other in _steps(place) if other > step]:
        aside = place / f"damaged-{later}"
        if os.path.lexists(aside):
            _remove(aside)
        os.rename(place / str(later), aside)


def prune(place: Path, keep: int) -> None:
    """Drop all but the latest `keep`."""
    for old in _steps(place)[:-keep]:
        _remove(place / str(old))


def _load(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    blank = dict.fromkeys(names, 0)
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}  # as it was saved, without a cast
    with _checkpointer() as orbax:
        return orbax.restore(folder.absolute(), args=ocp.args.PyTreeRestore(item=blank, restore_args=plain))


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """orbax's, which is imported when the first checkpoint is written and not by every command."""
    import orbax.checkpoint as ocp

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.PyTreeCheckpointer(use_ocdbt=True) as made:  # all leaves in a few files
            yield made
    finally:
        log.setLevel(level)


def _revived(values: np.ndarray | None, like: Any) -> Any:
    if values is None:
        values = np.zeros(jax.eval_shape(_numbers, like).shape, np.uint32 if _is_key(like) else like.dtype)
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(values), impl=like.dtype._impl)
    if isinstance(like, (np.ndarray, np.generic)):
        return values
    return jnp.asarray(values)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _steps(place: Path) -> list[int]:
    """Numbers of the checkpoints there, increasing; what has another name is not one."""
    if not place.is_dir():
        return []
    return sorted(int(entry.name) for entry in place.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", entry.name))


def _own(place: Path) -> None:
    if place.is_symlink():
        raise ValueError(f"{str(place)!r} is a symbolic link: a run's checkpoints are in its own folder")


def _files(folder: Path) -> Iterator[str]:
    """All files below, relative. Raises: `ValueError` for a link, or what is neither file nor folder."""
    for top, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(top) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                kind = "a symbolic link" if path.is_symlink() else "neither a file nor a folder"
                raise ValueError(f"checkpoint {folder.name}: {path.relative_to(folder)} is {kind}")
        yield from ((Path(top) / name).relative_to(folder).as_posix() for name in names)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _canonical(value: Any) -> bytes:
    """The one way in which a value is written, so that no byte of it can change unseen."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = (folder / name).read_bytes()
        value = json.loads(data)
    except (OSError, ValueError, RecursionError):
        data, value = b"", None
    if not isinstance(value, dict) or _canonical(value) != data:
        raise ValueError(f"checkpoint {folder.name}: {name} is not what was written")
    return value


def _sync(folder: Path) -> None:
    """Every file and folder below, on disk."""
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
    """An error in one line, the system's own words where it has them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return "No space left on device" if "No space left on device" in text else text[:300]
