"""The table of named methods. A new solver or planner is one row."""

import optax

from diffmbrl.choices import validate_choice
from diffmbrl.core import Task
from diffmbrl.methods.row import Method, solver
from diffmbrl.optimizers import (
    BestSoFar,
    Consensus,
    Continuation,
    Dense,
    Entropy,
    GaussNewton,
    Krylov,
    KrylovNewton,
    LevenbergMarquardt,
    NewtonCG,
    Noise,
    OptaxSolver,
    Sequential,
    ShortHorizon,
    Sigma,
    SquareRoot,
)
from diffmbrl.optimizers.clipped import clipped_adam, clipped_muon, clipped_sgd, clipped_soap
from diffmbrl.planners import (
    CEM,
    ILQR,
    MPPI,
    ArgMax,
    Coloured,
    EffectiveSize,
    MultipleShooting,
    Normal,
    Sampling,
    SecondOrder,
    Shooting,
    Uniform,
)

# The rates of first-order methods: the best of those tried on `cartpole-balance` and `pendulum-swingup`, and its neighbours.
METHODS: dict[str, Method] = {
    "adam": Method(
        lambda rate, steps, task: OptaxSolver(clipped_adam, learning_rate=rate),
        1,
        "policy",
        600,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        description="Adam on the clipped gradient through time",
    ),
    "adam-decay": Method(
        lambda rate, steps, task: OptaxSolver(clipped_adam, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(3e-3, 1e-2, 3e-2),
        default=False,
        description="Adam with a learning rate annealed to 0",
    ),
    "muon": Method(
        lambda rate, steps, task: OptaxSolver(clipped_muon, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(1e-2, 3e-2, 1e-1),
        default=False,
        description="Muon: orthogonalised momentum, clipped and annealed",
    ),
    "soap": Method(
        lambda rate, steps, task: OptaxSolver(clipped_soap, learning_rate=rate, anneal=float(steps)),
        1,
        "policy",
        600,
        rates=(3e-3, 1e-2, 3e-2),
        default=False,
        description="SOAP: Adam in Shampoo's eigenbasis, clipped and annealed",
    ),
    "sgd": Method(
        lambda rate, steps, task: OptaxSolver(clipped_sgd, learning_rate=rate),
        1,
        "policy",
        600,
        rates=(1e-2, 1e-1, 1.0),
        default=False,
        description="gradient descent on the clipped gradient",
    ),
    "lbfgs": Method(
        lambda rate, steps, task: OptaxSolver(optax.lbfgs, memory_size=20),
        1,
        "policy",
        600,
        sequential=True,
        description="L-BFGS with a line search",
    ),
    # Ten products rather than thirty: the grid of dampings selects short steps, which more products do not change.
    "gauss-newton": Method(
        lambda rate, steps, task: GaussNewton(system=Krylov(10)),
        2,
        "policy",
        150,
        continuation="trust",
        description="Gauss-Newton through the rollout by matrix-vector products; takes the best of a grid of dampings",
    ),
    "gauss-newton-dense": Method(
        lambda rate, steps, task: GaussNewton(system=Dense()),
        2,
        "policy",
        150,
        default=False,
        most_parameters=3000,
        continuation="trust",
        description="Gauss-Newton with the dense matrix",
    ),
    "gauss-newton-lm": Method(
        lambda rate, steps, task: GaussNewton(damping=LevenbergMarquardt()),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        description="Gauss-Newton with one adaptive damping (Levenberg-Marquardt)",
    ),
    "gauss-newton-sqrt": Method(
        lambda rate, steps, task: GaussNewton(system=SquareRoot()),
        2,
        "policy",
        150,
        default=False,
        most_parameters=1000,
        continuation="trust",
        description="Gauss-Newton by a square root of the matrix, for float32",
    ),
    "sigma-metric": Method(
        lambda rate, steps, task: GaussNewton(system=Sigma()),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        description="interpolates between Gauss-Newton and imitation of the planner's step",
    ),
    "newton-cg": Method(
        lambda rate, steps, task: NewtonCG(),
        2,
        "policy",
        150,
        default=False,
        continuation="trust",
        description="Newton with the true Hessian, by conjugate gradients in a trust region",
    ),
    "consensus": Method(
        lambda rate, steps, task: Consensus(),
        2,
        "policy",
        75,
        default=False,
        continuation="trust",
        description="guided policy search: iLQR around the policy, then regression onto its trajectories",
    ),
    "krylov-newton": Method(
        lambda rate, steps, task: KrylovNewton(),
        2,
        "policy",
        100,
        continuation="trust",
        race=0.2,
        description="takes the best of Gauss-Newton, saddle-free Newton and imitation steps; "
        "starts from the best of four policies",
    ),
    "newton-dense": Method(
        lambda rate, steps, task: KrylovNewton(rank=None),
        2,
        "policy",
        40,
        default=False,
        most_parameters=1500,
        continuation="trust",
        description="Krylov-Newton with the dense matrices",
    ),
    # The noise has a learned temperature: without noise, a policy soon holds a hanging pole still and never leaves it.
    "short-horizon": Method(
        lambda rate, steps, task: ShortHorizon(
            OptaxSolver(clipped_adam, learning_rate=rate, anneal=float(steps)), noise=Noise(entropy=Entropy())
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
        description="gradients through short windows that end in a critic, with entropy-regularised noise",
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
        description="short-horizon, then Krylov-Newton from its policy, without and with a schedule; "
        "returns the best policy of all",
    ),
    # Fifteen updates for each of twenty horizons: with five, 15 of 32 starts of the cart-pole's swing-up do not get there (20.6
    # on average in place of 6.0).
    "ilqr": Method(
        lambda rate, steps, task: ILQR.with_limits(task),
        2,
        "plan",
        300,
        continuation="growing",
        description="iterative LQR within the action limits",
    ),
    "random-shooting": Method(
        lambda rate, steps, task: Sampling(ArgMax(), draw=Uniform(), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        description="best of many plans drawn uniformly",
    ),
    "cem": Method(
        lambda rate, steps, task: Sampling(CEM(elites=32), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        description="cross-entropy method: refits a normal distribution to the best plans",
    ),
    "icem": Method(
        lambda rate, steps, task: Sampling(CEM(elites=32), draw=Coloured(2.0), samples=256, keep=8, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        description="cross-entropy method with coloured noise that keeps the best plans",
    ),
    "mppi": Method(
        lambda rate, steps, task: Sampling(MPPI(EffectiveSize(10.0)), draw=Normal(), samples=256, std=1.0),
        0,
        "plan",
        100,
        default=False,
        continuation="none",
        description="path integral control: average of plans weighted by their returns",
    ),
    "shooting": Method(
        lambda rate, steps, task: Shooting(OptaxSolver(optax.lbfgs, memory_size=10)),
        1,
        "plan",
        100,
        default=False,
        continuation="none",
        description="L-BFGS on the actions",
    ),
    "ddp": Method(
        lambda rate, steps, task: ILQR.with_limits(task, model=SecondOrder()),
        2,
        "plan",
        300,
        default=False,
        continuation="growing",
        description="iLQR with the second derivatives of the dynamics",
    ),
    "multiple-shooting": Method(
        lambda rate, steps, task: MultipleShooting(),
        2,
        "plan",
        300,
        default=False,
        continuation="growing",
        description="optimises states and actions together, from any guess of the states; meets constraints",
    ),
}


ALIASES = {"newton": "krylov-newton", "auto": "explored-newton"}  # short names for the two that are tried first


def method(name: str) -> tuple[str, Method]:
    """A row of METHODS by its name or its alias (`newton`, `auto`); `gauss_newton` is `gauss-newton`.

    Args:
        name: The method's name, with hyphens or underscores.

    Returns:
        The method's name in METHODS, and its row.

    Raises:
        ValueError: If the name is unknown; the message says which is nearest.

    >>> method("gauss_newton")[0], method("auto")[0]
    ('gauss-newton', 'explored-newton')
    """
    name = name.replace("_", "-")
    name = validate_choice("method", ALIASES.get(name, name), METHODS)
    return name, METHODS[name]


def _explored_newton(rate: float | None, steps: int, task: Task) -> Sequential:
    """The last 140 of 1340 updates are second order, without and with a schedule; the best policy of all is returned."""
    last = max(8, steps * 140 // 1340)
    searching = max(1, steps - last)
    search = solver(METHODS["short-horizon"], task, rate=rate, steps=searching, continuation="default")
    then = Continuation.resumed(KrylovNewton(), last, horizon=task.horizon)
    return Sequential(search, BestSoFar(then), updates=searching)
