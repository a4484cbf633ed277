"""Trees of arrays as named leaves, and the arrays that a run ends with: `<name>.npz` and its manifest `<name>.json`.

    policies/   of each method of a comparison: policies [rates, seeds, ...]
    agents/     of each learning agent: its carry [seeds, ...]
    buffers/    of each learning agent: its replay buffer [seeds, capacity, ...]

Checkpoints (`checkpoint.py`) store their trees through the same leaves. Nothing is pickled. The manifest is written last;
it lists the path, shape and dtype of every leaf and the size and SHA-256 of the file, and readers verify them.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from diffmbrl.runs import manifest as manifests
from diffmbrl.runs.folder import write_atomic, write_json

Tree = TypeVar("Tree")


def save_arrays(place: Path, name: str, tree: PyTree, **facts: Any) -> None:
    """Write a tree of arrays as `place/name.npz`, then its manifest `place/name.json`.

    Args:
        place: The folder, created if it is missing.
        name: The name of both files.
        tree: Arrays and random keys, each on devices of this process.
        **facts: Further entries of the manifest.

    Raises:
        OSError: If a file cannot be written.
    """
    leaves = {path: np.asarray(key_numbers(leaf)) for path, leaf in named_leaves(tree).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves.values())})
    place.mkdir(exist_ok=True)
    write_atomic(place / f"{name}.npz", buffer.getvalue())
    write_json(
        place / f"{name}.json", facts | {"leaves": describe_leaves(leaves)} | manifests.digest(place / f"{name}.npz")
    )


def read_arrays(place: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read and verify a tree that `save_arrays` wrote.

    Args:
        place: The folder.
        name: The name of both files.

    Returns: the manifest, and the leaves by their paths.

    Raises:
        ValueError: If a file cannot be read, or the arrays are not what was written.
    """
    file = place / f"{name}.npz"
    try:
        manifest = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"the arrays of '{name}' in '{place}' cannot be read: {error}") from None
    if wrong := manifests.fault(file, manifest):
        raise ValueError(f"'{file}' {wrong}")
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        leaves = {leaf["path"]: stored[f"leaf{i}"] for i, leaf in enumerate(manifest["leaves"])}
    return manifest, leaves


def fill(blank: Tree, leaves: Mapping[str, np.ndarray], what: str) -> Tree:
    """Rebuild a tree from leaves that `read_arrays` read, each in the precision in which it was saved.

    Args:
        blank: A tree of the wanted structure and shapes: arrays, or the shapes that `jax.eval_shape` returns.
        leaves: The arrays by their paths, in any order.
        what: The subject of the error's sentence.

    Returns: a tree like `blank` of the arrays.

    Raises:
        ValueError: If a leaf is missing, unknown, or of another shape than in `blank`.
    """
    wanted = {path: list(jax.eval_shape(key_numbers, leaf).shape) for path, leaf in named_leaves(blank).items()}
    if gap := mismatch({path: list(leaf.shape) for path, leaf in leaves.items()}, wanted):
        path, found, needed = gap
        has, needs = ("no array" if shape is None else shape for shape in (found, needed))
        raise ValueError(f"{what} does not fit: it has {has} for {path}, and the present setup needs {needs}")
    return unflatten_like(blank, leaves)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by their paths, as `jax.tree_util.keystr` writes them."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def describe_leaves(leaves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the path, dtype and shape of each leaf, fit for JSON."""
    return [{"path": path, "dtype": str(leaf.dtype), "shape": list(leaf.shape)} for path, leaf in leaves.items()]


def key_numbers(leaf: Any) -> Any:
    """Return the numbers of an array of random keys, and any other array unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def mismatch(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first leaf that differs, its found and its wanted description; None if all agree."""
    for path in {**wanted, **found}:
        if found.get(path) != wanted.get(path):
            return path or "its one leaf", found.get(path), wanted.get(path)
    return None


def unflatten_like(like: Tree, values: Mapping[str, np.ndarray]) -> Tree:
    """Build a tree like `like` from arrays by path: random keys of keys' numbers, numpy's where `like` has numpy's, else JAX's.

    A leaf without an entry in `values` has no elements.
    """
    leaves = [_leaf(values.get(path), leaf) for path, leaf in named_leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _leaf(values: np.ndarray | None, like: Any) -> Any:
    if values is None:
        values = np.zeros(jax.eval_shape(key_numbers, like).shape, np.uint32 if _is_key(like) else like.dtype)
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(values), impl=like.dtype._impl)
    return values if isinstance(like, (np.ndarray, np.generic)) else jnp.asarray(values)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
