r"""How does conditioning change with the horizon, for a plan and for a policy, and what do damping and whitening do to it?

Along the same rollouts, T = 10 ... 400 and in float64:
* the open-loop plan with the policy's own actions: its true Hessian and its Gauss-Newton matrix M, the closed loop cut (K = 0);
* M of the closed loop, in the actions, and whitened by a Riccati sweep, $(M + \sigma I)^{-1} M$;
* the policy's parameters: true Hessian, $N = G'MG$, the whitened $G' M (M + \sigma I)^{-1} G$ (the sigma-metric) and $G'G$, all
  dense, and N by Lanczos from the gradient. $\sigma$ is relative to $g'Mg / g'g$, as for `Sigma`.

Condition numbers are the largest over the smallest absolute eigenvalue. The smallest of M is the largest of $M^{-1}$, which a
Riccati sweep applies without forming M: it is exact where the dense matrix has long lost it to rounding. Those of M, and all of
plans, are of one start; those in the parameters are averaged over the starts. A damping d is relative to the largest
eigenvalue; a step damped by it follows $\sum_i \rho_i / (\rho_i + d \rho_1)$ directions.

Policies: at initialisation, and trained by L-BFGS with discounts at one horizon.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.jobs.batch import BatchedPolicyRuns, draw_starts
from diffmbrl.methods import METHODS, solver
from diffmbrl.policies import Neural, OpenLoop
from diffmbrl.report.figures import Series, key, log_axis, name_ends, style_of
from diffmbrl.second_order.curvature import curve, gauss_newton, hessian, planner_step
from diffmbrl.second_order.dense import dense
from diffmbrl.second_order.krylov import lanczos
from diffmbrl.tasks import make
from experiments.record import array
from experiments.sheet import band, heading, log_limits, sheet, title

EXPECTED = (
    "The condition number and the largest eigenvalue grow by orders of magnitude with T for an untrained policy; the plan's "
    "grow faster than the closed loop's, training tames them, damping leaves ever fewer directions as T grows, "
    "and whitening by Riccati takes out what the dynamics put in."
)
WHO = ("initial", "trained")
PARAMETERS = ("Hessian", "N = G'MG", "whitened N", "G'G")
SPECTRA = {"actions": ("plan, M", "closed loop, M", "whitened M", "plan, Hessian"), "parameters": PARAMETERS}
RANK = 30  # of Lanczos, the default of Krylov
DAMPINGS = np.logspace(-12, 0, 25)
FLOOR = 1e-16  # eigenvalues below this share of the largest are rounding


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    sigma: float
    trained_horizon: int
    trained_starts: int
    trained_steps: int


FULL = Size(("pendulum-swingup", "cartpole-balance"), (10, 40, 100, 200, 400), 5, 4, (8, 8), 1e-4, 100, 64, 300)
QUICK = FULL._replace(
    tasks=FULL.tasks[:1],
    horizons=(10, 40),
    seeds=2,
    starts=2,
    hidden=(6,),
    trained_horizon=40,
    trained_starts=8,
    trained_steps=30,
)


def measure(size: Size, parts: Any):
    """Eigenvalues for every task, horizon, policy and seed."""
    numbers: dict[str, Any] = {}
    for name in size.tasks:
        policies = cache(partial(_policies, name, size))
        numbers[name] = {}
        for T in size.horizons:
            part = {"task": name, "T": T} | {k: v for k, v in size._asdict().items() if k not in ("tasks", "horizons")}
            found = parts(part, partial(_spectra, name, T, policies, size))
            numbers[name][str(T)] = {who: _kept(found[who]) for who in WHO}
    yield numbers


def _policies(name: str, size: Size) -> Any:
    """Initial and trained policies, leaves [2 seeds, ...]."""
    task = make(name, horizon=size.trained_horizon)
    draws = draw_starts(task, size.seeds, size.trained_starts, 1, 0)
    made = solver(METHODS["lbfgs"], task, rate=None, steps=size.trained_steps, continuation="discounts")
    lanes = BatchedPolicyRuns([made], task, size.hidden, draws, sequential=True)
    initial = jax.vmap(lambda k: Neural.init(task, hidden=size.hidden, key=k))(draws[2])
    lanes.advance(0, size.trained_steps)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), initial, lanes.policies)


def _spectra(name: str, T: int, policies: Callable[[], Any], size: Size) -> dict[str, Any]:
    task = make(name, horizon=T)
    s0 = draw_starts(task, size.seeds, size.starts, 1, 1)[0]
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), s0)
    # Columns and starts are vmapped, and seeds five at a time: the tangents of all at once would fill the memory.
    run = jax.jit(
        lambda pi, s: jax.lax.map(lambda lane: _matrices(lane[0], lane[1], task, size.sigma), (pi, s), batch_size=5)
    )
    # Eigenvalues by numpy: of two batched eigendecompositions in one program, each can wait for the other's threads for good.
    found = {key: _eigenvalues(np.asarray(x)) for key, x in run(policies(), both).items()}
    ends = _ends(found)
    return {
        who: {key: _summary(key, x[i * size.seeds : (i + 1) * size.seeds]) for key, x in (found | ends).items()}
        for i, who in enumerate(WHO)
    }


def _matrices(policy: Any, s0: Any, task: Any, sigma: float) -> dict[str, Any]:
    """All matrices at one policy; of Lanczos the Ritz values, and what N has outside their diagonal."""
    model = gauss_newton(policy, task, s0)
    lin, K, g = model.linearization, model.K, model.g
    B, P = g.shape[-1], model.gradient.size
    relative = sigma * jnp.sum(g * curve(lin, K, g)) / jnp.sum(g * g)
    eye = jnp.eye(P, dtype=g.dtype)
    G = jax.vmap(model.push)(eye)
    soft = jax.vmap(lambda w: w + relative * planner_step(lin, K, relative, w))(G)
    N = dense(model, policy, task)
    space = lanczos(model.product, model.gradient, RANK)
    true = jax.vmap(hessian(policy, task, s0).product)(eye)

    lin_1, K_1 = lin._replace(**{k: x[..., :1] for k, x in lin._asdict().items()}), K[..., :1]
    plan = OpenLoop(model.trajectory.a[:, 0])
    plan_true = jax.vmap(hessian(plan, task, s0[:1]).product)(jnp.eye(plan.a.size, dtype=g.dtype))
    basis = jnp.eye(plan.a.size, dtype=g.dtype).reshape(-1, *plan.a.shape, 1)
    gains, nothing = (jnp.zeros_like(K_1), K_1), jnp.zeros((), g.dtype)
    M_open, M = (_apply(partial(curve, lin_1, K), basis) for K in gains)
    inverse_open, inverse = (_apply(lambda w, K=K: -planner_step(lin_1, K, nothing, w), basis) for K in gains)
    return {
        "plan, Hessian": plan_true,
        "plan, M": M_open,
        "plan, inverse": inverse_open,
        "closed loop, M": M,
        "closed loop, inverse": inverse,
        "Hessian": true,
        "N = G'MG": N,
        "whitened N": jnp.einsum("ptmb,qtmb->pq", G, soft) / B,
        "G'G": jnp.einsum("ptmb,qtmb->pq", G, G) / B,
        "Ritz": space.ritz,
        "sigma": relative,
        "Lanczos residual": jnp.linalg.norm(space.vectors @ N @ space.vectors.T - jnp.diag(space.ritz))
        / jnp.linalg.norm(N),
    }


def _apply(operator: Any, basis: Any) -> Any:
    return jax.vmap(operator)(basis).reshape(basis.shape[0], -1)


def _eigenvalues(x: np.ndarray) -> np.ndarray:
    """Increasing, of matrices [lanes, d, d]; anything else as it is."""
    return np.linalg.eigvalsh((x + np.swapaxes(x, 1, 2)) / 2) if x.ndim == 3 else x


def _ends(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Condition numbers, and what follows from the eigenvalues, for each lane."""
    out = {"condition, plan, Hessian": _ratio(found["plan, Hessian"])}
    for loop in ("plan", "closed loop"):
        top, inverse = found[f"{loop}, M"].max(1), found[f"{loop}, inverse"].max(1)
        out[f"condition, {loop}, M"] = top * inverse
        out[f"smallest, {loop}, M"] = 1 / inverse
    smallest, top, sigma = out["smallest, closed loop, M"], found["closed loop, M"].max(1), found["sigma"]
    out["condition, closed loop, whitened"] = (top / (top + sigma)) * (smallest + sigma) / smallest
    for which in PARAMETERS:
        out[f"top, {which}"] = np.abs(found[which]).max(1)
        rho = np.abs(found[which]) / out[f"top, {which}"][:, None]
        out[f"directions, {which}"] = np.sum(rho[:, None] / (rho[:, None] + DAMPINGS[:, None]), axis=2)
    out["negative, Hessian"] = np.sum(found["Hessian"] < -1e-12 * out["top, Hessian"][:, None], axis=1)
    return out


