r"""What does the scale of a first policy do to the Jacobians along its rollout?

The double pendulum, swung by networks that differ in the last layer alone: weights from N(0, 1/fan-in), and .1 (where this
library's policies start) and .01 times those. Along 100 steps from each start, in float64:
* the eigenvalues of the product $\Phi_{90}$ of the first 90 closed-loop Jacobians, and of the 90th Jacobian by itself;
* the largest modulus of each step's eigenvalues, and of each product's;
* $|dJ_T/d\theta|$ of the return of the first T steps, without a terminal reward, against the unroll T.

Metz, Freeman, Schoenholz and Kachman 2021, section 3, do this for a Brax ant. Here a seed is a policy and a start.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import reweighted
from diffmbrl.diagnostics import (
    eigenvalues,
    jacobians,
    log_eigenvalues,
    log_spectral_radius,
    mean_exponents,
    products,
    spectral_radius,
)
from diffmbrl.policies import Neural
from diffmbrl.render.palette import MUTED
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.rollout import episode_return, rollout
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "Under the default policy the product's eigenvalues leave the unit circle by orders of magnitude and the gradient's norm "
    "grows exponentially with the unroll; under the 0.01-scaled one they stay near it and the gradient grows slowly."
)


class Size(NamedTuple):
    """How much is measured."""

    task: str
    horizon: int
    at: int  # the step whose eigenvalues are shown
    scales: tuple[float, ...]
    seeds: int
    hidden: tuple[int, ...]
    unrolls: int  # how many are measured


FULL = Size("double-pendulum", 100, 90, (1.0, 0.1, 0.01), 32, (32, 32), 20)
QUICK = FULL._replace(scales=(1.0, 0.01), seeds=6, unrolls=8)


def measure(size: Size, parts: Any):
    """Both policies."""
    numbers = {str(s): parts({"scale": s} | size._asdict(), partial(_at_scale, s, size)) for s in size.scales}
    yield {"task": size.task, "at": size.at, "scales": numbers}


def _at_scale(scale: float, size: Size) -> dict[str, Any]:
    task = make(size.task, horizon=size.horizon)
    draw = partial(Neural.init, task, hidden=size.hidden, output_scale=scale)
    policies = jax.vmap(lambda k: draw(key=k))(jax.random.split(jax.random.key(0), size.seeds))
    s0 = task.starts(jax.random.key(1), size.seeds)

    def along(pi, s):
        loop = jacobians(pi, task, s[None]).loop[0]
        factors = products(loop)
        return loop, factors, mean_exponents(factors.growth, 1.0)

    def gradient(pi, s, T):
        weights = (jnp.arange(size.horizon + 1) < T).astype(task.weights.dtype)
        return jnp.linalg.norm(
            ravel_pytree(jax.grad(lambda pi: episode_return(pi, reweighted(task, weights), s))(pi))[0]
        )

    loop, factors, lyapunov = jax.jit(jax.vmap(along))(policies, s0)
    states = jax.jit(jax.vmap(lambda pi, s: rollout(pi, task, s).s))(policies, s0)
    unrolls = np.unique(np.geomspace(1, size.horizon, size.unrolls).round().astype(int))
    norms = jax.jit(lambda pi, s, T: jax.lax.map(lambda T: jax.vmap(gradient, (0, 0, None))(pi, s, T), T))
    t = np.arange(1, size.horizon + 1)
    at = [log_eigenvalues(A) for A in loop[:, : size.at]]
    one = eigenvalues(loop[:, size.at - 1])
    shown = np.unique(np.linspace(1, size.horizon, 50).round().astype(int)) - 1
    return {
        "product": {"log modulus": np.stack([x[0] for x in at]), "angle": np.stack([x[1] for x in at])},
        "step": {"log modulus": np.log(np.abs(one)), "angle": np.angle(one)},
        "t": t[shown],
        "largest of step": np.log(spectral_radius(loop))[:, shown].T,
        "largest of product": log_spectral_radius(factors)[:, shown].T,
        "exponents": lyapunov.values,
        "fastest": np.abs(np.asarray(states)[..., task.n // 2 :]).max(axis=(1, 2)) * task.dt,
        "unrolls": unrolls,
        "gradient": norms(policies, s0, jnp.asarray(unrolls)),
    }


def _finite(scales: dict[str, Any]) -> dict[str, Any]:
    """Arrays of the seeds whose rollouts are finite; the integrator loses those that spin too fast for its step."""
    out = {}
    for scale, x in scales.items():
        seen = np.isfinite(array(x["fastest"]))
        of_seeds = {which: {k: array(y)[seen] for k, y in x[which].items()} for which in ("product", "step")}
        over_time = {k: array(x[k])[:, seen] for k in ("largest of step", "largest of product", "gradient")}
        alone = {k: array(x[k])[seen] for k in ("exponents", "fastest")}
        out[scale] = x | of_seeds | over_time | alone | {"lost": int((~seen).sum())}
    return out


def conclude(numbers: Any) -> str:
    """From the numbers, medians over the seeds that are finite."""
    said = []
    for scale, x in _finite(numbers["scales"]).items():
        modulus = array(x["product"]["log modulus"])[:, 0] / np.log(10)
        steps = array(x["largest of step"])
        gradient, T = array(x["gradient"]), array(x["unrolls"])
        half = int(np.argmin(np.abs(T - T[-1] / 3)))
        growth = np.log(gradient[-1] / gradient[half]) / (T[-1] - T[half])
        said.append(
            f"at scale {scale} the largest eigenvalue of the product of {numbers['at']} steps has a median modulus of 10^"
            f"{np.median(modulus):.1f} (from 10^{modulus.min():.1f} to 10^{modulus.max():.1f}), a step's largest a median of "
            f"{np.exp(np.median(steps)):.3f}, |dJ/dtheta| is {np.median(gradient[-1]):.2g} at T = {T[-1]:.0f} and grew by "
            f"{np.median(growth):+.3f} a step in its logarithm since T = {T[half]:.0f}, the largest Lyapunov exponent is "
            f"{np.median(array(x['exponents'])[:, 0]):+.3f} a step, and the rods turn by {np.median(array(x['fastest'])):.2g} "
            f"rad a step at their fastest (at most {array(x['fastest']).max():.2g})"
            + (
                f"; {x['lost']} of its {x['lost'] + len(modulus)} rollouts are lost to the integrator"
                if x["lost"]
                else ""
            )
        )
    return f"{numbers['task']}: " + "; ".join(said) + "."


def paint(numbers: Any) -> Any:
    """Eigenvalues in the plane, one step's and the product's; largest over time; the gradient against the unroll."""
    figure, axes = sheet(1, (0.3, 0.3, 1.1, 1.0))
    heading(figure, f"Jacobians along rollouts of {numbers['task']}, by the scale of the first policy")
    row, at, scales = axes[0], numbers["at"], _finite(numbers["scales"])
    styles = {s: style_of(f"scale {s}", index=i) for i, s in enumerate(scales)}
    for axis, which, text in (
        (row[0], "step", f"eigenvalues of step {at}"),
        (row[1], "product", f"of the product of {at}"),
    ):
        _plane(axis, {s: x[which] for s, x in scales.items()}, styles)
        title(axis, text)
    lines = []
    for scale, x in scales.items():
        looks = styles[scale]
        for what, dashed in (("largest of product", False), ("largest of step", True)):
            if dashed and scale != next(iter(scales)):
                continue  # they lie on one line
            label = f"{what.split()[-1]}, {scale}"
            values = array(x[what]) / np.log(10)
            lines.append(band(row[2], looks._replace(label=label), x["t"], values, dashed=dashed))
    row[2].set_xlabel("step t")
    row[2].set_ylabel("log10 of the largest modulus")
    title(row[2], "largest eigenvalue: of each step, of the product")
    name_ends(row[2], lines)
    lines = []
    log_limits(row[3], "x", [array(x["unrolls"]) for x in scales.values()])
    log_limits(row[3], "y", [array(x["gradient"]) for x in scales.values()])
    for scale, x in scales.items():
        lines.append(band(row[3], styles[scale], x["unrolls"], array(x["gradient"])))
    row[3].set_xlabel("unroll T [steps]")
    row[3].set_ylabel("|dJ/dtheta|")
    title(row[3], "gradient of the first T steps' return")
    name_ends(row[3], lines)
    return figure


def _plane(axis: Any, found: dict[str, Any], styles: Any) -> None:
    """Eigenvalues with their modulus on a signed logarithmic scale: the ring is the unit circle, each tick a power of ten."""
    logs = {s: array(x["log modulus"]) / np.log(10) for s, x in found.items()}
    # The plane is drawn out to where the eigenvalues reach; inwards to 1e-1 and what is smaller at the centre.
    ring = 1.0
    reach = max(ring + max(float(np.nanmax(x)) for x in logs.values()), 1.2 * ring)
    turn = np.linspace(0, 2 * np.pi, 200)
    axis.plot(ring * np.cos(turn), ring * np.sin(turn), color=MUTED, linewidth=0.8)
    for scale, x in found.items():
        angle, r = array(x["angle"]), np.maximum(logs[scale] + ring, 0)
        looks = {"linestyle": "none", "marker": styles[scale].marker, "markersize": 3, "alpha": 0.7}
        axis.plot((r * np.cos(angle)).ravel(), (r * np.sin(angle)).ravel(), color=styles[scale].colour, **looks)
    axis.set_xlim(-1.08 * reach, 1.08 * reach)
    axis.set_ylim(-1.08 * reach, 1.08 * reach)
    axis.set_aspect("equal")
    axis.set_xlabel("1 + log10 |eigenvalue|, along its angle")
