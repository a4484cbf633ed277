"""The table of named estimators, for `diffmbrl compare --estimator`; a new estimator adds one row."""

from collections.abc import Callable
from typing import NamedTuple

from diffmbrl.choices import validate_choice
from diffmbrl.core import GradientEstimator, Task
from diffmbrl.gradients.alpha_order import AlphaOrder
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.gradients.discontinuity import DiscontinuityTested
from diffmbrl.gradients.evolution import CentredRanks, Evolution
from diffmbrl.gradients.inverse_variance import InverseVariance, InverseVariancePerStep
from diffmbrl.gradients.likelihood_ratio import LeaveOneOut, LikelihoodRatio, LinearBaseline, TotalReturn
from diffmbrl.gradients.smoothed import Smoothed
from diffmbrl.gradients.total_propagation import TotalPropagation
from diffmbrl.gradients.truncated import Clipped, Decayed, Truncated

NOISE = 0.1  # on the actions, as a share of half their range


class Estimator(NamedTuple):
    """A named estimator with settings that work on most tasks.

    Args:
        make: Function from the task to the estimator.
        draws: Whether it needs a key, for noise on the actions or on the parameters.
        differentiates: Whether it differentiates the dynamics or the reward; one that does not can also improve a policy where
            their derivatives are zero.
        description: One line, for the command line's help.
    """

    make: Callable[[Task], GradientEstimator]
    draws: bool
    differentiates: bool
    description: str = ""


ESTIMATORS: dict[str, Estimator] = {
    "bptt": Estimator(
        lambda task: BPTT(),
        draws=False,
        differentiates=True,
        description="the exact gradient, by backpropagation through time",
    ),
    "bptt-smoothed": Estimator(
        lambda task: Smoothed(BPTT(), std=NOISE),
        draws=True,
        differentiates=True,
        description="the same under noise on the actions",
    ),
    "truncated": Estimator(
        lambda task: BPTT(Truncated(20)), draws=False, differentiates=True, description="the adjoint cut every 20 steps"
    ),
    "clipped-adjoint": Estimator(
        lambda task: BPTT(Clipped(1.0)),
        draws=False,
        differentiates=True,
        description="the adjoint's norm clipped to 1 at each step",
    ),
    "decayed-adjoint": Estimator(
        lambda task: BPTT(Decayed(0.95)),
        draws=False,
        differentiates=True,
        description="the adjoint times .95 at each step",
    ),
    "likelihood-ratio": Estimator(
        lambda task: Smoothed(LikelihoodRatio(), std=NOISE),
        draws=True,
        differentiates=False,
        description="score function, rewards to go; no derivative of dynamics or reward",
    ),
    "likelihood-ratio-episode": Estimator(
        lambda task: Smoothed(LikelihoodRatio(TotalReturn(), LeaveOneOut()), std=NOISE),
        draws=True,
        differentiates=False,
        description="the same of whole episodes, the other starts' mean as a baseline",
    ),
    "likelihood-ratio-loo": Estimator(
        lambda task: Smoothed(LikelihoodRatio(baseline=LeaveOneOut()), std=NOISE),
        draws=True,
        differentiates=False,
        description="rewards to go, the other starts' mean as a baseline",
    ),
    "likelihood-ratio-value": Estimator(
        lambda task: Smoothed(LikelihoodRatio(baseline=LinearBaseline()), std=NOISE),
        draws=True,
        differentiates=False,
        description="rewards to go, a fitted value as a baseline",
    ),
    "inverse-variance": Estimator(
        lambda task: Smoothed(InverseVariance(), std=NOISE),
        draws=True,
        differentiates=True,
        description="pathwise and score function, weighted by their variances for each parameter",
    ),
    "inverse-variance-per-step": Estimator(
        lambda task: Smoothed(InverseVariancePerStep(), std=NOISE),
        draws=True,
        differentiates=True,
        description="the same for each time step",
    ),
    "total-propagation": Estimator(
        lambda task: Smoothed(TotalPropagation(), std=NOISE),
        draws=True,
        differentiates=True,
        description="the same at every step of the backward pass",
    ),
    "alpha-order": Estimator(
        lambda task: Smoothed(AlphaOrder(), std=NOISE),
        draws=True,
        differentiates=True,
        description="pathwise and score function, of least variance with a bounded bias",
    ),
    "discontinuity-tested": Estimator(
        lambda task: Smoothed(DiscontinuityTested(), std=NOISE),
        draws=True,
        differentiates=True,
        description="pathwise, and the score function where a test finds a jump",
    ),
    "evolution": Estimator(
        lambda task: Evolution(std=0.05),
        draws=True,
        differentiates=False,
        description="evolution strategies: noise on the parameters, in antithetic pairs",
    ),
    "evolution-rank": Estimator(
        lambda task: Evolution(std=0.05, shaping=CentredRanks()),
        draws=True,
        differentiates=False,
        description="the same on the ranks of the returns",
    ),
}


def estimator(name: str) -> tuple[str, Estimator]:
    """Find a row of ESTIMATORS by name; underscores count as hyphens.

    Args:
        name: The estimator's name.

    Returns:
        The name as in the table, and the row.

    Raises:
        ValueError: If the name is unknown; the message gives the nearest one.

    >>> estimator("likelihood_ratio")[0]
    'likelihood-ratio'
    """
    name = validate_choice("estimator", name.replace("_", "-"), ESTIMATORS)
    return name, ESTIMATORS[name]
