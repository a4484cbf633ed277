"""Training an ensemble and rolling it out: CPU seconds beside the matrix products alone, and beside mbrl-lib.

Seven networks of four hidden layers of 200 and two heads, on 5000 steps of the cart-pole, batches of 256, Adam, float32. The
products of an epoch are those of the layers, forward and backward, for every batch of every member, in the faster of two
layouts; those of a rollout are the forward ones, each row through the one member that it is given. A rollout is of 7000 rows
over 15 steps, noise drawn, members drawn anew for each row and step. On a core with AVX-512 those products run at 92 GFLOP/s,
near its peak, and bound the rollout at 3 times mbrl-lib's rows. Beside them, of .26 CPU s, activations take .04, the two heads'
noise .05, drawing the members .04. Blocks of 125 to 1000 rows, either layout and other forms of the same activation are within
8% of each other. mbrl-lib (`pip install mbrl torch`) trains and rolls out
networks of the same sizes and activation, with one thread, as its own trainer and `ModelEnv` do; it may be missing.
"""

import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffmbrl as d
from benchmarks.products import forward, layers
from benchmarks.record import save, table
from benchmarks.timing import medians
from diffmbrl.models import TS1, Ensemble, GaussianDynamics, Training, particles, train
from diffmbrl.models.buffer import Transition

MEMBERS, LAYERS, UNITS, STEPS, BATCH = 7, 4, 200, 5000, 256
ROWS, HORIZON = 7000, 15
KEY = jax.random.key(0)


