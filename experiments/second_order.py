r"""When does the curvature of a rollout stay bounded, how much of a planner's step does a policy follow, which schedule helps?

* Largest eigenvalue of M (one start at a time) and of $N = G'MG$ (averaged over starts) against T and discount, for policies at
  initialisation; the condition number of M, its smallest eigenvalue from the Riccati sweep. M should stay bounded for every T
  while $\gamma \rho^2 < 1$, with $\rho$ the growth per step of the closed loop, $|\prod_t (A_t + B_t K_t)|^{1/T}$: start by
  start, the growth of its largest eigenvalue from the last horizon but one to the last is set against $\gamma \rho^2$.
* The projection gap (`projection.py`) of the steps taken along a training run by Gauss-Newton, and the cost, under each of a
  table of schedules.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.jobs.batch import draw_starts
from diffmbrl.optimizers import Continuation, GaussNewton, Krylov
from diffmbrl.policies import Neural
from diffmbrl.render.palette import MUTED
from diffmbrl.report.figures import Series, name_ends, style_of
from diffmbrl.second_order.curvature import curve, gauss_newton, planner_step
from diffmbrl.second_order.krylov import lanczos
from diffmbrl.second_order.linearize import Linearization
from diffmbrl.second_order.riccati import closed_loop
from diffmbrl.second_order.small_matrices import matmul
from diffmbrl.tasks import make
from experiments.arms import Arm, train
from experiments.record import array
from experiments.sheet import band, heading, log_limits, note, sheet, title

EXPECTED = (
    "The largest eigenvalue of M stops growing with T where discount * rho^2 < 1 and grows without bound beyond; the "
    "projection gap falls along training; a schedule that follows what is measured (discounts as the growth allows them, "
    "trust in the sensitivity of each start, stages that end when progress does) ends lower than the same by the clock, "
    "and those lower than none."
)
# A schedule is one row: from a solver, its number of updates and the horizon to the solver that is run.
SCHEDULES = {
    "none": lambda solver, steps, T: solver,
    "discounts": lambda solver, steps, T: Continuation.discounted(solver, steps),
    "measured": lambda solver, steps, T: Continuation.measured(solver, steps),
    "clocked trust": lambda solver, steps, T: _by_the_clock(Continuation.trusted(solver, steps, horizon=T)),
    "trust": lambda solver, steps, T: Continuation.trusted(solver, steps, horizon=T),
}
RANK = 40  # of Lanczos for the ends of a spectrum
FLAT = 1.05  # growth of an eigenvalue from one horizon to the next that counts as none


class Size(NamedTuple):
    """How much is measured."""

    tasks: tuple[str, ...]  # of the spectra; the first is shown in full, and trained
    horizons: tuple[int, ...]
    discounts: tuple[float, ...]
    seeds: int
    starts: int
    hidden: tuple[int, ...]
    training_horizon: int
    training_seeds: int
    training_starts: int
    updates: int
    looks: int
    schedules: tuple[str, ...] = tuple(SCHEDULES)


FULL = Size(
    ("cartpole-balance", "pendulum-swingup"),
    (10, 25, 50, 100, 200, 400),
    (0.8, 0.9, 0.95, 0.98, 1.0),
    5,
    8,
    (8, 8),
    100,
    3,
    64,
    100,
    50,
)
QUICK = FULL._replace(
    tasks=FULL.tasks[:1],
    horizons=(10, 40),
    seeds=2,
    starts=4,
    hidden=(6,),
    training_horizon=30,
    training_seeds=2,
    training_starts=8,
    updates=10,
    looks=10,
    schedules=("none", "discounts", "trust"),
)


def _by_the_clock(schedule: Continuation) -> Continuation:
    """Without an end to a stage before its time."""
    return eqx.tree_at(lambda c: c.tolerance, schedule, jnp.full_like(schedule.tolerance, -jnp.inf))


def measure(size: Size, parts: Any):
    """Spectra, then training runs."""
    spectra: dict[str, Any] = {}
    for name in size.tasks:
        spectra[name] = {}
        for T in size.horizons:
            part: dict[str, Any] = {"task": name, "T": T, "discounts": size.discounts, "seeds": size.seeds}
            part |= {"starts": size.starts, "hidden": size.hidden}
            spectra[name][str(T)] = parts(part, partial(_spectrum, name, T, size))
    runs = {}
    for schedule in size.schedules:
        made = partial(SCHEDULES[schedule], GaussNewton(system=Krylov(10)), T=size.training_horizon)
        arm = Arm(lambda _, steps, made=made: made(steps), size.updates)
        options: dict[str, Any] = {
            "horizon": size.training_horizon,
            "hidden": size.hidden,
            "seeds": size.training_seeds,
            "starts": size.training_starts,
            "looks": size.looks,
        }
        part = {"schedule": schedule, "task": size.tasks[0], "updates": size.updates} | options
        runs[schedule] = parts(part, partial(train, arm, size.tasks[0], **options))
    yield {"discounts": size.discounts, "spectra": spectra, "runs": runs}


def _spectrum(name: str, T: int, size: Size) -> dict[str, Any]:
    """Ends of the spectra, [discounts, seeds, ...], and growth per step, [seeds, starts]."""
    task = make(name, horizon=T)
    train_starts, _, keys = draw_starts(task, size.seeds, size.starts, 1, 0)
    policies = jax.vmap(lambda k: Neural.init(task, hidden=size.hidden, key=k))(keys)
    discounts = jnp.asarray(size.discounts)
    found = jax.jit(jax.vmap(lambda pi, s: _ends(pi, task, s, discounts)))(policies, train_starts)
    return {k: np.asarray(x) if k == "growth" else np.moveaxis(np.asarray(x), 1, 0) for k, x in found.items()}


def _ends(policy: Any, task: Any, s0: Any, discounts: Any) -> dict[str, Any]:
    model = gauss_newton(policy, task, s0)
    lin, K = model.linearization, model.K
    v = jax.random.normal(jax.random.key(0), model.gradient.shape, model.gradient.dtype)

    def at(discount):
        eased = _discounted(lin, discount)
        N = lanczos(lambda x: model.pull(curve(eased, K, model.push(x))), v, RANK).ritz[-1]
        M, smallest = jax.vmap(partial(_ends_of_M, after=N), in_axes=(_last(eased), -1))(eased, K)
        return {"N": N, "M": M, "smallest": smallest}

    return jax.vmap(at)(discounts) | {"growth": _growth(closed_loop(lin, K).A)}


def _discounted(lin: Linearization, discount: Any) -> Linearization:
    """The costs of step t times discount^t."""
    T = lin.A.shape[0]
    w = discount ** jnp.arange(T + 1, dtype=lin.A.dtype)
    return lin._replace(H=lin.H * w[:T, None, None, None], H_T=lin.H_T * w[T])


def _last(lin: Linearization) -> Any:
    return jax.tree.map(lambda x: x.ndim - 1, lin)


def _ends_of_M(lin: Linearization, K: Any, after: Any) -> tuple[Any, Any]:
    """Largest and smallest eigenvalue of M of one start, the smallest as the largest of M^-1.

    Each Krylov space is found `after` the one before: of two batched eigendecompositions at a time, each can wait for the
    other's threads for good.
    """
    lin, K = jax.tree.map(lambda x: x[..., None], (lin, K))
    T, m = K.shape[:2]
    v = jax.random.normal(jax.random.key(1), (T * m,), K.dtype)
    nothing = jnp.zeros((), K.dtype)
    top = lanczos(lambda x: curve(lin, K, x.reshape(T, m, 1)).ravel(), v + 0 * after, RANK).ritz[-1]
    v = v + 0 * top
    inverse = lanczos(lambda x: -planner_step(lin, K, nothing, x.reshape(T, m, 1)).ravel(), v, RANK).ritz[-1]
    return top, 1 / inverse


def _growth(A: Any) -> Any:
    """|A_T-1 ... A_0|^(1/T) in the Frobenius norm, for each start; the product is kept at length 1."""
    T, n, _, B = A.shape

    def step(carry, A_t):
        product, log = carry
        product = matmul(A_t, product)
        length = jnp.sqrt(jnp.sum(product**2, axis=(0, 1)))
        return (product / length, log + jnp.log(length)), None

    start = jnp.broadcast_to(jnp.eye(n, dtype=A.dtype)[..., None], (n, n, B)), jnp.zeros(B, A.dtype)
    return jnp.exp(jax.lax.scan(step, start, A)[0][1] / T)


def _test(numbers: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every start, seed and discount: discount * rho^2 at the last horizon, and M's growth since the one before."""
    spectra = numbers["spectra"][name]
    before, last = list(spectra)[-2:]
    rho = array(spectra[last]["growth"])[None]
    x = array(numbers["discounts"])[:, None, None] * rho**2
    return x, array(spectra[last]["M"]) / array(spectra[before]["M"])


