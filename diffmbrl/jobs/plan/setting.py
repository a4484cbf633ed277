"""What a plan or a controller depends on, and what that means: model, plant and planner."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh

from diffmbrl.choices import validate_choice
from diffmbrl.core import State, Task
from diffmbrl.devices import check_divisible, mesh_of
from diffmbrl.methods import METHODS, solver
from diffmbrl.planners import Sampling
from diffmbrl.tasks import TASKS, delayed, make, noisy

WINDOW = 50  # steps that an MPC plans ahead by default
FIRST = 50  # updates in the first step of its episodes


class PlanConfig(NamedTuple):
    """Everything that a run depends on: its config."""

    task: str
    planner: str
    mpc: bool
    horizon: int | None  # of the plan: the task's own, or for an MPC its window
    steps: int | None  # of an MPC's episode
    iterations: int | None  # updates of the plan, or in each step of an MPC
    parameters: dict[str, float | str]  # numbers, and words such as a backend
    mismatch: dict[str, float]  # factors on the plant's parameters
    noise: float
    delay: int
    starts: int
    key: int
    x64: bool
    devices: int = 1  # that a population's samples are shared out among, or else a controller's starts


class ResolvedPlan(NamedTuple):
    """What a setting means."""

    model: Task
    plant: Task
    solver: Any
    horizon: int
    iterations: int
    mesh: Mesh


def prepare(setting: PlanConfig) -> ResolvedPlan:
    """Model, plant and planner, everything checked.

    Raises: `ValueError` naming the value that is wrong.
    """
    planners = {name: row for name, row in METHODS.items() if row.kind == "plan"}
    row = planners[validate_choice("planner", setting.planner.replace("_", "-"), planners)]
    for name, number in [("starts", setting.starts), ("iterations", setting.iterations), ("steps", setting.steps)]:
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= setting.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {setting.key}")
    if not setting.mpc:
        for name, given in [("steps", setting.steps is not None), ("delay", setting.delay != 0)]:
            if given:
                raise ValueError(f"--{name} is for a controller: give --mpc too")
    if setting.delay < 0:
        raise ValueError(f"delay must be at least 0 steps, got {setting.delay}")
    mesh, length = mesh_of(setting.devices), setting.steps if setting.mpc else setting.horizon
    model = make(setting.task, horizon=length, **setting.parameters)
    plant = noisy(_plant(setting, model), std=setting.noise)
    if setting.delay:
        plant = delayed(plant, steps=setting.delay)
    if not setting.mpc:
        iterations = row.steps if setting.iterations is None else setting.iterations
        made = solver(row, model, rate=None, steps=iterations, continuation="default")
        return ResolvedPlan(model, plant, _divided(made, setting, mesh), model.horizon, iterations, mesh)
    # Of the window's horizon: a continuation grows to that, within the first step, and then stays.
    H = min(WINDOW, model.horizon) if setting.horizon is None else setting.horizon
    window = make(setting.task, horizon=H, **setting.parameters)
    made = solver(row, window, rate=None, steps=FIRST, continuation="default")
    iterations = 1 if setting.iterations is None else setting.iterations
    return ResolvedPlan(model, plant, _divided(made, setting, mesh), H, iterations, mesh)


def _divided(made: Any, setting: PlanConfig, mesh: Mesh) -> Any:
    """The planner, whose samples the devices share if it draws any; of another they share a controller's starts."""
    if mesh.size == 1:
        return made
    if isinstance(made, Sampling):
        return dataclasses.replace(made, mesh=mesh)
    if not setting.mpc:
        drawing = ", ".join(name for name, row in METHODS.items() if row.kind == "plan" and row.order == 0)
        raise ValueError(
            f"{planner_name(setting)} plans from one start after another, on one device, got {mesh.size}: devices share the "
            f"samples of {drawing}, the starts of a controller (--mpc), or those of `diffmbrl compare {setting.task} --methods "
            f"{planner_name(setting)}`"
        )
    check_divisible(setting.starts, mesh.size, "starts")
    return made


def _plant(setting: PlanConfig, model: Task) -> Task:
    """The same task with dynamics whose parameters are so many times the model's."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(TASKS[setting.task].make).parameters.items()
        if name != "horizon" and isinstance(parameter.default, (int, float))
    }
    values: dict[str, Any] = defaults | setting.parameters
    if setting.mismatch and not defaults:
        raise ValueError(f"task '{setting.task}' has no physical parameters to mismatch")
    for name, factor in setting.mismatch.items():
        validate_choice(f"parameter of task '{setting.task}'", name, defaults)
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"the mismatch of {name} must be a finite positive factor, got {factor:g}")
        values[name] *= factor
    other = make(setting.task, horizon=model.horizon, **values)
    return eqx.tree_at(lambda t: t.dynamics, model, other.dynamics)


def start_states(setting: PlanConfig, model: Task) -> State:
    return model.starts(jax.random.fold_in(jax.random.key(setting.key), 0), setting.starts)


def keys_of(setting: PlanConfig) -> Any:
    """One for the planner's draws, one for the plant's noise of each start."""
    root = jax.random.key(setting.key)
    return jax.random.fold_in(root, 1), jax.random.split(jax.random.fold_in(root, 2), setting.starts)


def planner_name(setting: PlanConfig) -> str:
    return setting.planner.replace("_", "-")
