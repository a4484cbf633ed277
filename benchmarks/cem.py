"""CEM on an ensemble: CPU seconds of one action beside its matrix products alone, mbrl-lib, and planners that take gradients.

Seven networks of four hidden layers of 200 and two heads, untrained, on the cart-pole's states; 350 sequences, 20 particles,
horizon 15, five iterations, float32. The products are those of all layers for 7 x 1000 particles, 75 times, in the fastest
of three layouts. mbrl-lib (`pip install mbrl torch`) plans on networks of the same sizes and activation; it may be missing.

CEM takes 1.2 of its products (1.34 until the deviation of a member's noise was written in closed form). mbrl-lib took 2.1 to
3.5 s from run to run, as the allocator kept its pages or gave them back: half of it is .7 to 1.2 of the products alone, which
take PyTorch as long as JAX, 1.4 to 1.5 s at some 90 GFlop/s. So half of its time is reached where it pages, and where it does
not it cannot be by whoever scores as many sequences in float32. Tried without gain: unequal groups of particles in the place of
21 slots for 20 (1.20 to 1.29, and gradients through them a third slower).

iLQR on the members' mean earns less here, judged by the particles, because it solves another problem. The members are not
trained and agree on nothing, so their mean moves as none of them does, and what is best for it is bad for each. On members of
4x64 iLQR raises the return of the mean from -6.9 (resting) to -4.7, within the limits by either means, and so does Adam
on the mean; the particles' falls from -68.0 to -72.9 with all three. iLQR on the task of one particle a member reaches -68.5,
Adam on 20 particles -68.6: neither better than resting.
"""

import itertools
import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffmbrl as d
from benchmarks.products import forward
from benchmarks.record import save, table
from diffmbrl.models import TS1, Ensemble, GaussianDynamics, Mean, TSInfinity, particles, replicate_start
from diffmbrl.planners import CEM, Sampling, Shooting

MEMBERS, LAYERS, UNITS, PARTICLES, SEQUENCES, HORIZON, ITERATIONS = 7, 4, 200, 20, 350, 15, 5
KEY = jax.random.key(0)


