"""Training of ensembles: known answers, an end of each member's own, what is no data, what is not finite."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffmbrl import tasks
from diffmbrl.models import EndModel, GaussianDynamics, NetworkDynamics, RewardModel, Training, train
from diffmbrl.models.buffer import Transition
from diffmbrl.models.fit import holdout_split
from tests.problems import same

KEY = jax.random.key(0)


# One set of sizes for most tests: what one compiles, the others use.
ROWS = 60
STANDARD = {"learning_rate": 1e-2, "epochs": 12, "patience": 12, "batch": 64}


def plant():
    return tasks.lqr(horizon=6)


def data(count, capacity=None, noise=0.0, key=KEY):
    """Steps from states and actions drawn at random, in the first rows; NaN in the others."""
    task = plant()
    keys = jax.random.split(key, 3)
    s, a = jax.random.normal(keys[0], (count, task.n)), jax.random.normal(keys[1], (count, task.m))
    s_next = jax.vmap(task.dynamics)(s, a)
    s_next = s_next + noise * jax.random.normal(keys[2], s.shape)
    rows = Transition(s, a, jax.vmap(task.reward)(s, a), s_next, s_next[:, 0] > 0.5, jnp.zeros(count, bool))
    more = (capacity or count) - count

    def fill(x):
        value = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else False
        return jnp.concatenate([x, jnp.full((more, *x.shape[1:]), value, x.dtype)])

    return jax.tree.map(fill, rows)


def draw(kind=NetworkDynamics, count=3, hidden=(8,), key=KEY, **options):
    return jax.vmap(lambda k: kind.init(plant(), hidden=hidden, key=k, **options))(jax.random.split(key, count))


# Whatever can be trained: a new model is one row.
MODELS = {"network": NetworkDynamics, "gaussian": GaussianDynamics, "reward": RewardModel, "end": EndModel}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_trained(name):
    """The loss falls, the leaves keep their types, and a window's loss is a number."""
    members, rows = draw(MODELS[name], count=2), data(ROWS)
    trained, curves = train(members, rows, ROWS, KEY, Training(**STANDARD))
    assert np.all(curves.train[:, -1] < 0.95 * curves.train[:, 0]) and not np.any(curves.rejected)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, members)
    assert not any(x.weak_type for x in jax.tree.leaves((members, trained)))
    window = jax.tree.map(lambda x: x[:3], rows)
    loss = jax.tree.map(lambda x: x[0], trained).row_loss(window)
    assert loss.shape == () and np.isfinite(loss)


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_linear_model_is_least_squares(x64, holdout):
    """A network without hidden layers on noisy data: the minimum over the rows that are trained on."""
    rows = data(40, 48, noise=0.3)
    members = draw(hidden=(), count=2)
    training = Training(
        optax.lbfgs, epochs=60, patience=60, batch=48, holdout=holdout, improvement=0.0, bootstrap=False
    )
    trained, curves = train(members, rows, 40, KEY, training)
    order, held = holdout_split(48, jnp.int32(40), jnp.asarray(holdout))
    mine = np.asarray(order)[int(held) : 40]
    inputs = np.concatenate([rows.s, rows.a, np.ones((48, 1))], axis=1)[mine]
    weights = np.linalg.lstsq(inputs, np.asarray(rows.s_next)[mine], rcond=None)[0]
    s, a = jnp.asarray([0.7, -0.4]), jnp.asarray([0.3])
    for e in range(2):
        f = jax.tree.map(lambda x, e=e: x[e], trained)
        if holdout == 0:
            np.testing.assert_allclose(f(s, a), np.concatenate([s, a, [1]]) @ weights, rtol=1e-7)
            residual = (inputs @ weights - np.asarray(rows.s_next)[mine]) / np.asarray(f.normalizer.scale)
            np.testing.assert_allclose(curves.holdout[e], np.mean(residual**2), rtol=1e-7)
        else:
            # The best weights by the rows held out may lie on the way to the minimum; the last training loss is that.
            scale = np.asarray(f.normalizer.scale)
            residual = (inputs @ weights - np.asarray(rows.s_next)[mine]) / scale
            last = curves.train[e, int(curves.epochs[e]) - 1]
            np.testing.assert_allclose(last, np.mean(residual**2), rtol=1e-7)


