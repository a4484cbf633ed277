"""The table of named methods: a new solver, planner or estimator is one row."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import optax

from diffmbrl.core import Solver, Task
from diffmbrl.gradients import Entropy, Noise, ShortHorizon
from diffmbrl.gradients.registry import estimator
from diffmbrl.optimizers import (
    Consensus,
    Continuation,
    Dense,
    Descend,
    GaussNewton,
    KeepBest,
    Krylov,
    KrylovNewton,
    LevenbergMarquardt,
    NewtonCG,
    Raced,
    Relay,
    Sigma,
    SquareRoot,
)
from diffmbrl.optimizers.clipped import clipped_adam, clipped_muon, clipped_sgd, clipped_soap
from diffmbrl.planners import (
    CEM,
    ILQR,
    MPPI,
    Best,
    Coloured,
    EffectiveSize,
    Even,
    MultipleShooting,
    Normal,
    Sampling,
    SecondOrder,
    Shooting,
)
from diffmbrl.tasks.registry import known

CONTINUATIONS = ("default", "discounts", "trust", "measured", "none")


class Method(NamedTuple):
    """How a method is made and run in a comparison."""

    make: Callable[[float | None, int, Task], Solver]  # of a learning rate, where it has one, and the number of updates
    order: int  # 1 or 2, 0 without gradients; L-BFGS counts as 1: it is given gradients only
    kind: str  # "policy", or "plan": every start is planned anew
    steps: int  # updates by default
    rates: tuple[float, ...] = ()  # learning rates swept by default; none for a method without one
    sequential: bool = False  # seeds one after another: its line search branches, and `vmap` would run both branches
    default: bool = True  # whether `compare` runs it unasked
    most_parameters: int | None = None  # beyond which it does not fit
    race: float = 0.0  # share of the updates over which four first policies race; 0 for no race
    continuation: str = "discounts"  # the schedule by default: "discounts", "trust", "growing" for plans, or "none"
    estimator: str = "bptt"  # of the gradient, in methods that take one
    own_gradient: bool = False  # its gradient is part of the method: it takes no other
    words: str = ""  # what it is, in a line

    @property
    def takes_estimator(self) -> bool:
        """Whether its policy gradient can be another: of first-order methods without a line search, on policies."""
        return self.order == 1 and self.kind == "policy" and not (self.sequential or self.own_gradient)

    @property
    def draws(self) -> bool:
        """Whether its updates need a key."""
        return estimator(self.estimator)[1].draws

    @property
    def differentiates(self) -> bool:
        """Whether it needs derivatives of the reward in the actions."""
        return self.order > 0 and estimator(self.estimator)[1].differentiates


# The rates of first-order methods: the best of those tried on `cartpole-balance` and `pendulum-swingup`, and its neighbours.
METHODS: dict[str, Method] = {
    "adam": Method(
        lambda rate, steps, task: Descend(clipped_adam, learning_rate=rate),
        1,
        "policy",
        600,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        words="Adam on the gradient through time, clipped",
    ),
    "adam-decay": Method(
        lambda rate, steps, task: Descend(clipped_adam, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(3e-3, 1e-2, 3e-2),
        default=False,
        words="the same, its rate annealed to 0",
    ),
    "muon": Method(
        lambda rate, steps, task: Descend(clipped_muon, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(1e-2, 3e-2, 1e-1),
        default=False,
        words="Muon: orthogonalised momentum, clipped and annealed",
    ),
    "soap": Method(
        lambda rate, steps, task: Descend(clipped_soap, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(3e-3, 1e-2, 3e-2),
        default=False,
        words="SOAP: Adam in Shampoo's eigenbasis, clipped and annealed",
    ),
    "sgd": Method(
        lambda rate, steps, task: Descend(clipped_sgd, learning_rate=rate),
        1,
        "policy",
        600,
        rates=(1e-2, 1e-1, 1.0),
        default=False,
        words="gradient descent, clipped",
    ),
    "lbfgs": Method(
        lambda rate, steps, task: Descend(optax.lbfgs, memory_size=20),
        1,
        "policy",
        600,
        sequential=True,
        words="L-BFGS with a line search",
    ),
    # Ten products rather than thirty: the path takes short steps, for which more change nothing.
    "gauss-newton": Method(
        lambda rate, steps, task: GaussNewton(system=Krylov(10)),
        2,
        "policy",
        150,
        continuation="trust",
        words="Gauss-Newton through the rollout, by products; the best of a path of dampings",
    ),
    "gauss-newton-dense": Method(
        lambda rate, steps, task: GaussNewton(system=Dense()),
        2,
        "policy",
        150,
        default=False,
        most_parameters=3000,
        continuation="trust",
        words="the same with the matrix itself",
    ),
    "gauss-newton-lm": Method(
        lambda rate, steps, task: GaussNewton(damping=LevenbergMarquardt()),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        words="the same with one damping, adapted (Levenberg-Marquardt)",
    ),
    "gauss-newton-sqrt": Method(
        lambda rate, steps, task: GaussNewton(system=SquareRoot()),
        2,
        "policy",
        150,
        default=False,
        most_parameters=1000,
        continuation="trust",
        words="the same by a square root of the matrix, for float32",
    ),
    "sigma-metric": Method(
        lambda rate, steps, task: GaussNewton(system=Sigma()),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        words="between Gauss-Newton and imitation of the planner's step",
    ),
    "newton-cg": Method(
        lambda rate, steps, task: NewtonCG(),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        words="the true Hessian by conjugate gradients, in a trust region",
    ),
    "consensus": Method(
        lambda rate, steps, task: Consensus(),
        2,
        "policy",
        75,
        default=False,
        continuation="trust",
        words="guided policy search: iLQR around the policy, regression onto its trajectories",
    ),
    "krylov-newton": Method(
        lambda rate, steps, task: KrylovNewton(),
        2,
        "policy",
        100,
        continuation="trust",
        race=0.2,
        words="Gauss-Newton, saddle-free Newton and an imitated gradient, judged together; the best of four first policies",
    ),
    "newton-dense": Method(
        lambda rate, steps, task: KrylovNewton(rank=None),
        2,
        "policy",
        40,
        default=False,
        most_parameters=1500,
        continuation="trust",
        words="the same with the matrices themselves",
    ),
    # Noise at a learned price: without, a policy soon holds a hanging pole still, and stays there.
    "short-horizon": Method(
        lambda rate, steps, task: ShortHorizon(
            Descend(clipped_adam, learning_rate=rate, anneal=float(steps)), noise=Noise(entropy=Entropy())
        ),
        1,
        "policy",
        1200,
        rates=(5e-3,),
        default=False,
        continuation="none",
        own_gradient=True,
        # Which of them hold the pole shows late: after 300 of 1200 updates in one run in ten, after 600 in all.
        race=0.5,
        words="short windows with a critic behind them, noise at a price of entropy",
    ),
    "explored-newton": Method(
        lambda rate, steps, task: _explored_newton(rate, steps, task),
        2,
        "policy",
        1340,
        rates=(5e-3,),
        default=False,
        continuation="none",
        own_gradient=True,
        words="short-horizon's search, then Krylov-Newton from what it found, without a schedule and with; the best of all",
    ),
    "ilqr": Method(
        lambda rate, steps, task: ILQR.within(task),
        2,
        "plan",
        100,
        continuation="growing",
        words="iterative LQR, within the limits of the actions",
    ),
    "random-shooting": Method(
        lambda rate, steps, task: Sampling(Best(), draw=Even(), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        words="the best of many plans drawn evenly",
    ),
    "cem": Method(
        lambda rate, steps, task: Sampling(CEM(elites=32), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        words="cross-entropy method: a normal distribution refitted to the best plans",
    ),
    "icem": Method(
        lambda rate, steps, task: Sampling(CEM(elites=32), draw=Coloured(2.0), samples=256, keep=8, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        words="the same with coloured noise, the best plans kept",
    ),
    "mppi": Method(
        lambda rate, steps, task: Sampling(MPPI(EffectiveSize(10.0)), draw=Normal(), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        words="path integral control: the mean of plans weighted by their returns",
    ),
    "shooting": Method(
        lambda rate, steps, task: Shooting(Descend(optax.lbfgs, memory_size=10)),
        1,
        "plan",
        100,
        default=False,
        continuation="none",
        words="L-BFGS on the actions",
    ),
    "ddp": Method(
        lambda rate, steps, task: ILQR.within(task, model=SecondOrder()),
        2,
        "plan",
        100,
        default=False,
        continuation="growing",
        words="iLQR with the second derivatives of the dynamics",
    ),
    "multiple-shooting": Method(
        lambda rate, steps, task: MultipleShooting(),
        2,
        "plan",
        100,
        default=False,
        continuation="growing",
        words="states and actions together, from states that the dynamics do not follow; meets constraints",
    ),
}


def method(name: str) -> tuple[str, Method]:
    """A row of METHODS by name; `gauss_newton` is `gauss-newton`.

    Raises: `ValueError` naming the nearest for an unknown one.

    >>> method("gauss_newton")[0]
    'gauss-newton'
    """
    name = known("method", name.replace("_", "-"), METHODS)
    return name, METHODS[name]


def estimated(name: str, row: Method, estimators: Sequence[str]) -> list[tuple[str, Method]]:
    """The method with each of the estimators of its gradient, as `adam+truncated`; as it is with "bptt" or none named.

    Second-order methods and planners take none: they differentiate more than a policy's gradient, or no policy.
    Raises: `ValueError` for an unknown estimator, or one other than "bptt" for a method that searches along a line.
    """
    rows = [estimator(given) for given in estimators]
    if not row.takes_estimator or not rows:
        refused = [given for given, _ in rows if given != "bptt"]
        if row.sequential and refused:
            raise ValueError(
                f"{name} takes no --estimator {refused[0]}: its line search differentiates the return itself; leave {name} "
                "out, or take adam"
            )
        return [(name, row)]

    def made(make: Any) -> Any:
        return lambda rate, steps, task: eqx.tree_at(
            lambda descend: descend.gradient, row.make(rate, steps, task), make(task), is_leaf=lambda x: x is None
        )

    return [
        (name, row) if given == "bptt" else (f"{name}+{given}", row._replace(make=made(chosen.make), estimator=given))
        for given, chosen in rows
    ]


def solver(row: Method, task: Task, *, rate: float | None, steps: int, continuation: str) -> Solver:
    """The method's solver for `steps` updates, inside a continuation unless that is "none".

    "default" is the row's own: discounts .8, .9, .95, .98, 1 for first-order methods; discounts and trust in the measured
    sensitivity of each start for second-order ones; growing horizons for iLQR, which a discount does not help. Sampling
    planners and shooting, which do worse with those, have none, whatever is asked. "discounts", "trust" and "measured"
    (discounts as the measured growth of the closed loop allows them) give all policy methods the same. A raced method goes
    on with the best of four policies after its share of the updates.
    Raises: `ValueError` for another name, or fewer updates than stages.
    """
    known("continuation", continuation, CONTINUATIONS)
    inner = row.make(rate, steps, task)
    made = inner if "none" in (continuation, row.continuation) else _continued(inner, row, task, steps, continuation)
    return Raced(made, updates=max(1, round(row.race * steps))) if row.race else made


def _explored_newton(rate: float | None, steps: int, task: Task) -> Relay:
    """Of 1340 updates the last 140 are of second order: without a schedule and with, and the best of all is kept."""
    last = max(8, steps * 140 // 1340)
    searching = max(1, steps - last)
    search = solver(METHODS["short-horizon"], task, rate=rate, steps=searching, continuation="default")
    return Relay(search, KeepBest(Continuation.resumed(KrylovNewton(), last)), updates=searching)


def _continued(inner: Solver, row: Method, task: Task, steps: int, continuation: str) -> Continuation:
    if row.kind == "plan":
        return Continuation.growing(inner, steps, horizon=task.horizon)
    chosen = row.continuation if continuation == "default" else continuation
    return {
        "discounts": Continuation.discounted,
        "trust": Continuation.trusted,
        "measured": Continuation.measured,
    }[chosen](inner, steps)


def schedule(made: Solver) -> list[list[float | int | None]] | None:
    """The stages of a continuation as [discount, updates, bound of trust or None], for the record; None without one."""
    made = made.solver if isinstance(made, Raced) else made
    if not isinstance(made, Continuation):
        return None
    bounds = [None] * made.lengths.size if made.trusts is None else made.trusts.tolist()
    stages = zip(made.discounts.tolist(), made.lengths.tolist(), bounds, strict=True)
    return [
        [round(discount, 6), updates, None if bound is None or math.isinf(bound) else bound]
        for discount, updates, bound in stages
    ]
