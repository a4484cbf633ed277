"""SAC against Brax's losses on the same batch, Bellman's equation by hand, and integrals of the policy's density."""

import warnings
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from diffmbrl import tasks
from diffmbrl.agents import SAC, OffPolicy, SquashedGaussian
from diffmbrl.agents.actor import entropy, log_density, logit, squashed_moments, unit
from diffmbrl.models.buffer import Transition
from tests.problems import same, same_tree

KEY = jax.random.key(0)
LEARNER = SAC(hidden=(16, 16), entropy=jnp.asarray(-0.5))


@partial(jax.jit, static_argnames="count")
def steps(task, count, key=KEY, spread=1.0):
    """Transitions of a task, some of which end."""
    keys = jax.random.split(key, 5)
    s, s_next = (spread * jax.random.normal(k, (count, task.n), task.a_low.dtype) for k in keys[:2])
    u = jax.random.uniform(keys[2], (count, task.m), s.dtype, -0.99, 0.99)
    r, done = jax.random.normal(keys[3], (count,), s.dtype), jax.random.bernoulli(keys[4], 0.3, (count,))
    return Transition(s, jnp.where(jnp.isfinite(task.a_high), u * task.a_high, u), r, s_next, done, done)


@jax.jit
def learned(task, learner=LEARNER):
    """A state whose networks, targets among them, are all different and large enough to matter."""
    one, other = (learner.init(task, k) for k in jax.random.split(jax.random.key(1)))
    actor = eqx.tree_at(lambda net: net.weights[-1], one.actor, 50 * one.actor.weights[-1])
    return one._replace(actor=actor, targets=other.critics, log_alpha=jnp.full_like(one.log_alpha, -0.7))


def brax_layers(net):
    names = [f"hidden_{i}" for i in range(len(net.weights))]
    return {name: {"kernel": W.T, "bias": b} for name, W, b in zip(names, net.weights, net.biases, strict=True)}


def test_losses_and_gradients_are_braxs_on_the_same_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax.training.agents.sac import losses, networks
    task = tasks.quadrotor2d()  # two actions, limits that are not about 0
    batch, state = steps(task, 32), learned(task)
    state = state._replace(moments=None)

    def ours(part):
        return LEARNER.loss(part, state.targets, task, batch, KEY)

    (_, said), (actor, critics, log_alpha) = jax.jit(jax.value_and_grad(ours, has_aux=True))(
        (state.actor, state.critics, state.log_alpha)
    )

    key_now, key_next = jax.random.split(KEY)
    x, x_next = jax.vmap(task.features)(batch.s), jax.vmap(task.features)(batch.s_next)
    u = unit(batch.a, task.a_low, task.a_high)
    nets = networks.make_sac_networks(x.shape[1], task.m, hidden_layer_sizes=(16, 16))
    alpha_loss, critic_loss, actor_loss = losses.make_losses(nets, 1.0, 0.99, task.m)
    theirs = losses.Transition(
        observation=x, action=u, reward=batch.r, discount=1 - batch.done.astype(x.dtype), next_observation=x_next,
        extras={"state_extras": {"truncation": jnp.zeros(32)}},
    )  # fmt: skip
    pi = {"params": brax_layers(state.actor)}

    def both(critics):
        return {"params": {f"MLP_{i}": brax_layers(jax.tree.map(lambda x, i=i: x[i], critics)) for i in range(2)}}

    alpha = jnp.exp(state.log_alpha)
    with jax.numpy_dtype_promotion("standard"):
        grad = jax.value_and_grad
        value, g_alpha = jax.jit(grad(lambda p: alpha_loss(p, pi, None, theirs, key_now)))(state.log_alpha)
        value_q, g_q = jax.jit(grad(lambda p: critic_loss(p, pi, None, both(state.targets), alpha, theirs, key_next)))(
            both(state.critics)
        )
        value_pi, g_pi = jax.jit(grad(lambda p: actor_loss(p, None, both(state.critics), alpha, theirs, key_now)))(pi)
    close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    close(said["critic_loss"], value_q)
    close(said["actor_loss"], value_pi)
    close(alpha * (said["entropy"] + 0.5 * task.m), value)
    close(log_alpha, g_alpha)
    jax.tree.map(close, both(critics), g_q)
    jax.tree.map(close, {"params": brax_layers(actor)}, g_pi)


