"""What a run ends with, as plain arrays: trees in `<name>.npz` beside `<name>.json`, in folders of the run.

    policies/   of each method of a comparison: policies [rates, seeds, ...]
    agents/     of each agent that learned: its carry [seeds, ...]          buffers/    and what it saw [seeds, capacity, ...]

Nothing is pickled. The JSON file names every leaf with its shape and dtype and has the SHA-256 of the arrays' file; both are
checked when it is read.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.runs.folder import write_atomic, write_json


def save_arrays(place: Path, name: str, tree: Any, **facts: Any) -> None:
    """Write a tree of arrays as `place/name.npz`, and beside it what describes it, `facts` included."""
    leaves = {path: np.asarray(_plain(leaf)) for path, leaf in _named(tree).items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves.values())})
    place.mkdir(exist_ok=True)
    write_atomic(place / f"{name}.npz", buffer.getvalue())
    described = [{"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in leaves.items()]
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json(place / f"{name}.json", facts | {"leaves": described, "sha256": digest})


def read_arrays(place: Path, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What describes a saved tree, and its leaves by their paths.

    Raises: `ValueError` if they cannot be read or are not what was written.
    """
    try:
        manifest = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        data = (place / f"{name}.npz").read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"the arrays of '{name}' in '{place}' cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise ValueError(f"'{place / name}.npz' is not the file that was written: its SHA-256 is another")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        leaves = {leaf["path"]: file[f"leaf{i}"] for i, leaf in enumerate(manifest["leaves"])}
    return manifest, leaves


def filled(blank: Any, leaves: dict[str, np.ndarray], what: str) -> Any:
    """A tree like `blank` (arrays, or shapes of arrays) of the leaves that were read, in the precision that they were saved in.

    Raises: `ValueError` if they have other paths or shapes.
    """
    wanted = {path: jax.eval_shape(_plain, leaf).shape for path, leaf in _named(blank).items()}
    found = {path: leaf.shape for path, leaf in leaves.items()}
    if wanted != found:
        path = next(path for path in {**wanted, **found} if wanted.get(path) != found.get(path))
        has, needs = ("none" if shape is None else list(shape) for shape in (found.get(path), wanted.get(path)))
        raise ValueError(
            f"{what} does not fit: it has {has} for {path or 'its one leaf'}, and what was set up needs {needs}"
        )
    # In the tree's order, whatever the file's.
    values = [_revived(leaves[path], leaf) for path, leaf in _named(blank).items()]
    return jax.tree.unflatten(jax.tree.structure(blank), values)


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    """Random keys as the numbers that they are."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _revived(values: np.ndarray, like: Any) -> Any:
    array = jnp.asarray(values)
    return jax.random.wrap_key_data(array) if _is_key(like) else array
