"""The table that a new solver joins by one row; test_solvers.py and test_known_answers.py hold every row to its contract."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from diffmbrl import (
    DDP,
    ILQR,
    BestSoFar,
    Consensus,
    Continuation,
    GaussNewton,
    KrylovNewton,
    MultipleShooting,
    MultiStart,
    NewtonCG,
    OptaxSolver,
    Sequential,
    ShortHorizon,
)
from diffmbrl.contrib import LeafBlocks, Preconditioned, SignedJacobi
from diffmbrl.optimizers import (
    AdaptiveHorizon,
    Dense,
    Entropy,
    Krylov,
    LevenbergMarquardt,
    Noise,
    Sigma,
    SquareRoot,
)
from diffmbrl.optimizers.clipped import clipped_adam, clipped_muon
from diffmbrl.optimizers.soap import soap
from diffmbrl.planners import CEM, MPPI, ArgMax, Coloured, Normal, Sampling, Shooting, Uniform
from diffmbrl.second_order.curvature import gauss_newton


class Row(NamedTuple):
    """A solver and what it promises."""

    name: str
    solver: Any
    kind: str = "policy"  # or "plan": one start at a time, from Affine.zeros(task)
    monotone: bool = False  # the return of the objective never falls
    exact_on_lqr: bool = False  # one update of a plan reaches the optimum of a linear-quadratic task
    models: bool = True  # it reports its quadratic model
    gradients: bool = True  # it takes any: otherwise one that is not finite is nothing to it
    slow: bool = False  # its parts are in other rows, or it has a file of tests of its own


ADAM = OptaxSolver(optax.adam, learning_rate=3e-2)
SHORT: dict[str, Any] = {"window": 4, "environments": 6, "epochs": 2, "batches": 2, "hidden": (8,)}
REACH = AdaptiveHorizon(initial=2.0, low=1.0, high=4.0)

SOLVERS = [
    Row("adam", ADAM, models=False),
    Row("clipped adam", OptaxSolver(clipped_adam, learning_rate=3e-2, max_norm=0.5), models=False, slow=True),
    Row("annealed adam", OptaxSolver(optax.adam, learning_rate=6e-2, anneal=30.0), models=False, slow=True),
    Row("muon", OptaxSolver(clipped_muon, learning_rate=3e-2), models=False, slow=True),
    Row("soap", OptaxSolver(soap, learning_rate=3e-2, every=2), models=False, slow=True),
    Row("sgd", OptaxSolver(optax.sgd, learning_rate=3e-2), models=False, slow=True),
    Row("lbfgs", OptaxSolver(optax.lbfgs, memory_size=5), monotone=True, models=False),
    Row("gauss-newton", GaussNewton(), monotone=True, exact_on_lqr=True),
    Row("gauss-newton, chunked", GaussNewton(system=Krylov(8), chunk=3), monotone=True, slow=True),
    Row("gauss-newton, damped", GaussNewton(damping=LevenbergMarquardt()), monotone=True, slow=True),
    Row("dense gauss-newton", GaussNewton(system=Dense()), monotone=True, exact_on_lqr=True, slow=True),
    Row(
        "dense gauss-newton, damped",
        GaussNewton(system=Dense(), damping=LevenbergMarquardt()),
        monotone=True,
        slow=True,
    ),
    Row("square root gauss-newton", GaussNewton(system=SquareRoot()), monotone=True, exact_on_lqr=True, slow=True),
    Row("sigma-metric", GaussNewton(system=Sigma(rank=8)), monotone=True, slow=True),
    Row("preconditioned gauss-newton", GaussNewton(system=Preconditioned(rank=4)), monotone=True, slow=True),
    Row(
        "gauss-newton in its blocks' metric",
        GaussNewton(system=Preconditioned(LeafBlocks(), rank=4)),
        monotone=True,
        slow=True,
    ),
    Row("newton-cg", NewtonCG(), monotone=True, slow=True),
    Row("newton-cg of gauss-newton", NewtonCG(curvature=gauss_newton), monotone=True, slow=True),
    Row(
        "newton-cg of gauss-newton, preconditioned",
        NewtonCG(curvature=gauss_newton, preconditioner=SignedJacobi()),
        monotone=True,
        slow=True,
    ),
    Row("krylov-newton", KrylovNewton(rank=12, structured=12), monotone=True, exact_on_lqr=True),
    Row("consensus", Consensus(rank=8), monotone=True, slow=True),
    Row("continued adam", Continuation(ADAM, discounts=[0.8, 1.0], lengths=[2, 2]), models=False),
    Row(
        "continued lbfgs",
        Continuation(OptaxSolver(optax.lbfgs, memory_size=5), discounts=[0.8, 1.0], lengths=[2, 2]),
        models=False,
        slow=True,
    ),
    Row(
        "continued gauss-newton",
        Continuation(GaussNewton(system=Krylov(8)), discounts=[0.8, 1.0], lengths=[2, 2]),
        slow=True,
    ),
    Row(
        "trusting gauss-newton",
        Continuation(
            GaussNewton(system=Krylov(8)), discounts=[0.8, 1.0, 1.0], lengths=[2, 1, 1], trusts=[2.0, 2.0, jnp.inf]
        ),
        slow=True,
    ),
    Row(
        "raced gauss-newton",
        MultiStart(GaussNewton(system=Krylov(8)), entrants=3, updates=2, starts=3),
        monotone=True,
        slow=True,
    ),
    # Windows of half an episode, at all its phases, so that one in two environments meets the end.
    Row("short-horizon", ShortHorizon(ADAM, **SHORT), models=False, slow=True),
    Row(
        "short-horizon with noise, entropy and an adaptive horizon",
        ShortHorizon(ADAM, noise=Noise(0.1, entropy=Entropy(temperature=1e-3)), reach=REACH, **SHORT),
        models=False,
        slow=True,
    ),
    Row("the best of gauss-newton", BestSoFar(GaussNewton(system=Krylov(8))), monotone=True, slow=True),
    Row("adam, then gauss-newton", Sequential(ADAM, GaussNewton(system=Krylov(8)), updates=2), models=False, slow=True),
    Row("ilqr", ILQR(), "plan", monotone=True, exact_on_lqr=True, models=False),
    Row("ddp", DDP(), "plan", monotone=True, exact_on_lqr=True, models=False, slow=True),
    Row("multiple shooting", MultipleShooting(), "plan", exact_on_lqr=True, models=False, slow=True),
    Row("growing ilqr", Continuation.growing(ILQR(), 4, horizon=8), "plan", models=False, slow=True),
    Row(
        "random shooting",
        Sampling(ArgMax(), draw=Uniform(), samples=64, std=1.0),
        "plan",
        monotone=True,
        models=False,
        gradients=False,
        slow=True,
    ),
    Row(
        "cem",
        Sampling(CEM(elites=8), samples=64, std=1.0),
        "plan",
        monotone=True,
        models=False,
        gradients=False,
        slow=True,
    ),
    Row(
        "icem",
        Sampling(CEM(elites=8), draw=Coloured(1.0), samples=64, keep=4, std=1.0),
        "plan",
        monotone=True,
        models=False,
        gradients=False,
    ),
    Row(
        "mppi",
        Sampling(MPPI(), draw=Normal(), samples=64, std=1.0),
        "plan",
        monotone=True,
        models=False,
        gradients=False,
        slow=True,
    ),
    Row(
        "shooting",
        Shooting(OptaxSolver(optax.adam, learning_rate=0.1), starts=3, spread=0.3),
        "plan",
        models=False,
        slow=True,
    ),
]