def test_the_target_by_hand(x64):
    """Critics that are constant, an actor at mean 0: y = r + gamma (1 - d) (min(5, 3) - alpha log pi)."""
    task = tasks.cartpole_continuous()
    batch, state = steps(task, 6), learned(task)
    constant = jax.tree.map(jnp.zeros_like, state.critics)
    constant = eqx.tree_at(lambda net: net.biases[-1], constant, jnp.asarray([[5.0], [3.0]]))
    actor = jax.tree.map(jnp.zeros_like, state.actor)
    learner = SAC(hidden=(16, 16), discount=0.9)
    alpha = jnp.asarray(0.2)
    _, said = learner.loss((actor, constant, jnp.log(alpha)), constant, task, batch, KEY)

    noise_now, noise_next = (np.asarray(jax.random.normal(k, (6, 1)))[:, 0] for k in jax.random.split(KEY))
    std = np.log(2) + 1e-3

    def log_prob(noise):
        u = np.tanh(std * noise)
        return -(noise**2) / 2 - np.log(std) - np.log(2 * np.pi) / 2 - np.log(1 - u**2)

    y = np.asarray(batch.r) + 0.9 * (1 - np.asarray(batch.done)) * (3 - 0.2 * log_prob(noise_next))
    same(said["critic_loss"], ((5 - y) ** 2 + (3 - y) ** 2).mean() / 4)
    same(said["actor_loss"], (0.2 * log_prob(noise_now) - 3).mean())
    same(said["entropy"], -log_prob(noise_now).mean())


def test_critics_find_the_values_of_a_small_chain():
    """0 -> 1 earns 1; from 1, the end earns 2, or the clock cuts off a step that stays and earns 2: values 1 + .5 * 2, 2, 4."""
    task = tasks.pendulum()
    task = eqx.tree_at(lambda t: t.features, task, First(), is_leaf=lambda x: x is task.features)
    s = jnp.asarray([[0.0, 0], [1, 0], [2, 0]])
    s_next = jnp.asarray([[1.0, 0], [1, 0], [2, 0]])
    done = jnp.asarray([False, True, False])
    batch = Transition(s, jnp.zeros((3, 1)), jnp.asarray([1.0, 2, 2]), s_next, done, jnp.asarray([False, True, True]))
    learner = SAC(hidden=(32,), discount=0.5, rate=3e-3, follow=0.1, temperature=1e-6)

    @jax.jit
    def run(state):
        def step(state, key):
            return learner.update(state, task, batch._replace(a=2 * jax.random.uniform(key, (3, 1), minval=-1)), key)

        return jax.lax.scan(step, state, jax.random.split(KEY, 1500))[0]

    from diffmbrl.agents.sac import q_values

    state = run(learner.init(task, KEY))
    x = jnp.repeat(jax.vmap(First())(s), 3, axis=0)
    u = jnp.tile(jnp.asarray([[-0.8], [0.0], [0.8]]), (3, 1))
    np.testing.assert_allclose(q_values(state.critics, x, u), np.tile(np.repeat([2.0, 2, 4], 3), (2, 1)), atol=0.15)


class First(eqx.Module):
    """Which of three states it is."""

    def __call__(self, s):
        return (jnp.abs(s[0] - jnp.arange(3, dtype=s.dtype)) < 0.5).astype(s.dtype)


@pytest.mark.slow
def test_gradients_are_central_differences(x64):
    task = tasks.cartpole_continuous()
    learner = SAC(hidden=(4,), activation=jnp.tanh)
    batch, state = steps(task, 5), learned(task, learner)
    whole = (state.actor, state.critics, state.log_alpha)

    def in_third(i, part):
        return learner.loss((*whole[:i], part, *whole[i + 1 :]), state.targets, task, batch, KEY)

    gradient = jax.grad(lambda w: learner.loss(w, state.targets, task, batch, KEY)[0])(whole)
    # Each loss in its own third: the actor's reaches neither the critics nor the temperature.
    check_grads(lambda p: in_third(1, p)[1]["critic_loss"], (whole[1],), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)
    check_grads(lambda p: in_third(0, p)[1]["actor_loss"], (whole[0],), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)
    same_tree(jax.grad(lambda p: in_third(1, p)[1]["critic_loss"])(whole[1]), gradient[1])
    same_tree(jax.grad(lambda p: in_third(0, p)[1]["actor_loss"])(whole[0]), gradient[0])
    said = in_third(0, whole[0])[1]
    same(gradient[2], jnp.exp(whole[2]) * (said["entropy"] + task.m))


# The policy.


