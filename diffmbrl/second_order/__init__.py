"""Linear algebra along a trajectory: linearisation, Riccati sweeps, curvature products, Krylov spaces."""

from diffmbrl.second_order.curvature import CurvatureModel, Curved, fisher, gauss_newton, hessian
from diffmbrl.second_order.dense import dense, square_root
from diffmbrl.second_order.kkt import KKTStep, solve_with_gaps
from diffmbrl.second_order.krylov import Spectral, TruncatedCG, conjugate_gradients, lanczos
from diffmbrl.second_order.linearize import Linearization, feedback, linearize
from diffmbrl.second_order.parallel_riccati import parallel_riccati
from diffmbrl.second_order.projection import projection_gap
from diffmbrl.second_order.riccati import RiccatiSolution, adjoint, closed_loop, respond, riccati
from diffmbrl.second_order.sensitivity import growth, sensitivity, trust

__all__ = [
    "CurvatureModel",
    "Curved",
    "KKTStep",
    "Linearization",
    "RiccatiSolution",
    "Spectral",
    "TruncatedCG",
    "adjoint",
    "closed_loop",
    "conjugate_gradients",
    "dense",
    "feedback",
    "fisher",
    "gauss_newton",
    "growth",
    "hessian",
    "lanczos",
    "linearize",
    "parallel_riccati",
    "projection_gap",
    "respond",
    "riccati",
    "sensitivity",
    "solve_with_gaps",
    "square_root",
    "trust",
]