def test_a_noise_free_linear_plant_is_found(x64):
    members = draw(hidden=(), count=2)
    training = Training(optax.lbfgs, epochs=60, patience=60, batch=48, improvement=0.0, bootstrap=False)
    trained, curves = train(members, data(40, 48), 40, KEY, training)
    assert np.all(curves.holdout < 1e-12)
    s, a = jnp.asarray([0.7, -0.4]), jnp.asarray([0.3])
    for e in range(2):
        f = jax.tree.map(lambda x, e=e: x[e], trained)
        np.testing.assert_allclose(f(s, a), plant().dynamics(s, a), rtol=1e-5)
        A, B = jax.jacfwd(lambda s, a, f=f: f(s, a), argnums=(0, 1))(s, a)
        np.testing.assert_allclose(A, plant().dynamics.A, atol=1e-5)
        np.testing.assert_allclose(B, plant().dynamics.B, atol=1e-5)


def test_noise_is_learned_with_its_size(x64):
    trained, _ = train(
        draw(GaussianDynamics, hidden=(), count=1),
        data(3000, noise=0.2),
        3000,
        KEY,
        Training(epochs=60, learning_rate=3e-2, bootstrap=False),
    )
    f = jax.tree.map(lambda x: x[0], trained)
    mean, std = f.moments(jnp.asarray([0.3, 0.3]), jnp.zeros(1))
    np.testing.assert_allclose(std, 0.2, rtol=0.1)
    np.testing.assert_allclose(mean, plant().dynamics(jnp.asarray([0.3, 0.3]), jnp.zeros(1)), atol=0.03)


def test_each_member_ends_by_itself_with_its_own_best_weights():
    """In one ensemble: a member that learns, one whose steps diverge, and one that has nothing that it could learn by."""
    rows = data(200)
    training = Training(optax.sgd, learning_rate=0.1, epochs=30, patience=4, batch=32, improvement=0.03)
    one = draw(count=1)
    wild = jax.tree.map(lambda x: 1e3 * x if x.ndim == 3 else x, one)
    # Of a network of zeros only the last biases have a gradient, and the changes a mean of nearly 0.
    idle = eqx.tree_at(lambda f: f.net, one, jax.tree.map(jnp.zeros_like, one.net))
    members = jax.tree.map(lambda *x: jnp.concatenate(x), one, wild, idle)
    trained, curves = train(members, rows, 200, KEY, training)
    assert list(curves.rejected) == [0, 1, 0]
    assert curves.epochs[1] == 1 and 4 <= curves.epochs[2] < 15 < curves.epochs[0], curves
    each = [jax.tree.map(lambda x, e=e: x[e], trained) for e in range(3)]
    assert curves.holdout[0] < 0.5 * curves.heldout[0, 0]
    chex.assert_trees_all_equal(each[1].net, jax.tree.map(lambda x: x[0], wild).net)
    # What is returned has the loss that is reported: each member's own best, evaluated again.
    same(curves.holdout, np.nanmin(np.where(np.isfinite(curves.heldout), curves.heldout, np.nan), axis=1))
    order, held = holdout_split(200, jnp.int32(200), jnp.asarray(0.1))
    judged = jax.tree.map(lambda x: x[order[: int(held)]], rows)
    for e, f in enumerate(each):
        np.testing.assert_allclose(jnp.mean(jax.vmap(f.row_loss)(judged)), curves.holdout[e], rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_the_best_weights_are_kept_while_training_goes_on_to_worse_ones():
    """Few rows of pure noise: the loss held out falls and rises again."""
    noise = data(30)
    noise = noise._replace(s_next=noise.s + jax.random.normal(jax.random.key(5), noise.s.shape))
    training = Training(epochs=60, patience=60, learning_rate=1e-2, holdout=0.3)
    _, curves = train(draw(hidden=(32,), count=2), noise, 30, KEY, training)
    for e in range(2):
        at = int(np.argmin(curves.heldout[e]))
        assert at < 40 and curves.heldout[e, -1] > 1.2 * curves.heldout[e, at]
        assert curves.holdout[e] == curves.heldout[e, at]
        assert curves.train[e, -1] < 0.5 * curves.train[e, 0]


@pytest.mark.slow
def test_rows_beyond_the_size_are_no_data_and_nothing_compiles_while_a_buffer_grows():
    members, full = draw(), data(ROWS)
    run = jax.jit(chex.assert_max_traces(lambda *arguments: train(*arguments), n=1))
    for bootstrap in (False, True):
        training = Training(**STANDARD, bootstrap=bootstrap)
        for size in (2, 30, ROWS):
            trained, curves = run(members, data(size, ROWS), jnp.int32(size), KEY, training)
            other = jax.tree.map(lambda x, y: jnp.concatenate([y, x[len(y) :]]), full, data(size))
            again, _ = run(members, other, jnp.int32(size), KEY, training)
            chex.assert_trees_all_equal(trained, again)
            assert not np.any(curves.rejected) and np.all(np.isfinite(curves.holdout))


def test_equal_keys_are_equal_bit_for_bit_and_others_differ():
    members, rows, training = draw(), data(ROWS), Training(**STANDARD)
    one, again = (train(members, rows, ROWS, KEY, training)[0] for _ in range(2))
    chex.assert_trees_all_equal(one, again)
    other = train(members, rows, ROWS, jax.random.key(1), training)[0]
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(one.net), jax.tree.leaves(other.net), strict=True))


