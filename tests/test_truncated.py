"""Rules for the adjoint against the derivatives they stand for: by hand, by stop-gradient, and at their limits by BPTT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffmbrl import Linear, OpenLoop, tasks
from diffmbrl.gradients import BPTT, Clipped, Decayed, Truncated
from tests.problems import bent, changed, matrices, same, same_tree, some_slow

KEY = jax.random.key(0)
STOP = jax.lax.stop_gradient


def policy_and_starts(task, count=3):
    K = jnp.asarray([[0.6, -0.8]])
    return Linear(K, jnp.asarray([0.2])), task.starts(KEY, count)


def gradient(rule, policy, task, s0, remat=1):
    return jax.jit(lambda rule, *x: BPTT(rule, remat=remat)(*x, None))(rule, policy, task, s0)


@pytest.mark.parametrize("remat", some_slow([None, 1, 3], 1, 3))
@pytest.mark.parametrize(
    "rule", [Truncated(8), Clipped(jnp.inf), Decayed(1.0)], ids=["truncated", "clipped", "decayed"]
)
def test_a_rule_that_changes_nothing_is_bptt(rule, remat, x64):
    task = bent(ends=True)
    policy, s0 = policy_and_starts(task)
    same_tree(gradient(rule, policy, task, s0, remat), gradient(None, policy, task, s0))


def by_hand(at_entry, policy, task, s0):
    """The mean return in a Python loop, each state that enters a step after the first replaced by `at_entry(t, s)`."""

    def J(s):
        total = 0.0
        for t in range(task.horizon):
            s = s if t == 0 else at_entry(t, s)
            a = policy(s)
            total = total + task.weights[t] * task.reward(s, a)
            s = task.dynamics(s, a)
        return total + task.weights[-1] * task.terminal(s)

    return jnp.mean(jax.vmap(J)(s0))


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("k", some_slow([1, 2, 3, 7], 1, 2))
def test_truncation_is_a_stopped_gradient_at_every_kth_state(k, plan, x64):
    task = changed(bent(), weights=jnp.linspace(1.0, 0.3, 9))
    policy, s0 = policy_and_starts(task)
    if plan:
        policy = OpenLoop(jax.random.normal(KEY, (8, 1)))
        expected = jax.value_and_grad(lambda plan: planned(plan, k, task, s0))(policy)
        same_tree(gradient(Truncated(k), policy, task, s0), expected)
        return
    expected = jax.value_and_grad(lambda pi: by_hand(lambda t, s: STOP(s) if t % k == 0 else s, pi, task, s0))(policy)
    same_tree(gradient(Truncated(k), policy, task, s0), expected)


def planned(plan, k, task, s0):
    def one(s):
        actions = iter(plan.a)
        return by_hand(lambda t, s: STOP(s) if t % k == 0 else s, lambda s: next(actions), task, s[None])

    return jnp.mean(jnp.stack([one(s) for s in s0]))


def test_decay_counts_a_reward_j_steps_later_by_its_factor_to_the_j(x64):
    task = bent()
    policy, s0 = policy_and_starts(task)
    expected = jax.value_and_grad(lambda pi: by_hand(lambda t, s: 0.7 * s + 0.3 * STOP(s), pi, task, s0))(policy)
    same_tree(gradient(Decayed(0.7), policy, task, s0), expected)
    same_tree(gradient(Decayed(0.0), policy, task, s0), gradient(Truncated(1), policy, task, s0))


def adjoint_by_numpy(task, policy, s0, rule):
    """dJ/dK of a linear policy on a linear-quadratic task from one start, the adjoint recursion with `rule`."""
    A, B, Q, R, Q_T = matrices(task)
    K, b = np.asarray(policy.K), np.asarray(policy.b)
    states = [np.asarray(s0)]
    for _ in range(task.horizon):
        states.append(A @ states[-1] + B @ (K @ states[-1] + b))
    adjoint, total = -Q_T @ states[-1], np.zeros_like(K)
    for t in reversed(range(task.horizon)):
        s, a = states[t], K @ states[t] + b
        to_action = -R @ a + B.T @ adjoint
        total += np.outer(to_action, s)
        adjoint = rule(-Q @ s + A.T @ adjoint + K.T @ to_action)
    return total


def test_each_start_has_its_own_adjoint_clipped(x64):
    task = tasks.random_lqr(KEY, 2, 1, stability="unstable", horizon=12)
    policy, s0 = policy_and_starts(task)

    def clip(x):
        return x * min(1, 2.0 / np.linalg.norm(x))

    expected = np.mean([adjoint_by_numpy(task, policy, s, clip) for s in s0], axis=0)
    free = np.mean([adjoint_by_numpy(task, policy, s, lambda x: x) for s in s0], axis=0)
    assert np.linalg.norm(free - expected) > 0.3 * np.linalg.norm(free)  # it does clip
    same(gradient(Clipped(2.0), policy, task, s0)[1].K, expected)
    # Not a B-th of it: a start given twice changes nothing.
    same_tree(gradient(Clipped(2.0), policy, task, jnp.repeat(s0, 2, axis=0)), gradient(Clipped(2.0), policy, task, s0))
    same(gradient(None, policy, task, s0)[1].K, free)


def test_with_windows_of_one_step_an_action_answers_for_its_own_reward(x64):
    task = tasks.lqr(horizon=6)
    policy, s0 = policy_and_starts(task)
    expected = np.mean([adjoint_by_numpy(task, policy, s, np.zeros_like) for s in s0], axis=0)
    same(gradient(Truncated(1), policy, task, s0)[1].K, expected)


def test_an_infinite_adjoint_stays_in_its_window(x64):
    # The derivative of the terminal reward's square root is infinite where the last speed is 0.
    task = changed(bent(), kink=0.0)
    plan, s0 = OpenLoop(jnp.zeros((8, 1))), jnp.zeros((1, 2))
    assert not jnp.isfinite(gradient(None, plan, task, s0)[1].a).any()
    assert jnp.isfinite(gradient(Truncated(3), plan, task, s0)[1].a).ravel().tolist() == 6 * [True] + 2 * [False]


def test_a_sweep_is_a_vmap_and_one_trace(x64):
    task = bent()
    policy, s0 = policy_and_starts(task)
    ks = jnp.arange(1, 9, dtype=jnp.int32)
    swept = jax.jit(jax.vmap(lambda k: BPTT(Truncated(k))(policy, task, s0, None)))(ks)
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(lambda rule: BPTT(rule)(policy, task, s0, None), n=1))
    for i, k in enumerate(ks):
        same_tree(jax.tree.map(lambda x, i=i: x[i], swept), one(Truncated(k)))


def test_the_norm_is_over_the_whole_state(x64):
    clipped = Clipped(1.0)(jnp.int32(1), {"p": jnp.array([3.0]), "v": jnp.array([4.0])})
    same_tree(clipped, {"p": jnp.array([0.6]), "v": jnp.array([0.8])})
    within = {"p": jnp.array([0.0]), "v": jnp.array([0.0])}
    same_tree(Clipped(1.0)(jnp.int32(1), within), within)


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match="every must be a whole number of steps of at least 1, got 0"):
        Truncated(0)
    with pytest.raises(ValueError, match=r"every must be a whole number of steps of at least 1, got 2\.5"):
        Truncated(2.5)
    with pytest.raises(ValueError, match=r"norm must be positive .*, got 0"):
        Clipped(0)
    with pytest.raises(ValueError, match=r"factor must be from 0 to 1, got 1\.1"):
        Decayed(1.1)
    with pytest.raises(ValueError, match=r"norm must be positive .*, got nan"):
        Clipped(float("nan"))
