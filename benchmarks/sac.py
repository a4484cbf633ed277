"""A SAC update beside its matrix products alone, Brax's update and mbrl-lib's: CPU milliseconds.

Networks of two hidden layers, batch 256: two critics, their targets, the actor and the temperature. The products are counted,
forward and backward, in units of one of batch x width x width, which is timed in the same run, one after another. Ours and
Brax's draw no batch from a buffer; "from the buffer" is what an agent does, all updates in one scan. Pin the process to a core
(`taskset -c 0`) to compare cores.
"""

import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffmbrl as d
from benchmarks.record import save, table
from benchmarks.timing import medians
from diffmbrl.agents import SAC
from diffmbrl.models.buffer import Buffer, Transition

BATCH, WIDTH, UPDATES = 256, 256, 40
MBRL_LIB = 14.0  # ms, measured once on another machine: anchors of the project
KEY = jax.random.key(0)


def run(*, quick: bool) -> None:
    width = 64 if quick else WIDTH
    task = d.tasks.cartpole_continuous()
    learner = SAC(hidden=(width, width))
    state, buffer = learner.init(task, KEY), _buffer(task)
    batch = buffer.sample(KEY, BATCH)

    @jax.jit
    def updates(learner, state, task, batch):
        return jax.lax.scan(
            lambda state, key: learner.update(state, task, batch, key), state, jax.random.split(KEY, UPDATES)
        )

    @jax.jit
    def from_buffer(learner, state, task, buffer):
        def step(state, key):
            key_sample, key_update = jax.random.split(key)
            return learner.update(state, task, buffer.sample(key_sample, BATCH), key_update)

        return jax.lax.scan(step, state, jax.random.split(KEY, UPDATES))

    count = products(task, width)
    calls = {
        "one product": _products(width),
        "update": partial(updates, learner, state, task, batch),
        "update, from the buffer": partial(from_buffer, learner, state, task, buffer),
        "Brax": _brax(task, batch, width),
    }
    compiled = {name: _first(call) for name, call in calls.items()}
    seconds = medians(calls, rounds=5 if quick else 15, least=0.0, clock=time.process_time)
    floor = count * seconds["one product"] / UPDATES * 1e3
    rows: list[list[Any]] = [[f"its {count:.2f} products of {BATCH}x{width}x{width}", floor, 1.0, "-"]]
    for name in ("update", "update, from the buffer", "Brax"):
        ms = seconds[name] / UPDATES * 1e3
        rows.append([name, ms, ms / floor, compiled[name]])
    if not quick:
        rows.append(["mbrl-lib (quoted)", MBRL_LIB, "-", "-"])
    head = ["SAC, one update", "CPU ms", "of the products", "compilation, CPU s"]
    print(f"2x{width} networks, batch {BATCH}, float32\n\n{table(head, rows)}")
    save("sac", {"columns": head, "rows": rows, "products": count}, quick=quick)


def products(task: d.Task, width: int) -> float:
    """Multiplications of all layers' products in one update, in units of BATCH width width.

    Forward: the actor at s and s', the critics at (s, a) and (s, u), the targets. Backward: weights and inputs of the critics'
    loss; inputs alone through the critics and both of the actor for the actor's. Nothing goes back into the first layers'
    inputs but the critics' to u.
    """
    k = jax.eval_shape(task.features, task.state_shape).shape[0]

    def layers(inputs: int, outputs: int) -> tuple[int, int, int]:
        return inputs * width, width * width, width * outputs

    actor, critic = layers(k, 2 * task.m), layers(k + task.m, 1)
    forward = 2 * sum(actor) + 3 * 2 * sum(critic)
    critic_loss = 2 * (sum(critic) + sum(critic[1:]))
    actor_loss = 2 * (sum(critic[1:]) + task.m * width) + sum(actor) + sum(actor[1:])
    return (forward + critic_loss + actor_loss) / width**2


def _products(width: int):
    """UPDATES products, each of the last one's result, which an orthogonal matrix keeps its size."""
    W = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0], jnp.float32)

    @jax.jit
    def run(W, x):
        return jax.lax.scan(lambda x, _: (W @ x, None), x, None, length=UPDATES)[0]

    return partial(run, W, jax.random.normal(KEY, (width, BATCH)))


def _brax(task: d.Task, batch: Transition, width: int):
    """Brax's three losses, networks and Adams, in the order of its trainer, which does not run on this version of JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brax.training.agents.sac import losses, networks
    x, x_next = jax.vmap(task.features)(batch.s), jax.vmap(task.features)(batch.s_next)
    nets = networks.make_sac_networks(x.shape[1], task.m, hidden_layer_sizes=(width, width))
    alpha_loss, critic_loss, actor_loss = losses.make_losses(nets, 1.0, 0.99, task.m)
    extras: Any = {"state_extras": {"truncation": jnp.zeros(BATCH)}}
    data = losses.Transition(
        observation=x, action=batch.a / task.a_high, reward=batch.r, discount=1 - batch.done.astype(x.dtype),
        next_observation=x_next, extras=extras,
    )  # fmt: skip
    pi, q = nets.policy_network.init(KEY), nets.q_network.init(KEY)
    log_alpha, rule = jnp.zeros(()), optax.adam(3e-4)

    @jax.jit
    def run(carry, data):
        def step(carry, key):
            pi, q, targets, log_alpha, states = carry
            keys = jax.random.split(key, 3)
            alpha = jnp.exp(log_alpha)
            gradients = (
                jax.grad(alpha_loss)(log_alpha, pi, None, data, keys[0]),
                jax.grad(critic_loss)(q, pi, None, targets, alpha, data, keys[1]),
                jax.grad(actor_loss)(pi, None, q, alpha, data, keys[2]),
            )
            moved, after = [], []
            for x, g, state in zip((log_alpha, q, pi), gradients, states, strict=True):
                change, state = rule.update(g, state)
                moved.append(optax.apply_updates(x, change))
                after.append(state)
            log_alpha, q, pi = moved
            targets = jax.tree.map(lambda x, y: 0.995 * x + 0.005 * y, targets, q)
            return (pi, q, targets, log_alpha, tuple(after)), None

        return jax.lax.scan(step, carry, jax.random.split(KEY, UPDATES))[0]

    return partial(run, (pi, q, q, log_alpha, tuple(rule.init(x) for x in (log_alpha, q, pi))), data)


def _buffer(task: d.Task) -> Buffer:
    count = 5000
    s, a = task.starts(KEY, count), jax.random.uniform(KEY, (count, task.m), minval=-1) * task.a_high
    no, t = jnp.zeros(count, bool), jnp.arange(count, dtype=jnp.int32)
    s_next = jax.vmap(task.dynamics)(s, a)
    return Buffer.empty(task, count).add(Transition(s, a, jnp.ones(count), s_next, no, no), 0 * t, t)


def _first(call) -> float:
    begun = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - begun
