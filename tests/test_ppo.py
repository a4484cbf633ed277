"""PPO: generalised advantages against their sum, Brax's loss on the same batch, and REINFORCE as a setting of it."""

import warnings
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl import LikelihoodRatio, tasks
from diffmbrl.agents import PPO, SquashedGaussian
from diffmbrl.agents.actor import limited, log_density, logit, squashed_moments
from diffmbrl.agents.ppo import Rows, normalised
from diffmbrl.core import reweighted
from diffmbrl.gradients import ValueBaseline
from diffmbrl.models.buffer import Transition
from diffmbrl.rollout import rollouts, split_keys
from tests.problems import same, same_tree
from tests.test_sac import brax_layers
from tests.test_sac import learned as learned_by_sac

KEY = jax.random.key(0)
N, H = 3, 7


@partial(jax.jit, static_argnames="ends")
def streams(task, key=KEY, ends=True):
    """Streams of steps, one after another, with ends of both kinds."""
    keys = jax.random.split(key, 6)
    dtype = task.a_low.dtype
    s = 0.05 * jax.random.normal(keys[0], (N, H, task.n), dtype)
    s_next = 0.05 * jax.random.normal(keys[1], (N, H, task.n), dtype)
    u = jax.random.uniform(keys[2], (N, H, task.m), dtype, -0.9, 0.9)
    r = jax.random.normal(keys[3], (N, H), dtype)
    done = jax.random.bernoulli(keys[4], 0.2, (N, H)) & ends
    cut = jax.random.bernoulli(keys[5], 0.2, (N, H)) & ends
    a = jnp.where(jnp.isfinite(task.a_high), u * jnp.where(jnp.isfinite(task.a_high), task.a_high, 1), u)
    return Transition(s, a, r, s_next, done, done | cut)


@jax.jit
def learned(task, learner):
    """A state whose networks matter."""
    key = jax.random.key(1)
    state = learner.init(task, key)
    actor = eqx.tree_at(lambda net: net.weights[-1], state.actor, 30 * state.actor.weights[-1])
    last = jax.random.normal(key, state.critic.net.weights[-1].shape, task.a_low.dtype)
    critic = eqx.tree_at(lambda c: c.net.weights[-1], state.critic, last)
    return state._replace(actor=actor, critic=critic)


@jax.jit
def features(task, steps):
    return tuple(jax.vmap(jax.vmap(task.features))(s) for s in (steps.s, steps.s_next))


@jax.jit
def returns(learner, *x):
    return learner.returns(*x)


def test_advantages_are_the_sum_of_discounted_errors(x64):
    r"""A_t = sum_k (gamma lambda)^k delta_{t+k}, up to and with the end of the episode; no value beyond `done`."""
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(8,), discount=0.9, trace=0.8)
    steps, state = streams(task), learned(task, learner)
    assert np.any(steps.done) and np.any(steps.last & ~steps.done)
    x, x_next = features(task, steps)
    G, V = returns(learner, state.critic, x, x_next, steps, jnp.ones((N, H), bool))
    V_next = jax.jit(jax.vmap(jax.vmap(state.critic)))(x_next)
    delta = steps.r + 0.9 * jnp.where(steps.done, 0, V_next) - V
    for i in range(N):
        for t in range(H):
            end = next((u for u in range(t, H) if steps.last[i, u]), H - 1)
            # Between ends a stream's steps follow one another: what V says of s_next is also what it says of the next s.
            total = sum((0.9 * 0.8) ** (u - t) * delta[i, u] for u in range(t, end + 1))
            gap = sum(
                (0.9 * 0.8) ** (u + 1 - t) * (V[i, u + 1] - V_next[i, u]) for u in range(t, end)
            )  # of these made-up streams
            same(G[i, t] - V[i, t], total + gap, rtol=1e-8)


def test_a_row_that_does_not_count_cuts_the_trace_and_changes_nothing_else(x64):
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(8,), batches=1, epochs=1)
    steps, state = streams(task, ends=False), learned(task, learner)
    broken = steps._replace(r=steps.r.at[0, 3].set(jnp.nan), s_next=steps.s_next.at[0, 3].set(jnp.inf))
    x, x_next = features(task, steps)
    keep = jnp.ones((N, H), bool).at[0, 3].set(False)
    G, V = returns(learner, state.critic, x, x_next, broken, keep)
    assert np.all(np.isfinite(G)) and G[0, 3] == V[0, 3]
    # The step before is valued as if the episode had been cut off after it.
    cut = steps._replace(last=steps.last.at[0, 2].set(True), s_next=steps.s_next.at[0, 2].set(steps.s[0, 3]))
    other, _ = returns(learner, state.critic, x, features(task, cut)[1], cut, jnp.ones((N, H), bool))
    matched = broken._replace(s_next=broken.s_next.at[0, 2].set(steps.s[0, 3]))
    G, _ = returns(learner, state.critic, x, jnp.nan_to_num(features(task, matched)[1], posinf=0), matched, keep)
    same(G[0, :3], other[0, :3])
    A = jax.random.normal(KEY, (N * H,))
    centred = normalised(A.at[3].set(jnp.nan), keep.ravel())
    others = np.delete(np.asarray(A), 3)
    same(np.delete(centred, 3), (others - others.mean()) / others.std(), rtol=1e-6)
    after, said = jax.jit(lambda *x: learner.update(*x))(state, task, broken, KEY)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((after, said)))


