"""Components that work and that no method, experiment or part of the library needs; the library never imports them."""

from diffmbrl.contrib.natural_gradient import KLGrid, NaturalGradient
from diffmbrl.contrib.preconditioners import Jacobi, Kronecker, LeafBlocks, Preconditioned, SignedJacobi
from diffmbrl.contrib.sensitivity_gate import SensitivityGate
from diffmbrl.contrib.simplex_memory import SimplexMemory

__all__ = [
    "Jacobi",
    "KLGrid",
    "Kronecker",
    "LeafBlocks",
    "NaturalGradient",
    "Preconditioned",
    "SensitivityGate",
    "SignedJacobi",
    "SimplexMemory",
]
