r"""How does the variance of gradient estimators grow with the frequency of a ripple?

The loss $l(x) = .1 \sin(\omega x/\pi) + (x/10)^2 + .1$ at $x = \theta + w$, $w \sim N(0, \sigma^2)$; the largest variance
over theta of one sample of the pathwise gradient, and of the score function's without and with a baseline. The lines are
closed forms (`exact.py`).

Set-up of Metz et al. 2021, Gradients are Not All You Need, section 3.
"""

from typing import Any, NamedTuple

import numpy as np

from diffmbrl.report.figures import Series, name_ends
from diffmbrl.tasks import sinusoid
from experiments import exact
from experiments.decisions import BASELINE, ESTIMATORS, EXACT, PATHWISE, SCORE, STYLES, estimates
from experiments.record import array
from experiments.sheet import heading, log_limits, sheet, title

EXPECTED = (
    "The largest variance of the pathwise gradient grows with the square of the frequency, that of the score function does not "
    "depend on it; so the score function is better beyond some frequency, and a baseline moves that crossing down."
)
KEYS = {PATHWISE: "pathwise_variance", SCORE: "score_variance", BASELINE: "baseline_variance"}


class Size(NamedTuple):
    """How much is measured."""

    std: float
    frequencies: tuple[float, ...]
    thetas: int
    samples: int


FULL = Size(0.3, (1, 2, 3, 5, 7, 10, 14, 20, 30, 45, 65, 95, 140, 205, 300), 81, 4000)
QUICK = FULL._replace(frequencies=(1, 5, 20, 80, 300), thetas=21, samples=1000)
FINE = np.linspace(-10, 10, 2001)


def measure(size: Size, parts: Any):
    """The largest variances for every frequency, measured and exact."""
    yield parts(size._asdict(), lambda: _measure(size))


def _measure(size: Size) -> dict[str, Any]:
    theta = np.linspace(-10, 10, size.thetas)
    dense = np.geomspace(size.frequencies[0], size.frequencies[-1], 200)
    found: dict[str, Any] = {"frequency": size.frequencies, "dense": dense}
    forms = [exact.wave(FINE, size.std, frequency=frequency) for frequency in dense]
    ends = [exact.wave(theta, size.std, frequency=frequency) for frequency in size.frequencies]
    for name, estimator in ESTIMATORS.items():
        rows = [
            estimates(estimator, sinusoid(frequency=w), theta, std=size.std, s0=[0.0], samples=size.samples, repeats=1)
            for w in size.frequencies
        ]
        spread = np.stack([row["variance"][:, 0] for row in rows])
        known = np.stack([getattr(form, KEYS[name]) for form in ends])
        gradient = np.stack([form.gradient for form in ends])
        means = np.stack([row["mean"][:, 0] for row in rows])
        found[name] = {
            "largest": spread.max(1),
            "exact": np.array([getattr(form, KEYS[name]).max() for form in forms]),
            "off": np.median(np.abs(spread / known - 1), axis=1),  # of the measured variance
            "z": np.sqrt(np.mean((means - gradient) ** 2 / (known / size.samples))),  # of the means; 1 if unbiased
        }
    return found


def conclude(numbers: Any) -> str:
    """Growth, crossings, and how well closed forms and measurements agree."""
    dense = array(numbers["dense"])
    curves = {name: array(numbers[name]["exact"]) for name in ESTIMATORS}
    upper = dense > 30
    power = np.polyfit(np.log(dense[upper]), np.log(curves[PATHWISE][upper]), 1)[0]
    said = [
        f"From a frequency of 30 on the largest variance of the pathwise gradient grows with the power {power:.2f} of it"
    ]
    for name in (SCORE, BASELINE):
        over = np.flatnonzero(curves[PATHWISE] > curves[name])
        crossing = f"from {dense[over[0]]:.3g} on" if over.size else "nowhere"
        change = curves[name].max() / curves[name].min()
        label = "without a baseline" if name == SCORE else "with one"
        said.append(f"the score function's {label} changes by a factor of {change:.2g} in all and is lower {crossing}")
    off = max(float(np.max(array(numbers[name]["off"]))) for name in ESTIMATORS)
    z = ", ".join(f"{float(numbers[name]['z']):.2f}" for name in ESTIMATORS)
    at = [f"{curves[name][-1]:.3g}" for name in ESTIMATORS]
    return (
        f"{'; '.join(said)}. At the highest frequency they are {at[0]}, {at[1]} and {at[2]}. Measured variances are within "
        f"{off:.1%} of the closed forms (median over theta), and means have the spread of unbiased ones (r.m.s. z of {z})."
    )


def paint(numbers: Any) -> Any:
    """The largest variance against the frequency."""
    figure, axes = sheet(1, (1.55,))
    axis = axes[0, 0]
    heading(figure, "Ripples: variance against frequency")
    dense, lines = array(numbers["dense"]), []
    for name, style in STYLES.items():
        axis.plot(dense, array(numbers[name]["exact"]), color=EXACT.colour, linewidth=1, zorder=0)
        axis.plot(
            array(numbers["frequency"]), array(numbers[name]["largest"]), style.marker, markersize=4, color=style.colour
        )
        lines.append(Series(style, dense, array(numbers[name]["exact"])))
    log_limits(axis, "x", [dense])
    log_limits(axis, "y", [line.y for line in lines])
    axis.set_xlabel("frequency")
    title(axis, "largest variance; lines: exact")
    name_ends(axis, lines)
    return figure
