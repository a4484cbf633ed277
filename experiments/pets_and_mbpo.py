r"""How many real steps do PETS on its swing-up and MBPO on the inverted pendulum need, beside what is compared with them?

* The swing-up of PETS (`pets-cartpole`: episodes of 200 steps, a return of at most 200): MPC through an ensemble that is fitted
  anew after each episode, the first of random actions. "PETS": CEM over the particles of an ensemble of Gaussian networks
  (TS-infinity), with fewer samples, particles and units than its paper's, which take hours of a core. "iLQR": on the mean of an
  ensemble of deterministic networks. Drawn are the returns of the episodes from which they learn.
* The inverted pendulum (`inverted-pendulum`, at most 1000 a run): MBPO and SAC alone, as `diffmbrl learn` runs them; returns of
  the policy's mode from 8 starts.

Seconds are the process's, of one seed: fits, updates, plans and real steps, without compiling and evaluating. In float32, as
agents run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from diffmbrl.agents import Agent, learn
from diffmbrl.agents.ensemble_trainer import EnsembleTrainer
from diffmbrl.agents.mpc_agent import MPCAgent
from diffmbrl.agents.registry import make_agent as make_agent
from diffmbrl.core import Task
from diffmbrl.models import Training, TSInfinity
from diffmbrl.planners import CEM, Receding, Sampling
from diffmbrl.render.palette import MUTED
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import band, heading, sheet, title

EXPECTED = (
    "MPC through an ensemble earns above 170 of 200 within 1500 real steps on every seed, with iLQR in a fraction of the time "
    "that CEM takes; MBPO reaches the best return of the inverted pendulum in fewer real steps than SAC."
)
LEVELS = {"pets-cartpole": 170.0, "inverted-pendulum": 950.0}  # counted as solved
BEST = {"pets-cartpole": 200.0, "inverted-pendulum": 1000.0}
SHOWN = {"pets-cartpole": "PETS's swing-up", "inverted-pendulum": "inverted pendulum"}


class Size(NamedTuple):
    """How much is measured."""

    agents: tuple[str, ...]
    seeds: int
    trials: int  # episodes of the swing-up, the random one included
    horizon: int  # steps of a plan
    samples: int
    particles: int
    iterations: int  # of CEM at each step
    units: int  # of two layers of a member
    epochs: int
    length: int  # of the inverted pendulum's episodes
    steps: int  # real steps of MBPO
    alone: int  # and of SAC
    updates: int  # of SAC for the real steps between two fits, in MBPO
    evaluations: int


FULL = Size(("PETS", "iLQR", "MBPO", "SAC"), 5, 8, 25, 100, 5, 3, 64, 60, 1000, 1000, 5000, 3000, 8)
QUICK = Size(("iLQR", "MBPO"), 1, 2, 5, 8, 5, 1, 8, 2, 40, 250, 600, 5, 2)


def arms(size: Size) -> dict[str, dict[str, tuple[Callable[[Task], Agent], int]]]:
    """For each task, its arms: an agent, and how many real steps it takes."""

    def world(**fields: Any) -> EnsembleTrainer:
        training = Training(optax.adam, learning_rate=1e-3, epochs=size.epochs, batch=64)
        return EnsembleTrainer(training, members=5, elites=5, hidden=(size.units, size.units), **fields)

    def pets(task: Task) -> Agent:
        planner = Sampling(
            CEM(elites=max(2, size.samples // 10)), samples=size.samples, particles=size.particles, keep=1
        )
        return MPCAgent(
            task, planner, world=world(), propagation=TSInfinity(), window=Receding(), horizon=size.horizon,
            iterations=size.iterations, first=size.iterations, warmup=task.horizon, every=task.horizon,
        )  # fmt: skip

    def ilqr(task: Task) -> Agent:
        return MPCAgent(task, window=Receding(), horizon=size.horizon, warmup=task.horizon, every=task.horizon)

    swing = 200 * size.trials
    return {
        "pets-cartpole": {"PETS": (pets, swing), "iLQR": (ilqr, swing)},
        "inverted-pendulum": {
            "MBPO": (lambda task: make_agent("mbpo", task, {"updates": size.updates}), size.steps),
            "SAC": (lambda task: make_agent("sac", task), size.alone),
        },
    }


def measure(size: Size, parts: Any):
    """Returns and seconds of each arm, [looks, seeds], seed by seed."""
    numbers: dict[str, Any] = {}
    for name, agents in arms(size).items():
        numbers[name] = {}
        for label, (agent, steps) in agents.items():
            if label not in size.agents:
                continue
            sizes = {k: v for k, v in size._asdict().items() if k not in ("agents", "seeds")}
            part = {"task": name, "agent": label} | sizes
            each = [parts(part | {"seed": k}, partial(_one, name, agent, steps, size, k)) for k in range(size.seeds)]
            seeds = {what: np.stack([array(run[what]) for run in each], axis=1) for what in ("return", "cpu")}
            numbers[name][label] = seeds | {"steps": each[0]["steps"]}
            yield numbers


def _one(name: str, agent: Callable[[Task], Agent], steps: int, size: Size, seed: int) -> dict[str, Any]:
    """One seed alone: all seeds of a `vmap` wait for the one whose planner takes longest."""
    pets = name == "pets-cartpole"
    with jax.enable_x64(False):
        task = make(name, horizon=None if pets else size.length)
        keys = jax.random.fold_in(jax.random.key(0), seed)[None]
        found = learn(agent(task), task, keys, real_steps=steps, evaluations=0 if pets else size.evaluations)
    records = found.records
    earned = [np.nanmean(r["returns"]) if pets else np.mean(r["evaluation"]) for r in records]
    return {"steps": [r["real_steps"] for r in records], "return": earned, "cpu": [r["cpu_seconds"] for r in records]}


def conclude(numbers: Any) -> str:
    """What every arm earned, when it was there, and what it took."""
    said = []
    for name, agents in numbers.items():
        parts = []
        for label, run in agents.items():
            earned, steps, cpu = array(run["return"]), array(run["steps"]), array(run["cpu"])
            there = earned >= LEVELS[name]
            seeds = earned.shape[1]
            solved = int(there.any(axis=0).sum())
            out = f"{label} ends at {np.median(earned[-1]):.4g} ({earned[-1].min():.4g} to {earned[-1].max():.4g})"
            if solved:
                first = [int(np.argmax(there[:, k])) for k in range(seeds) if there[:, k].any()]
                out += f", above {LEVELS[name]:g} on {solved} of {seeds} seeds after {np.median(steps[first]):g} real steps"
                out += f" (at most {np.max(steps[first]):g})"
                spent = [cpu[i, k] for i, k in zip(first, np.flatnonzero(there.any(axis=0)), strict=True)]
                out += f" and {np.median(spent):.3g} s of CPU"
            else:
                out += f", above {LEVELS[name]:g} on none of {seeds} seeds"
            parts.append(f"{out}; {np.median(cpu[-1]):.3g} s in all")
        said.append(f"{SHOWN[name]}: {'. '.join(parts)}.")
    return " ".join(said)


def paint(numbers: Any) -> Any:
    """A row for each task: returns against real steps and against seconds."""
    figure, axes = sheet(len(numbers), (0.75, 0.75))
    heading(figure, "PETS and MBPO on their tasks, beside what they are compared with")
    for row, (name, agents) in zip(axes, numbers.items(), strict=True):
        styles = {label: style_of(label, index=i) for i, label in enumerate(agents)}
        for axis, what in zip(row, ("real steps", "CPU seconds of a seed"), strict=True):
            lines = []
            for label, run in agents.items():
                x = array(run["steps"]) if what == "real steps" else np.median(array(run["cpu"]), axis=1)
                lines.append(band(axis, styles[label], x, array(run["return"])))
            axis.axhline(BEST[name], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
            axis.set_xlim(left=0)
            axis.set_ylim(top=1.05 * BEST[name])
            axis.set_xlabel(what)
            axis.set_ylabel("return")
            name_ends(axis, lines)
            title(axis, SHOWN[name] + (", median and range of seeds" if what == "real steps" else ""))
    return figure
