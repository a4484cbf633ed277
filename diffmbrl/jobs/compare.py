"""Compare methods on one task, with the same starts, seeds and cost axes."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.choices import validate_choice
from diffmbrl.core import Task
from diffmbrl.devices import broadcast, check_divisible, mesh_of, to_local
from diffmbrl.jobs.batch import BatchedPlanRuns, BatchedPolicyRuns, BatchedRuns, draw_starts, shared
from diffmbrl.jobs.configs import CompareConfig, RunOptions
from diffmbrl.jobs.job import JobFunctions, start_job
from diffmbrl.jobs.policies import save_policies
from diffmbrl.jobs.table import JOBS
from diffmbrl.methods import METHODS, Method, estimated, method, schedule, solver
from diffmbrl.policies import Neural
from diffmbrl.runs import Session
from diffmbrl.solve.gradient_reach import refuse_without_gradient
from diffmbrl.solve.loop import CHUNK
from diffmbrl.tasks import TASKS, make

Write = Callable[[dict[str, Any]], None]
HELD_OUT = 256
EVALUATIONS = 30  # along a run


class ResolvedCompare(NamedTuple):
    """A comparison whose defaults are filled in and whose values are checked.

    Args:
        config: The config without open defaults.
        task: The task.
        rows: The methods by name, each estimator a row of its own.
    """

    config: CompareConfig
    task: Task
    rows: list[tuple[str, Method]]

    @property
    def notes(self) -> dict[str, Any]:
        """Further entries of `config.json`."""
        return {"held_out": HELD_OUT}


def compare_methods(config: CompareConfig, options: RunOptions | None = None) -> Path:
    """Compare methods on one task, and write a run folder with figures and report.

    Every method starts from the same policies and the same start states, which seed k draws for itself; held-out starts are
    common to all. Evaluation is not timed. All learning rates and seeds of a method run as one program.

    Args:
        config: The options of the comparison.
        options: The folder, the checkpoints and the trackers.

    Returns:
        The run folder.

    Raises:
        ValueError: If a value of the config or the folder is wrong, before anything is written.
    """
    return start_job(JOBS["compare"], config, options)


def resolve(config: CompareConfig) -> ResolvedCompare:
    """Fill in the defaults of a comparison and check its values.

    Args:
        config: The options of the comparison.

    Returns:
        The config without open defaults, its task and its methods.

    Raises:
        ValueError: If a value is wrong; the text names it.
    """
    defaults = TASKS[validate_choice("task", config.task, TASKS)]
    task = make(config.task, horizon=config.horizon, **config.parameters)
    # A line search takes no estimator, so it is not a default method where one is given.
    fitting = (name for name, row in METHODS.items() if row.default and not (config.estimators and row.sequential))
    config = replace(
        config,
        methods=config.methods or tuple(fitting),
        horizon=task.horizon,
        hidden=config.hidden or tuple(defaults.hidden),
    )
    _check_numbers(config)
    rows = [method(name) for name in config.methods]
    if len({name for name, _ in rows}) != len(rows):
        raise ValueError(f"each method can be named once, got {' '.join(config.methods)}")
    if len(set(config.estimators)) != len(config.estimators):
        raise ValueError(f"each estimator can be named once, got {' '.join(config.estimators)}")
    rows = [arm for name, row in rows for arm in estimated(name, row, config.estimators)]
    if config.estimators and not any(row.takes_estimator for _, row in rows):
        raise ValueError(
            f"--estimator {' '.join(config.estimators)} is for first-order methods of policies, such as adam; none of "
            f"{', '.join(config.methods)} takes one"
        )
    size = _parameters(task, config.hidden)
    for name, row in rows:
        if row.most_parameters is not None and size > row.most_parameters:
            raise ValueError(
                f"{name} forms matrices of P x P and takes policies of at most {row.most_parameters} parameters; hidden "
                f"{list(config.hidden)} makes {size}"
            )
        solver(row, task, rate=1.0, steps=config.steps or row.steps, continuation=config.continuation)
    if any(row.differentiates for _, row in rows):
        refuse_without_gradient(task)
    return ResolvedCompare(config, task, rows)


def _check_numbers(config: CompareConfig) -> None:
    for name, number in [("seeds", config.seeds), ("starts", config.starts)]:
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= config.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {config.key}")
    mesh_of(config.devices)
    check_divisible(config.starts, config.devices, "starts")
    if HELD_OUT % config.devices:
        fitting = [count for count in range(1, HELD_OUT + 1) if HELD_OUT % count == 0]
        nearest = min(fitting, key=lambda count: abs(count - config.devices))
        raise ValueError(f"devices must divide the {HELD_OUT} held-out starts: {nearest} do, {config.devices} do not")
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    if not config.budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {config.budget:g}")
    for rate in config.rates:
        if not (np.isfinite(rate) and rate > 0):
            raise ValueError(f"a learning rate must be a finite positive number, got {rate:g}")
    if len(set(config.rates)) != len(config.rates):
        raise ValueError(f"each learning rate can be named once, got {' '.join(f'{rate:g}' for rate in config.rates)}")
    if min(config.hidden) < 1:
        raise ValueError(f"hidden needs at least one layer of at least one unit, got {list(config.hidden)}")


def _run(resolved: ResolvedCompare, run: Session) -> None:
    for name, row in run.arms(resolved.rows):
        _run_method(name, row, resolved.task, resolved.config, run)


def _read(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config, checked to have the installed number of held-out starts."""
    if entries.get("held_out") != HELD_OUT:
        raise ValueError(f"config.json has held_out = {entries.get('held_out')}; the installed diffmbrl has {HELD_OUT}")
    return {name: x for name, x in entries.items() if name != "held_out"}


