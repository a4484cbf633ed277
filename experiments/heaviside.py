r"""What do gradient estimators make of a step, and of a step that is only just soft?

A decision theta earns $f(\theta + w)$, $w \sim N(0, \sigma^2)$. Hard: f(x) = 1[x >= 0]. Soft: f(x) = clip(2 x / width, -1,
1), for which the pathwise gradient is right on average: with the probability p of landing on the ramp it is 2 / width, and
else 0. Of a batch of N, $(1 - p)^N$ see no ramp at all, and then report a gradient of 0 with a variance of 0.

The exact curves are closed forms (`exact.py`). Set-up of Suh et al. 2022, Do Differentiable Simulators Give Better Policy
Gradients, section 3.
"""

from typing import Any, NamedTuple

import numpy as np

from diffmbrl.report.figures import Series, name_ends
from diffmbrl.tasks import heaviside, soft_heaviside
from experiments import exact
from experiments.decisions import BASELINE, ESTIMATORS, EXACT, PATHWISE, SCORE, STYLES, estimates
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "On the hard step the pathwise gradient is exactly 0 with a variance of exactly 0, so it is biased and sure of it; the "
    "score function is right, with a variance that a baseline lowers. On the soft step both are unbiased, but small batches "
    "of the pathwise gradient mostly miss the ramp: its error is larger than the score function's, and its own variance "
    "hides it."
)


class Size(NamedTuple):
    """How much is measured."""

    std: float  # of the hard step
    thetas: int
    samples: int
    width: float  # of the soft step
    soft_std: float
    counts: tuple[int, ...]  # batch sizes on the soft step, at theta = 0
    repeats: int


COUNTS = (1, 2, 3, 6, 10, 18, 32, 56, 100, 178, 316, 562, 1000)
FULL = Size(0.2, 61, 10_000, 0.005, 0.1, COUNTS, 2000)
QUICK = FULL._replace(thetas=13, samples=2000, counts=(2, 10, 100, 1000), repeats=200)


def measure(size: Size, parts: Any):
    """The hard step against theta, the soft one against the batch."""
    numbers = {"hard": parts({"part": "hard"} | size._asdict(), lambda: _hard(size))}
    yield numbers | {"soft": parts({"part": "soft"} | size._asdict(), lambda: _soft(size))}


def _hard(size: Size) -> dict[str, Any]:
    task = heaviside(low=0.0, high=1.0)
    theta = np.linspace(-1.5, 1.5, size.thetas)
    found: dict[str, Any] = {"theta": theta, "exact": exact.step(theta, size.std)._asdict()}
    for name, estimator in ESTIMATORS.items():
        x = estimates(estimator, task, theta, std=size.std, s0=[0.0], samples=size.samples, repeats=1)
        found[name] = {key: values[:, 0] for key, values in x.items()}
    return found


def _soft(size: Size) -> dict[str, Any]:
    """Errors of estimates at theta = 0, where the gradient is largest, relative to it."""
    task = soft_heaviside(low=-1.0, high=1.0, width=size.width)
    known = exact.ramp(np.zeros(1), size.soft_std, width=size.width)
    gradient = float(known.gradient[0])
    p = gradient * size.width / 2
    found: dict[str, Any] = {"gradient": gradient, "p": p, "counts": size.counts}
    found["blind"] = (1 - p) ** np.array(size.counts)
    for name, estimator in ESTIMATORS.items():
        # A mean of others needs others.
        counts = [n for n in size.counts if n > 1 or name != BASELINE]
        rows = [
            estimates(estimator, task, [0.0], std=size.soft_std, s0=[0.0], samples=n, repeats=size.repeats)
            for n in counts
        ]
        means = np.stack([row["mean"][0] for row in rows])
        claimed = np.stack([row["variance"][0] / n for row, n in zip(rows, counts, strict=True)])
        variance = {PATHWISE: known.pathwise_variance, SCORE: known.score_variance, BASELINE: known.baseline_variance}
        found[name] = {
            "counts": counts,
            "mean": means.mean(1) / gradient,
            "rms": np.sqrt(np.mean((means - gradient) ** 2, axis=1)) / gradient,
            "median": np.median(np.abs(means - gradient), axis=1) / gradient,
            "zero": np.mean((means == 0) & (claimed == 0), axis=1),
            "expected_rms": np.sqrt(float(variance[name][0]) / np.array(counts)) / gradient,
        }
    return found


