"""A planner of several variants, from every start of every seed, in one program."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from diffmbrl.core import Planner, Solver, State, Task, is_planner
from diffmbrl.devices import shard_like, to_local
from diffmbrl.diagnostics.spectrum import curvature_eigenvalues
from diffmbrl.jobs.batch.metric_accumulator import MetricAccumulator
from diffmbrl.jobs.batch.programs import action_gradients, chunks, concatenate, replica, replica_updates, stack, timed
from diffmbrl.jobs.batch.starts import Draws
from diffmbrl.policies import Affine, OpenLoop
from diffmbrl.rollout import returns, rollout
from diffmbrl.solve.checkpointer import Checkpointer
from diffmbrl.solve.nonfinite import locate
from diffmbrl.tasks.transforms.squash import squashed


def planned_task(solver: Planner, task: Task) -> Task:
    """Move the action limits into the dynamics, unless the planner keeps them itself.

    Args:
        solver: The planner.
        task: The task, perhaps with limits.

    Returns:
        The task that the planner plans on; its returns are those of `task`.
    """
    return task if solver.keeps_limits else squashed(task)


class BatchedPlanRuns:
    """A planner of several variants, from every training start of every seed; held-out starts likewise, untimed.

    Replica (v * seeds + k) * starts + i is start i of seed k of variant v. Each start has a key of its own, by which a planner
    draws; update i uses `fold_in(key, i)`.

    Args:
        solvers: One planner for each variant, of the same structure.
        task: One task that all variants share, or one for each, of the same structure: they may differ in leaves.
        draws: The result of `draw_starts`: one that all variants share if they share the task, else one for each.

    Raises:
        TypeError: If a solver is not a planner.
    """

    def __init__(self, solvers: Sequence[Solver], task: Task | Sequence[Task], draws: Draws | Sequence[Draws]):
        planners = [solver for solver in solvers if is_planner(solver)]
        if len(planners) < len(solvers):
            raise TypeError(f"expected planners, such as ILQR(); got {' '.join(type(x).__name__ for x in solvers)}")
        self.variants = len(planners)
        tasks: list[Any] = [task] * self.variants if isinstance(task, Task) else list(task)
        drawn: list[Any] = [draws] * self.variants if isinstance(task, Task) else list(draws)
        tasks = [planned_task(solver, task) for solver, task in zip(planners, tasks, strict=True)]
        self.seeds, self.starts = drawn[0][2].shape[0], jax.tree.leaves(drawn[0][0])[0].shape[1]
        self.held_out = jax.tree.leaves(drawn[0][1])[0].shape[0]
        self.count = self.variants * self.seeds * self.starts
        # The planners and tasks of all replicas, or the one that they share.
        self.axis = None if self.variants == 1 else 0
        self.solver = planners[0] if self.axis is None else stack(planners, 1)
        self.task = tasks[0] if self.axis is None else stack(tasks, 1)
        training, testing = [], []
        for solver, own, (train, test, keys) in zip(planners, tasks, drawn, strict=True):
            plan = solver.first_plan(own)
            flat = jax.tree.map(lambda x: x.reshape(self.seeds * self.starts, *x.shape[2:]), train)
            seed_keys = jnp.repeat(keys, self.starts)
            train_keys = jax.vmap(jax.random.fold_in)(seed_keys, jnp.tile(jnp.arange(self.starts), self.seeds))
            test_keys = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], self.starts + jnp.arange(self.held_out))
            training.append(_replicas(solver, own, plan, flat, train_keys))
            testing.append(_replicas(solver, own, plan, test, test_keys))
        self.parameters = planners[0].first_plan(tasks[0]).a.size
        self.train = shard_like(drawn[0][0], concatenate(training))
        self.test = shard_like(drawn[0][0], concatenate(testing))
        self.metrics = MetricAccumulator(self.variants, self.seeds, self.starts)
        self.done = self.behind = 0  # updates made on the training and on the held-out starts

    def compile(self) -> float:
        """Trace and compile an update.

        Returns:
            The seconds that it took.
        """
        return timed(lambda: self._run(self.train, 0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make further updates on the training starts.

        Args:
            done: The number of updates made so far.
            updates: The number of further updates.
        """
        for first, count in chunks(done, updates):
            *moved, info, made = self._run(self.train, first, count)
            self.train = (*shard_like(self.train, tuple(moved)), *self.train[2:])
            self.metrics.add(*to_local((info, made)))
        self.done = done + updates

    @property
    def state(self) -> dict[str, PyTree]:
        """Everything that changes from update to update: plans and carries of both sets of starts."""
        done = {"done": np.int64(self.done), "behind": np.int64(self.behind)}
        return {"train": self.train[:2], "test": self.test[:2], "tally": self.metrics.state, **done}

    def restore(self, checkpointer: Checkpointer) -> None:
        """Restore the state that a checkpoint holds.

        Args:
            checkpointer: Holds a state that was saved after at least one update.
        """
        *train, info, _ = jax.eval_shape(lambda: self._update(self.train, jnp.int32(0), jnp.int32(1)))
        *test, _, _ = jax.eval_shape(lambda: self._update(self.test, jnp.int32(0), jnp.int32(1)))
        count = {"done": np.int64(0), "behind": np.int64(0)}
        like = {"train": tuple(train), "test": tuple(test), "tally": self.metrics.after(info), **count}
        state = checkpointer.restore(like)
        self.train = (*shard_like(self.train[2], state["train"]), *self.train[2:])
        self.test = (*shard_like(self.test[2], state["test"]), *self.test[2:])
        self.metrics.restore(state["tally"], info)
        self.done, self.behind = int(state["done"]), int(state["behind"])

    def returns(self) -> dict[str, np.ndarray]:
        """Evaluate the plans, after as many updates on the held-out starts as on the training starts.

        Returns:
            Mean returns `train` and `test`, `success` if the task defines it, and `nonfinite` so far, [variants, seeds].
        """
        for first, count in chunks(self.behind, self.done - self.behind):
            *moved, _, _ = self._run(self.test, first, count)
            self.test = (*shard_like(self.test, tuple(moved)), *self.test[2:])
        self.behind = self.done
        train, _ = to_local(_evaluate(self.train[0], self.task, self.train[2], axis=self.axis))
        test, success = to_local(_evaluate(self.test[0], self.task, self.test[2], axis=self.axis))
        out = {
            "train": np.asarray(train).reshape(self.variants, self.seeds, self.starts).mean(2),
            "test": self._held_out(test),
        }
        if success is not None:
            out["success"] = self._held_out(success)
        return out | {"nonfinite": self.metrics.fields()["nonfinite"]}

    def evaluate(self) -> dict[str, np.ndarray]:
        """Evaluate the plans.

        Returns:
            What `returns` does, and what the last updates reported, [variants, seeds].
        """
        return self.returns() | self.metrics.fields()

    def profile(self, variant: int) -> np.ndarray:
        """Measure how large the gradient by the actions is at each time along the plans.

        Args:
            variant: The number of the variant.

        Returns:
            Root mean square of dJ/da_t over seeds, starts and action dimensions, shape [T].
        """
        own = slice(variant * self.seeds * self.starts, (variant + 1) * self.seeds * self.starts)
        plans, s0 = replica((self.train[0], self.train[2]), own) if self.axis == 0 else (self.train[0], self.train[2])
        g = to_local(action_gradients(plans, self._task(variant), jax.tree.map(lambda x: x[:, None], s0)))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, variant: int) -> np.ndarray:
        """Compute the eigenvalues of M, the Gauss-Newton matrix of the first start's plan without its feedback.

        Args:
            variant: The number of the variant.

        Returns:
            The eigenvalues, shape [T m].
        """
        plan, task, s0 = self._one(variant, 0)
        return curvature_eigenvalues(OpenLoop(plan.a), task, s0)

    def path(self, variant: int) -> None:
        """Planners report no candidate steps.

        Args:
            variant: The number of the variant.

        Returns:
            None.
        """

    def broken(self, variant: int) -> str | None:
        """Find out where the plan of some start met a non-finite value and stopped.

        Args:
            variant: The number of the variant.

        Returns:
            The first such value, the start and the seed in words, or None.
        """
        index = self.metrics.broken(variant)
        if index is None:
            return None
        return f"{locate(*self._one(variant, index))}, start {index % self.starts}, seed {index // self.starts}"

    def _one(self, variant: int, index: int) -> tuple[Affine | OpenLoop, Task, State]:
        index += variant * self.seeds * self.starts
        plan, s0 = to_local((replica(self.train[0], index), replica(self.train[2], slice(index, index + 1))))
        return plan, self._task(variant), s0

    def _task(self, variant: int) -> Task:
        return self.task if self.axis is None else replica(self.task, variant)

    def _held_out(self, found: Array | np.ndarray) -> np.ndarray:
        """Means over the held-out starts, which the seeds of a variant share."""
        means = np.asarray(found).reshape(self.variants, self.held_out).mean(1)
        return np.repeat(means[:, None], self.seeds, axis=1)

    def _run(self, replicas: Any, done: int, updates: int) -> Any:
        return jax.block_until_ready(self._update(replicas, jnp.int32(done), jnp.int32(updates)))

    def _update(self, replicas: Any, done: Int[Array, ""], updates: Int[Array, ""]) -> Any:
        return _advance(self.solver, *replicas, self.task, done, updates, axis=self.axis)