def _parameters(task: Task, hidden: tuple[int, ...]) -> int:
    """The number of parameters of a policy, without sampling one."""
    policy = jax.eval_shape(lambda key: Neural.init(task, hidden=hidden, key=key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def _run_method(name: str, row: Method, task: Task, config: CompareConfig, run: Session) -> None:
    """Run all rates and seeds of one method; record arms, evaluations, profiles, spectra and ends, and save the policies."""
    write, progress = run.write, run.progress
    rates: list[float | None] = list(config.rates or row.rates) if row.rates else [None]
    steps = config.steps or row.steps
    solvers = [solver(row, task, rate=rate, steps=steps, continuation=config.continuation) for rate in rates]
    draws = shared(draw_starts(task, config.seeds, config.starts, HELD_OUT, config.key), config.devices)
    runs: BatchedRuns = (
        BatchedPlanRuns(solvers, task, draws)
        if row.kind == "plan"
        else BatchedPolicyRuns(solvers, task, config.hidden, draws, sequential=row.sequential, draws_noise=row.draws)
    )
    progress.arm(name, steps)
    progress.update(0, "compiling")
    if (restored := run.restored) is None:
        compile_seconds = runs.compile()
        arm = {"method": name, "label": name, "order": row.order, "policy_kind": row.kind}
        if row.takes_estimator:
            arm["estimator"] = row.estimator
        for rate, made in zip(rates, solvers, strict=True):
            record = {"kind": "arm", **arm, "rate": rate, "compile_seconds": compile_seconds}
            write({**record, "parameters": runs.parameters, "continuation": schedule(made)})
        done, spent = 0, 0.0
        _write_evaluation(write, name, rates, runs, 0, 0.0)
        _write_profiles(write, name, rates, runs, "start")
    else:
        runs.restore(run)
        runs.compile()  # outside the time of the updates
        done, spent = restored["done"], restored["spent"]
    every = max(1, min(CHUNK, -(-steps // EVALUATIONS)))
    while done < steps and (done == 0 or spent < config.budget):
        begun = time.perf_counter()
        runs.advance(done, min(every, steps - done))
        spent = broadcast(spent + time.perf_counter() - begun)
        done += min(every, steps - done)
        train = _write_evaluation(write, name, rates, runs, done, spent)
        progress.update(done, f"return {np.max(train):.4g}, {spent:.1f} s")
        run.save(runs.state, done=done, spent=spent)
    stop = f"{steps} updates" if done >= steps else f"budget of {config.budget:g} s after {done} of {steps} updates"
    _write_profiles(write, name, rates, runs, "end")
    if isinstance(runs, BatchedPolicyRuns):
        save_policies(run.folder, name, to_local(runs.policies), rates=rates, seeds=config.seeds)
    for index, rate in enumerate(rates):
        if (path := runs.path(index)) is not None:
            write({"kind": "path", "method": name, "rate": rate, **path})
        where = runs.broken(index)
        reason = stop if where is None else f"nonfinite: {where}; the others: {stop}"
        write({"kind": "stop", "method": name, "rate": rate, "reason": reason})


def _write_evaluation(
    write: Write, name: str, rates: list[float | None], runs: BatchedRuns, done: int, spent: float
) -> np.ndarray:
    """Write one record for each rate, and return the mean training return of each."""
    evaluation = runs.evaluate()
    for index, rate in enumerate(rates):
        fields = {key: np.asarray(values[index]).tolist() for key, values in evaluation.items()}
        head = {"kind": "eval", "method": name, "rate": rate, "update": done, "seconds": spent}
        write({**head, "lanes": runs.count, **fields})
    return np.mean(np.nan_to_num(evaluation["train"], nan=-np.inf), axis=1)


def _write_profiles(write: Write, name: str, rates: list[float | None], runs: BatchedRuns, when: str) -> None:
    """Write |dJ/da_t| and the spectrum of each rate; at the start they are equal for all rates."""
    distinct = range(len(rates)) if when == "end" else [0]
    found = [(runs.profile(index).tolist(), runs.spectrum(index).tolist()) for index in distinct]
    for index, rate in enumerate(rates):
        profile, spectrum = found[index if when == "end" else 0]
        head = {"method": name, "rate": rate, "when": when}
        write({"kind": "gradient_profile", **head, "values": profile})
        write({"kind": "spectrum", **head, "values": spectrum})


FUNCTIONS = JobFunctions(resolve, lambda resolved: len(resolved.rows), _run, _read)
