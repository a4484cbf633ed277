r"""Which contact models have derivatives with the right sign?

A ball at q_0 comes down at 1 m/s and shall be at 1 m after 2 s: the loss is |q_T - 1|. Without gravity $q_T = |q_0 - 2|$ if
it bounces ideally; on a spring and a damper, a = -v - 50 q below the ground, $q_T = e^{-\tau/2}(2 - \tau - q_0)$ with the
time of contact $\tau = \pi/\sqrt{50 - 1/4}$, and what a damped oscillation says while it touches.

For each model and time step: automatic differentiation with respect to q_0, a central difference over 1e-6 m, which is the
same where neither straddles a jump, one over .1 m, and the exact slope of the model itself. Set-up of Paulus et al. 2025,
Hard Contacts with Soft Gradients, section 3. `tests/test_contact.py` has gravity as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Task
from diffmbrl.policies import OpenLoop
from diffmbrl.report.figures import Series, name_ends, style_of
from diffmbrl.rollout import episode_return
from diffmbrl.tasks import bouncing, bouncing_on_the_grid, bouncing_penalty
from experiments.record import array
from experiments.sheet import heading, sheet, title

EXPECTED = (
    "With impacts on the grid of time steps the derivative has the wrong sign after a bounce, at every step, while differences "
    "over a distance are right; the penalty's is wrong at the coarse step and right at the fine one; with the time of impact "
    "it is right at any step."
)
GRID, SPRING, IMPACT = "on the grid", "penalty", "time of impact"
MODELS = {GRID: bouncing_on_the_grid, SPRING: bouncing_penalty, IMPACT: bouncing}
STYLES = {name: style_of(name, index=(1, 2, 0)[i]) for i, name in enumerate(MODELS)}
TRUE = style_of("exact", index=6)._replace(colour="#6a737d")
WIDE, NARROW, SPAN = 0.05, 5e-7, 2.0  # half the distance of a central difference [m]; seconds


class Size(NamedTuple):
    """How much is measured."""

    starts: int
    steps: tuple[float, ...]  # seconds


FULL = Size(600, (0.1, 0.001))
QUICK = FULL._replace(starts=120, steps=(0.1, 0.01))


def measure(size: Size, parts: Any):
    """Losses and slopes for every model and step."""
    # Off the grid: at multiples of the step an impact falls on it.
    q = (np.arange(size.starts) + 0.37) * 3 / size.starts
    numbers: dict[str, Any] = {"q": q, "models": {}}
    for name, make in MODELS.items():
        final = settled if name == SPRING else lambda q: np.abs(q - SPAN)
        numbers["models"][name] = {"loss": np.abs(final(q) - 1), "slope": _slope(final, q)}
        for dt in size.steps:
            task = make(horizon=round(SPAN / dt), dt=dt)
            key = {"model": name, "dt": dt, "starts": size.starts}
            numbers["models"][name][f"{dt:g}"] = parts(key, lambda task=task: _measure(task, q))
        yield numbers


def settled(q: np.ndarray) -> np.ndarray:
    """q_T of the ball on a spring and a damper."""
    omega = np.sqrt(50 - 0.25)
    tau = np.pi / omega
    touching = np.clip(SPAN - q, 0, tau)
    below = -np.exp(-touching / 2) * np.sin(omega * touching) / omega
    return np.where(q > SPAN, q - SPAN, np.where(SPAN - q < tau, below, np.exp(-tau / 2) * (SPAN - tau - q)))


def _slope(final: Any, q: np.ndarray) -> np.ndarray:
    """Of the loss |q_T - 1|, exact but for a difference over 2e-7 m of a closed form."""
    loss = lambda x: np.abs(final(x) - 1)  # noqa: E731
    return (loss(q + 1e-7) - loss(q - 1e-7)) / 2e-7


def _measure(task: Task, q: np.ndarray) -> dict[str, Any]:
    plan = OpenLoop.zeros(task)

    def loss(q):
        return -episode_return(plan, task, jnp.stack([q, -jnp.ones_like(q)]), remat=None)

    def all_of(q):
        across = [(loss(q + d) - loss(q - d)) / (2 * d) for d in (WIDE, NARROW)]
        return loss(q), jax.grad(loss)(q), *across

    found = [np.asarray(x) for x in jax.jit(jax.vmap(all_of))(jnp.asarray(q))]
    return dict(zip(("loss", "autodiff", "wide", "narrow"), found, strict=True))


def _agreement(found: Any, slope: np.ndarray) -> dict[str, float]:
    """Shares of starts at which the sign is right, and of those at which autodiff is the narrow difference."""
    clear = np.abs(slope) > 1e-3
    share = {
        key: float(np.mean(np.sign(array(found[key]))[clear] == np.sign(slope)[clear])) for key in ("autodiff", "wide")
    }
    share["median error"] = float(np.median(np.abs(array(found["autodiff"]) - slope)))
    share["narrow"] = float(np.mean(np.abs(array(found["autodiff"]) - array(found["narrow"])) < 1e-3))
    return share


def conclude(numbers: Any) -> str:
    """For each model and step: how often autodiff and a difference over .1 m have the sign of the exact slope."""
    said = []
    for name, model in numbers["models"].items():
        slope = array(model["slope"])
        for dt in _steps(model):
            found = _agreement(model[dt], slope)
            said.append(
                f"{name}, h = {dt}: {found['autodiff']:.0%} of signs right (median error {found['median error']:.2g}), by "
                f"differences over {2 * WIDE:g} m {found['wide']:.0%}; autodiff is the difference over {2 * NARROW:g} m at "
                f"{found['narrow']:.0%}."
            )
    return (
        "Slopes of the loss against the exact ones of each model. "
        + " ".join(said)
        + " So the derivatives are those of the "
        "program; where a step's impact is put on the grid the program is a saw whose teeth have the wrong slope."
    )


def _steps(model: Any) -> list[str]:
    return [key for key in model if key not in ("loss", "slope")]


def paint(numbers: Any) -> Any:
    """A row for each step: the loss, and its slope by autodiff, for every model."""
    models = numbers["models"]
    steps = _steps(next(iter(models.values())))
    figure, axes = sheet(len(models), (0.25,) * (len(steps)) + (1.2,) * len(steps))
    heading(figure, "A bouncing ball: loss, and its slope in the start's height")
    q = array(numbers["q"])
    for row, (name, model) in zip(axes, models.items(), strict=True):
        for i, dt in enumerate(steps):
            loss, slope = row[i], row[len(steps) + i]
            loss.plot(q, array(model["loss"]), color=TRUE.colour, linewidth=1)
            loss.plot(q, array(model[dt]["loss"]), ".", markersize=2, color=STYLES[name].colour)
            slope.plot(q, array(model["slope"]), color=TRUE.colour, linewidth=1)
            slope.plot(q, array(model[dt]["wide"]), color="#e69f00", linewidth=0.8)
            slope.plot(q, array(model[dt]["autodiff"]), ".", markersize=2.5, color=STYLES[name].colour)
            slope.set_ylim(-2.5, 2.5)
            title(loss, f"{name}, h = {dt}: loss")
            title(slope, f"{name}, h = {dt}: slope")
            for axis in (loss, slope):
                axis.set_xlabel("start [m]")
            ends = [
                Series(TRUE, q, array(model["slope"])),
                Series(style_of("over .1 m", index=4), q, np.clip(array(model[dt]["wide"]), -2.5, 2.5)),
                Series(STYLES[name]._replace(label="autodiff"), q, np.clip(array(model[dt]["autodiff"]), -2.5, 2.5)),
            ]
            name_ends(slope, ends)
    return figure
