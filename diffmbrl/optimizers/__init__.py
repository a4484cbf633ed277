"""Optimisers of a policy's parameters."""

from diffmbrl.optimizers.continuation import Continuation
from diffmbrl.optimizers.damping import LevenbergMarquardt, Path
from diffmbrl.optimizers.descend import Descend
from diffmbrl.optimizers.gauss_newton import Dense, GaussNewton, Krylov
from diffmbrl.optimizers.natural import NaturalGradient, Radii
from diffmbrl.optimizers.newton import KrylovNewton

__all__ = [
    "Continuation",
    "Dense",
    "Descend",
    "GaussNewton",
    "Krylov",
    "KrylovNewton",
    "LevenbergMarquardt",
    "NaturalGradient",
    "Path",
    "Radii",
]
