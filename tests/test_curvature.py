"""Products with the true Hessian and the Fisher matrix against dense ones, and weights of each start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import (
    BPTT,
    Gaussian,
    KrylovNewton,
    Neural,
    episode_return,
    episode_returns,
    mean_return,
    rollouts,
    solve,
)
from diffmbrl.core import reweighted
from diffmbrl.second_order.curvature import fisher, gauss_newton, hessian
from diffmbrl.second_order.dense import dense
from tests.problems import bent, same

KEY = jax.random.key(3)
BATCH = 3


@pytest.fixture
def problem(x64):
    task = bent(horizon=6)
    return Neural.init(task, hidden=[4], key=KEY), task, task.starts(KEY, BATCH)


def test_hessian_products_are_the_dense_hessians(problem):
    policy, task, s0 = problem
    theta, unravel = ravel_pytree(policy)

    @jax.jit
    def both(task):
        model = hessian(policy, task, s0, KEY)
        H = jax.hessian(lambda x: -mean_return(unravel(x), task, s0, KEY, remat=None))(theta)
        return model.J, model.gradient, jax.vmap(model.product)(jnp.eye(theta.size)), H

    # Weights over time of each start's own, too.
    for weights in (task.weights, jnp.linspace(1, 0.1, 7), jax.random.uniform(KEY, (BATCH, 7))):
        J, gradient, products, H = both(reweighted(task, weights))
        assert np.min(np.linalg.eigvalsh(H)) < 0
        same(products, H)
        assert float(J) == pytest.approx(float(mean_return(policy, reweighted(task, weights), s0, KEY)))
        same(-gradient, ravel_pytree(BPTT()(policy, reweighted(task, weights), s0, KEY)[1])[0])


def divergence(one: Gaussian, other: Gaussian, states) -> jax.Array:
    """KL of diagonal Gaussians by the textbook, summed over time and averaged over starts."""
    mean, moved = (jax.vmap(jax.vmap(pi.mean))(states) for pi in (one, other))
    ratio = jnp.exp(2 * (one.log_std - other.log_std))
    kl = (ratio + (moved - mean) ** 2 / jnp.exp(2 * other.log_std) - 1) / 2 + other.log_std - one.log_std
    return jnp.mean(jnp.sum(kl, axis=(1, 2)))


def test_the_fisher_matrix_is_the_second_derivative_of_the_divergence(problem):
    mean, task, s0 = problem
    policy = Gaussian.around(mean, task, std=0.3)
    theta, unravel = ravel_pytree(policy)

    @jax.jit
    def both():
        model = fisher(policy, task, s0, KEY)
        states = rollouts(policy, task, s0, KEY).s
        wanted = jax.hessian(lambda x: divergence(policy, unravel(x), states))(theta)
        return model.gradient, jax.vmap(model.product)(jnp.eye(theta.size)), wanted

    gradient, products, wanted = both()
    same(products, wanted)
    assert np.linalg.eigvalsh(products)[-1] > 1
    same(-gradient, ravel_pytree(BPTT()(policy, task, s0, KEY)[1])[0])


def test_a_discount_and_weights_of_each_start_reach_the_fisher_matrix(problem):
    mean, task, s0 = problem
    policy = Gaussian.around(mean, task, std=0.3)
    v = jnp.ones(ravel_pytree(policy)[0].size)
    product = jax.jit(lambda weights: fisher(policy, reweighted(task, weights), s0).product(v))
    w = jax.random.uniform(KEY, (BATCH, 7))
    one = jax.jit(lambda w, s: fisher(policy, reweighted(task, w), s[None]).product(v))
    apart = [one(w[i], s0[i]) for i in range(BATCH)]
    same(product(w), np.mean(apart, axis=0))
    same(product(jnp.tile(w[:1], (BATCH, 1))), product(w[0]))


def test_a_fisher_matrix_needs_a_distribution(problem):
    policy, task, s0 = problem
    with pytest.raises(TypeError, match=r"needs a Gaussian policy, as Gaussian\.around\(policy, \.\.\.\); got Neural"):
        fisher(policy, task, s0)


def test_weights_of_each_start_are_a_loop_over_starts(problem):
    policy, task, s0 = problem
    w = jax.random.uniform(KEY, (BATCH, 7))

    def of_each(policy, s0, w, k):
        one = reweighted(task, w)
        model = gauss_newton(policy, one, s0[None], None)
        return episode_return(policy, one, s0), model.gradient, dense(model, policy, one)

    J, gradient, N = jax.jit(jax.vmap(of_each, in_axes=(None, 0, 0, None)))(policy, s0, w, None)
    weighted = reweighted(task, w)

    @jax.jit
    def together(task):
        model = gauss_newton(policy, task, s0)
        products = jax.vmap(model.product)(jnp.eye(model.gradient.size))
        return episode_returns(policy, task, s0), model.J, model.gradient, products

    for one, of_loop in zip(
        together(weighted), (J, np.mean(J), *(np.mean(x, axis=0) for x in (gradient, N))), strict=True
    ):
        same(one, of_loop)


def test_weights_of_another_number_of_starts_are_refused(problem):
    policy, task, s0 = problem
    for call in (mean_return, gauss_newton, hessian):
        with pytest.raises(ValueError, match=r"shape \[T\+1\] or \[3, T\+1\] for 3 starts, got \[2, 7\]"):
            call(policy, reweighted(task, jnp.ones((2, 7))), s0)


def test_newton_is_exact_where_gauss_newton_is_and_repelled_by_a_saddle(x64):
    """From a policy that does nothing, whose gradient in all weights but the last layer's vanishes, both move off."""
    task = bent(horizon=6)
    s0 = task.starts(KEY, BATCH)
    policy = Neural.init(task, hidden=[4], key=KEY, output_scale=1e-3)
    better, history = solve(KrylovNewton(rank=12), policy, task, s0, None, 12)
    assert np.all(np.diff(history.info.J) >= 0)
    assert history.info.J[-1] > history.info.J[0] + 0.1
    gradient = BPTT()(better, task, s0, None)[1]
    assert np.linalg.norm(ravel_pytree(gradient)[0]) < 0.05 * float(history.info.gradient_norm[0])
