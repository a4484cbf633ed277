"""The health of a policy's gradient on a task, horizon by horizon: what `diffmbrl diagnose` runs."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.core import Task, is_stateful
from diffmbrl.diagnostics.health import Health, check_health_arguments, gradient_health
from diffmbrl.diagnostics.verdict import BATCH, FLOAT32, TAIL, least_z, total_growth, verdict
from diffmbrl.jobs.learn import restore_agent
from diffmbrl.jobs.policies import load_policy, parse
from diffmbrl.policies import Neural
from diffmbrl.report import learning_curves, rebuild
from diffmbrl.runs import Progress, Writer, check_out, create, read_config, read_metrics, running
from diffmbrl.tasks import make

OUTPUT_SCALE = 0.1  # of a first policy's last layer


class DiagnoseConfig(NamedTuple):
    """Everything that a diagnosis depends on: its config."""

    task: str
    horizons: tuple[int, ...]
    policy: str | None  # RUN[:method[:seed]]
    scale: float | None  # of a random first policy's last layer, in multiples of its default
    hidden: tuple[int, ...]  # its layers
    parameters: dict[str, float | str]  # numbers, and words such as a backend
    starts: int
    std: float
    key: int


def diagnose(setting: DiagnoseConfig, *, out: Path | None = None, stream: Any = None) -> Path:
    """Measure the gradient's health and return the run folder, with verdict, figures and report.

    Raises: `ValueError` for anything wrong in the setting or the folder, before anything is written.
    """
    task, policy, origin = prepare(setting)
    check_out(out)
    folder = create(out, setting.task, "diagnose", setting._asdict() | {"seeds": None, "of": origin})
    arms = len(setting.horizons)
    with running(folder), Writer(folder / "metrics.jsonl") as writer, Progress(1, stream=stream) as progress:
        progress.arm("gradient health", arms)
        progress.update(0, "compiling")
        begun = time.perf_counter()

        def seen(count: int) -> None:
            progress.update(count, f"T = {setting.horizons[count - 1]}, {time.perf_counter() - begun:.1f} s")

        key = jax.random.fold_in(jax.random.key(setting.key), 1)
        health = gradient_health(
            task, policy, setting.horizons, key=key, starts=setting.starts, std=setting.std, progress=seen
        )
        _write(writer, health, time.perf_counter() - begun)
    rebuild(folder)
    return folder


def prepare(setting: DiagnoseConfig) -> tuple[Task, Any, str]:
    """The task of the longest horizon, the policy and where it is from, everything checked.

    Raises: `ValueError` naming the value that is wrong.
    """
    check_health_arguments(max(setting.horizons, default=0), setting.horizons, setting.starts, setting.std)
    task = make(setting.task, horizon=int(setting.horizons[-1]), **setting.parameters)
    if not 0 <= setting.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {setting.key}")
    if setting.policy is not None:
        if setting.scale is not None:
            raise ValueError("--scale is of a random first policy and --policy names a trained one: give one of them")
        return task, *_trained(setting.policy, task)
    if not setting.hidden or min(setting.hidden) < 1:
        raise ValueError(f"hidden needs at least one layer of at least one unit, got {list(setting.hidden)}")
    scale = 1.0 if setting.scale is None else setting.scale
    if not (np.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number of at least 0, got {scale:g}")
    key = jax.random.fold_in(jax.random.key(setting.key), 0)
    policy = Neural.init(task, hidden=setting.hidden, key=key, output_scale=OUTPUT_SCALE * scale)
    return task, policy, f"a random first policy, its last layer times {scale:g}"


def _trained(place: str, task: Task) -> tuple[Any, str]:
    """The policy that a run of `compare` or of `learn` left, and which it is."""
    folder, name, seed = parse(place)
    config = read_config(folder)
    if config.get("job") != "learn":
        saved = load_policy(place, task)
        rate = "" if saved.rate is None else f" at rate {saved.rate:g}"
        return saved.policy, f"{saved.method}{rate}, seed {saved.seed}"
    if config["task"] != task.name:
        raise ValueError(f"the policy of '{folder}' is of task '{config['task']}', not '{task.name}'")
    leader = learning_curves.leader(learning_curves.collect_curves(read_metrics(folder / "metrics.jsonl")[0]))
    name = name or (config["agents"][0] if leader is None else leader.method)
    with jax.enable_x64(bool(config["x64"])):  # what is measured is turned into both precisions
        restored = restore_agent(folder, name)
        if not 0 <= seed < len(restored.keys):
            raise ValueError(f"the run has seeds 0 to {len(restored.keys) - 1}, got {seed}")
        carry = jax.tree.map(lambda x: x[seed], restored.carry)
        policy = restored.agent.best(carry, restored.system.view)
    if is_stateful(policy):
        raise ValueError(
            f"agent '{name}' plans at every step: a policy with a memory has no gradient that could be examined"
        )
    return policy, f"{name}, seed {seed}"


def _write(writer: Writer, health: Health, seconds: float) -> None:
    """One record for each horizon, and one with the verdict."""
    found = verdict(health)
    grown = total_growth(health)
    for k, T in enumerate(health.horizons):
        row = {"kind": "health", "horizon": int(T), "state": found.states[k], "swell": grown[k]}
        for name, value in health._asdict().items():
            if name in ("horizons", "std", "where"):
                continue
            parts = value._asdict().items() if hasattr(value, "_asdict") else [(None, value)]
            row |= {name if part is None else f"{name}_{part}": x[k] for part, x in parts}
        row["contributions"] = row["contributions"][: int(T)]
        writer.write(row)
    bounds = {"batch": BATCH, "float32_bound": FLOAT32, "tail_bound": TAIL, "z_bound": least_z(len(health.horizons))}
    writer.write({"kind": "verdict", **found._asdict(), "where": health.where, "seconds": seconds, **bounds})
