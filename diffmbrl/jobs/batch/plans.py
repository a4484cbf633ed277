"""A planner from every start of every seed, as one program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffmbrl.core import Solver, State, Task, is_planner
from diffmbrl.devices import shard_like, to_local
from diffmbrl.diagnostics.spectrum import curvature_eigenvalues
from diffmbrl.jobs.batch.metric_accumulator import MetricAccumulator
from diffmbrl.jobs.batch.programs import action_gradients, chunks, replica, replica_updates, timed
from diffmbrl.policies import Affine, OpenLoop
from diffmbrl.rollout import returns, rollout
from diffmbrl.solve.checkpointer import Checkpointer
from diffmbrl.solve.nonfinite import locate
from diffmbrl.tasks.transforms.squash import squashed


class BatchedPlanRuns:
    """A planner from every training start of every seed, each planned on its own; held-out starts likewise, untimed.

    Action limits are moved into the plant, unless the planner keeps them itself. The returns are of the same task. Each start
    has a key of its own, by which a planner draws; update i of it uses `fold_in(key, i)`.
    """

    def __init__(self, solvers: Sequence[Solver], task: Task, draws: tuple[State, State, Any]):
        train, test, keys = draws
        if not is_planner(solvers[0]):
            raise TypeError(f"expected a planner, such as ILQR(); got {type(solvers[0]).__name__}")
        self.solver, self.rates, self.seeds = solvers[0], 1, keys.shape[0]
        self.task = task if self.solver.keeps_limits else squashed(task)
        self.starts = jax.tree.leaves(train)[0].shape[1]
        self.count = self.seeds * self.starts
        flat = jax.tree.map(lambda x: x.reshape(self.count, *x.shape[2:]), train)
        zero = self.solver.first_plan(self.task)
        self.parameters = zero.a.size
        held_out = jax.tree.leaves(test)[0].shape[0]
        seed_keys = jnp.repeat(keys, self.starts)
        train_keys = jax.vmap(jax.random.fold_in)(seed_keys, jnp.tile(jnp.arange(self.starts), self.seeds))
        test_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys[0], self.starts + jnp.arange(held_out))
        self.train = shard_like(train, self._lanes(zero, flat, train_keys))
        self.test = shard_like(train, self._lanes(zero, test, test_keys))
        self.tally = MetricAccumulator(1, self.seeds, self.starts)
        self.done = self.behind = 0  # updates made on the training and on the held-out starts

    def compile(self) -> float:
        """Seconds to trace and compile an update."""
        return timed(lambda: self._run(self.train, 0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make so many updates, number `done` and on, on the training starts."""
        for first, count in chunks(done, updates):
            *lanes, info, made = self._run(self.train, first, count)
            self.train = (*shard_like(self.train, tuple(lanes)), *self.train[2:])
            self.tally.add(*to_local((info, made)))
        self.done = done + updates

    @property
    def state(self) -> Any:
        """All that changes from update to update: plans and carries of both sets of starts."""
        done = {"done": np.int64(self.done), "behind": np.int64(self.behind)}
        return {"train": self.train[:2], "test": self.test[:2], "tally": self.tally.state, **done}

    def restore(self, checkpointer: Checkpointer) -> None:
        """Go on from a look after at least one update."""
        *train, info, _ = jax.eval_shape(lambda: self._update(self.train, jnp.int32(0), jnp.int32(1)))
        *test, _, _ = jax.eval_shape(lambda: self._update(self.test, jnp.int32(0), jnp.int32(1)))
        count = {"done": np.int64(0), "behind": np.int64(0)}
        like = {"train": tuple(train), "test": tuple(test), "tally": self.tally.after(info), **count}
        state = checkpointer.restore(like)
        self.train = (*shard_like(self.train[2], state["train"]), *self.train[2:])
        self.test = (*shard_like(self.test[2], state["test"]), *self.test[2:])
        self.tally.restore(state["tally"], info)
        self.done, self.behind = int(state["done"]), int(state["behind"])

    def evaluate(self) -> dict[str, np.ndarray]:
        """As `PolicyLanes.evaluate`; the held-out starts are planned as far as the others first."""
        for first, count in chunks(self.behind, self.done - self.behind):
            *lanes, _, _ = self._run(self.test, first, count)
            self.test = (*shard_like(self.test, tuple(lanes)), *self.test[2:])
        self.behind = self.done
        train, _ = to_local(_evaluate_plans(self.train[0], self.task, self.train[2]))
        test, success = to_local(_evaluate_plans(self.test[0], self.task, self.test[2]))
        out = {
            "train": np.asarray(train).reshape(self.seeds, self.starts).mean(1),
            "test": np.full(self.seeds, np.mean(np.asarray(test))),
        }
        if success is not None:
            out["success"] = np.full(self.seeds, np.mean(np.asarray(success)))
        return {name: x[None] for name, x in out.items()} | self.tally.fields()

    def profile(self, rate: int) -> np.ndarray:
        """[T]: root mean square over seeds, starts and action dimensions of dJ/da_t along the plans."""
        g = to_local(action_gradients(self.train[0], self.task, jax.tree.map(lambda x: x[:, None], self.train[2])))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, rate: int) -> np.ndarray:
        """Eigenvalues of M, the Gauss-Newton matrix of the first start's plan without its feedback."""
        plan, s0 = self._one(0)
        return curvature_eigenvalues(OpenLoop(plan.a), self.task, s0)

    def path(self, rate: int) -> None:
        """Planners report none."""

    def broken(self, rate: int) -> str | None:
        """Where the plan of some start met a non-finite value and stopped, if one did."""
        lane = self.tally.broken(0)
        if lane is None:
            return None
        plan, s0 = self._one(lane)
        where = locate(plan, self.task, s0)
        return f"{where}, start {lane % self.starts}, seed {lane // self.starts}"

    def _one(self, lane: int) -> tuple[Affine | OpenLoop, State]:
        return to_local((replica(self.train[0], lane), replica(self.train[2], slice(lane, lane + 1))))

    def _lanes(self, plan: Affine | OpenLoop, s0: State, keys: Any):
        count = jax.tree.leaves(s0)[0].shape[0]
        plans = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), plan)
        return plans, jax.vmap(lambda p: self.solver.init(p, self.task))(plans), s0, keys

    def _run(self, lanes: Any, done: int, updates: int):
        return jax.block_until_ready(self._update(lanes, jnp.int32(done), jnp.int32(updates)))

    def _update(self, lanes: Any, done: Any, updates: Any):
        return _plan(self.solver, *lanes, self.task, done, updates)


@jax.jit
def _plan(solver, plans, carries, s0, keys, task, done, updates):
    return jax.vmap(lambda *lane: replica_updates((solver, *lane), task, done, updates))(plans, carries, s0, keys)


@jax.jit
def _evaluate_plans(plans, task, s0):
    def one(plan, s):
        trajectory = rollout(plan, task, s)
        return returns(trajectory, task), None if task.success is None else task.success(trajectory.s_T)

    return jax.vmap(one)(plans, s0)
