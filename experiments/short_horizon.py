r"""Do short windows with a critic learn what the full unroll does not, are they smoother, and how long should they be?

* Learning: `ShortHorizon` from random weights, 5 seeds, in three forms: learned noise alone (SHAC), the same with an adaptive
  reach (AHAC), and noise at a learned price of entropy (SAPO), each the best of four first policies after half of its updates;
  beside full BPTT with clipped Adam at the best of its rates, at the full horizon and without continuation. Costs on held-out
  starts against dynamics evaluations.
* Landscape: the weight of the first layer with the largest gradient is shifted, for a policy trained by the third form: J over
  a long horizon against the objective of one window from the same starts, with the critic's value (`windows.window`).
* Windows: the third form with windows of h = 4 ... 64 steps at fixed N h.

SHAC's constants are a discount of .99, Adam(.7, .95), a rate of 2e-3, 16 x 4 critic batches and windows of 32. Measured here
are the package's defaults: .97, Adam(.9, .999), 5e-3 decaying, 4 x 4 and 16; a trace of .95, a mixing of .2 and clipping to
norm 1 are the same.
"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.optimizers import AdaptiveHorizon, Entropy, MultiStart, Noise, OptaxSolver, ShortHorizon
from diffmbrl.optimizers.clipped import clipped_adam
from diffmbrl.optimizers.short_horizon.windows import start_environments, window
from diffmbrl.policies import Neural
from diffmbrl.report.figures import effort_axis, name_ends, style_of
from diffmbrl.rollout import mean_return
from diffmbrl.tasks import make
from experiments.arms import Arm, train
from experiments.record import array
from experiments.sheet import band, heading, log_limits, note, sheet, title

EXPECTED = (
    "Windows with a critic learn both tasks on every seed and the full unroll with clipping, tuned as well, does not; the "
    "objective of a window is smoother in a weight than the return over a long horizon; windows of 16 to 32 steps are the best."
)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of the full unroll
FORMS = ("windows, entropy", "full unroll", "windows", "windows, adaptive")


class Size(NamedTuple):
    """How much is measured."""

    forms: tuple[str, ...]
    tasks: tuple[str, ...]
    horizons: tuple[int, ...]
    seeds: int
    starts: int
    entrants: int  # first policies of a run with windows, of which the best goes on
    hidden: tuple[int, ...]
    updates: tuple[int, ...]  # of windows, on each task
    unrolls: int  # updates of the full unroll, each through 6 to 12 times as many steps
    rate: float
    windows: tuple[int, ...]
    steps: int  # N h of the comparison of windows
    window_seeds: int
    window_updates: int
    long: int  # steps of the landscape's return
    shifts: int
    looks: int


FULL = Size(
    FORMS, ("cartpole-swingup", "pendulum"), (100, 200), 5, 64, 4, (32, 32), (1200, 800), 800, 5e-3,
    windows=(4, 8, 16, 32, 64), steps=1024, window_seeds=3, window_updates=400, long=1000, shifts=81, looks=10,
)  # fmt: skip
# Without the race, which compiles a solver twice, and one length of the windows.
QUICK = FULL._replace(
    forms=FORMS[:2], tasks=("pendulum",), horizons=(40,), seeds=2, starts=8, entrants=1, hidden=(6,), updates=(20,),
    unrolls=20, windows=(), long=100, shifts=5, looks=2,
)  # fmt: skip


def forms(size: Size, updates: int) -> dict[str, Arm]:
    """The arms of the first question, the entropy-regularised form first."""
    return {
        "windows, entropy": Arm(lambda rate, steps: raced(size, steps, noise=Noise(entropy=Entropy())), updates),
        "full unroll": Arm(
            lambda rate, steps: OptaxSolver(clipped_adam, learning_rate=rate, anneal=float(steps)), size.unrolls, RATES
        ),
        "windows": Arm(lambda rate, steps: raced(size, steps, noise=Noise()), updates),
        "windows, adaptive": Arm(
            lambda rate, steps: raced(size, steps, noise=Noise(), reach=adaptive()),
            updates,
        ),
    }


def adaptive() -> AdaptiveHorizon:
    """From half the window, up to all of it."""
    return AdaptiveHorizon(initial=jnp.asarray(8.0), high=jnp.asarray(16.0))


def raced(size: Size, steps: int, **options: Any) -> MultiStart | ShortHorizon:
    """Windows, of the best of several first policies after half of the updates."""
    solver = short(size, steps, **options)
    return solver if size.entrants == 1 else MultiStart(solver, entrants=size.entrants, updates=max(1, steps // 2))


def short(size: Size, steps: int, **options: Any) -> ShortHorizon:
    """A solver of windows with annealed rates."""
    descend = OptaxSolver(clipped_adam, learning_rate=size.rate, anneal=float(steps))
    options.setdefault("environments", min(64, size.starts))
    return ShortHorizon(descend, **options)


def measure(size: Size, parts: Any):
    """The landscape, learning curves for each form and task, then windows on the first task; learnt in float32."""
    numbers: dict[str, Any] = {"learning": {}}
    options: dict[str, Any] = {k: getattr(size, k) for k in ("seeds", "starts", "hidden", "looks")}
    name, T = size.tasks[0], size.horizons[0]
    part = {"landscape": name, "T": T} | {
        k: getattr(size, k) for k in ("starts", "hidden", "updates", "long", "shifts")
    }
    numbers["landscape"] = parts(part, partial(_landscape, name, T, size))
    yield numbers
    for label in size.forms:
        for name, T, updates in zip(size.tasks, size.horizons, size.updates, strict=True):
            arm = forms(size, updates)[label]
            part = {
                "task": name,
                "T": T,
                "arm": label,
                "updates": arm.steps,
                "rates": arm.rates,
                "entrants": size.entrants,
            }
            part |= options
            run = parts(part, partial(_train, arm, name, horizon=T, **options))
            numbers["learning"].setdefault(name, {})[label] = run
            yield numbers
    name, T = size.tasks[0], size.horizons[0]
    numbers["windows"] = {"task": name, "h": [], "test": []}
    options |= {"seeds": size.window_seeds, "looks": 2}
    for h in size.windows:
        arm = Arm(
            lambda rate, steps, h=h: short(
                size, steps, noise=Noise(entropy=Entropy()), window=h, environments=size.steps // h
            ),
            size.window_updates,
        )
        part = {"window": h, "steps": size.steps, "task": name, "T": T, "updates": arm.steps} | options
        run = parts(part, partial(_train, arm, name, horizon=T, **options))
        numbers["windows"]["h"].append(h)
        numbers["windows"]["test"].append(run["test"][-1])
        yield numbers


def _train(arm: Arm, name: str, **options: Any) -> dict[str, Any]:
    with jax.enable_x64(False):
        run = train(arm, name, **options)
    return {k: run[k] for k in ("update", "cpu", "rate", "test", "success", "evaluations", "test_by_rate")}


def _landscape(name: str, T: int, size: Size) -> dict[str, Any]:
    """J and the window's objective along one weight of a trained policy, and how rough each is."""
    with jax.enable_x64(False):
        task = make(name, horizon=T)
        key = jax.random.key(0)
        solver = short(size, size.updates[0], noise=Noise(entropy=Entropy()))
        policy = Neural.init(task, hidden=size.hidden, key=key)
        s0 = task.starts(jax.random.key(1), size.starts)

        @jax.jit
        def learn(policy, carry):
            def step(state, _):
                policy, carry = state
                return solver.update(policy, carry, task, s0, key=None)[:2], None

            return jax.lax.scan(step, (policy, carry), None, length=size.updates[0])[0]

        policy, carry = learn(policy, solver.init(policy, task))
    far = make(name, horizon=size.long)
    policy, critic, task, s0 = jax.tree.map(
        lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x, (policy, carry.target, task, s0[:8])
    )
    environments = start_environments(s0, s0.shape[0], task, staggered=False)

    def shifted(shift):
        W = policy.net.weights[0]
        return eqx.tree_at(lambda pi: pi.net.weights[0], policy, W.at[place].add(shift))

    def surrogate(policy):
        return window(policy, task, s0, environments, critic, length=32, discount=jnp.ones(()))[0]

    slope = jax.jit(jax.grad(lambda pi: mean_return(pi, task, s0)))(policy).net.weights[0]
    place = jnp.unravel_index(jnp.argmax(jnp.abs(slope)), slope.shape)
    shifts = jnp.linspace(-1.0, 1.0, size.shifts)
    J = jax.jit(lambda x: jax.lax.map(lambda e: mean_return(shifted(e), far, s0), x))(shifts)
    short_ = jax.jit(lambda x: jax.lax.map(lambda e: surrogate(shifted(e)), x))(shifts)
    return {"shift": shifts, "J": J, "window": short_}


