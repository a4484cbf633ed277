"""Models beyond the plain network: with a memory, with bounded Jacobians, of rewards and of ends; elites and disagreement."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import Neural, OpenLoop, rollout, tasks
from diffmbrl.contrib import SimplexMemory
from diffmbrl.models import (
    EndModel,
    Ensemble,
    NetworkDynamics,
    RecurrentDynamics,
    Remembered,
    RewardModel,
    SimplexMLP,
    Training,
    bounded_spectrum,
    disagreement,
    elites,
    remembering,
    train,
)
from diffmbrl.models.buffer import Transition
from diffmbrl.nets import GRU, LSTM, MLP
from diffmbrl.second_order.linearize import linearize
from tests.problems import same

KEY = jax.random.key(0)
TASK = tasks.lqr(horizon=6)


def rows(count, task=TASK):
    keys = jax.random.split(KEY, 2)
    s, a = jax.random.normal(keys[0], (count, task.n)), jax.random.normal(keys[1], (count, task.m))
    s_next = jax.vmap(task.dynamics)(s, a)
    return Transition(s, a, jax.vmap(task.reward)(s, a), s_next, s_next[:, 0] > 0.5, jnp.zeros(count, bool))


def alone(model):
    return jax.tree.map(lambda x: x[None], model)


def first(members):
    return jax.tree.map(lambda x: x[0], members)


def hidden_force(count, steps):
    """Windows of a block pushed by a force of +-1 that the state does not show, but its changes do."""
    keys = jax.random.split(KEY, 3)
    force = jax.random.rademacher(keys[0], (count,), float)
    a = jax.random.normal(keys[1], (count, steps, 1))

    def follow(s, a, force):
        return jax.lax.scan(lambda s, a: (TASK.dynamics(s, a + force), s), s, a)

    last, s = jax.vmap(follow)(jax.random.normal(keys[2], (count, 2)), a, force)
    s_next = jnp.concatenate([s[:, 1:], last[:, None]], axis=1)
    no = jnp.zeros((count, steps), bool)
    return Transition(s, a, jnp.zeros((count, steps)), s_next, no, no)


@pytest.mark.parametrize("draw", [GRU.init, LSTM.init], ids=["gru", "lstm"])
def test_a_memory_tells_what_the_state_does_not(draw):
    windows = hidden_force(120, 6)
    f = RecurrentDynamics.init(TASK, hidden=8, draw=draw, key=KEY)
    trained, curves = train(alone(f), windows, 120, KEY, Training(learning_rate=3e-2, epochs=60, batch=32, patience=60))
    assert curves.holdout[0] < 0.35 * curves.heldout[0, 0]
    f = first(trained)

    def error(skip):
        """Of the last step, after a memory of the steps before it but for the first `skip`."""

        def one(row):
            state = f.start(row.s[skip])
            for t in range(skip, 5):
                state = f.remember(state, row.a[t], row.s_next[t])
            return jnp.mean((f(state, row.a[5]).s - row.s_next[5]) ** 2)

        return jnp.mean(jax.vmap(one)(windows))

    assert error(0) < 0.3 * error(5)


def test_a_model_with_a_memory_goes_through_rollouts_and_linearisation():
    f = RecurrentDynamics.init(TASK, hidden=4, key=KEY)
    task, plan = remembering(TASK, f), OpenLoop(0.3 * jnp.ones((6, 1)))
    s0 = task.initial(KEY)
    assert isinstance(s0, Remembered) and not np.any(s0.h)
    trajectory = jax.jit(rollout)(plan, task, s0)
    step, state = jax.jit(lambda state, a: (TASK.reward(state.s, a), f(state, a))), s0
    for t in range(6):
        same(trajectory.s.s[t], state.s, rtol=1e-5)
        r, state = step(state, plan.a[t])
        same(trajectory.r[t], r, rtol=1e-4)
    assert jax.jit(linearize)(task, trajectory).A.shape == (6, 6, 6)
    policy = Neural.init(task, hidden=[4], key=KEY)
    on_states = eqx.tree_at(lambda p: p.features, policy, TASK.features)
    same(policy(s0), on_states(s0.s))
    # The loss of a window is that of predictions from the true states, the memory running through.
    one = first(hidden_force(1, 3))
    state, errors = f.start(one.s[0]), []
    for t in range(3):
        errors.append(jnp.mean((f(state, one.a[t]).s - one.s_next[t]) ** 2))
        state = f.remember(state, one.a[t], one.s_next[t])
    np.testing.assert_allclose(f.row_loss(one), np.mean(errors), rtol=1e-5)
    with pytest.raises(ValueError, match=r"trained on windows \[capacity, k, ...\], got single transitions"):
        train(alone(f), rows(10), 10, KEY)


def test_simplices_bound_what_a_network_says():
    net = SimplexMLP.init(3, [8, 16], 2, key=KEY)
    latent = jnp.concatenate([jax.nn.softmax(x) for x in net.encoder(jnp.ones(3)).reshape(2, 8)])
    same(net(jnp.ones(3)), net.readout(latent), rtol=1e-5)
    W, b = np.asarray(net.readout.weights[0]), np.asarray(net.readout.biases[0])
    highest = b + W.reshape(2, 2, 8).max(axis=2).sum(axis=1)
    for x in 1e3 * jax.random.normal(KEY, (20, 3)):
        assert np.all(net(x) <= highest + 1e-5)
    f = NetworkDynamics.init(TASK, hidden=[8, 16], draw=SimplexMLP.init, key=KEY)
    trained, curves = train(alone(f), rows(60), 60, KEY, Training(epochs=20, learning_rate=1e-2))
    assert curves.holdout[0] < 0.9 * curves.heldout[0, 0] and isinstance(trained.net, SimplexMLP)


@pytest.mark.parametrize("draw", [GRU.init, LSTM.init], ids=["gru", "lstm"])
def test_a_memory_on_simplices_stays_there(draw):
    net = SimplexMemory.init(3, 8, 2, key=KEY, draw=draw, group=4)
    memory = net.start()
    for x in 10 * jax.random.normal(KEY, (5, 3)):
        memory, y = net(memory, x)
        h = memory[0] if isinstance(memory, tuple) else memory
        np.testing.assert_allclose(h.reshape(2, 4).sum(axis=1), 1, rtol=1e-5)
        same(y, net.net.readout(h))
    f = RecurrentDynamics.init(TASK, hidden=8, draw=SimplexMemory.init, key=KEY)
    assert np.isfinite(f.row_loss(first(hidden_force(1, 3))))


def test_a_bounded_spectrum_is_kept_through_training():
    """Any network's matrices, by their singular values; without the bound they grow beyond it."""
    training = {"learning_rate": 3e-2, "epochs": 20, "batch": 32, "patience": 20}
    nets = (MLP.init(3, [8, 8], 2, key=KEY), GRU.init(3, 4, 2, key=KEY).cell)
    assert max(np.linalg.norm(W, 2) for W in jax.tree.leaves(nets) if W.ndim == 2) > 0.7
    f = alone(NetworkDynamics.init(TASK, hidden=[8, 8], output_scale=1.0, key=KEY))
    norms = {}
    for rule, more in ((optax.adam, {}), (bounded_spectrum, {"bound": 0.7})):
        trained, curves = train(f, rows(60), 60, KEY, Training(rule, **training, **more))
        assert curves.holdout[0] < curves.heldout[0, 0]
        norms[rule] = [np.linalg.norm(W[0], 2) for W in trained.net.weights]
    assert max(norms[bounded_spectrum]) < 0.7 * 1.02 and max(norms[optax.adam]) > 1.0
    # In a cell, too, and a matrix of zeros is left alone.
    rule = bounded_spectrum(optax.sgd, bound=0.5, learning_rate=0.1)
    cell = eqx.tree_at(lambda c: c.weight_hh, nets[1], jnp.zeros_like(nets[1].weight_hh))
    state = rule.init(cell)
    change, _ = rule.update(jax.tree.map(jnp.zeros_like, cell), state, cell)
    moved = optax.apply_updates(cell, change)
    assert np.linalg.norm(moved.weight_ih, 2) < 0.51 and not np.any(moved.weight_hh)
    same(moved.bias, cell.bias)