def conclude(numbers: Any) -> str:
    """From the numbers alone."""
    lines = []
    for name, spectra in numbers["spectra"].items():
        T = list(spectra)
        x, grown = _test(numbers, name)
        bounded, counts = grown < FLAT, x < 1
        share = [np.mean(bounded[of]) if of.any() else float("nan") for of in (counts, ~counts)]
        tops = [
            "{:.1e} to {:.1e} at discount {:g}".format(
                *(np.median(array(spectra[t]["M"])[i]) for t in (T[0], T[-1])), numbers["discounts"][i]
            )
            for i in (0, -1)
        ]
        condition = [np.median(array(spectra[T[-1]]["M"])[i] / array(spectra[T[-1]]["smallest"])[i]) for i in (0, -1)]
        largest = np.max(grown[counts]) if counts.any() else float("nan")
        lines.append(
            f"{name}: the largest eigenvalue of M goes from {' and from '.join(tops)} (T = {T[0]} to {T[-1]}, medians). "
            f"From T = {T[-2]} to {T[-1]} it grows by less than {FLAT - 1:.0%} in {share[0]:.0%} of the {counts.sum()} cases "
            f"with discount * rho^2 < 1 (at most by a factor of {largest:.2g}) and in {share[1]:.0%} of the "
            f"{(~counts).sum()} others. The condition number at T = {T[-1]} is {condition[0]:.1e} at the lowest discount and "
            f"{condition[1]:.1e} at the highest."
        )
    costs, gaps = {}, {}
    for schedule, run in numbers["runs"].items():
        gap, test = array(run["gap"]), array(run["test"])[-1]
        tenth = max(1, len(gap) // 10)
        costs[schedule] = float(np.median(test))
        gaps[schedule] = f"{np.nanmedian(gap[:tenth]):.2f} to {np.nanmedian(gap[-tenth:]):.2f}"
    order = sorted(costs, key=lambda schedule: costs[schedule])
    ranked = ", ".join(f"{schedule} {costs[schedule]:.3g} (gap {gaps[schedule]})" for schedule in order)
    return (
        " ".join(lines) + f" Held-out cost after training, and projection gap from first to last tenth of it: {ranked}."
    )


def paint(numbers: Any) -> Any:
    """Curvature against T; the test of the bound; condition, projection gap and cost."""
    figure, axes = sheet(2, (0.95, 1.2, 1.1))
    name = next(iter(numbers["spectra"]))
    heading(figure, f"{name}: curvature against horizon and discount, the planner's step and the schedules")
    spectra = numbers["spectra"][name]
    styles = [style_of(f"discount {discount:g}", index=i) for i, discount in enumerate(numbers["discounts"])]
    for axis, field, what in ((axes[0, 0], "M", "M"), (axes[0, 1], "N", "N = G'MG"), (axes[1, 0], "condition", "M")):
        _against_T(axis, spectra, styles, field)
        axis.set_ylabel(f"condition number of {what}" if field == "condition" else f"largest eigenvalue of {what}")
    title(axes[0, 0], "in the actions, by discount")
    title(axes[0, 1], "in the parameters, by discount")
    title(axes[1, 0], "both ends, by discount")
    _bound(axes[0, 2], numbers)
    _training(axes[1, 1], axes[1, 2], numbers["runs"])
    return figure


def _against_T(axis: Any, spectra: Any, styles: list, field: str) -> None:
    T = [int(t) for t in spectra]

    def values(t: str) -> np.ndarray:
        found = {k: array(spectra[t][k]) for k in ("M", "N", "smallest")}
        found["condition"] = found["M"] / found["smallest"]
        # One number for each seed: of M, which is one for each start, the median.
        return found[field] if field == "N" else np.median(found[field], axis=-1)

    stacked = np.stack([values(t) for t in spectra])
    log_limits(axis, "x", [T])
    axis.set_xticks(T, [str(t) for t in T])
    log_limits(axis, "y", [stacked])
    axis.set_xlabel("horizon T [steps]")
    name_ends(axis, [band(axis, style, T, stacked[:, i]) for i, style in enumerate(styles)])


def _bound(axis: Any, numbers: Any) -> None:
    """Growth of M between the last two horizons against discount * rho^2, a point for each start, seed and discount."""
    lines = []
    for i, name in enumerate(numbers["spectra"]):
        x, y = (z.ravel() for z in _test(numbers, name))
        style = style_of(name, index=i)
        axis.plot(x, y, style.marker, color=style.colour, markersize=3, alpha=0.45, markeredgewidth=0)
        lines.append((name, x, y, style))
    x, y = (np.concatenate([line[k] for line in lines]) for k in (1, 2))
    log_limits(axis, "y", [y])
    axis.set_xlim(min(0.75, x.min() - 0.03), max(1.1, x.max() + 0.03))
    axis.axvline(1, color=MUTED, linewidth=1, linestyle="--")
    before, last = list(numbers["spectra"][lines[0][0]])[-2:]
    axis.set_xlabel("discount · (growth per step)²")
    axis.set_ylabel(f"growth of M's largest eigenvalue,\nT = {before} to {last}")
    for i, (name, *_, style) in enumerate(lines):
        note(axis, name, 0.04, 0.93 - 0.08 * i, color=style.colour, fontweight="bold")
    title(axis, "bounded left of 1?")


def _training(gap_axis: Any, cost_axis: Any, runs: Any) -> None:
    lines: list[Series] = []
    ends: list[Series] = []
    for i, (schedule, run) in enumerate(runs.items()):
        style = style_of(schedule, index=i)
        lines.append(band(gap_axis, style, run["update"][1:], array(run["gap"])))
        ends.append(band(cost_axis, style, run["update"], array(run["test"])))
        cost_axis.plot(
            run["update"], np.median(array(run["train"]), axis=1), color=style.colour, linewidth=0.8, alpha=0.8
        )
    gap_axis.set_ylim(0, 1.05)
    for axis in (gap_axis, cost_axis):
        axis.set_xlabel("updates of Gauss-Newton")
    gap_axis.set_ylabel("projection gap")
    title(gap_axis, "the planner's step that is not followed")
    log_limits(cost_axis, "y", [array(run[k]) for run in runs.values() for k in ("train", "test")])
    cost_axis.set_ylabel("cost, held out (thin: training)")
    title(cost_axis, "schedules")
    name_ends(gap_axis, lines)
    name_ends(cost_axis, ends)