def _roughness(y: Any) -> float:
    """The variation along the line over its range: 1 for what only rises or falls, 2 for one hill."""
    y = array(y)
    return float(np.sum(np.abs(np.diff(y))) / np.ptp(y))


def conclude(numbers: Any) -> str:
    """Seeds that learn, final costs, roughness and the best window."""
    said = [_sentence(name, runs) for name, runs in numbers["learning"].items()]
    if "landscape" in numbers:
        rough = {k: _roughness(numbers["landscape"][k]) for k in ("J", "window")}
        said.append(
            f"Along one weight the return over the long horizon varies by {rough['J']:.3g} times its range, the objective of a "
            f"window by {rough['window']:.3g} times."
        )
    if numbers.get("windows", {}).get("h"):
        test = {
            h: float(np.median(array(x))) for h, x in zip(*(numbers["windows"][k] for k in ("h", "test")), strict=True)
        }
        best = min(test, key=lambda h: test[h])
        said.append(
            f"At fixed N h, median costs by h: {', '.join(f'{h}: {x:.3g}' for h, x in test.items())}; best at {best}."
        )
    return " ".join(said)


def _sentence(name: str, runs: Any) -> str:
    said = []
    for label, run in runs.items():
        success, cost = array(run["success"]), array(run["test"])[-1]
        rate = "" if run["rate"] is None else f" at its best rate {run['rate']:g}"
        said.append(
            f"{label}{rate} {int(np.sum(success >= 0.95))} of {success.size} seeds (cost {np.median(cost):.3g}, "
            f"{cost.min():.3g} to {cost.max():.3g}; {run['evaluations'][-1]:.1e} evaluations, {run['cpu'][-1]:.0f} s)"
        )
    return f"{name}, seeds with at least 95% of the held-out starts successful: {'; '.join(said)}."