def _ratio(values: np.ndarray) -> np.ndarray:
    size = np.abs(values)
    return size.max(1) / np.maximum(size.min(1), np.finfo(float).tiny)


def _summary(key: str, x: np.ndarray) -> Any:
    """Spectra as medians over seeds, by number, largest absolute value first; all else for each seed."""
    if x.ndim == 1 or key.startswith("directions"):
        return x
    return np.median(np.sort(np.abs(x), axis=1)[:, ::-1], axis=0)


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    """What is worth saving: forty eigenvalues of each spectrum, M's from both ends; medians of the directions; the rest."""
    found = {key: array(x) for key, x in found.items()}
    for loop in ("plan", "closed loop"):
        found[f"{loop}, M"] = _joined(found[f"{loop}, M"], found.pop(f"{loop}, inverse"))
    found["whitened M"] = found["closed loop, M"] / (found["closed loop, M"] + np.median(found["sigma"]))
    for space, spectra in SPECTRA.items():
        shown = np.unique(np.round(np.geomspace(1, found[spectra[0]].size, 40)).astype(int))
        found |= {key: found[key][shown - 1] for key in spectra} | {f"number, {space}": shown}
    return {key: np.median(x, axis=0) if key.startswith("directions") else x for key, x in found.items()}


def _joined(values: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Eigenvalues of M, decreasing: the upper ones from M, those below the geometric middle from its inverse."""
    lower = 1 / np.maximum(inverse[::-1], np.finfo(float).tiny)
    middle = np.sqrt(values[0]) * np.sqrt(lower[-1])
    return np.where(values > middle, values, np.minimum(lower, values[0]))


def conclude(numbers: Any) -> str:
    """From the first horizon to the last, medians over seeds."""
    return " ".join(_sentence(name, horizons) for name, horizons in numbers.items())


def _sentence(name: str, horizons: Any) -> str:
    T = list(horizons)

    def at(t: str, who: str, what: str) -> float:
        return float(np.median(array(horizons[t][who][what])))

    def grown(who: str, what: str) -> str:
        return f"{at(T[0], who, what):.1e} to {at(T[-1], who, what):.1e}"

    def left(what: str) -> str:
        column = int(np.argmin(np.abs(np.log10(DAMPINGS) + 6)))
        found = [array(horizons[t]["initial"][f"directions, {what}"])[column] for t in (T[0], T[-1])]
        return "{:.1f} and {:.1f}".format(*found)

    true, N, whitened = PARAMETERS[:3]
    closed, soft = "condition, closed loop, M", "condition, closed loop, whitened"
    plan = {who: at(T[-1], who, "condition, plan, M") / at(T[-1], who, closed) for who in WHO}
    tamed = at(T[-1], "trained", closed) / at(T[-1], "initial", closed)
    return (
        f"{name}, medians, T = {T[0]} to {T[-1]}: the condition of M goes from {grown('initial', closed)} in the untrained "
        f"closed loop and {grown('trained', closed)} in the trained one ({tamed:.2g} times the untrained one's at the end); "
        f"the plan's, of the same actions without feedback, is then {plan['initial']:.2g} times that untrained and "
        f"{plan['trained']:.2g} times trained; whitened it ends at {at(T[-1], 'initial', soft):.1e} untrained. "
        f"The largest eigenvalue of N goes from {grown('initial', f'top, {N}')} and {grown('trained', f'top, {N}')}, "
        f"of the Hessian from {grown('initial', f'top, {true}')} and {grown('trained', f'top, {true}')}, "
        f"of the whitened N from {grown('initial', f'top, {whitened}')}. Untrained, a damping of 1e-6 follows {left(N)} "
        f"directions of N, {left(whitened)} whitened; {at(T[-1], 'initial', 'negative, Hessian'):.0f} eigenvalues of the "
        f"Hessian are negative at the end."
    )


STYLES = {what: style_of(what, index=i) for i, what in enumerate(SPECTRA["actions"])} | {
    what: style_of(what, index=i) for i, what in enumerate((*PARAMETERS[1::-1], *PARAMETERS[2:]))
}


def paint(numbers: Any) -> Any:
    """A row for each task: condition and spectrum in the actions, top eigenvalue and spectrum in the parameters, damping."""
    figure, axes = sheet(len(numbers), (1.15, 1.15, 0.95, 0.95, 1.25))
    heading(figure, "Conditioning against the horizon: a plan's actions, a policy's parameters")
    for row, (name, horizons) in zip(axes, numbers.items(), strict=True):
        longest = list(horizons)[-1]
        _against_T(
            row[0],
            horizons,
            {
                "plan, M": "condition, plan, M",
                "closed loop, M": "condition, closed loop, M",
                "whitened M": "condition, closed loop, whitened",
            },
            ylabel="condition number",
        )
        title(row[0], f"{name}: actions")
        _spectrum(row[1], horizons[longest]["initial"], "actions")
        title(row[1], f"the same untrained, T = {longest}")
        _against_T(row[2], horizons, {what: f"top, {what}" for what in PARAMETERS}, ylabel="largest |eigenvalue|")
        title(row[2], f"{name}: parameters")
        _spectrum(row[3], horizons[longest]["initial"], "parameters")
        title(row[3], f"the same untrained, T = {longest}")
        _damping(row[4], horizons)
        title(row[4], "what damping leaves, untrained")
    return figure


def _against_T(axis: Any, horizons: Any, series: dict[str, str], *, ylabel: str) -> None:
    T = [int(t) for t in horizons]
    values = {
        (who, what): np.stack([array(horizons[t][who][field]) for t in horizons])
        for who in WHO
        for what, field in series.items()
    }
    log_limits(axis, "x", [T])
    axis.set_xticks(T, [str(t) for t in T])
    log_limits(axis, "y", list(values.values()))
    axis.set_xlabel("horizon T [steps]")
    axis.set_ylabel(ylabel)
    lines = {k: band(axis, STYLES[k[1]], T, y, dashed=k[0] == "trained") for k, y in values.items()}
    key(axis, [("initial policy", {"linewidth": 1.7}), ("trained", {"linewidth": 1.7, "linestyle": "--"})])
    named = [line for (who, _), line in lines.items() if who == "initial"]
    for (who, what), line in lines.items():
        if who == "trained" and line.y[-1] > 1e3 * max(other.y[-1] for other in named):
            named.append(line._replace(style=line.style._replace(label=f"{what}, trained"[:16])))
    name_ends(axis, named)


def _spectrum(axis: Any, found: Any, space: str) -> None:
    """Eigenvalues by number, and of N as Lanczos finds them."""
    x = array(found[f"number, {space}"])
    lines = []
    for what in SPECTRA[space]:
        y = array(found[what])
        # Below that share of the largest there is rounding, but for M, whose lower half is from its inverse.
        lines.append(Series(STYLES[what], x, y if what.endswith(" M") else np.where(y > FLOOR * y[0], y, np.nan)))
    log_limits(axis, "y", [line.y for line in lines])
    log_axis(axis.xaxis, (1.0, float(x[-1])))
    axis.set_xlabel("number of the eigenvalue")
    axis.set_ylabel("|eigenvalue|")
    for line in lines:
        axis.plot(line.x, line.y, color=line.style.colour, linewidth=1.7)
    if space == "parameters":
        ritz = array(found["Ritz"])
        axis.plot(np.arange(1, ritz.size + 1), ritz, "x", color=STYLES[PARAMETERS[1]].colour, markersize=4)
        key(axis, [(f"N by {RANK} Lanczos steps", {"linestyle": "none", "marker": "x", "markersize": 4})])
    name_ends(axis, lines)


def _damping(axis: Any, horizons: Any) -> None:
    """Directions that a damped step follows, for a few horizons."""
    T = list(horizons)
    shown = [T[0], T[len(T) // 2], T[-1]] if len(T) > 2 else T
    log_limits(axis, "x", [DAMPINGS])
    axis.invert_xaxis()  # the curves part where little is damped: there their names stand
    axis.set_xlabel("damping / largest eigenvalue")
    axis.set_ylabel("directions followed")
    lines, values = [], []
    for what in PARAMETERS[1:3]:
        for i, t in enumerate(shown):
            y = array(horizons[t]["initial"][f"directions, {what}"])
            values.append(y)
            style = STYLES[what]._replace(label=f"{what.split()[0]}, T {t}")
            axis.plot(DAMPINGS, y, color=style.colour, linewidth=0.8 + 0.7 * i)
            lines.append(Series(style, DAMPINGS[::-1], y[::-1]))
    log_limits(axis, "y", values)
    name_ends(axis, lines)