@pytest.mark.parametrize("limited", [True, False])
def test_the_density_integrates_to_one_and_its_entropy_is_what_is_said(limited, x64):
    mean, std, bounded = jnp.full((4001, 1), 0.4), jnp.full((4001, 1), 0.8), jnp.asarray([limited])
    z = jnp.linspace(-7, 7, 4001)[:, None]
    slope = 1 - jnp.tanh(z[:, 0]) ** 2 if limited else jnp.ones(4001)
    density = jnp.exp(log_density(mean, std, z, bounded))
    same(jnp.trapezoid(density * slope, z[:, 0]), 1, rtol=1e-6)
    H = -jnp.trapezoid(density * slope * jnp.log(density), z[:, 0])
    noise = jax.random.normal(KEY, mean.shape)
    drawn = jnp.mean(entropy(mean, std, noise, bounded))
    same(drawn, H, atol=0.02)


def test_actions_keep_their_limits_and_are_judged_by_their_density(x64):
    task = eqx.tree_at(
        lambda t: (t.a_low, t.a_high), tasks.quadrotor2d(), (jnp.asarray([0.0, -jnp.inf]), jnp.asarray([4.0, jnp.inf]))
    )
    net = learned(task).actor
    pi = SquashedGaussian.around(jax.tree.map(lambda x: 3 * x, net), task)
    s = task.starts(KEY, 50)
    a = jax.jit(jax.vmap(lambda s, k: pi(s, key=k)))(s, jax.random.split(KEY, 50))
    assert np.all((a[:, 0] >= 0) & (a[:, 0] <= 4)) and np.any(np.abs(a[:, 1]) > 4)
    u, z = unit(a, task.a_low, task.a_high), logit(a, task.a_low, task.a_high)
    np.testing.assert_allclose(u[:, 1], a[:, 1])
    inside = np.abs(u[:, 0]) < 0.999
    np.testing.assert_allclose(np.tanh(z[inside, 0]), u[inside, 0], rtol=1e-9)
    by_rows = jax.jit(lambda s: log_density(*squashed_moments(pi.net.many(jax.vmap(task.features)(s))), z, pi.limited))(
        s
    )
    np.testing.assert_allclose(jax.jit(jax.vmap(pi.log_prob))(s, a), by_rows, rtol=1e-9)
    at_limit = logit(jnp.asarray([4.0, 100.0]), task.a_low, task.a_high)
    assert np.all(np.isfinite(at_limit)) and at_limit[0] > 15 and at_limit[1] == 100
    np.testing.assert_array_equal(pi(s[0]), pi(s[0]))


# Updates.


def test_an_update_is_adams_and_the_targets_follow(x64):
    task = tasks.cartpole_continuous()
    learner = SAC(hidden=(8,), rate=1e-3, follow=0.25)
    batch, state = steps(task, 16), learned(task, learner)
    after, _ = jax.jit(lambda *x: learner.update(*x))(state, task, batch, KEY)
    loss = jax.grad(lambda w: learner.loss(w, state.targets, task, batch, KEY), has_aux=True)
    gradient, said = jax.jit(loss)((state.actor, state.critics, state.log_alpha))
    # Adam's first step is rate times the sign of the gradient.
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g / (jnp.abs(g) + 1e-8), (state.actor, state.critics), gradient[:2])
    same_tree((after.actor, after.critics), moved, rtol=1e-6, atol=1e-8)
    same_tree(after.targets, jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, state.targets, after.critics))
    # Less entropy than wanted raises the temperature.
    assert (after.log_alpha > state.log_alpha) == (said["entropy"] < -1)


def test_one_compilation_for_all_rates_and_seeds_alone_or_side_by_side():
    task = tasks.cartpole_continuous()
    batch = steps(task, 16)

    @jax.jit
    @chex.assert_max_traces(1)
    def update(learner, state, key):
        return learner.update(state, task, batch, key)[0]

    made = [SAC(hidden=(8,), rate=rate) for rate in (1e-3, 1e-2)]
    states = [SAC(hidden=(8,)).init(task, k) for k in jax.random.split(KEY)]
    alone = [update(learner, state, KEY) for learner, state in zip(made, states, strict=True)]
    together = jax.jit(jax.vmap(lambda learner, state: learner.update(state, task, batch, KEY)[0]))(
        *(jax.tree.map(lambda *x: jnp.stack(x), *items) for items in (made, states))
    )
    # Not bit for bit: a batched product sums in another order.
    same_tree(jax.tree.map(lambda *x: jnp.stack(x), *alone), together, rtol=1e-4, atol=1e-5)
    same_tree(update(made[0], states[0], KEY), alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("size", ["updates", "batch"])
def test_sizes(size):
    with pytest.raises(ValueError, match=f"{size} must be a whole number of at least 1, got 0"):
        OffPolicy(SAC(), **{size: 0})
