"""Optimisers of a policy's parameters."""

from diffmbrl.optimizers.consensus import Consensus
from diffmbrl.optimizers.damping import DampingGrid, LevenbergMarquardt, TrustRegion
from diffmbrl.optimizers.gauss_newton import GaussNewton
from diffmbrl.optimizers.natural import KLGrid, NaturalGradient
from diffmbrl.optimizers.newton import KrylovNewton
from diffmbrl.optimizers.newton_cg import NewtonCG
from diffmbrl.optimizers.optax_solver import OptaxSolver
from diffmbrl.optimizers.sensitivity_gate import SensitivityGate
from diffmbrl.optimizers.short_horizon import AdaptiveHorizon, Entropy, Noise, ShortHorizon, StiffCut
from diffmbrl.optimizers.systems import Dense, Krylov, Preconditioned, Sigma, SquareRoot
from diffmbrl.optimizers.wrappers.best_so_far import BestSoFar
from diffmbrl.optimizers.wrappers.continuation import Continuation
from diffmbrl.optimizers.wrappers.minibatch import MiniBatch
from diffmbrl.optimizers.wrappers.multi_start import MultiStart
from diffmbrl.optimizers.wrappers.sequential import Sequential

__all__ = [
    "AdaptiveHorizon",
    "BestSoFar",
    "Consensus",
    "Continuation",
    "DampingGrid",
    "Dense",
    "Entropy",
    "GaussNewton",
    "KLGrid",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "MiniBatch",
    "MultiStart",
    "NaturalGradient",
    "NewtonCG",
    "Noise",
    "OptaxSolver",
    "Preconditioned",
    "SensitivityGate",
    "Sequential",
    "ShortHorizon",
    "Sigma",
    "SquareRoot",
    "StiffCut",
    "TrustRegion",
]
