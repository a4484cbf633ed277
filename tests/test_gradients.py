"""The contract of estimators: a call is the mean of its samples, for the same keys; smoothing adds noise of the given size."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, OpenLoop, tasks
from diffmbrl.core import GradientEstimator, NoTerminal, reweighted
from diffmbrl.gradients import (
    BPTT,
    Agreement,
    AlphaOrder,
    CentredRanks,
    Clipped,
    Decayed,
    Decoupled,
    DiscontinuityTested,
    Evolution,
    InverseVariance,
    InverseVariancePerStep,
    LeaveOneOut,
    LikelihoodRatio,
    LinearBaseline,
    MeanBaseline,
    Smoothed,
    TotalPropagation,
    TotalReturn,
    Truncated,
    ValueBaseline,
)

KEY = jax.random.key(0)


class Drift(eqx.Module):
    """A model of any task with a flat state: its Jacobians are the identity and a constant."""

    def __call__(self, s, a, *, key=None):
        return s + 0.1 * a[0]


ESTIMATORS = {
    "bptt": BPTT(),
    "smoothed bptt": Smoothed(BPTT(), std=0.3),
    "truncated": BPTT(Truncated(2)),
    "clipped adjoint": BPTT(Clipped(0.5)),
    "decayed adjoint": BPTT(Decayed(0.9)),
    "likelihood ratio, episode": Smoothed(LikelihoodRatio(TotalReturn()), std=0.3),
    "likelihood ratio": Smoothed(LikelihoodRatio(), std=0.3),
    "likelihood ratio, mean": Smoothed(LikelihoodRatio(baseline=MeanBaseline()), std=0.3),
    "likelihood ratio, leave-one-out": Smoothed(LikelihoodRatio(baseline=LeaveOneOut()), std=0.3),
    "likelihood ratio, fitted": Smoothed(LikelihoodRatio(baseline=LinearBaseline()), std=0.3),
    "evolution": Evolution(std=0.1),
    "evolution, ranks": Evolution(std=0.1, shaping=CentredRanks()),
    "decoupled": Decoupled(Drift()),
    "likelihood ratio, learned value": Smoothed(LikelihoodRatio(baseline=ValueBaseline(NoTerminal())), std=0.3),
    "inverse variance": Smoothed(InverseVariance(), std=0.3),
    "inverse variance per step": Smoothed(InverseVariancePerStep(), std=0.3),
    "total propagation": Smoothed(TotalPropagation(), std=0.3),
    "alpha-order": Smoothed(AlphaOrder(), std=0.3),
    "discontinuity-tested": Smoothed(DiscontinuityTested(), std=0.3),
    "discontinuity-tested by agreement": Smoothed(DiscontinuityTested(Agreement()), std=0.3),
}


# Parts of these are in other rows: the same rule with another number, baseline or test.
ALIKE = {
    *("clipped adjoint", "decayed adjoint", "likelihood ratio, episode", "likelihood ratio, mean"),
    *("likelihood ratio, leave-one-out", "inverse variance per step", "discontinuity-tested by agreement"),
    *("evolution", "alpha-order"),
}
parametrised = pytest.mark.parametrize(
    "estimator",
    [pytest.param(made, id=name, marks=[pytest.mark.slow] * (name in ALIKE)) for name, made in ESTIMATORS.items()],
)


@parametrised
def test_a_call_is_the_mean_of_its_samples(estimator):
    task = tasks.cartpole_balance(horizon=6)
    weights = jnp.linspace(0.5, 1.0, 4)[:, None] * jnp.ones(7)
    given, policy, s0 = reweighted(task, weights), Linear.zeros(task), task.starts(KEY, 4)
    assert isinstance(estimator, GradientEstimator)
    J, gradient = jax.jit(lambda *x: estimator(*x))(policy, given, s0, KEY)
    each, gradients = jax.jit(lambda *x: estimator.samples(*x))(policy, given, s0, KEY)
    assert each.shape == (4,) and gradients.K.shape == (4, 1, 4)
    np.testing.assert_allclose(J, each.mean(), rtol=1e-5)
    chex.assert_trees_all_close(gradient, jax.tree.map(lambda x: x.mean(0), gradients), rtol=2e-4, atol=1e-5)


@parametrised
def test_one_trace_and_the_dtype_of_the_policy(estimator):
    chex.clear_trace_counter()
    task = tasks.lqr(horizon=3)
    traced = jax.jit(chex.assert_max_traces(lambda *arguments: estimator(*arguments), n=1))
    for key in (jax.random.key(0), jax.random.key(1)):
        _, gradient = traced(Linear.zeros(task), task, task.starts(key, 2), key)
        assert gradient.K.dtype == jnp.float32


def test_smoothing_scales_with_the_limits():
    task = tasks.cartpole_balance(horizon=200)
    noisy = Smoothed(BPTT(), std=0.1).around(OpenLoop.zeros(task), task)
    np.testing.assert_allclose(jnp.exp(noisy.log_std), 1.0, rtol=1e-6)
    assert noisy.log_std.shape == (200, 1)


def test_noise_needs_a_key_and_a_size():
    task = tasks.lqr(horizon=2)
    with pytest.raises(ValueError, match="noise needs a key"):
        Smoothed(BPTT(), std=0.1)(Linear.zeros(task), task, task.starts(KEY, 2), None)
    with pytest.raises(ValueError, match=r"std must be positive, got -0\.1"):
        Smoothed(BPTT(), std=-0.1)