def _replicas(
    solver: Planner, task: Task, plan: Affine | OpenLoop, s0: State, keys: Key[Array, " replicas"]
) -> tuple[PyTree, PyTree, State, Key[Array, " replicas"]]:
    """One variant's plans and carries before the first update, their starts and keys."""
    plans = jax.tree.map(lambda x: jnp.repeat(x[None], keys.shape[0], axis=0), plan)
    return plans, jax.vmap(lambda p: solver.init(p, task))(plans), s0, keys


@partial(jax.jit, static_argnames="axis")
def _advance(solver, plans, carries, s0, keys, task, done, updates, *, axis):
    def one(solver, task, *replica):
        return replica_updates(task, (solver, *replica), done, updates)

    common = _of_replicas((solver, task), plans, axis)
    return jax.vmap(one, in_axes=(axis, axis, 0, 0, 0, 0))(*common, plans, carries, s0, keys)


@partial(jax.jit, static_argnames="axis")
def _evaluate(plans, task, s0, *, axis):
    def one(task, plan, s):
        trajectory = rollout(plan, task, s)
        return returns(trajectory, task), None if task.success is None else task.success(trajectory.s_T)

    return jax.vmap(one, in_axes=(axis, 0, 0))(_of_replicas(task, plans, axis), plans, s0)


def _of_replicas(common: Any, plans: Any, axis: int | None) -> Any:
    """Each variant's leaves for each of its replicas."""
    if axis is None:
        return common
    count = jax.tree.leaves(plans)[0].shape[0]
    return jax.tree.map(lambda x: jnp.repeat(x, count // x.shape[0], axis=0), common)