def conclude(numbers: Any) -> str:
    """Whether the pathwise gradient is 0, how good the others are, and what a small batch sees of the ramp."""
    hard = numbers["hard"]
    zero = not np.any(array(hard[PATHWISE]["mean"])) and not np.any(array(hard[PATHWISE]["variance"]))
    gradient = array(hard["exact"]["gradient"])
    theta = array(hard["theta"])
    peak = int(np.argmax(gradient))
    at = f"at theta = {theta[peak]:.2g} is"
    errors = {name: np.max(np.abs(array(hard[name]["mean"]) - gradient)) for name in (SCORE, BASELINE)}
    spread = {name: array(hard[name]["variance"])[peak] for name in (SCORE, BASELINE)}
    known = [array(hard["exact"][key])[peak] for key in ("score_variance", "baseline_variance")]
    said = [
        f"Hard step: the pathwise gradient is {'exactly 0 with variance 0 at every theta' if zero else 'not 0'}, where the "
        f"true one reaches {gradient.max():.3g}; the score function's largest error is {errors[SCORE]:.2g}, with a baseline "
        f"{errors[BASELINE]:.2g}; its variance {at} {spread[SCORE]:.3g} (closed form {known[0]:.3g}), with a baseline "
        f"{spread[BASELINE]:.3g} ({known[1]:.3g})."
    ]
    if "soft" in numbers:
        said.append(_soft_sentence(numbers["soft"]))
    return " ".join(said)


def _soft_sentence(soft: Any) -> str:
    counts = array(soft[PATHWISE]["counts"])
    rms, other = array(soft[PATHWISE]["rms"]), array(soft[BASELINE]["rms"])
    last = f"N = {counts[-1]:.0f}"
    mean = array(soft[PATHWISE]["mean"])[-1]
    # The smallest batch of which less than half are blind.
    zero = array(soft[PATHWISE]["zero"])
    some = int(np.argmin(np.abs(counts - 10)))
    return (
        f"Soft step at theta = 0, {float(soft['p']):.1%} of samples on the ramp: of batches of {counts[some]:.0f}, "
        f"{zero[some]:.0%} (expected {array(soft['blind'])[some]:.0%}) say 0 with variance 0; over batches the mean is "
        f"{mean:.3g} of the true one at {last}, so it is unbiased, with a root-mean-square error of {rms[-1]:.2g} against the "
        f"score function's {array(soft[SCORE]['rms'])[-1]:.2g} without and {other[-1]:.2g} with a baseline."
    )


def paint(numbers: Any) -> Any:
    """Value, gradient and variance against theta; error and blindness against the batch."""
    figure, axes = sheet(2, (0.35, 0.35, 1.55))
    heading(figure, "A step, hard (above) and only just soft (below)")
    hard = numbers["hard"]
    theta, known = array(hard["theta"]), hard["exact"]
    value, gradient, variance = axes[0]
    value.step(theta, theta >= 0, where="mid", color="#c8ccd1", linewidth=1.2)
    value.plot(theta, array(known["value"]), color=EXACT.colour)
    value.plot(theta, array(hard[SCORE]["J"]), "o", markersize=2.6, color=STYLES[SCORE].colour)
    title(value, "f, and its mean under noise")
    lines = []
    for name, style in STYLES.items():
        mean, spread = array(hard[name]["mean"]), array(hard[name]["variance"])
        gradient.plot(theta, mean, style.marker, markersize=2.6, color=style.colour)
        variance.plot(theta, spread, style.marker, markersize=2.6, color=style.colour)
        lines.append(Series(style, theta, spread))
    gradient.plot(theta, array(known["gradient"]), color=EXACT.colour, linewidth=1, zorder=0)
    title(gradient, "gradient; line: exact")
    for which in ("pathwise_variance", "score_variance", "baseline_variance"):
        variance.plot(theta, array(known[which]), color=EXACT.colour, linewidth=1, zorder=0)
    name_ends(variance, lines)
    title(variance, "variance of one sample; lines: exact")
    for axis in axes[0]:
        axis.set_xlabel("theta")
    if "soft" in numbers:
        _paint_soft(axes[1], numbers["soft"])
    return figure


def _paint_soft(row: Any, soft: Any) -> None:
    rms, median, zero = row
    lines = []
    for name, style in STYLES.items():
        found = soft[name]
        n = array(found["counts"])
        rms.plot(n, array(found["expected_rms"]), color=EXACT.colour, linewidth=1, zorder=0)
        rms.plot(n, array(found["rms"]), style.marker, markersize=3, color=style.colour)
        band(median, style, n, array(found["median"])[:, None])
        zero.plot(n, array(found["zero"]), style.marker, markersize=3, color=style.colour)
        lines.append(Series(style, n, array(found["zero"])))
    zero.plot(array(soft["counts"]), array(soft["blind"]), color=EXACT.colour, linewidth=1, zorder=0)
    for axis in (rms, median):
        key = "rms" if axis is rms else "median"
        log_limits(axis, "y", [array(soft[name][key]) for name in STYLES])
    for axis in row:
        log_limits(axis, "x", [array(soft["counts"])])
        axis.set_xlabel("samples N in a batch")
    title(rms, "relative error, r.m.s.; lines: exact")
    title(median, "relative error, median batch")
    title(zero, "batches that say 0 with variance 0")
    name_ends(zero, lines)