def test_returns_and_loss_are_braxs_on_the_same_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax.training.agents.ppo import losses, networks
        from brax.training.types import Transition as BraxTransition
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(16, 16), trace=1.0, discount=0.9, activation=jax.nn.silu, entropy=0.01, clip=0.2)
    steps, state = streams(task), learned(task, learner)
    steps = steps._replace(
        done=steps.last
    )  # Brax leaves steps that were cut off out of its loss, where the critic values them
    # V(x_next) of a step is V of the next step: what Brax takes it for.
    s_next = jnp.concatenate([steps.s[:, 1:], steps.s_next[:, -1:]], axis=1)
    steps = steps._replace(s_next=s_next)
    x, x_next = features(task, steps)
    G, V = returns(learner, state.critic, x, x_next, steps, jnp.ones((N, H), bool))
    V_next = jax.jit(jax.vmap(jax.vmap(state.critic)))(x_next)
    time_first = partial(jnp.swapaxes, axis1=0, axis2=1)
    for trace in (1.0, 0.8):
        other = PPO(trace=trace, discount=0.9)
        ours = returns(other, state.critic, x, x_next, steps, jnp.ones((N, H), bool))[0]
        vs, advantages = jax.jit(losses.compute_gae)(
            truncation=jnp.zeros((H, N)),
            termination=time_first(steps.done.astype(x.dtype)),
            rewards=time_first(steps.r),
            values=time_first(V),
            bootstrap_value=V_next[:, -1],
            lambda_=trace,
            discount=0.9,
        )
        np.testing.assert_allclose(time_first(vs), ours, rtol=1e-5, atol=1e-5)
        if trace == 1:
            np.testing.assert_allclose(time_first(advantages), ours - V, rtol=1e-4, atol=1e-5)

    bounded = limited(task.a_low, task.a_high)
    flat, z = x.reshape(N * H, -1), logit(steps.a, task.a_low, task.a_high).reshape(N * H, -1)
    # The policy that took the steps is another.
    old = jax.tree.map(lambda w: 1.2 * w, state.actor)
    log_prob = jax.jit(lambda net: log_density(*squashed_moments(net.many(flat)), z, bounded))(old)
    advantage = normalised((G - V).ravel(), jnp.ones(N * H, bool))

    def by_time(y):  # in Brax's order, which is also that of its noise
        return time_first(y.reshape(N, H, *y.shape[1:])).reshape(N * H, *y.shape[1:])

    rows = Rows(*map(by_time, (flat, z, log_prob, advantage, jnp.ones(N * H))))
    loss, gradient = jax.jit(jax.value_and_grad(lambda net: learner.loss(net, rows, bounded, KEY)[0]))(state.actor)

    nets = networks.make_ppo_networks(
        x.shape[-1], task.m, policy_hidden_layer_sizes=(16, 16), value_hidden_layer_sizes=(16, 16)
    )
    data = BraxTransition(
        observation=x, action=steps.a, reward=steps.r, discount=1 - steps.done.astype(x.dtype), next_observation=x_next,
        extras={"state_extras": {"truncation": jnp.zeros((N, H))},
                "policy_extras": {"raw_action": z.reshape(N, H, -1), "log_prob": log_prob.reshape(N, H)}},
    )  # fmt: skip

    class Values:
        """Our critic, which is no plain network, in the place of Brax's."""

        @staticmethod
        def apply(_, params, x):
            return jnp.vectorize(state.critic, signature="(k)->()")(x)

    nets = nets.replace(value_network=Values)

    def theirs(pi):
        params = losses.PPONetworkParams(policy={"params": pi}, value=None)
        return losses.compute_ppo_loss(
            params, None, data, KEY, nets, entropy_cost=0.01, discounting=0.9, gae_lambda=1.0, clipping_epsilon=0.2,
            vf_coefficient=0.0,
        )[0]  # fmt: skip

    # Brax's distribution may report a divergence from the old one, of which we keep no parameters.
    extras = data.extras["policy_extras"]
    extras["distribution_params"] = jax.vmap(jax.vmap(old))(x)
    with jax.numpy_dtype_promotion("standard"):
        value, g = jax.jit(jax.value_and_grad(theirs))(brax_layers(state.actor))
    np.testing.assert_allclose(loss, value, rtol=2e-4, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-6), brax_layers(gradient), g)