def run(*, quick: bool) -> None:
    units = 32 if quick else UNITS
    task = d.tasks.cartpole_balance(horizon=HORIZON)
    s0 = task.initial(jax.random.key(3))
    members = jax.vmap(lambda k: GaussianDynamics.init(task, hidden=[units] * LAYERS, key=k))(
        jax.random.split(KEY, MEMBERS)
    )
    cem = Sampling(CEM(elites=SEQUENCES // 10), samples=SEQUENCES, particles=PARTICLES)
    adam = Shooting(d.OptaxSolver(optax.adam, learning_rate=0.1), particles=PARTICLES)
    sizes = [task.n + task.m, *[units] * LAYERS, 2 * task.n]
    share = SEQUENCES * PARTICLES // MEMBERS
    calls: dict[str, Any] = {
        f"products, {layout}": forward(sizes, MEMBERS, share, HORIZON * ITERATIONS, layout)
        for layout in ("columns, members together", "rows, members together", "rows")
    }
    worth: dict[str, Any] = {}
    for name, planner, propagation, updates in [
        ("CEM, TS1", cem, TS1(), ITERATIONS),
        ("CEM, TS-infinity", cem, TSInfinity(), ITERATIONS),
        ("Adam, TS-infinity, 20 updates", adam, TSInfinity(), 20),
        ("Adam, TS-infinity, 100 updates", adam, TSInfinity(), 100),
    ]:
        model = eqx.tree_at(lambda t: t.dynamics, task, Ensemble(members, propagation))
        calls[name] = _plan(planner, d.OpenLoop.zeros(model), model, s0, updates)
    mean = d.tasks.squashed(eqx.tree_at(lambda t: t.dynamics, task, Ensemble(members, Mean())))
    for count in (5, 40):
        name = f"iLQR, mean of members, {count} iterations"
        calls[name] = _plan(d.ILQR(), d.Affine.zeros(mean), mean, s0, count)
    judge = eqx.tree_at(lambda t: t.dynamics, task, Ensemble(members, TSInfinity()))
    cloud, start = particles(judge, PARTICLES), replicate_start(s0, judge, PARTICLES)
    for name, call in calls.items():
        out = jax.block_until_ready(call())
        if "products" not in name:
            a = d.rollout(out, mean, s0).a if isinstance(out, d.Affine) else out.a
            a = jnp.tanh(a) * task.a_high if isinstance(out, d.Affine) else a
            worth[name] = float(d.episode_return(d.OpenLoop(a), cloud, start, KEY))
    peer = None if quick else _mbrl_lib(task, np.asarray(s0))
    if peer is None:
        print("mbrl-lib is not installed or not asked: no line of it")
    else:
        calls["mbrl-lib, CEM, TS1"] = peer
        calls["PyTorch's products"] = _torch_products(sizes, share)
        peer()
    seconds = _cpu_seconds(calls, rounds=3)
    products = min(s for name, s in seconds.items() if name.startswith("products"))
    rows = [[name, s, s / products, worth.get(name, "-")] for name, s in seconds.items()]
    head = ["one action", "CPU s", "of the products", "model return"]
    print(
        f"{MEMBERS} networks {LAYERS}x{units}, {SEQUENCES} sequences x {PARTICLES} particles x H {HORIZON} x "
        f"{ITERATIONS} iterations\n\n{table(head, rows)}"
    )
    save("cem", {"columns": head, "rows": rows, "units": units}, quick=quick)


def _plan(solver: Any, plan: Any, task: d.Task, s0: jax.Array, updates: int):
    """So many updates as one compiled call."""

    @jax.jit
    def run(solver, plan, carry, task, s0):
        def one(i, state):
            return solver.update(*state, task, s0, key=jax.random.fold_in(KEY, i))[:2]

        return jax.lax.fori_loop(0, updates, one, (plan, carry))[0]

    return partial(run, solver, plan, solver.init(plan, task), task, s0)


def _cpu_seconds(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median CPU seconds of the process, in interleaved rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.process_time()
            jax.block_until_ready(call())
            samples[name].append(time.process_time() - begun)
    return {name: float(np.median(values)) for name, values in samples.items()}


def _torch_products(sizes: list[int], share: int):
    """What `products` does, by PyTorch: the members one after another, as is faster there too."""
    import torch  # type: ignore[import-not-found]

    layers = [torch.randn(MEMBERS, i, o) / i**0.5 for i, o in itertools.pairwise(sizes)]
    x = torch.randn(share, sizes[0])

    def run():
        for _ in range(HORIZON * ITERATIONS):
            for member in range(MEMBERS):
                y = x
                for layer in layers:
                    y = y @ layer[member]
        return np.zeros(())

    return run


def _mbrl_lib(task: d.Task, s0: np.ndarray):
    """mbrl-lib's own CEM, of one action, on its own networks; None where it is not installed."""
    try:
        import mbrl.models  # type: ignore[import-not-found]
        import mbrl.planning  # type: ignore[import-not-found]
        import torch  # type: ignore[import-not-found]
    except ImportError:
        return None
    torch.set_num_threads(1)
    net = mbrl.models.GaussianMLP(
        in_size=task.n + task.m,
        out_size=task.n,
        device=torch.device("cpu"),
        num_layers=LAYERS,
        ensemble_size=MEMBERS,
        hid_size=UNITS,
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    model = mbrl.models.OneDTransitionRewardModel(net, target_is_delta=True, normalize=True, learned_rewards=False)

    class Space:
        shape = s0.shape

    class Env:
        observation_space = action_space = Space

    env = mbrl.models.ModelEnv(
        Env,
        model,
        lambda a, s: torch.zeros(s.shape[0], dtype=torch.bool)[:, None],
        lambda a, s: -(s**2).sum(1, keepdim=True),
        generator=torch.Generator(),
    )
    high = float(task.a_high[0])
    cem = mbrl.planning.CEMOptimizer(
        ITERATIONS, 0.1, SEQUENCES, [[-high]] * HORIZON, [[high]] * HORIZON, 0.1, torch.device("cpu")
    )
    start = s0.astype(np.float32)

    def action():
        with torch.no_grad():
            return cem.optimize(
                lambda a: env.evaluate_action_sequences(a, initial_state=start, num_particles=PARTICLES),
                x0=torch.zeros(HORIZON, 1),
            ).numpy()

    return action
