"""The policies that a comparison ends with, as plain arrays: `policies/<method>.npz` beside `<method>.json` in its run folder.

Nothing is pickled. The JSON file names every leaf with its shape and dtype and has the SHA-256 of the arrays' file; both are
checked when a policy is read.
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
from diffmbrl.runs import summarise, verdict
from diffmbrl.runs.folder import write_atomic, write_json
from diffmbrl.tasks.registry import known


class Saved(NamedTuple):
    """A policy and where it came from."""

    policy: Neural
    method: str
    rate: float | None
    seed: int


def save_policies(folder: Path, method: str, policies: Any, *, rates: Sequence[float | None], seeds: int) -> None:
    """Write the policies of a method, whose leaves have a leading axis of rates times seeds."""
    leaves = {
        path: np.asarray(leaf).reshape(len(rates), seeds, *leaf.shape[1:]) for path, leaf in _named(policies).items()
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves.values())})
    place = folder / "policies"
    place.mkdir(exist_ok=True)
    write_atomic(place / f"{method}.npz", buffer.getvalue())
    described = [{"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in leaves.items()]
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json(place / f"{method}.json", {"rates": list(rates), "seeds": seeds, "leaves": described, "sha256": digest})


def load_policy(place: str, task: Task) -> Saved:
    """The policy that `RUN`, `RUN:method` or `RUN:method:seed` names, for a task of the same name.

    Without a method the one with the best held-out return, without a seed the first; of several learning rates the best.
    Raises: `ValueError` if there is none, if it is of another task, or if its file is not what was written.
    """
    folder, method, number = _parse(place)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"'{folder}' is not a run: it has no config.json that can be read") from None
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
    manifest, leaves = _read(folder / "policies", method)
    if not 0 <= number < manifest["seeds"]:
        raise ValueError(f"the run has seeds 0 to {manifest['seeds'] - 1}, got {number}")
    best = [row.arm.rate for row in summary.rows if row.arm.method == method]
    index = manifest["rates"].index(best[0]) if best and best[0] in manifest["rates"] else 0
    blank = jax.eval_shape(lambda key: Neural.init(task, hidden=config["hidden"], key=key), jax.random.key(0))
    wanted = {path: tuple(leaf.shape) for path, leaf in _named(blank).items()}
    found = {path: leaf.shape[2:] for path, leaf in leaves.items()}
    if wanted != found:
        raise ValueError(f"the policy of '{folder}' has leaves {found}; task '{task.name}' needs {wanted}")
    values = [jnp.asarray(leaf[index, number]) for leaf in leaves.values()]
    policy = jax.tree.unflatten(jax.tree.structure(blank), values)
    return Saved(policy, method, manifest["rates"][index], number)


def _parse(place: str) -> tuple[Path, str | None, int]:
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


def _read(place: Path, method: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        manifest = json.loads((place / f"{method}.json").read_text(encoding="utf-8"))
        data = (place / f"{method}.npz").read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"the policies of '{method}' in '{place}' cannot be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise ValueError(f"'{place / method}.npz' is not the file that was written: its SHA-256 is another")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        leaves = {leaf["path"]: file[f"leaf{i}"] for i, leaf in enumerate(manifest["leaves"])}
    return manifest, leaves


def _named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
