"""Networks: what they compute, the scale of their weights, memory over a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffmbrl.nets import GRU, LSTM, MLP
from tests.problems import some_slow

KEY = jax.random.key(0)

NETS = {
    "mlp": (lambda key: MLP.init(3, [5, 4], 2, key=key), 3 * 5 + 5 + 5 * 4 + 4 + 4 * 2 + 2),
    "gru": (lambda key: GRU.init(3, 5, 2, key=key), 3 * 5 * (3 + 5) + 3 * 5 + 5 + 5 * 2 + 2),
    "lstm": (lambda key: LSTM.init(3, 5, 2, key=key), 4 * 5 * (3 + 5) + 4 * 5 + 5 * 2 + 2),
}


@pytest.mark.parametrize("name", some_slow(NETS, "lstm"))
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_every_leaf_is_a_float_array(name, double):
    init, size = NETS[name]
    with jax.enable_x64(double):
        net = init(KEY)
        theta, unravel = ravel_pytree(net)
        assert theta.dtype == (jnp.float64 if double else jnp.float32)
        assert theta.shape == (size,)
        jax.tree.map(np.testing.assert_array_equal, unravel(theta), net)
        assert not np.array_equal(theta, ravel_pytree(init(jax.random.key(1)))[0])


def test_mlp_is_its_equation():
    net = MLP.init(3, [5, 4], 2, key=KEY, activation=jnp.sin)
    x = jnp.asarray([0.3, -0.7, 0.2])
    h = np.asarray(x)
    for i, (W, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        h = np.asarray(W) @ h + np.asarray(b) + (i + 1)
        h = np.sin(h) if i < 2 else h
    shifted = MLP(net.weights, tuple(b + (i + 1) for i, b in enumerate(net.biases)), jnp.sin)
    np.testing.assert_allclose(shifted(x), h, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda net, x: net(x))(shifted, x), h, rtol=1e-5)


def test_mlp_scales():
    net = MLP.init(100, [200], 80, key=KEY, output_scale=0.1)
    for W, fan_in, scale in zip(net.weights, [100, 200], [1, 0.1], strict=True):
        assert W.std() == pytest.approx(scale / fan_in**0.5, rel=0.05)
        assert abs(W.mean()) < 0.05 * scale
    assert not any(b.any() for b in net.biases)


@pytest.mark.parametrize("sizes", [(0, [4], 1), (3, [4, 0], 1), (3, [4], -1)])
def test_a_layer_needs_a_unit(sizes):
    with pytest.raises(ValueError, match="every layer needs at least one unit, got sizes"):
        MLP.init(*sizes, key=KEY)


@pytest.mark.parametrize("net", [GRU.init(3, 5, 2, key=KEY), LSTM.init(3, 5, 2, key=KEY)], ids=["gru", "lstm"])
def test_memory_is_carried_by_scan(net):
    xs = jax.random.normal(jax.random.key(1), (6, 3))

    @jax.jit
    def run(net, xs):
        return jax.lax.scan(lambda memory, x: net(memory, x), net.start(), xs)[1]

    memory, outputs = net.start(), []
    for x in xs:
        memory, y = net(memory, x)
        outputs.append(y)
    np.testing.assert_allclose(run(net, xs), jnp.stack(outputs), rtol=1e-4, atol=1e-6)
    # The last output knows the first input, and the first does not know the last.
    other = run(net, xs.at[0].add(1.0)) - run(net, xs)
    assert np.abs(other[-1]).max() > 1e-6
    np.testing.assert_array_equal((run(net, xs.at[-1].add(1.0)) - run(net, xs))[:-1], 0)
    gradient = jax.jit(jax.grad(lambda net: jnp.sum(run(net, xs)[-1] ** 2)))(net)
    assert all(np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient))


def test_gru_and_lstm_equations():
    """Against the equations as written in the papers, with the gates' order in Equinox's weights."""
    x, h, c = (jax.random.normal(jax.random.key(i), (size,)) for i, size in enumerate((3, 5, 5)))
    sigmoid = jax.nn.sigmoid
    net = LSTM.init(3, 5, 2, key=KEY)
    i, f, g, o = jnp.split(net.cell.weight_ih @ x + net.cell.weight_hh @ h + net.cell.bias, 4)
    new_c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    new_h = sigmoid(o) * jnp.tanh(new_c)
    (got_h, got_c), y = net((h, c), x)
    np.testing.assert_allclose(got_c, new_c, rtol=1e-5)
    np.testing.assert_allclose(got_h, new_h, rtol=1e-5)
    np.testing.assert_allclose(y, net.readout(new_h), rtol=1e-5)