def test_rewards_and_ends_are_learned(x64):
    task = tasks.lqr(horizon=6)
    keys = jax.random.split(KEY, 2)
    s, a = (jax.random.uniform(k, (400, d), minval=-1, maxval=1) for k, d in zip(keys, (2, 1), strict=True))
    s_next = jax.vmap(task.dynamics)(s, a)
    data = Transition(s, a, jax.vmap(task.reward)(s, a), s_next, s_next[:, 0] > 0.3, jnp.zeros(400, bool))
    training = Training(learning_rate=1e-2, epochs=100, batch=16, patience=100)
    r = RewardModel.init(task, hidden=[16], key=KEY)
    trained, curves = train(alone(r), data, 400, KEY, training)
    assert curves.holdout[0] < 0.1
    learned = eqx.tree_at(lambda t: t.reward, task, first(trained))
    plan = OpenLoop(jnp.zeros((6, 1)))
    true, mine = (rollout(plan, t, jnp.asarray([0.5, -0.5])).r for t in (task, learned))
    np.testing.assert_allclose(mine, true, atol=0.3 * float(data.r.std()))
    end = EndModel.init(task, hidden=[8], key=KEY)
    trained, curves = train(alone(end), data, 400, KEY, training)
    done = first(trained)
    assert np.mean(np.asarray(jax.vmap(done)(s_next)) == np.asarray(data.done)) > 0.97
    ending = Transition(*(x[:3] for x in data))
    np.testing.assert_allclose(r.row_loss(ending), np.mean([r.row_loss(first(ending._replace(**{
        k: x[i:] for k, x in ending._asdict().items()}))) for i in range(3)]))  # fmt: skip