@pytest.mark.slow
def test_members_are_trained_as_if_alone_and_together_alike():
    """Side by side, one after another, and vmapped over seeds."""
    members, rows, training = draw(), data(ROWS), Training(**STANDARD)
    alone, curves = train(members, rows, ROWS, KEY, training)
    together, also = train(members, rows, ROWS, KEY, Training(**STANDARD, together=3))
    for x, y in zip(jax.tree.leaves((alone, curves)), jax.tree.leaves((together, also)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    keys = jnp.stack([KEY, jax.random.key(1)])
    seeds = jax.jit(jax.vmap(lambda key: train(members, rows, ROWS, key, training)[0]))(keys)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(seeds), strict=True):
        np.testing.assert_allclose(x, y[0], atol=1e-4)


def test_bootstrap_gives_members_rows_of_their_own():
    """Equal members, full batches: with the same rows they stay equal."""
    members = jax.tree.map(lambda x: jnp.concatenate([x] * 3), draw(count=1))
    rows = data(ROWS, noise=0.5)
    for bootstrap in (False, True):
        trained, _ = train(members, rows, ROWS, KEY, Training(**STANDARD, bootstrap=bootstrap))
        W = trained.net.weights[0]
        assert np.allclose(W, W[:1], atol=1e-4) is not bootstrap


def test_a_share_is_held_out_and_stays_so_as_the_rows_grow():
    order, held = holdout_split(1000, jnp.int32(400), jnp.asarray(0.1))
    assert int(held) == 40 and sorted(np.asarray(order[:400])) == list(range(400))
    more, most = holdout_split(1000, jnp.int32(440), jnp.asarray(0.1))
    kept = set(np.asarray(order[:40])) & set(np.asarray(more[: int(most)]))
    assert len(kept) >= 36
    assert int(holdout_split(10, jnp.int32(2), jnp.asarray(0.1))[1]) == 1
    assert int(holdout_split(10, jnp.int32(2), jnp.asarray(0.0))[1]) == 0


@pytest.mark.slow
def test_training_goes_on_from_trained_members():
    rows, training = data(ROWS), Training(**STANDARD)
    first, curves = train(draw(), rows, ROWS, KEY, training)
    _, more = train(first, rows, ROWS, jax.random.key(1), training)
    np.testing.assert_allclose(more.heldout[:, 0], curves.holdout, rtol=1e-4)
    assert np.all(more.holdout <= curves.holdout * (1 + 1e-4))


@pytest.mark.slow
def test_windows_are_trained_on_by_the_models_own_rollouts(x64):
    """The loss of a window is that of predictions fed back; on data with wrong middles only the ends can teach."""
    f = jax.tree.map(lambda x: x[0], draw(hidden=(), count=1, output_scale=1.0))
    s, a = jax.random.normal(KEY, (4, 2)), jax.random.normal(KEY, (4, 1))
    s_next = jax.random.normal(jax.random.key(1), (4, 2))
    no = jnp.zeros(4, bool)
    x, errors = s[0], []
    for j in range(4):
        x = f(x, a[j])
        errors.append(jnp.mean((s_next[j] - x) ** 2))
    window = Transition(s, a, jnp.zeros(4), s_next, no, no)
    np.testing.assert_allclose(f.row_loss(window), np.mean(errors), rtol=1e-10)

    def follow(s0, a):
        return jax.lax.scan(lambda s, a: (plant().dynamics(s, a), (s, plant().dynamics(s, a))), s0, a)[1]

    a = jax.random.normal(KEY, (50, 4, 1))
    s, s_next = jax.vmap(follow)(jax.random.normal(KEY, (50, 2)), a)
    no = jnp.zeros((50, 4), bool)
    windows = Transition(s, a, jnp.zeros((50, 4)), s_next, no, no)
    windows = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.full_like(x, jnp.nan) if x.dtype == float else x]), windows
    )
    trained, curves = train(draw(hidden=(), count=2), windows, 50, KEY, Training(optax.lbfgs, epochs=80, patience=80))
    assert np.all(curves.holdout < 1e-8)
    f = jax.tree.map(lambda x: x[1], trained)
    np.testing.assert_allclose(f(s[0, 0], a[0, 0]), s_next[0, 0], rtol=1e-3)