def run(*, quick: bool) -> None:
    units, steps, count = (32, 1000, 700) if quick else (UNITS, STEPS, ROWS)
    task = d.tasks.cartpole_balance(horizon=HORIZON)
    rows = _data(task, steps)
    members = jax.vmap(lambda k: GaussianDynamics.init(task, hidden=[units] * LAYERS, key=k))(
        jax.random.split(KEY, MEMBERS)
    )
    inputs = int(members.normalizer.mean.shape[1])
    sizes = [inputs, *[units] * LAYERS, 2 * task.n]
    one, many = (_training(members, rows, steps, epochs) for epochs in (1, 5))
    calls: dict[str, Any] = {"train, 1 epoch": one, "train, 5 epochs": many}
    for layout in ("rows", "columns"):
        calls[f"products of an epoch, {layout}"] = _epoch_products(sizes, steps, layout)
        calls[f"products of a rollout, {layout}"] = forward(sizes, MEMBERS, count // MEMBERS, HORIZON, layout)
    cloud = particles(eqx.tree_at(lambda t: t.dynamics, task, Ensemble(members, TS1())), count)
    calls["rollout, TS1"] = _rollout(cloud, jax.vmap(task.initial)(jax.random.split(KEY, count)))
    peer = None if quick else _mbrl_lib(rows, sizes, count)
    if peer is None:
        print("mbrl-lib is not installed or not asked: no line of it")
    else:
        calls |= peer
    seconds = medians(calls, rounds=3 if quick else 5, clock=time.process_time)
    epoch = (seconds.pop("train, 5 epochs") - seconds.pop("train, 1 epoch")) / 4
    products = {
        what: min(seconds.pop(f"products of {what}, {layout}") for layout in ("rows", "columns"))
        for what in ("an epoch", "a rollout")
    }
    lines = [
        ["an epoch: products", products["an epoch"], 1.0, "-"],
        ["an epoch: train", epoch, epoch / products["an epoch"], "-"],
        ["a rollout: products", products["a rollout"], 1.0, count * HORIZON / products["a rollout"]],
    ]
    for name, x in seconds.items():
        what = "an epoch" if "epoch" in name else "a rollout"
        rate = "-" if what == "an epoch" else count * HORIZON / x
        lines.append([f"{what}: {name.split(', ')[1]}", x, x / products[what], rate])
    head = ["", "CPU s", "of the products", "rows per CPU s"]
    print(f"{MEMBERS} networks {LAYERS}x{units}, {steps} steps, {count} rows x {HORIZON}\n\n{table(head, lines)}")
    save("fit", {"columns": head, "rows": lines, "units": units}, quick=quick)


def _data(task: d.Task, steps: int) -> Transition:
    keys = jax.random.split(KEY, 2)
    s, a = task.starts(keys[0], steps), jax.random.uniform(keys[1], (steps, task.m), minval=-10, maxval=10)
    no = jnp.zeros(steps, bool)
    return Transition(s, a, jax.vmap(task.reward)(s, a), jax.vmap(task.dynamics)(s, a), no, no)


def _training(members: Any, rows: Transition, steps: int, epochs: int):
    """Two rows held out, so that an epoch is of the rows that its products are of."""
    training = Training(epochs=epochs, patience=epochs, batch=BATCH, holdout=2 / steps)
    return partial(train, members, rows, steps, KEY, training)


def _epoch_products(sizes: list[int], steps: int, layout: str):
    """Forward, both kinds of backward, one member after another: what no training can do without."""
    along = {"rows": ("oi,bi->bo", "oi,bo->bi", "bo,bi->oi"), "columns": ("oi,ib->ob", "oi,ob->ib", "ob,ib->oi")}[
        layout
    ]
    batches = -(-steps // BATCH)
    shape = (batches, BATCH, sizes[0]) if layout == "rows" else (batches, sizes[0], BATCH)

    def member(args):
        weights, x = args

        def step(total, y):
            outputs = [y]
            for W in weights:
                outputs.append(jnp.einsum(along[0], W, outputs[-1]))
            g, gradients = outputs[-1], []
            for i in reversed(range(len(weights))):
                gradients.insert(0, jnp.einsum(along[2], g, outputs[i]))
                g = jnp.einsum(along[1], weights[i], g) if i else g
            return jax.tree.map(lambda t, w: t + w, total, gradients), None

        return jax.lax.scan(step, [jnp.zeros_like(W) for W in weights], x)[0]

    @jax.jit
    def products(weights, x):
        return jax.lax.map(lambda weights: member((weights, x)), weights)

    return partial(products, layers(sizes, MEMBERS), jax.random.normal(KEY, shape))


def _rollout(cloud: d.Task, s0: jax.Array):
    @jax.jit
    def run(task, plan, s, key):
        return d.rollout(plan, task, s, key, remat=None).s_T

    return partial(run, cloud, d.OpenLoop(jnp.ones((HORIZON, 1))), s0, KEY)


def _mbrl_lib(rows: Transition, sizes: list[int], count: int) -> dict[str, Any] | None:
    """mbrl-lib's trainer for an epoch, and its environment over the horizon; None where it is not installed."""
    try:
        import mbrl.models  # type: ignore[import-not-found]
        import mbrl.util.replay_buffer as replay  # type: ignore[import-not-found]
        import torch  # type: ignore[import-not-found]
    except ImportError:
        return None
    torch.set_num_threads(1)
    s, a, r, s_next = (np.asarray(x, np.float32) for x in (rows.s, rows.a, rows.r, rows.s_next))
    net = mbrl.models.GaussianMLP(
        in_size=s.shape[1] + 1,
        out_size=s.shape[1],
        device=torch.device("cpu"),
        num_layers=LAYERS,
        ensemble_size=MEMBERS,
        hid_size=UNITS,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model = mbrl.models.OneDTransitionRewardModel(net, target_is_delta=True, normalize=True, learned_rewards=False)
    buffer = replay.ReplayBuffer(len(s), s.shape[1:], (1,))
    buffer.add_batch(s, a, s_next, r, np.zeros(len(s), bool), np.zeros(len(s), bool))
    data = replay.BootstrapIterator(buffer.get_all(), BATCH, MEMBERS, shuffle_each_epoch=True)
    model.update_normalizer(buffer.get_all())
    trainer = mbrl.models.ModelTrainer(model, optim_lr=1e-3, weight_decay=0.0)

    class Space:
        shape = s.shape[1:]

    class Env:
        observation_space = action_space = Space

    generator = torch.Generator()
    env = mbrl.models.ModelEnv(
        Env, model, lambda a, s: torch.zeros(s.shape[0], dtype=torch.bool)[:, None], lambda a, s: s[:, :1], generator
    )
    start, action = s[np.arange(count) % len(s)], np.ones((count, 1), np.float32)

    def epoch():
        trainer.train(data, num_epochs=1, silent=True, evaluate=False)

    def rollout():
        state = env.reset(start, return_as_np=False)
        for _ in range(HORIZON):
            state = env.step(action, state, sample=True)[-1]

    return {"epoch, mbrl-lib": epoch, "rollout, mbrl-lib": rollout}
