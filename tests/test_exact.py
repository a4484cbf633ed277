"""Closed forms of smoothed decisions against quadrature, and estimators against both."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import OpenLoop, tasks
from diffmbrl.gradients import BPTT, LeaveOneOut, LikelihoodRatio
from diffmbrl.policies import Gaussian
from experiments import exact

close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
THETA = np.linspace(-1.1, 1.3, 13)


def test_a_step_in_closed_form():
    found = exact.quadrature(lambda x: (x >= 0) * 1.0, np.zeros_like, THETA, 0.2, edges=[0.0])
    for one, other in zip(exact.step(THETA, 0.2), found, strict=True):
        close(one, other)


def test_a_ramp_in_closed_form():
    width = 0.3
    found = exact.quadrature(
        lambda x: np.clip(2 * x / width, -1, 1),
        lambda x: np.where(np.abs(x) < width / 2, 2 / width, 0),
        THETA,
        0.2,
        edges=[-width / 2, width / 2],
    )
    for one, other in zip(exact.ramp(THETA, 0.2, width=width), found, strict=True):
        close(one, other)
    # A ramp is smooth enough: the pathwise gradient is right on average. A steep one is a step.
    close(found.pathwise, found.gradient)
    steep, edge = exact.ramp(THETA, 0.2, width=1e-7), exact.step(THETA, 0.2)
    close((steep.value + 1) / 2, edge.value, atol=1e-6)
    close(steep.gradient / 2, edge.gradient, atol=1e-6)


@pytest.mark.parametrize("frequency", [1.0, 17.0, 300.0])
def test_a_wave_in_closed_form(frequency):
    kappa = frequency / np.pi
    found = exact.quadrature(
        lambda x: -(0.1 * np.sin(kappa * x) + (x / 10) ** 2 + 0.1),
        lambda x: -(0.1 * kappa * np.cos(kappa * x) + x / 50),
        5 * THETA,
        0.3,
    )
    for one, other in zip(exact.wave(5 * THETA, 0.3, frequency=frequency), found, strict=True):
        close(one, other, rtol=1e-8)
    close(found.pathwise, found.gradient)


def test_the_gradient_is_a_difference_of_values():
    d = 1e-4
    for form in (
        partial(exact.step, sigma=0.2),
        partial(exact.ramp, sigma=0.2, width=0.3),
        partial(exact.wave, sigma=0.3, frequency=30.0),
    ):
        close(form(THETA).gradient, (form(THETA + d).value - form(THETA - d).value) / (2 * d), rtol=1e-4, atol=1e-6)


# The estimators: means within 4.5 standard errors of the exact ones (false alarms below 1e-3 in all), variances within 5%.

CASES = {
    "heaviside": (tasks.heaviside, {"low": 0.0, "high": 1.0}, 0.2, partial(exact.step, sigma=0.2), (-0.25, 0.1)),
    "soft heaviside": (
        tasks.soft_heaviside, {"low": -1.0, "high": 1.0, "width": 0.1}, 0.1,
        partial(exact.ramp, sigma=0.1, width=0.1), (-0.05, 0.1),
    ),
    "sinusoid": (tasks.sinusoid, {"frequency": 20.0}, 0.3, partial(exact.wave, sigma=0.3, frequency=20.0), (-3.0, 8.0)),
}  # fmt: skip
N = 40_000


@pytest.mark.parametrize("name", CASES)
def test_means_and_variances_of_estimators_are_the_closed_forms(name, x64):
    make, parameters, sigma, form, thetas = CASES[name]
    task = make(**parameters)

    @partial(jax.jit, static_argnums=0)
    def samples(estimator, theta, key):
        policy = Gaussian.around(OpenLoop(theta.reshape(1, 1)), task, std=sigma)
        J, gradient = estimator.samples(policy, task, jnp.zeros((N, 1)), key)
        return J, gradient.mean.a[:, 0, 0]

    for i, theta in enumerate(thetas):
        known = exact.Exact(*(float(x[0]) for x in form(np.asarray([theta]))))
        for estimator, mean, variance in [
            (BPTT(), known.pathwise, known.pathwise_variance),
            (LikelihoodRatio(), known.gradient, known.score_variance),
            (LikelihoodRatio(baseline=LeaveOneOut()), known.gradient, known.baseline_variance),
        ]:
            J, g = jax.tree.map(np.asarray, samples(estimator, jnp.asarray(theta), jax.random.key(i)))
            assert abs(J.mean() - known.value) < 4.5 * J.std() / np.sqrt(N)
            if variance == 0:
                assert not np.any(g)
                continue
            assert abs(g.mean() - mean) < 4.5 * np.sqrt(variance / N)
            # The standard error of a variance, by the samples' own fourth moment.
            spread = np.std((g - g.mean()) ** 2) / np.sqrt(N)
            assert abs(g.var() - variance) < 4.5 * spread


def test_the_pathwise_gradient_of_a_step_is_biased_and_sure_of_it(x64):
    task = tasks.heaviside(low=0.0, high=1.0)
    policy = Gaussian.around(OpenLoop.zeros(task), task, std=0.2)
    J, gradient = BPTT().samples(policy, task, jnp.zeros((100, 1)), jax.random.key(0))
    assert 30 < np.sum(np.asarray(J)) < 70
    assert not np.any(np.asarray(gradient.mean.a))
    assert exact.step(np.zeros(1), 0.2).gradient[0] == pytest.approx(1.9947, abs=1e-4)