def test_reinforce_is_the_likelihood_ratio_gradient_with_the_critic_for_a_baseline(x64):
    task = tasks.lqr(horizon=H)
    task = reweighted(task, task.weights.at[-1].set(0))
    learner = PPO.reinforce(hidden=(8,), discount=1.0, entropy=0.0)
    state = learned(task, learner)
    policy = SquashedGaussian.around(state.actor, task)
    s0 = task.starts(KEY, 4)
    estimator = LikelihoodRatio(baseline=ValueBaseline(AtState(state.critic)))
    _, gradient = jax.jit(lambda *x: estimator(*x))(policy, task, s0, KEY)
    tau = jax.jit(rollouts)(policy, task, s0, KEY)
    assert split_keys(KEY, s0).shape == (4,)
    s_next = jnp.concatenate([tau.s[:, 1:], tau.s_T[:, None]], axis=1)
    last = jnp.broadcast_to(jnp.arange(H) == H - 1, (4, H))
    steps = Transition(
        tau.s, tau.a, tau.r, s_next, last, last
    )  # the end of the horizon is the end: nothing comes after
    x, x_next = features(task, steps)
    G, V = returns(learner, state.critic, x, x_next, steps, jnp.ones((4, H), bool))
    z, bounded = logit(tau.a, task.a_low, task.a_high).reshape(4 * H, -1), limited(task.a_low, task.a_high)
    flat = x.reshape(4 * H, -1)
    log_prob = jax.jit(lambda net: log_density(*squashed_moments(net.many(flat)), z, bounded))(state.actor)
    rows = Rows(flat, z, log_prob, (G - V).ravel(), jnp.ones(4 * H))
    ours = jax.jit(jax.grad(lambda net: learner.loss(net, rows, bounded, KEY)[0]))(state.actor)
    same_tree(jax.tree.map(lambda g: -H * g, ours), gradient.net, rtol=1e-7, atol=1e-9)


class AtState(eqx.Module):
    """A critic of features as a function of the state, which for this task is the same."""

    critic: eqx.Module

    def __call__(self, s):
        return self.critic(s)


def test_a_ratio_beyond_the_clip_has_no_gradient(x64):
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(8,), entropy=0.0)
    actor = learned(task, learner).actor
    x, z, bounded = jnp.full((2, 4), 0.3), jnp.asarray([[0.1], [-0.2]]), jnp.ones(1, bool)
    now = log_density(*squashed_moments(actor.many(x)), z, bounded)

    @jax.jit
    def gradient(ratio, advantage):
        rows = Rows(x, z, now - jnp.log(ratio), jnp.full(2, advantage), jnp.ones(2))
        return jnp.abs(ravel_pytree(jax.grad(lambda net: learner.loss(net, rows, bounded, KEY)[0])(actor))[0]).max()

    assert gradient(1.3, 1.0) == 0 and gradient(0.7, -1.0) == 0
    assert gradient(1.3, -1.0) > 0 and gradient(0.7, 1.0) > 0 and gradient(1.1, 1.0) > 0


def test_an_update_raises_the_surrogate_and_fits_the_critic():
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(16,), batches=3, epochs=20, rate=3e-3, critic_rate=1e-2, entropy=0.0)
    steps, state = streams(task), learned(task, learner)

    @jax.jit
    @chex.assert_max_traces(1)
    def update(learner, state, key):
        return learner.update(state, task, steps, key)

    once, said = update(learner, state, KEY)
    assert float(said["actor_loss"]) < -0.05  # at the start it is 0: the advantages have mean 0
    after = once
    later = said
    for i in range(5):
        after, later = update(learner, after, jax.random.fold_in(KEY, i))
    assert later["critic_loss"] < said["critic_loss"]
    same_tree(update(learner, state, KEY)[0], once, rtol=0, atol=0)
    other = PPO(hidden=(16,), batches=3, epochs=20, rate=1e-4, critic_rate=1e-2, entropy=0.0)
    assert not np.array_equal(update(other, state, KEY)[0].actor.weights[0], once.actor.weights[0])


def test_too_few_steps():
    task = tasks.cartpole_continuous()
    learner = PPO(hidden=(4,), batches=22)
    with pytest.raises(ValueError, match="21 steps cannot make 22 mini-batches"):
        jax.eval_shape(lambda steps: learner.update(learner.init(task, KEY), task, steps, KEY), streams(task))


def test_the_actor_is_sacs():
    """One policy for both learners: what the one has learned the other can go on with."""
    task = tasks.cartpole_continuous()
    net = learned_by_sac(task).actor
    state = PPO(hidden=(16, 16), activation=jax.nn.relu).init(task, KEY)._replace(actor=net)
    s = task.initial(KEY)
    same(PPO().policy(state, task)(s), SquashedGaussian.around(net, task)(s))
