"""The main job: methods side by side on one task, the same starts, seeds and cost axes."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffmbrl.core import Task
from diffmbrl.devices import broadcast, check_divisible, mesh_of, to_local
from diffmbrl.jobs.batch import BatchedPlanRuns, BatchedPolicyRuns, BatchedRuns, draw_starts, shared
from diffmbrl.jobs.policies import save_policies
from diffmbrl.methods import Method, estimated, method, schedule, solver
from diffmbrl.policies import Neural
from diffmbrl.report import rebuild
from diffmbrl.runs import EVERY, Session, check_out, check_sinks, config_from_json, create, underway
from diffmbrl.solve.gradient_reach import refuse_without_gradient
from diffmbrl.solve.loop import CHUNK
from diffmbrl.tasks import make

HELD_OUT = 256
LOOKS = 30  # evaluations along a run


class CompareConfig(NamedTuple):
    """Everything that a comparison depends on, and nothing else: the run's config."""

    task: str
    methods: tuple[str, ...]
    horizon: int
    parameters: dict[str, float | str]  # numbers, and words such as a backend
    hidden: tuple[int, ...]
    seeds: int
    starts: int
    steps: int | None
    budget: float
    rates: tuple[float, ...]
    continuation: str
    x64: bool
    key: int
    estimators: tuple[str, ...] = ()
    devices: int = 1  # that the starts are shared out among


def compare(
    setting: CompareConfig,
    *,
    out: Path | None = None,
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
) -> Path:
    """Run the comparison and return its run folder, with figures and report.

    Every method starts from the same policies and sees the same starts; seed k has its own of both. Held-out starts are common
    to all. Evaluation is not timed. A method with a learning rate runs all its rates and seeds as lanes of one program.
    A checkpoint is written `every` so many seconds and at the end.

    Raises: `ValueError` for anything wrong in the setting or the folder, before anything is written.
    """
    check_sinks(track)
    task, rows = prepare(setting)
    check_out(out)
    folder = create(out, setting.task, "compare", setting._asdict() | {"held_out": HELD_OUT})
    return _run(setting, task, rows, folder, stream=stream, every=every, track=track)


def resume(
    folder: Path,
    config: dict[str, Any],
    *,
    stream: Any = None,
    every: float = EVERY,
    track: Sequence[str] = (),
) -> Path:
    """Go on with a comparison from its newest checkpoint, to the same numbers.

    Raises: `ValueError` if its config or its checkpoints do not fit.
    """
    setting = config_from_json(CompareConfig, config, besides={"held_out"})
    if config.get("held_out") != HELD_OUT:
        raise ValueError(f"config.json has held_out = {config.get('held_out')}; the installed diffmbrl has {HELD_OUT}")
    return _run(setting, *prepare(setting), folder, stream=stream, every=every, track=track, resumed=True)


def _run(setting: CompareConfig, task: Task, rows: list[tuple[str, Method]], folder: Path, **options: Any) -> Path:
    with underway(folder, len(rows), report=rebuild, **options) as run:
        for name, row in run.arms(rows):
            _run_method(name, row, task, setting, run)
    return folder


def prepare(setting: CompareConfig) -> tuple[Task, list[tuple[str, Method]]]:
    """The task and the methods' rows, everything checked.

    Raises: `ValueError` naming the value that is wrong.
    """
    task = make(setting.task, horizon=setting.horizon, **setting.parameters)
    for what, number in [("seeds", setting.seeds), ("starts", setting.starts)]:
        if number < 1:
            raise ValueError(f"{what} must be at least 1, got {number}")
    if not 0 <= setting.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {setting.key}")
    mesh_of(setting.devices)
    check_divisible(setting.starts, setting.devices, "starts")
    if HELD_OUT % setting.devices:
        fitting = [count for count in range(1, HELD_OUT + 1) if HELD_OUT % count == 0]
        nearest = min(fitting, key=lambda count: abs(count - setting.devices))
        raise ValueError(f"devices must divide the {HELD_OUT} held-out starts: {nearest} do, {setting.devices} do not")
    if setting.steps is not None and setting.steps < 1:
        raise ValueError(f"steps must be at least 1, got {setting.steps}")
    if not setting.budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {setting.budget:g}")
    for rate in setting.rates:
        if not (np.isfinite(rate) and rate > 0):
            raise ValueError(f"a learning rate must be a finite positive number, got {rate:g}")
    if len(set(setting.rates)) != len(setting.rates):
        raise ValueError(f"each learning rate can be named once, got {' '.join(f'{rate:g}' for rate in setting.rates)}")
    if not setting.hidden or min(setting.hidden) < 1:
        raise ValueError(f"hidden needs at least one layer of at least one unit, got {list(setting.hidden)}")
    rows = [method(name) for name in setting.methods]
    if len({name for name, _ in rows}) != len(rows):
        raise ValueError(f"each method can be named once, got {' '.join(setting.methods)}")
    if len(set(setting.estimators)) != len(setting.estimators):
        raise ValueError(f"each estimator can be named once, got {' '.join(setting.estimators)}")
    rows = [arm for name, row in rows for arm in estimated(name, row, setting.estimators)]
    if setting.estimators and not any(row.takes_estimator for _, row in rows):
        raise ValueError(
            f"--estimator {' '.join(setting.estimators)} is for first-order methods of policies, such as adam; none of "
            f"{', '.join(setting.methods)} takes one"
        )
    size = _parameters(task, setting.hidden)
    for name, row in rows:
        if row.most_parameters is not None and size > row.most_parameters:
            raise ValueError(
                f"{name} forms matrices of P x P and takes policies of at most {row.most_parameters} parameters; hidden "
                f"{list(setting.hidden)} makes {size}"
            )
        solver(row, task, rate=1.0, steps=setting.steps or row.steps, continuation=setting.continuation)
    if any(row.differentiates for _, row in rows):
        refuse_without_gradient(task)
    return task, rows


