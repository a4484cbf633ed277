"""Resolve the options of a plan or a controller into model, plant and planner."""

import inspect
from dataclasses import replace
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from diffmbrl.choices import validate_choice
from diffmbrl.core import Planner, Solver, State, Task
from diffmbrl.devices import check_divisible, mesh_of
from diffmbrl.jobs.configs import PlanConfig
from diffmbrl.methods import METHODS, solver
from diffmbrl.planners import Sampling
from diffmbrl.tasks import TASKS, delayed, make, noisy

WINDOW = 50  # steps that an MPC plans ahead by default
FIRST = 50  # updates in the first step of its episodes


class ResolvedPlan(NamedTuple):
    """A planning job whose defaults are filled in and whose values are checked.

    Args:
        config: The config without open defaults.
        model: The planner's task.
        plant: The task with the real dynamics.
        solver: The planner.
        horizon: Time steps that the planner plans ahead.
        iterations: Updates of the plan, or of a controller in each step.
        mesh: The devices.
    """

    config: PlanConfig
    model: Task
    plant: Task
    solver: Planner
    horizon: int
    iterations: int
    mesh: Mesh

    @property
    def notes(self) -> dict[str, Any]:
        """Further entries of `config.json`: the steps of an episode, and whether plant and model differ."""
        config = self.config
        return {"steps": self.plant.horizon, "differs": bool(config.mismatch or config.noise or config.delay)}


def read_plan_config(entries: dict[str, Any]) -> dict[str, Any]:
    """Remove the notes from the entries of `config.json`.

    Args:
        entries: The entries.

    Returns:
        Those of the config.
    """
    own = {name: x for name, x in entries.items() if name != "differs"}
    return own if own.get("mpc") else own | {"steps": None}


def resolve(config: PlanConfig) -> ResolvedPlan:
    """Fill in the defaults of a planning job and check its values.

    Args:
        config: The options of the plan.

    Returns:
        The config without open defaults, the model, the plant and the planner.

    Raises:
        ValueError: If a value is wrong; the text names it.
    """
    planners = {name: row for name, row in METHODS.items() if row.kind == "plan"}
    row = planners[validate_choice("planner", planner_name(config), planners)]
    for name, number in [("starts", config.starts), ("iterations", config.iterations), ("steps", config.steps)]:
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= config.key < 2**32:
        raise ValueError(f"key must be a whole number from 0 to {2**32 - 1}, got {config.key}")
    if not config.mpc:
        for name, given in [("steps", config.steps is not None), ("delay", config.delay != 0)]:
            if given:
                raise ValueError(f"--{name} is for a controller: give --mpc too")
    if config.delay < 0:
        raise ValueError(f"delay must be at least 0 steps, got {config.delay}")
    mesh, length = mesh_of(config.devices), config.steps if config.mpc else config.horizon
    model = make(config.task, horizon=length, **config.parameters)
    plant = noisy(_plant(config, model), std=config.noise)
    if config.delay:
        plant = delayed(plant, steps=config.delay)
    if config.mpc:
        # The window's own horizon: a continuation grows to it within the first step of an episode, and then stays there.
        horizon = min(WINDOW, model.horizon) if config.horizon is None else config.horizon
        iterations = 1 if config.iterations is None else config.iterations
        window = make(config.task, horizon=horizon, **config.parameters)
        made = solver(row, window, rate=None, steps=FIRST, continuation="default")
    else:
        horizon = model.horizon
        iterations = row.steps if config.iterations is None else config.iterations
        made = solver(row, model, rate=None, steps=iterations, continuation="default")
    steps = plant.horizon if config.mpc else None
    config = replace(config, horizon=horizon, steps=steps, iterations=iterations)
    return ResolvedPlan(config, model, plant, cast(Planner, _divided(made, config, mesh)), horizon, iterations, mesh)


def _divided(made: Solver, config: PlanConfig, mesh: Mesh) -> Solver:
    """The planner on all devices: they share the samples of a sampling planner, otherwise a controller's starts."""
    if mesh.size == 1:
        return made
    if isinstance(made, Sampling):
        return replace(made, mesh=mesh)
    if not config.mpc:
        drawing = ", ".join(name for name, row in METHODS.items() if row.kind == "plan" and row.order == 0)
        raise ValueError(
            f"{planner_name(config)} plans from one start after another, on one device, got {mesh.size}: devices share the "
            f"samples of {drawing}, the starts of a controller (--mpc), or those of `diffmbrl compare {config.task} --methods "
            f"{planner_name(config)}`"
        )
    check_divisible(config.starts, mesh.size, "starts")
    return made


def _plant(config: PlanConfig, model: Task) -> Task:
    """The model's task with the dynamics of the mismatched parameters."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(TASKS[config.task].make).parameters.items()
        if name != "horizon" and isinstance(parameter.default, (int, float))
    }
    values: dict[str, Any] = defaults | config.parameters
    if config.mismatch and not defaults:
        raise ValueError(f"task '{config.task}' has no physical parameters to mismatch")
    for name, factor in config.mismatch.items():
        validate_choice(f"parameter of task '{config.task}'", name, defaults)
        if not (np.isfinite(factor) and factor > 0):
            raise ValueError(f"the mismatch of {name} must be a finite positive factor, got {factor:g}")
        values[name] *= factor
    other = make(config.task, horizon=model.horizon, **values)
    return eqx.tree_at(lambda t: t.dynamics, model, other.dynamics)


def start_states(config: PlanConfig, model: Task) -> State:
    """Draw the start states.

    Args:
        config: The options of the plan.
        model: The planner's task.

    Returns:
        States with a leading axis of starts.
    """
    return model.starts(jax.random.fold_in(jax.random.key(config.key), 0), config.starts)


def keys_of(config: PlanConfig) -> tuple[Key[Array, ""], Key[Array, " starts"]]:
    """Split the random keys.

    Args:
        config: The options of the plan.

    Returns:
        One key for the planner's samples, and one for the plant's noise from each start.
    """
    root = jax.random.key(config.key)
    return jax.random.fold_in(root, 1), jax.random.split(jax.random.fold_in(root, 2), config.starts)


def planner_name(config: PlanConfig) -> str:
    """The planner's name with hyphens.

    Args:
        config: The options of the plan.

    Returns:
        Its name in the table of methods.
    """
    return config.planner.replace("_", "-")
