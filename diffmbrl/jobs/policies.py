"""Save the policies of a comparison, and load the one that `RUN:method:seed` names."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from diffmbrl.choices import validate_choice
from diffmbrl.core import Task
from diffmbrl.policies import Neural
from diffmbrl.report import summarise, verdict
from diffmbrl.runs import read_config
from diffmbrl.runs.arrays import fill, read_arrays, save_arrays


class Saved(NamedTuple):
    """A policy of a run.

    Args:
        policy: The policy.
        method: The method that trained it.
        rate: The method's learning rate, None if it has none.
        seed: The seed.
    """

    policy: Neural
    method: str
    rate: float | None
    seed: int


def save_policies(folder: Path, method: str, policies: PyTree, *, rates: Sequence[float | None], seeds: int) -> None:
    """Save the policies of a method.

    Args:
        folder: The run folder.
        method: The method.
        policies: Policies whose leaves have a leading axis of rates times seeds.
        rates: The learning rates.
        seeds: The number of seeds.
    """
    apart = jax.tree.map(lambda x: x.reshape(len(rates), seeds, *x.shape[1:]), policies)
    save_arrays(folder / "policies", method, apart, rates=list(rates), seeds=seeds)


def load_policy(place: str, task: Task) -> Saved:
    """Load the policy that `RUN`, `RUN:method` or `RUN:method:seed` names.

    By default it is of the method with the highest held-out return and of the first seed, always of the best learning rate.

    Args:
        place: The run folder, the method and the seed.
        task: A task of the same name.

    Returns:
        The policy and its origin.

    Raises:
        ValueError: If there is none, if it is of another task, or if its file is damaged.
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
    validate_choice("method of the run", method, kept)
    manifest, leaves = read_arrays(folder / "policies", method)
    if not 0 <= number < manifest["seeds"]:
        raise ValueError(f"the run has seeds 0 to {manifest['seeds'] - 1}, got {number}")
    best = [row.arm.rate for row in summary.rows if row.arm.method == method]
    index = manifest["rates"].index(best[0]) if best and best[0] in manifest["rates"] else 0
    blank = jax.eval_shape(lambda key: Neural.init(task, hidden=config["hidden"], key=key), jax.random.key(0))
    chosen = {path: leaf[index, number] for path, leaf in leaves.items()}
    policy = fill(blank, chosen, f"the policy of '{folder}' for task '{task.name}'")
    return Saved(policy, method, manifest["rates"][index], number)


def parse(place: str) -> tuple[Path, str | None, int]:
    """Split RUN[:method[:seed]]; the folder's own name may contain colons.

    Args:
        place: The text.

    Returns:
        The folder, the method if it is named, and the seed, by default 0.

    Raises:
        ValueError: If the folder does not exist or the seed is not a number.
    """
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