def test_a_member_that_was_not_finite_stays_as_it_was_and_is_counted():
    members = draw()
    spoiled = eqx.tree_at(lambda f: f.net.biases[0], members, members.net.biases[0].at[1].set(jnp.nan))
    trained, curves = train(spoiled, data(ROWS), ROWS, KEY, Training(**STANDARD))
    assert list(curves.rejected) == [0, 1, 0]
    assert np.isinf(curves.holdout[1]) and np.all(np.isfinite(curves.holdout[jnp.array([0, 2])]))
    kept, given = (jax.tree.leaves(jax.tree.map(lambda x: x[1], f)) for f in (trained, spoiled))
    chex.assert_trees_all_equal(kept, given)


def test_rows_of_nan_reject_every_member():
    rows, members = data(ROWS), draw()
    rows = rows._replace(s_next=rows.s_next.at[3].set(jnp.nan))
    trained, curves = train(members, rows, ROWS, KEY, Training(**STANDARD))
    assert np.all(curves.rejected == 1) and np.all(np.isinf(curves.holdout)) and np.all(curves.epochs == 0)
    chex.assert_trees_all_equal(trained, members)


def test_too_few_rows_are_an_error_or_counted():
    members, rows = draw(), data(ROWS)
    traced = jax.jit(lambda size, training: train(members, rows, size, KEY, training))
    for size, holdout in ((0, 0.1), (1, 0.1), (0, 0.0)):
        training = Training(**STANDARD, holdout=holdout)
        least = 2 if holdout else 1
        with pytest.raises(ValueError, match=rf"takes {least} to 60 of the 60 rows .*, got {size}"):
            train(members, rows, size, KEY, training)
        trained, curves = traced(size, training)
        assert np.all(curves.rejected == 1) and np.all(np.isinf(curves.holdout))
        chex.assert_trees_all_equal(trained, members)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"rule must be a constructor such as optax.adam.* got GradientTransformation"):
        Training(optax.adam(1e-3))
    with pytest.raises(ValueError, match="epochs must be a whole number of at least 1, got 0"):
        Training(epochs=0)
    with pytest.raises(ValueError, match=r"holdout must be a share of at least 0 and below 1, got 1.5"):
        Training(holdout=1.5)
    with pytest.raises(ValueError, match=r"takes 2 to 10 of the 10 rows .*, got 11"):
        train(draw(), data(10), 11, KEY)
    with pytest.raises(ValueError, match="same leading axis: draw them under vmap"):
        train(NetworkDynamics.init(plant(), hidden=[4], key=KEY), data(10), 10, KEY)
