"""What a run ends with, as plain arrays: trees in `<name>.npz` beside `<name>.json`, in folders of the run.

    policies/   of each method of a comparison: policies [rates, seeds, ...]
    agents/     of each agent that learned: its carry [seeds, ...]          buffers/    and what it saw [seeds, capacity, ...]

Nothing is pickled. The JSON file names every leaf with its shape and dtype and has the SHA-256 of the arrays' file; both are
checked when it is read.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Task
from diffmbrl.policies import Neural
from diffmbrl.runs import read_config, summarise, verdict
from diffmbrl.runs.folder import write_atomic, write_json
from diffmbrl.tasks.registry import known


class Saved(NamedTuple):
    """A policy and where it came from."""

    policy: Neural
    method: str
    rate: float | None
    seed: int


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


def save_policies(folder: Path, method: str, policies: Any, *, rates: Sequence[float | None], seeds: int) -> None:
    """Write the policies of a method, whose leaves have a leading axis of rates times seeds."""
    apart = jax.tree.map(lambda x: x.reshape(len(rates), seeds, *x.shape[1:]), policies)
    save_arrays(folder / "policies", method, apart, rates=list(rates), seeds=seeds)


def load_policy(place: str, task: Task) -> Saved:
    """The policy that `RUN`, `RUN:method` or `RUN:method:seed` names, for a task of the same name.

    Without a method the one with the best held-out return, without a seed the first; of several learning rates the best.
    Raises: `ValueError` if there is none, if it is of another task, or if its file is not what was written.
    """
    folder, method, number = parse(place)
    config = read_config(folder)
    if config.get("task") != task.name:
        raise ValueError(f"the policy of '{folder}' is of task '{config.get('task')}', not '{task.name}'")
    kept = sorted(path.stem for path in (folder / "policies").glob("*.json"))
    if not kept:
        raise ValueError(f"'{folder}' has no policies: only comparisons of policy methods leave them")
    summary = summarise(folder)
    if method is None:
        leader = verdict.leader(summary)
        method = leader.arm.method if leader is not None and leader.arm.method in kept else kept[0]
    known("method of the run", method, kept)
    manifest, leaves = read_arrays(folder / "policies", method)
    if not 0 <= number < manifest["seeds"]:
        raise ValueError(f"the run has seeds 0 to {manifest['seeds'] - 1}, got {number}")
    best = [row.arm.rate for row in summary.rows if row.arm.method == method]
    index = manifest["rates"].index(best[0]) if best and best[0] in manifest["rates"] else 0
    blank = jax.eval_shape(lambda key: Neural.init(task, hidden=config["hidden"], key=key), jax.random.key(0))
    chosen = {path: leaf[index, number] for path, leaf in leaves.items()}
    policy = filled(blank, chosen, f"the policy of '{folder}' for task '{task.name}'")
    return Saved(policy, method, manifest["rates"][index], number)


def parse(place: str) -> tuple[Path, str | None, int]:
    """RUN[:method[:seed]]; a folder whose own name has colons is one all the same."""
    if Path(place).is_dir():
        return Path(place), None, 0
    name, *rest = place.rsplit(":", 2) if Path(place.rsplit(":", 2)[0]).is_dir() else place.rsplit(":", 1)
    if not Path(name).is_dir():
        raise ValueError(
            f"'{place}' is not a run: expected RUN, RUN:method or RUN:method:seed with the folder of a run"
        )
    if len(rest) == 2 and not rest[1].isdecimal():
        raise ValueError(f"the seed of a policy must be a whole number, got '{rest[1]}'")
    return Path(name), rest[0], int(rest[1]) if len(rest) == 2 else 0


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
