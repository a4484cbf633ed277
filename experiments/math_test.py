r"""What is an open loop worth where the question is seen only later, a plan made anew at each step, and a policy?

The math test (`tasks/math_test.py`): at the door take the test or go home (0); at the desk see two digits and write down their
sum, for 2000 or at a loss of 1000. Bars are exact, by enumeration of all plans and policies in fractions:
* the best plan, and the best of those that take the test;
* the best plan through the mean, a test of 4.5 + 4.5: what it believes to earn, and what it earns;
* MPC, which applies the first choice of the best plan at each step: from the door, and if it is put before the test;
* MPC whose model draws one test, and plans as though that were the one to come;
* the best policy; and the greedy policies of Q-learning and of Dyna-Q, learned from real steps (median over seeds).

Crosses are the package's own planner (CEM on sequences of actions) in the same places: its plan's value, and the mean return of
its MPC over real tests.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.agents.dyna_q import DynaQ
from diffmbrl.core import Task
from diffmbrl.planners import MPC, Sampling
from diffmbrl.policies import OpenLoop
from diffmbrl.render.palette import INK, MUTED
from diffmbrl.report.figures import name_ends, style_of
from diffmbrl.rollout import episode_return, episode_returns
from diffmbrl.tasks.finite import Finite, Lookup, followed, open_loop, optimal_q, planned, replanned
from diffmbrl.tasks.math_test import DESK, choice, finite_model, math_test
from experiments.record import array
from experiments.sheet import band, heading, sheet, title

EXPECTED = (
    "The best plan goes home and earns 0, and so does MPC that plans open loop at each step, though before the test it answers "
    "right; the best policy takes the test and earns 2000; Q-learning and Dyna-Q find it, Dyna-Q in fewer real steps."
)
BEST, TAKES, MEAN, REPLANNED = "best plan", "best plan that takes it", "plan through the mean test", "MPC"
SEATED, DRAWN, POLICY = "MPC, put before the test", "MPC on one drawn test", "best policy"
LEARNED = {"Q-learning": 0, "Dyna-Q": 10}  # planning steps


class Size(NamedTuple):
    """How much is measured."""

    seeds: int
    looks: int  # at what was learned
    steps: int  # real ones between two looks
    samples: int  # sequences of the planner
    particles: int  # tests that each of them is scored on
    iterations: int
    tests: int  # real ones that its MPC meets
    rate: float
    exploration: float


FULL = Size(20, 40, 250, 256, 100, 4, 20, 0.5, 0.1)
QUICK = FULL._replace(seeds=4, looks=8, steps=1000, particles=40, tests=5)


def measure(size: Size, parts: Any):
    """Exact values, what the planner does, what is learned."""
    task = math_test()
    finite = finite_model(task)
    numbers = {"exact": parts({"part": "exact"}, lambda: exact(task, finite))}
    keys = ("samples", "particles", "iterations", "tests")
    key = {"part": "planner"} | {name: getattr(size, name) for name in keys}
    numbers["planner"] = parts(key, lambda: _planner(task, finite, size))
    yield numbers
    for name, planning in LEARNED.items():
        key = {"part": name, "planning": planning} | {k: v for k, v in size._asdict().items() if k not in keys}
        numbers[name] = parts(key, lambda planning=planning: _learn(task, finite, planning, size))
        yield numbers


def exact(task: Task, finite: Finite) -> dict[str, Any]:
    """The values of all ways to decide, from the door; fractions until here."""
    steps = task.horizon
    best, plan = open_loop(finite, 0, steps)
    taking = max(planned(finite, 0, (1, a)) for a in range(len(finite.a)))
    believed, through_mean = _through_the_mean(task, finite)
    found = {
        BEST: best,
        TAKES: taking,
        MEAN: planned(finite, 0, through_mean),
        REPLANNED: replanned(finite, 0, steps),
        SEATED: sum((p * replanned(finite, s, steps - 1) for s, p in finite.following[0][1].items()), Fraction(0)),
        DRAWN: _on_one_draw(finite, steps),
        POLICY: max(optimal_q(finite, steps)[0][0]),
    }
    values = {name: float(x) for name, x in found.items()}
    return {"values": values, "believed": believed, "goes home": finite.a[plan[0]][0] < 0}


def _through_the_mean(task: Task, finite: Finite) -> tuple[float, tuple[int, int]]:
    """The best plan of the task without noise: what it is thought to earn, and its choices."""
    a = jnp.asarray(finite.a)
    A = a.shape[0]
    plans = jnp.stack([jnp.repeat(a, A, axis=0), jnp.tile(a, (A, 1))], axis=1)
    s0 = jnp.asarray(finite.s[0])
    J = np.asarray(jax.jit(jax.vmap(lambda plan: episode_return(OpenLoop(plan), task, s0)))(plans))
    return float(J.max()), (int(J.argmax()) // A, int(J.argmax()) % A)


def _on_one_draw(finite: Finite, steps: int) -> Fraction:
    """MPC from the door whose plan is made for one test, drawn evenly, and that then sees another."""
    total = Fraction(0)
    for drawn, p in finite.following[0][1].items():
        door = [{drawn: Fraction(1)} if len(ahead) > 1 else ahead for ahead in finite.following[0]]
        certain = finite._replace(following=[door, *finite.following[1:]])
        a = open_loop(certain, 0, steps)[1][0]
        ahead = finite.following[0][a].items()
        total += p * (finite.r[0][a] + sum(q * replanned(finite, s, steps - 1) for s, q in ahead))
    return total


def _planner(task: Task, finite: Finite, size: Size) -> dict[str, float]:
    """CEM's plan by its exact value, and the mean return of MPC with it over real tests."""
    door = jnp.asarray(finite.s[0])
    tests = jnp.asarray(finite.s[3:])[:: max(1, (len(finite.s) - 3) // size.tests)]
    # Wide, since an answer that is far from the last one must be found again.
    cem = Sampling(samples=size.samples, particles=size.particles, share=0.5)
    key = jax.random.key(0)

    def controller(planner: Sampling, task: Task) -> MPC:
        return MPC.init(planner, task, horizon=2, iterations=size.iterations, key=key)

    @jax.jit
    def run(mpc: MPC, blind: MPC) -> tuple[Any, Any, Any, Any]:
        def improve(i, state):
            plan, carry = state
            return cem.update(plan, carry, task, door, key=jax.random.fold_in(key, i))[:2]

        rest = OpenLoop.zeros(task)
        plan, _ = jax.lax.fori_loop(0, size.iterations, improve, (rest, cem.init(rest, task)))
        doors = jnp.broadcast_to(door, tests.shape)
        seen = episode_returns(mpc, task, jnp.concatenate([doors, tests]), key).reshape(2, -1)
        return plan.a, *jnp.mean(seen, axis=1), jnp.mean(episode_returns(blind, task, doors, key))

    actions, *earned = run(controller(cem, task), controller(Sampling(samples=size.samples, share=0.5), task))
    plan = tuple(int(choice(a)) + 1 for a in actions)
    names = (REPLANNED, SEATED, DRAWN)
    return {BEST: float(planned(finite, 0, plan))} | {n: float(x) for n, x in zip(names, earned, strict=True)}


def _learn(task: Task, finite: Finite, planning: int, size: Size) -> dict[str, Any]:
    """The exact value of the greedy policy and the error of Q, against real steps; [looks, seeds]."""
    agent = DynaQ(rate=size.rate, exploration=size.exploration, planning=planning)
    lookup = Lookup.of(finite)
    optimal = best_q(finite, task.horizon)

    @jax.jit
    def seed(key):
        def look(carry, _):
            carry = agent.run(carry, task, lookup, key, steps=size.steps)
            return carry, carry.Q

        return jax.lax.scan(look, agent.init(task, lookup, key), None, length=size.looks)[1]

    Q = np.asarray(jax.jit(jax.vmap(seed))(jax.random.split(jax.random.key(1), size.seeds)))
    greedy = [[float(followed(finite, 0, q.argmax(-1).tolist(), task.horizon)) for q in run] for run in Q]
    return {
        "steps": size.steps * (1 + np.arange(size.looks)),
        "value": np.transpose(greedy),
        "error": np.abs(Q - optimal).mean((2, 3)).T,
    }


def best_q(finite: Finite, steps: int) -> np.ndarray:
    """Q* of the states as they are met: the door with all its steps left, the desk with one less."""
    Q = optimal_q(finite, steps)
    return np.array([[float(x) for x in Q[int(s[0] == DESK)][i]] for i, s in enumerate(finite.s)])


def conclude(numbers: Any) -> str:
    """The values, whether the planner agrees, and how many real steps learning took."""
    exact, values = numbers["exact"], numbers["exact"]["values"]
    said = [
        f"The best plan {'goes home' if exact['goes home'] else 'takes the test'} and earns {values[BEST]:g} (the best that "
        f"takes the test {values[TAKES]:g}; through the mean test it believes in {exact['believed']:g} and earns "
        f"{values[MEAN]:g}); MPC earns {values[REPLANNED]:g}, put before the test {values[SEATED]:g}; the best policy "
        f"{values[POLICY]:g}. MPC whose model shows it one drawn test takes the test because it believes to know it, and earns "
        f"{values[DRAWN]:g} because it then sees."
    ]
    off = {name: x - values[name] for name, x in numbers["planner"].items()}
    most = max(off, key=lambda name: abs(off[name]))
    said.append(f"CEM in these places is off by at most {abs(off[most]):g} ({most}).")
    when = {}
    for name in (name for name in LEARNED if name in numbers):
        steps, value = array(numbers[name]["steps"]), np.median(array(numbers[name]["value"]), axis=1)
        error = np.median(array(numbers[name]["error"])[-1])
        won, optimal = steps[first(value > values[BEST])], steps[first(value >= values[POLICY])]
        when[name] = optimal if value[-1] >= values[POLICY] else np.inf
        said.append(
            f"{name} beats the best plan after {won:g} real steps and is "
            f"{f'optimal after {optimal:g}' if np.isfinite(when[name]) else 'never optimal'} (medians); its Q is then, after "
            f"{steps[-1]:g}, off by {error:.2g} on average."
        )
    if len(when) == len(LEARNED) and len(set(when.values())) == 1:
        said.append(
            "Planning saves no real steps here, though it makes the table better: every test has to be met and answered before "
            "its row of the table is right, and a model of what was met says nothing of what was not."
        )
    return " ".join(said)


def first(reached: np.ndarray) -> int:
    """The index from which on it holds, or the last."""
    missing = np.flatnonzero(~reached)
    return int(min(missing[-1] + 1, len(reached) - 1)) if missing.size else 0


STYLES = {name: style_of(name, index=i) for i, name in enumerate(LEARNED)}


def paint(numbers: Any) -> Any:
    """Bars of all values; the value of what is learned, and the error of Q, against real steps."""
    values = dict(numbers["exact"]["values"])
    for name in LEARNED:
        if name in numbers:
            values[name] = float(np.median(array(numbers[name]["value"])[-1]))
    figure, axes = sheet(1, (0.3, 0.85, 0.85))
    heading(figure, "The math test: an open loop goes home")
    bars, curves, errors = axes[0]
    place = np.arange(len(values))[::-1]
    colours = [STYLES[name].colour if name in STYLES else MUTED for name in values]
    bars.barh(place - 0.2, list(values.values()), color=colours, height=0.36)
    bars.axvline(0, color=INK, linewidth=0.8)
    bars.set_xlim(-1200, 2300)
    bars.set_xticks([-1000, 0, 1000, 2000])
    bars.set_yticks([])
    bars.set_xlabel("return")
    for y, (name, x) in zip(place, values.items(), strict=True):
        bars.text(-1150, y + 0.06, f"{name}: {x:g}", fontsize=7.5, va="bottom", color=INK)
        if name in numbers["planner"]:
            bars.plot(numbers["planner"][name], y - 0.2, "x", color=INK, markersize=5)
    title(bars, "what each earns (x: CEM, run)")
    for axis, what in ((curves, "value"), (errors, "error")):
        lines = [
            band(axis, STYLES[name], numbers[name]["steps"], array(numbers[name][what]))
            for name in STYLES
            if name in numbers
        ]
        axis.set_xlabel("real steps")
        name_ends(axis, lines)
    curves.axhline(values[BEST], color=INK, linewidth=0.8, linestyle=":")
    curves.axhline(values[POLICY], color=INK, linewidth=0.8, linestyle=":")
    curves.set_ylabel("return of the greedy policy")
    title(curves, "learned, exact value")
    errors.set_ylabel("mean |Q - Q*|")
    title(errors, "error of the table")
    return figure
