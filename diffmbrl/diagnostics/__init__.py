"""Diagnostics of a policy's gradient: its health by horizon, noise, bias, Jacobians, Lyapunov exponents, curvature, slices."""

from diffmbrl.diagnostics.bias import BiasTest, bias_test
from diffmbrl.diagnostics.differences import difference_error
from diffmbrl.diagnostics.health import Health, gradient_health
from diffmbrl.diagnostics.jacobians import (
    Jacobians,
    contributions,
    eigenvalues,
    jacobians,
    singular_values,
    spectral_radius,
)
from diffmbrl.diagnostics.landscape import filter_normalised, landscape_line, landscape_plane
from diffmbrl.diagnostics.lyapunov import (
    LyapunovExponents,
    closed_loop_exponents,
    crossover_horizon,
    lyapunov_exponents,
    mean_exponents,
)
from diffmbrl.diagnostics.products import (
    Products,
    log_eigenvalues,
    log_singular_values,
    log_spectral_radius,
    products,
)
from diffmbrl.diagnostics.sample_statistics import SampleStatistics, gradient_samples, sample_statistics
from diffmbrl.diagnostics.spectrum import (
    ExtremeEigenvalues,
    SpectralDensity,
    curvature_eigenvalues,
    extreme_eigenvalues,
    in_double,
    smooth_density,
    spectral_density,
)
from diffmbrl.diagnostics.verdict import Verdict, horizon_states, least_z, safe_horizon, total_growth, verdict

__all__ = [
    "BiasTest",
    "ExtremeEigenvalues",
    "Health",
    "Jacobians",
    "LyapunovExponents",
    "Products",
    "SampleStatistics",
    "SpectralDensity",
    "Verdict",
    "bias_test",
    "closed_loop_exponents",
    "contributions",
    "crossover_horizon",
    "curvature_eigenvalues",
    "difference_error",
    "eigenvalues",
    "extreme_eigenvalues",
    "filter_normalised",
    "gradient_health",
    "gradient_samples",
    "horizon_states",
    "in_double",
    "jacobians",
    "landscape_line",
    "landscape_plane",
    "least_z",
    "log_eigenvalues",
    "log_singular_values",
    "log_spectral_radius",
    "lyapunov_exponents",
    "mean_exponents",
    "products",
    "safe_horizon",
    "sample_statistics",
    "singular_values",
    "smooth_density",
    "spectral_density",
    "spectral_radius",
    "total_growth",
    "verdict",
]