def paint(numbers: Any) -> Any:
    """Learning curves of each task, then the landscape and the windows."""
    tasks = numbers["learning"]
    figure, axes = sheet(1, [*([1.35] * len(tasks)), 0.9, 0.2])
    heading(figure, "Windows with a critic, beside backpropagation through the whole episode")
    styles = {label: style_of(label, index=i) for i, label in enumerate(FORMS)}
    for axis, (name, runs) in zip(axes[0], tasks.items(), strict=False):
        effort_axis(
            axis, [np.asarray(run["evaluations"], float) for run in runs.values()], "dynamics evaluations per seed"
        )
        log_limits(axis, "y", [array(run["test"]) for run in runs.values()])
        name_ends(axis, [band(axis, styles[k], run["evaluations"], array(run["test"])) for k, run in runs.items()])
        axis.set_ylabel("cost on held-out starts")
        title(axis, name)
    landscape, windows = axes[0][-2:]
    if "landscape" in numbers:
        found = numbers["landscape"]
        lines = []
        for i, (k, label) in enumerate([("J", "long return"), ("window", "window")]):
            y = array(found[k])
            y = (y - y.min()) / np.ptp(y)
            lines.append(band(landscape, style_of(label, index=i), found["shift"], y[:, None]))
        name_ends(landscape, lines)
    else:
        note(landscape, "not measured yet", 0.3, 0.5)
    landscape.set_xlabel("shift of one weight")
    landscape.set_ylabel("objective, as a share of its range")
    title(landscape, "landscape")
    if numbers.get("windows", {}).get("h"):
        found = numbers["windows"]
        log_limits(windows, "x", [found["h"]])
        log_limits(windows, "y", [array(found["test"])])
        band(windows, style_of("h", index=0), found["h"], array(found["test"]))
    else:
        note(windows, "not measured yet", 0.3, 0.5)
    windows.set_xlabel("window h [steps], N h fixed")
    windows.set_ylabel("cost on held-out starts")
    title(windows, "windows")
    return figure
