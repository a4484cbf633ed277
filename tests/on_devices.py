"""What `test_devices.py` runs in processes with devices of their own: a part of a batch on each, beside the whole on one.

python -m tests.on_devices
"""

import importlib
import io
import json
import tempfile
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

from diffmbrl import GaussNewton, Neural, OpenLoop, Sampling, solve, tasks
from diffmbrl import devices as on
from diffmbrl.agents import RandomAgent
from diffmbrl.agents.learn import learn
from diffmbrl.core import Task
from diffmbrl.jobs.batch import BatchedPlanRuns, BatchedPolicyRuns, draw_starts, shared
from diffmbrl.jobs.configs import PlanConfig, RunOptions
from diffmbrl.jobs.plan import make_plan
from diffmbrl.methods import METHODS
from diffmbrl.optimizers import Krylov
from diffmbrl.runs import metrics
from diffmbrl.runs.checkpoint import restore_checkpoint, save_checkpoint, verify
from diffmbrl.second_order.curvature import gauss_newton
from diffmbrl.solve.loop import iterate

TASK = tasks.cartpole_balance(horizon=5)
STEPS = 3


def gap(one, other) -> float:
    """The largest relative difference of two trees."""
    pairs = zip(*(jax.tree.leaves(on.to_local(tree)) for tree in (one, other)), strict=True)
    floats = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs if x.dtype != np.bool_]
    return max(float(np.max(np.abs(x - y)) / max(1e-3, np.max(np.abs(x)))) for x, y in floats)


def product(policy, task: Task, s0):
    model = gauss_newton(policy, task, s0)
    return model.product(model.gradient), model.J


def agree() -> dict:
    """Differences between four devices and one, and what was compiled or traced more than once."""
    mesh, out = on.mesh_of(4), {}
    policy, s0 = Neural.init(TASK, hidden=(3,), key=jax.random.key(0)), TASK.starts(jax.random.key(1), 8)
    divided = on.shard(s0, mesh, what="starts")
    once = jax.jit(chex.assert_max_traces(product, n=1))
    out["product"] = max(
        gap(jax.jit(product)(policy, TASK, s0), once(policy, TASK, x)) for x in (divided, on.shard_like(divided, s0))
    )
    text = once.lower(policy, TASK, divided).compile().as_text()
    out["reductions"] = text.count(" all-reduce(") + text.count(" all-reduce-start(")
    solver = GaussNewton(system=Krylov(3))
    one, _ = solve(solver, policy, TASK, s0, None, STEPS)
    before = iterate._cache_size()
    four, _ = solve(solver, policy, TASK, divided, None, STEPS)
    out |= {"gauss-newton": gap(one, four), "programs of a solve": iterate._cache_size() - before}
    out |= lanes() | agents(mesh) | population(mesh) | checkpointed(mesh)
    return out


def lanes() -> dict:
    """Policies and plans of a comparison, evaluated."""
    found = {}
    for devices in (1, 4):
        draws = shared(draw_starts(TASK, 2, 4, 8, 0), devices)
        row = METHODS["adam"]
        policies = BatchedPolicyRuns(
            [row.make(rate, 9, TASK) for rate in (1e-2, 3e-2)], TASK, (3,), draws, sequential=False
        )
        plans = BatchedPlanRuns([METHODS["random-shooting"].make(None, 9, TASK)], TASK, draws)
        for made in (policies, plans):
            made.advance(0, 1)
            made.advance(1, STEPS - 1)
        found[devices] = [
            {name: made.evaluate()[name] for name in ("train", "test", "J", "forward")} for made in (policies, plans)
        ]
    return dict(zip(("policies", "plans"), map(gap, found[1], found[4]), strict=True))


def agents(mesh) -> dict:
    """An agent's seeds; and of hyperparameters, a lane each."""
    keys = jax.random.split(jax.random.key(0), 4)
    given = {"real_steps": 40, "evaluations": 2}
    one = learn(RandomAgent(warmup=20, every=10), TASK, keys, **given)
    four = learn(RandomAgent(warmup=20, every=10), TASK, on.shard(keys, mesh, what="seeds"), **given)
    return {"agents": gap(one.buffer.rows, four.buffer.rows), "buffers on": len(four.buffer.size.sharding.device_set)}


def checkpointed(mesh) -> dict:
    """A checkpoint of an array that lies on all devices, and of keys: the shards that orbax wrote, and the values read."""
    x = jax.numpy.arange(16.0).reshape(8, 2)
    tree = {
        "x": on.shard(x, mesh, what="rows"),
        "key": on.shard(jax.random.split(jax.random.key(0), 4), mesh, what="seeds"),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = save_checkpoint(Path(place) / "checkpoints", 1, tree, {})
        with ocp.PyTreeCheckpointer() as orbax:
            written = orbax.metadata(folder / "arrays").item_metadata.tree
        back = restore_checkpoint(verify(folder), tree)
    same = [np.array_equal(back["x"], x), bool(jax.numpy.all(back["key"] == tree["key"]))]
    shapes = sorted(list(leaf.storage.write_shape) for leaf in written.values())
    return {"checkpoint": same, "shards": shapes}


def population(mesh) -> dict:
    """The samples of a planner: what goes around in an update, and runs on one device and on four."""
    planner, blank, s0 = Sampling(samples=8, mesh=mesh), OpenLoop.zeros(TASK), TASK.initial(jax.random.key(1))
    update = jax.jit(lambda plan, carry, s0, key: planner.update(plan, carry, TASK, s0, key=key))
    text = update.lower(blank, planner.init(blank, TASK), on.copied(s0, mesh), jax.random.key(2)).compile().as_text()
    sent = text.count(" all-gather("), text.count(" all-reduce("), f"f32[2,{TASK.horizon},1]" in text
    before = iterate._cache_size()
    one, four = planned(1), planned(4)
    return {"population": gap(one, four), "sent": sent, "programs of a plan": iterate._cache_size() - before}


def planned(devices: int) -> list:
    """States and actions of a run of `diffmbrl plan`."""
    setting = PlanConfig("lqr", "cem", False, 4, None, 2, {}, {}, 0.01, 0, 1, 0, False, devices)
    with tempfile.TemporaryDirectory() as place:
        folder = make_plan(setting, RunOptions(out=Path(place) / "run", stream=io.StringIO()))
        records = metrics.read_metrics(folder / "metrics.jsonl")[0]
    return [[np.asarray(x["s"]), np.asarray(x["a"])] for x in records if x["kind"] == "trajectory"]


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for job in ("compare", "learn", "plan.run"):  # figures take long
        importlib.import_module(f"diffmbrl.jobs.{job}").rebuild = lambda folder: folder  # type: ignore[attr-defined]
    print(json.dumps(agree()))
