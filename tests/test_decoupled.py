"""Decoupled backward: true states, the model's Jacobians, against an adjoint recursion in numpy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Gaussian, Linear, tasks
from diffmbrl.gradients import BPTT, Decoupled, TrueForward
from diffmbrl.tasks.linear import LinearDynamics
from tests.problems import bent, changed, matrices, same, same_tree

KEY = jax.random.key(0)


def test_with_the_true_model_it_is_bptt(x64):
    task = changed(bent(ends=True), noise=0.3)
    policy = Gaussian(Linear(jnp.array([[0.6, -0.8]]), jnp.array([0.2])), jnp.log(jnp.array([0.4])))
    s0 = task.starts(KEY, 4)
    found, expected = (
        jax.jit(lambda *x, g=g: (g(*x), g.samples(*x)))(policy, task, s0, KEY)
        for g in (Decoupled(task.dynamics), BPTT())
    )
    same_tree(found, expected)


def test_the_states_are_true_and_the_jacobians_are_the_models(x64):
    task = tasks.lqr(horizon=6)
    A, B, Q, R, Q_T = matrices(task)
    A_model, B_model = A + np.array([[0.1, 0.2], [-0.3, 0.1]]), 1.5 * B
    policy = Linear(jnp.array([[-0.4, -0.6]]), jnp.array([0.3]))
    s0 = task.initial(KEY)
    J, gradient = Decoupled(LinearDynamics(A_model, B_model))(policy, task, s0[None], None)
    same(J, BPTT()(policy, task, s0[None], None)[0])
    K, b, states = np.asarray(policy.K), np.asarray(policy.b), [np.asarray(s0)]
    for _ in range(6):
        states.append(A @ states[-1] + B @ (K @ states[-1] + b))
    adjoint, expected = -Q_T @ states[-1], np.zeros((1, 2))
    for s in reversed(states[:-1]):
        to_action = -R @ (K @ s + b) + B_model.T @ adjoint
        expected += np.outer(to_action, s)
        adjoint = -Q @ s + A_model.T @ adjoint + K.T @ to_action
    same(gradient.K, expected)


class Floor(eqx.Module):
    """Dynamics that have no useful derivative: the state is rounded down to tenths."""

    def __call__(self, s, a, *, key=None):
        return jnp.floor(10 * (s + 0.5 * a)) / 10


def test_dynamics_without_derivatives_get_the_models():
    decoupled = TrueForward(Floor(), LinearDynamics(jnp.eye(2), 0.5 * jnp.ones((2, 1))))
    s, a, ds = jnp.array([0.33, 1.21]), jnp.array([0.5]), jnp.array([1.0, -1.0])
    assert jnp.array_equal(decoupled(s, a), Floor()(s, a))
    same(jax.jvp(lambda s: decoupled(s, a), (s,), (ds,))[1], ds)
    same(jax.vjp(lambda a: decoupled(s, a), a)[1](ds)[0], jnp.zeros(1))


class Longer(eqx.Module):
    def __call__(self, s, a, *, key=None):
        return jnp.append(s, a)


def test_a_model_of_another_state_is_refused():
    task = tasks.lqr(horizon=3)
    with pytest.raises(ValueError, match=r"the model maps a state of task 'lqr', float32\[2\], to float32\[3\]"):
        Decoupled(Longer())(Linear.zeros(task), task, task.starts(KEY, 2), None)