def test_elites_are_the_best_and_disagreement_is_their_spread():
    draw = jax.vmap(lambda k: NetworkDynamics.init(TASK, hidden=[4], output_scale=1.0, key=k))
    members = jax.jit(draw)(jax.random.split(KEY, 4))
    holdout = jnp.asarray([0.3, jnp.nan, 0.1, jnp.inf])
    best = elites(members, holdout, 3)
    for place, e in enumerate([2, 0, 3]):
        same(best.net.weights[0][place], members.net.weights[0][e])
    with pytest.raises(ValueError, match="elites are 1 to 4 of 4 members, got 5"):
        elites(members, holdout, 5)
    s, a, step = jnp.ones(2), jnp.ones(1), jax.jit(lambda f, s, a: f(s, a))
    scale = jnp.asarray([2.0, 0.0])
    scaled = eqx.tree_at(lambda f: f.normalizer.scale, members, jnp.tile(scale, (4, 1)))
    each = np.stack([step(f, s, a) for f in (jax.tree.map(lambda x, e=e: x[e], scaled) for e in range(4))])
    np.testing.assert_allclose(disagreement(Ensemble(scaled), s, a), each[:, 0].std() / 2, rtol=1e-5)
    equal = jax.tree.map(lambda x: jnp.stack([x[0]] * 3), scaled)
    assert disagreement(Ensemble(equal), s, a) == 0
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda s: disagreement(Ensemble(equal), s, a)))(s)))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="divided into groups of at least 2: 12 units, groups of 8"):
        SimplexMLP.init(3, [12], 2, key=KEY)
    with pytest.raises(ValueError, match="the last hidden layer: give at least one"):
        SimplexMLP.init(3, [], 2, key=KEY)
    with pytest.raises(ValueError, match="divided into groups of at least 2: 8 units, groups of 1"):
        SimplexMemory.init(3, 8, 2, key=KEY, group=1)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        bounded_spectrum(optax.sgd, learning_rate=0.1, iterations=0)