def _parameters(task: Task, hidden: tuple[int, ...]) -> int:
    """The number of a policy's parameters, without drawing it."""
    policy = jax.eval_shape(lambda key: Neural.init(task, hidden=hidden, key=key), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(policy))


def _run_method(name: str, row: Method, task: Task, setting: CompareConfig, run: Session) -> None:
    """One method, all its rates and seeds: records of arms, evaluations, profiles, spectra and why each ended; its policies."""
    write, progress = run.write, run.progress
    rates: list[float | None] = list(setting.rates or row.rates) if row.rates else [None]
    steps = setting.steps or row.steps
    solvers = [solver(row, task, rate=rate, steps=steps, continuation=setting.continuation) for rate in rates]
    draws = shared(draw_starts(task, setting.seeds, setting.starts, HELD_OUT, setting.key), setting.devices)
    lanes: BatchedRuns = (
        BatchedPlanRuns(solvers, task, draws)
        if row.kind == "plan"
        else BatchedPolicyRuns(solvers, task, setting.hidden, draws, sequential=row.sequential, draws_noise=row.draws)
    )
    progress.arm(name, steps)
    progress.update(0, "compiling")
    if (kept := run.restored) is None:
        compile_seconds = lanes.compile()
        arm = {"method": name, "label": name, "order": row.order, "policy_kind": row.kind}
        if row.takes_estimator:
            arm["estimator"] = row.estimator
        for rate, made in zip(rates, solvers, strict=True):
            record = {"kind": "arm", **arm, "rate": rate, "compile_seconds": compile_seconds}
            write({**record, "parameters": lanes.parameters, "continuation": schedule(made)})
        done, spent = 0, 0.0
        _write_evaluation(write, name, rates, lanes, 0, 0.0)
        _write_profiles(write, name, rates, lanes, "start")
    else:
        lanes.restore(run)
        lanes.compile()  # apart from the time of the updates
        done, spent = kept["done"], kept["spent"]
    every = max(1, min(CHUNK, -(-steps // LOOKS)))
    while done < steps and (done == 0 or spent < setting.budget):
        begun = time.perf_counter()
        lanes.advance(done, min(every, steps - done))
        spent = broadcast(spent + time.perf_counter() - begun)
        done += min(every, steps - done)
        train = _write_evaluation(write, name, rates, lanes, done, spent)
        progress.update(done, f"return {np.max(train):.4g}, {spent:.1f} s")
        run.save(lanes.state, done=done, spent=spent)
    stop = f"{steps} updates" if done >= steps else f"budget of {setting.budget:g} s after {done} of {steps} updates"
    _write_profiles(write, name, rates, lanes, "end")
    if isinstance(lanes, BatchedPolicyRuns):
        save_policies(run.folder, name, to_local(lanes.policies), rates=rates, seeds=setting.seeds)
    for index, rate in enumerate(rates):
        if (path := lanes.path(index)) is not None:
            write({"kind": "path", "method": name, "rate": rate, **path})
        where = lanes.broken(index)
        reason = stop if where is None else f"nonfinite: {where}; the others: {stop}"
        write({"kind": "stop", "method": name, "rate": rate, "reason": reason})


def _write_evaluation(write, name: str, rates: list, lanes: BatchedRuns, done: int, spent: float) -> np.ndarray:
    """One record for each rate; returns the mean training return of each."""
    evaluation = lanes.evaluate()
    for index, rate in enumerate(rates):
        fields = {key: np.asarray(values[index]).tolist() for key, values in evaluation.items()}
        head = {"kind": "eval", "method": name, "rate": rate, "update": done, "seconds": spent}
        write({**head, "lanes": lanes.count, **fields})
    return np.mean(np.nan_to_num(evaluation["train"], nan=-np.inf), axis=1)


def _write_profiles(write, name: str, rates: list, lanes: BatchedRuns, when: str) -> None:
    """|dJ/da_t| and the spectrum of each rate; at the start they are the same for all."""
    distinct = range(len(rates)) if when == "end" else [0]
    found = [(lanes.profile(index).tolist(), lanes.spectrum(index).tolist()) for index in distinct]
    for index, rate in enumerate(rates):
        profile, spectrum = found[index if when == "end" else 0]
        head = {"method": name, "rate": rate, "when": when}
        write({"kind": "gradient_profile", **head, "values": profile})
        write({"kind": "spectrum", **head, "values": spectrum})
