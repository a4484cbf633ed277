r"""Is it better to step in the actions and let the policy imitate, or to step in the policy's parameters?

After PODS (Mora et al. 2021), every method under the same schedule of discounts:
* first-order imitation: regression onto a gradient step in the actions, $\min_d |G d + \eta g|^2$, that is
  $d = -\eta\,(G'G + \mu I)^{-1} G'g$, with the best of a path of step sizes $\eta$ by true rollouts (the natural gradient of a
  Gaussian policy with fixed noise, whose Fisher matrix is G'G up to a factor);
* second-order imitation: regression onto the planner's step, `Sigma` with a small sigma, with its path of dampings;
* Gauss-Newton on the parameters, which weighs the same regression by M: Krylov and dense;
* gradient descent and Adam on the parameters at the best of their rates, and L-BFGS.

Cost on held-out starts against updates, sequential passes over the horizon and CPU time (of all seeds together).
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffmbrl.core import restart
from diffmbrl.info import count_evaluations
from diffmbrl.methods import METHODS, solver
from diffmbrl.optimizers import Continuation, Dense, GaussNewton, Krylov, Sigma
from diffmbrl.optimizers.damped_update import damped_update
from diffmbrl.optimizers.damping import Choice, best_of, scale
from diffmbrl.report.figures import effort_axis, name_ends, style_of
from diffmbrl.rollout import mean_return
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.second_order.krylov import lanczos
from diffmbrl.tasks import make
from experiments.arms import Arm, train
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "Second-order imitation ends lower than first-order imitation in fewer updates; Gauss-Newton on the policy itself, which "
    "knows what the policy cannot express, ends at least as low as imitation of its steps; all need fewer sequential "
    "passes than first-order descent on the parameters."
)
DAMPING = 1e-3  # of the regression, relative to the largest eigenvalue of G'G


class StepSizes(eqx.Module):
    r"""A dozen step sizes along one direction, judged by their true returns; the best is taken.

    A size of 1 changes no action by more than `carry` (the trust, tenfold less when no size improves, up to 1 again later).
    """

    sizes: Float[Array, " k"] = eqx.field(default_factory=lambda: jnp.logspace(-5, 1, 12, dtype=float))

    def start(self, dtype: Any) -> Array:
        return jnp.ones((), dtype)

    def choose(self, carry: Any, space: Any, J: Any, evaluate: Any) -> tuple[Any, Choice]:
        direction, predicted = space.step(DAMPING * scale(space))
        sizes = carry * self.sizes
        choice = best_of(sizes[:, None] * direction, sizes * predicted, sizes, J, evaluate)
        return jnp.where(choice.accepted, jnp.minimum(carry * 10, 1.0), self.refuse(carry)), choice

    def refuse(self, carry: Any) -> Any:
        """The carry after a refused step."""
        return carry / 10


class GradientImitation(eqx.Module):
    """The policy regresses onto a gradient step of the actions: see the module; a solver like the others."""

    damping: StepSizes = eqx.field(default_factory=StepSizes)
    rank: int = eqx.field(static=True, default=10)

    @property
    def kind(self) -> str:
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Any) -> Any:
        return self.damping.start(jax.tree.leaves(policy)[0].dtype)

    on_objective_change = restart

    def update(self, policy: Any, carry: Any, task: Any, s0: Any, *, key: Any) -> tuple[Any, Any, Any]:
        model = gauss_newton(policy, task, s0, key)
        largest = jnp.max(jnp.abs(model.g))
        # Scaled so that the target of size 1 moves the actions by at most 1: no curvature is asked for the scale.
        target = model.pull(model.g / jnp.where(largest > 0, largest, 1.0))
        space = lanczos(lambda v: model.pull(model.push(v)), target, self.rank)
        space = space._replace(values=jnp.maximum(space.values, 0))
        steps = model.g.shape[0] * model.g.shape[-1]

        def work(candidates: int) -> Any:
            # As GaussNewton's, but products with G'G have no recursion over time.
            return count_evaluations(forward=steps * (2 + candidates), jvp=steps * (task.n + task.m), sequential=2 + 1)

        return damped_update(self.damping, policy, carry, model, space, lambda pi: mean_return(pi, task, s0, key), work)


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizon: int
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    updates: int  # of second order and of imitation
    descents: int  # of first order
    looks: int


FULL = Size(("pendulum-swingup", "cartpole-balance"), 100, 3, 32, (8, 8), 75, 450, 25)
QUICK = FULL._replace(
    tasks=FULL.tasks[:1], horizon=30, seeds=2, starts=8, hidden=(6,), updates=10, descents=30, looks=5
)


def arms(size: Size, task: Any) -> dict[str, Arm]:
    """The methods, all with the same discounts."""

    def second(inner: Any) -> Arm:
        return Arm(lambda _, steps: Continuation.discounted(inner, steps), size.updates)

    def first(name: str) -> Arm:
        row = METHODS[name]

        def made(rate: Any, steps: int) -> Any:
            return solver(row, task, rate=rate, steps=steps, continuation="discounts")

        return Arm(made, size.descents, row.rates, row.sequential)

    return {
        "imitate gradient": second(GradientImitation()),
        "imitate planner": second(GaussNewton(system=Sigma(1e-3))),
        "Gauss-Newton": second(GaussNewton(system=Krylov(10))),
        "dense G-N": second(GaussNewton(system=Dense())),
        "descent": first("sgd"),
        "Adam": first("adam"),
        "L-BFGS": first("lbfgs"),
    }


def measure(size: Size, parts: Any):
    """A training run of each method on each task."""
    numbers: dict[str, Any] = {}
    for name in size.tasks:
        numbers[name] = {}
        for label, arm in arms(size, make(name, horizon=size.horizon)).items():
            options: dict[str, Any] = {k: getattr(size, k) for k in ("horizon", "seeds", "starts", "hidden", "looks")}
            part = {"task": name, "arm": label, "updates": arm.steps, "rates": arm.rates} | options
            numbers[name][label] = parts(part, partial(train, arm, name, **options))
            yield numbers


def conclude(numbers: Any) -> str:
    """Final costs, and what they say of the expectation."""
    return " ".join(_sentence(name, runs) for name, runs in numbers.items())


def _sentence(name: str, runs: Any) -> str:
    final = {k: [float(np.median(array(run[kind])[-1])) for kind in ("test", "train")] for k, run in runs.items()}
    order = sorted(final, key=lambda label: final[label][0])
    ranked = ", ".join(
        f"{label} {final[label][0]:.3g} (training {final[label][1]:.3g}; {runs[label]['sequential'][-1]:.0f} passes, "
        f"{runs[label]['cpu'][-1]:.0f} s)"
        for label in order
    )

    def lower(a: str, b: str) -> str:
        if a not in final or b not in final:
            return f"{a} against {b} is not measured"
        return f"{a} ends {'lower' if final[a][0] < final[b][0] else 'no lower'} than {b}"

    pairs = [
        ("imitate planner", "imitate gradient"),
        ("Gauss-Newton", "imitate planner"),
        ("imitate gradient", "descent"),
        ("Gauss-Newton", "L-BFGS"),
    ]
    return f"{name}: held-out cost {ranked}. {'; '.join(lower(*pair) for pair in pairs)}."


def paint(numbers: Any) -> Any:
    """A row for each task: the held-out cost against updates, sequential passes and CPU time."""
    figure, axes = sheet(len(numbers), (0.1, 0.1, 1.35))
    heading(figure, "Steps in the actions, imitated by the policy, beside steps in its parameters")
    measures = {
        "update": "updates",
        "sequential": "sequential passes over the horizon",
        "cpu": "CPU time of all seeds [s]",
    }
    for row, (name, runs) in zip(axes, numbers.items(), strict=True):
        styles = {label: style_of(label, index=i) for i, label in enumerate(runs)}
        lines = []
        for axis, (measure_, xlabel) in zip(row, measures.items(), strict=True):
            effort_axis(axis, [np.asarray(run[measure_], float) for run in runs.values()], xlabel)
            log_limits(axis, "y", [array(run["test"]) for run in runs.values()])
            lines = [
                band(axis, styles[label], run[measure_], array(run["test"]), dashed=bool(run["rates"]))
                for label, run in runs.items()
            ]
            axis.set_ylabel("cost on held-out starts")
        title(row[0], f"{name}")
        title(row[1], "median and range over seeds")
        title(row[2], "dashed: at the best of its rates")
        name_ends(row[2], lines)
    return figure
