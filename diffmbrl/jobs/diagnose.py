"""Measure the health of a policy's gradient at each horizon (`diffmbrl diagnose`)."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from diffmbrl.choices import validate_choice
from diffmbrl.core import Policy, Task, is_stateful
from diffmbrl.diagnostics.health import Health, check_health_arguments, gradient_health
from diffmbrl.diagnostics.verdict import BATCH, FLOAT32, TAIL, least_z, total_growth, verdict
from diffmbrl.jobs.configs import DiagnoseConfig, RunOptions
from diffmbrl.jobs.job import JobFunctions, Records, start_job
from diffmbrl.jobs.learn import restore_agent
from diffmbrl.jobs.policies import load_policy, parse
from diffmbrl.jobs.table import JOBS
from diffmbrl.policies import Neural
from diffmbrl.report import learning_curves
from diffmbrl.runs import read_config, read_metrics
from diffmbrl.tasks import TASKS, make

OUTPUT_SCALE = 0.1  # of a random initial policy's last layer


class ResolvedDiagnose(NamedTuple):
    """A diagnosis whose defaults are filled in and whose values are checked.

    Args:
        config: The config without open defaults.
        task: The task with the longest horizon.
        policy: The policy.
        origin: Which policy it is, in words.
    """

    config: DiagnoseConfig
    task: Task
    policy: Policy
    origin: str

    @property
    def notes(self) -> dict[str, Any]:
        """Further entries of `config.json`."""
        return {"seeds": None, "of": self.origin}


def diagnose_gradient(config: DiagnoseConfig, options: RunOptions | None = None) -> Path:
    """Measure the health of a policy's gradient at each horizon, and write a run folder with verdict, figures and report.

    Args:
        config: The options of the diagnosis.
        options: The folder.

    Returns:
        The run folder.

    Raises:
        ValueError: If a value of the config or the folder is wrong, before anything is written.
    """
    return start_job(JOBS["diagnose"], config, options)


def resolve(config: DiagnoseConfig) -> ResolvedDiagnose:
    """Fill in the defaults of a diagnosis and check its values.

    Args:
        config: The options of the diagnosis.

    Returns:
        The config without open defaults, the task of the longest horizon and the policy.

    Raises:
        ValueError: If a value is wrong; the text names it.
    """
    defaults = TASKS[validate_choice("task", config.task, TASKS)]
    if config.policy is not None and config.hidden:
        raise ValueError("--hidden is for a random initial policy and --policy names a trained one: give one of them")
    config = replace(config, hidden=config.hidden or tuple(defaults.hidden))
    check_health_arguments(max(config.horizons, default=0), config.horizons, config.starts, config.std)
    task = make(config.task, horizon=int(config.horizons[-1]), **config.parameters)
    if not 0 <= config.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {config.key}")
    if config.policy is not None:
        if config.scale is not None:
            raise ValueError(
                "--scale is for a random initial policy and --policy names a trained one: give one of them"
            )
        return ResolvedDiagnose(config, task, *_trained(config.policy, task))
    if min(config.hidden) < 1:
        raise ValueError(f"hidden needs at least one layer of at least one unit, got {list(config.hidden)}")
    scale = 1.0 if config.scale is None else config.scale
    if not (np.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number of at least 0, got {scale:g}")
    key = jax.random.fold_in(jax.random.key(config.key), 0)
    policy = Neural.init(task, hidden=config.hidden, key=key, output_scale=OUTPUT_SCALE * scale)
    return ResolvedDiagnose(config, task, policy, f"a random first policy, its last layer times {scale:g}")


def _run(resolved: ResolvedDiagnose, run: Records) -> None:
    config, task, policy, _ = resolved
    run.progress.arm("gradient health", len(config.horizons))
    run.progress.update(0, "compiling")
    begun = time.perf_counter()

    def seen(count: int) -> None:
        run.progress.update(count, f"T = {config.horizons[count - 1]}, {time.perf_counter() - begun:.1f} s")

    key = jax.random.fold_in(jax.random.key(config.key), 1)
    health = gradient_health(
        task, policy, config.horizons, key=key, starts=config.starts, std=config.std, progress=seen
    )
    _write(run.write, health, time.perf_counter() - begun)


def _trained(place: str, task: Task) -> tuple[Policy, str]:
    """The policy of a run of `compare`, `learn` or `race`, and its description."""
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
    with jax.enable_x64(bool(config["x64"])):  # the measurement converts it to both precisions
        restored = restore_agent(folder, name)
        if not 0 <= seed < len(restored.keys):
            raise ValueError(f"the run has seeds 0 to {len(restored.keys) - 1}, got {seed}")
        carry = jax.tree.map(lambda x: x[seed], restored.carry)
        policy = restored.agent.best(carry, restored.system.view)
    if not isinstance(policy, Policy) or is_stateful(policy):
        raise ValueError(f"agent '{name}' plans at every step: the gradient of a stateful policy cannot be measured")
    return cast(Policy, policy), f"{name}, seed {seed}"


def _write(write: Callable[[dict[str, Any]], None], health: Health, seconds: float) -> None:
    """Write one record for each horizon, and one with the verdict."""
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
        write(row)
    bounds = {"batch": BATCH, "float32_bound": FLOAT32, "tail_bound": TAIL, "z_bound": least_z(len(health.horizons))}
    write({"kind": "verdict", **found._asdict(), "where": health.where, "seconds": seconds, **bounds})


FUNCTIONS = JobFunctions(resolve, lambda resolved: 1, _run)
