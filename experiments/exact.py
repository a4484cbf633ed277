r"""What is exact of a decision under Gaussian noise: value and gradient of the smoothed objective, and the estimators'
variances.

A decision $\theta$ earns $f(\theta + \sigma\epsilon)$, $\epsilon \sim N(0, 1)$, so that $F(\theta) = E f$ and $F'(\theta) =
E[f \epsilon] / \sigma$. One sample of the pathwise gradient is $f'(\theta + \sigma\epsilon)$, one of the score function's
$(f - b)\,\epsilon / \sigma$ with a baseline b, here 0 or F. `quadrature` integrates any f; `step`, `ramp` and `wave` are
closed forms.

Reference: Suh et al. 2022, section 3; Metz et al. 2021, section 3; Stein's lemma $E[g(x)\,\epsilon] = \sigma E[g'(x)]$.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

Array = np.ndarray
REACH, PANELS, NODES = 9.0, 400, 12  # standard deviations integrated over; Gauss-Legendre panels and nodes in each


class Exact(NamedTuple):
    """At each theta [n]."""

    value: Array  # F
    gradient: Array  # F'
    pathwise: Array  # mean of the pathwise gradient
    pathwise_variance: Array  # of one sample
    score_variance: Array  # of one sample, without baseline
    baseline_variance: Array  # with the baseline F


def quadrature(
    f: Callable[[Array], Array],
    slope: Callable[[Array], Array],
    theta: Array,
    sigma: float,
    edges: Sequence[float] = (),
) -> Exact:
    """Of f and its derivative where it has one, by Gauss-Legendre quadrature between the places `edges` where either jumps."""
    x, w = np.polynomial.legendre.leggauss(NODES)
    out = []
    for centre in theta:
        inner = [(edge - centre) / sigma for edge in edges if abs(edge - centre) < REACH * sigma]
        ends = np.unique(np.concatenate([np.linspace(-REACH, REACH, PANELS + 1), inner]))
        half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
        epsilon = (middle[:, None] + half[:, None] * x).ravel()
        weight = (half[:, None] * w).ravel() * np.exp(-(epsilon**2) / 2) / np.sqrt(2 * np.pi)
        at = centre + sigma * epsilon
        out.append(_moments(f(at), slope(at), epsilon, weight, sigma))
    return Exact(*(np.array(column) for column in zip(*out, strict=True)))


def _moments(f: Array, slope: Array, epsilon: Array, weight: Array, sigma: float) -> Exact:
    F, gradient = weight @ f, weight @ (f * epsilon) / sigma
    pathwise = weight @ slope
    score = weight @ (f * epsilon / sigma) ** 2 - gradient**2
    baseline = weight @ ((f - F) * epsilon / sigma) ** 2 - gradient**2
    return Exact(F, gradient, pathwise, weight @ (slope - pathwise) ** 2, score, baseline)


def step(theta: Array, sigma: float) -> Exact:
    r"""f(x) = 1[x >= 0]: $F = \Phi(z)$, $F' = \varphi(z)/\sigma$, $z = \theta/\sigma$; the pathwise gradient is 0.

    $E[f\epsilon^2] = \Phi - z\varphi$, so the score function has the variance $(\Phi - z\varphi - \varphi^2)/\sigma^2$.

    >>> step(np.zeros(1), 0.2).gradient.round(6)
    array([1.994711])
    """
    z = theta / sigma
    F, density = ndtr(z), np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    second = F - z * density  # of f, and as f^2 = f, of f^2
    nothing = np.zeros_like(z)
    score = (second - density**2) / sigma**2
    baseline = (second * (1 - 2 * F) + F**2 - density**2) / sigma**2
    return Exact(F, density / sigma, nothing, nothing, score, baseline)


def ramp(theta: Array, sigma: float, *, width: float) -> Exact:
    r"""f(x) = clip(2 x / width, -1, 1): a sample of the pathwise gradient is 2 / width with the probability p of the ramp,
    else 0.

    So its mean is 2 p / width = F', and its variance $(2/\mathrm{width})^2 p (1 - p)$.
    """
    found = quadrature(
        lambda x: np.clip(2 * x / width, -1, 1),
        lambda x: np.where(np.abs(x) < width / 2, 2 / width, 0.0),
        theta,
        sigma,
        edges=(-width / 2, width / 2),
    )
    p = ndtr((width / 2 - theta) / sigma) - ndtr((-width / 2 - theta) / sigma)
    return found._replace(
        gradient=2 * p / width, pathwise=2 * p / width, pathwise_variance=(2 / width) ** 2 * p * (1 - p)
    )


def wave(theta: Array, sigma: float, *, frequency: float) -> Exact:
    r"""$f(x) = -(.1 \sin(\kappa x) + (x/10)^2 + .1)$, $\kappa = \omega/\pi$: all of it in closed form.

    Each moment is a sum of $E[p(x, \epsilon)\,e^{ikx}]$ with a polynomial p, $k \in \{0, \kappa, 2\kappa\}$, and the factor
    $e^{ikx}$ only moves the Gaussian: $\epsilon \to \epsilon + ik\sigma$, times $e^{ik\theta - k^2\sigma^2/2}$.
    """
    kappa = frequency / np.pi

    def tilted(k: float, p: Callable[[Array, Array], Array]) -> Any:
        # Gauss-Hermite with 8 nodes is exact up to degree 15.
        nodes, weights = np.polynomial.hermite_e.hermegauss(8)
        epsilon = nodes + 1j * k * sigma
        x = theta[:, None] + sigma * epsilon
        return np.exp(1j * k * theta - (k * sigma) ** 2 / 2) * (p(x, epsilon) @ weights) / np.sqrt(2 * np.pi)

    def bowl(x):
        return (x / 10) ** 2 + 0.1

    def moment(power: int, shift: Array) -> Array:
        """E[(f - shift)^2 epsilon^power], f = -(.1 sin + bowl)."""
        b = shift[:, None]
        square = tilted(0, lambda x, e: (bowl(x) + b) ** 2 * e**power + 0.005 * e**power).real
        cross = 0.2 * tilted(kappa, lambda x, e: (bowl(x) + b) * e**power).imag
        return square + cross - 0.005 * tilted(2 * kappa, lambda x, e: e**power + 0 * x).real

    one = 0.1 * tilted(kappa, lambda x, e: 1 + 0 * x).imag
    F = -(one + tilted(0, lambda x, e: bowl(x)).real)
    cosine = tilted(kappa, lambda x, e: 1 + 0 * x).real
    gradient = -(0.1 * kappa * cosine + theta / 50)
    # Var[.1 kappa cos(kappa x) + x / 50], with Cov[cos(kappa x), x] by Stein's lemma.
    cosines = (1 + tilted(2 * kappa, lambda x, e: 1 + 0 * x).real) / 2 - cosine**2
    with_place = -kappa * sigma**2 * 10 * one
    pathwise = (0.1 * kappa) ** 2 * cosines + sigma**2 / 2500 + 2 * 0.1 * kappa / 50 * with_place
    score = moment(2, np.zeros_like(F)) / sigma**2 - gradient**2
    baseline = moment(2, F) / sigma**2 - gradient**2
    return Exact(F, gradient, gradient, pathwise, score, baseline)
