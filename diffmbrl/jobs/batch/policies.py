"""A policy solver of several variants, from several seeds, in one program."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from diffmbrl.core import Solver, State, Task
from diffmbrl.devices import replicate_like, to_local
from diffmbrl.diagnostics.sample_statistics import SampleStatistics, gradient_samples, sample_statistics
from diffmbrl.diagnostics.spectrum import curvature_eigenvalues
from diffmbrl.gradients import BPTT
from diffmbrl.jobs.batch.metric_accumulator import MetricAccumulator
from diffmbrl.jobs.batch.programs import (
    action_gradients,
    chunks,
    concatenate,
    over_replicas,
    replica,
    replica_updates,
    stack,
    timed,
)
from diffmbrl.jobs.batch.starts import NOISE, Draws
from diffmbrl.policies import Neural
from diffmbrl.rollout import episode_returns, returns, rollouts
from diffmbrl.solve.checkpointer import Checkpointer
from diffmbrl.solve.nonfinite import locate


class BatchedPolicyRuns:
    """A policy solver of several variants, from several seeds; replica v * seeds + k is seed k of variant v.

    A solver that draws noise has a key for each seed, and update i uses `fold_in(key, i)`. Evaluations are without noise.

    Args:
        solvers: One solver for each variant, of the same structure, such as one for each learning rate.
        task: One task that all variants share, or one for each, of the same structure: they may differ in leaves.
        hidden: The widths of the policies' hidden layers.
        draws: The result of `draw_starts`: one that all variants share if they share the task, else one for each.
        sequential: Run the replicas one after another, for solvers that branch: `vmap` would run both branches for all.
        draws_noise: Whether the solver needs a key.
    """

    def __init__(
        self,
        solvers: Sequence[Solver],
        task: Task | Sequence[Task],
        hidden: Sequence[int],
        draws: Draws | Sequence[Draws],
        *,
        sequential: bool,
        draws_noise: bool = False,
    ):
        # A shared task and its held-out starts are not copied for each replica.
        self.axis = None if isinstance(task, Task) else 0
        tasks: list[Any] = [task] if isinstance(task, Task) else list(task)
        drawn: list[Any] = [draws] if isinstance(task, Task) else list(draws)
        self.variants, self.seeds = len(solvers), drawn[0][2].shape[0]
        self.count = self.variants * self.seeds
        copies = self.variants // len(drawn)
        self.task = tasks[0] if self.axis is None else stack(tasks, self.seeds)
        self.test = drawn[0][1] if self.axis is None else stack([test for _, test, _ in drawn], self.seeds)
        self.train = _tile(concatenate([train for train, _, _ in drawn]), copies)
        policies = [
            jax.vmap(lambda k, task=task: Neural.init(task, hidden=hidden, key=k))(keys)
            for task, (_, _, keys) in zip(tasks, drawn, strict=True)
        ]
        # One variant after another: a solver may refuse a task by its values, which are unknown within `vmap`.
        carries = [
            jax.vmap(lambda p, solver=solver, task=task: solver.init(p, task))(own)
            for solver, task, own in zip(solvers, tasks * copies, policies * copies, strict=True)
        ]
        self.solvers = stack(solvers, self.seeds)
        self.policies, self.carries = _tile(concatenate(policies), copies), concatenate(carries)
        self.parameters = ravel_pytree(self.policies)[0].size // self.count
        # Folded in, since the seed's policy is drawn from the key itself.
        noise = [jax.vmap(lambda k: jax.random.fold_in(k, NOISE))(keys) for _, _, keys in drawn]
        self.keys = jnp.tile(concatenate(noise), copies) if draws_noise else None
        placed = (self.solvers, self.policies, self.carries, self.keys)
        self.solvers, self.policies, self.carries, self.keys = replicate_like(self.train, placed)
        self.metrics = MetricAccumulator(self.variants, self.seeds)
        self.sequential = sequential

    def compile(self) -> float:
        """Trace and compile an update.

        Returns:
            The seconds that it took.
        """
        return timed(lambda: self._run(0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make further updates of every replica.

        Args:
            done: The number of updates made so far.
            updates: The number of further updates.
        """
        for first, count in chunks(done, updates):
            policies, carries, info, made = self._run(first, count)
            self.policies, self.carries = replicate_like(self.train, (policies, carries))
            self.metrics.add(*to_local((info, made)))

    @property
    def state(self) -> dict[str, PyTree]:
        """Everything that changes from update to update."""
        return {"policies": self.policies, "carries": self.carries, "tally": self.metrics.state}

    def restore(self, checkpointer: Checkpointer) -> None:
        """Restore the state that a checkpoint holds.

        Args:
            checkpointer: Holds a state that was saved after at least one update.
        """
        policies, carries, info, _ = jax.eval_shape(self._update, jnp.int32(0), jnp.int32(1))
        state = checkpointer.restore({"policies": policies, "carries": carries, "tally": self.metrics.after(info)})
        self.policies, self.carries = replicate_like(self.train, (state["policies"], state["carries"]))
        self.metrics.restore(state["tally"], info)

    def returns(self) -> dict[str, np.ndarray]:
        """Evaluate the policies on the training and on the held-out starts.

        Returns:
            Mean returns `train` and `test`, `success` if the task defines it, and `nonfinite` so far, [variants, seeds].
        """
        train, test, success = to_local(_evaluate(self.policies, self.task, self.train, self.test, axis=self.axis))
        found = {"train": train, "test": test} | ({} if success is None else {"success": success})
        return self._shaped(found) | {"nonfinite": self.metrics.fields()["nonfinite"]}

    def evaluate(self) -> dict[str, np.ndarray]:
        """Evaluate the policies, and measure the spread of each training start's BPTT gradient of the full objective.

        Returns:
            What `returns` does, the spreads `spread_...`, and what the last updates reported, [variants, seeds].
        """
        health = to_local(_spreads(self.policies, self.task, self.train, axis=self.axis))
        spreads = self._shaped({f"spread_{name}": x for name, x in health._asdict().items()})
        return self.returns() | spreads | self.metrics.fields()

    def profile(self, variant: int) -> np.ndarray:
        """Measure how large the gradient by the actions is at each time, through the closed loop.

        Args:
            variant: The number of the variant.

        Returns:
            Root mean square of dJ/da_t over seeds, starts and action dimensions, shape [T].
        """
        own = slice(variant * self.seeds, (variant + 1) * self.seeds)
        g = to_local(action_gradients(replica(self.policies, own), self._task(own.start), replica(self.train, own)))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, variant: int) -> np.ndarray:
        """Compute the eigenvalues of the Gauss-Newton matrix of the first seed's policy.

        Args:
            variant: The number of the variant.

        Returns:
            The eigenvalues, shape [parameters].
        """
        return curvature_eigenvalues(*self._one(variant * self.seeds))

    def path(self, variant: int) -> dict[str, np.ndarray] | None:
        """Report the candidate steps of the first seed's first update, by the model and in truth.

        Args:
            variant: The number of the variant.

        Returns:
            `dampings`, `predicted` and `improved`, [candidates] each; None for a method without a model.
        """
        model = self.metrics.first
        if model is None:
            return None
        first = variant * self.seeds
        return {name: np.asarray(getattr(model, name)[first]) for name in ("dampings", "predicted", "improved")}

    def broken(self, variant: int) -> str | None:
        """Find out where a seed of a variant met a non-finite value and stopped.

        Args:
            variant: The number of the variant.

        Returns:
            The first such value and the seed in words, or None.
        """
        seed = self.metrics.broken(variant)
        return None if seed is None else f"{locate(*self._one(variant * self.seeds + seed))}, seed {seed}"

    def _one(self, index: int) -> tuple[Neural, Task, State]:
        policy, train = to_local((replica(self.policies, index), replica(self.train, index)))
        return policy, self._task(index), train

    def _task(self, index: int) -> Task:
        return self.task if self.axis is None else replica(self.task, index)

    def _shaped(self, found: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(x).reshape(self.variants, self.seeds) for name, x in found.items()}

    def _run(self, done: int, updates: int) -> Any:
        return jax.block_until_ready(self._update(jnp.int32(done), jnp.int32(updates)))

    def _update(self, done: Int[Array, ""], updates: Int[Array, ""]) -> Any:
        replicas = (self.solvers, self.policies, self.carries, self.train, self.keys)
        return _advance(replicas, self.task, done, updates, axis=self.axis, sequential=self.sequential)


@partial(jax.jit, static_argnames=("axis", "sequential"))
def _advance(replicas, task, done, updates, *, axis, sequential):
    def one(task, replica):
        return replica_updates(task, replica, done, updates)

    return over_replicas(one, task, replicas, axis=axis, sequential=sequential)


@partial(jax.jit, static_argnames="axis")
def _evaluate(policies, task, train, test, *, axis=None):
    def one(common, replica):
        (task, test), (policy, train) = common, replica
        trajectories = rollouts(policy, task, test)
        success = None if task.success is None else jnp.mean(jax.vmap(task.success)(trajectories.s_T))
        held_out = jax.vmap(lambda tau: returns(tau, task))(trajectories)
        return jnp.mean(episode_returns(policy, task, train)), jnp.mean(held_out), success

    return over_replicas(one, (task, test), (policies, train), axis=axis)


@partial(jax.jit, static_argnames="axis")
def _spreads(policies, task, train, *, axis) -> SampleStatistics:
    def one(task, replica):
        policy, s0 = replica
        return sample_statistics(gradient_samples(BPTT(), policy, task, s0, None)[1])

    # Sequential: the gradients of all starts of all replicas at once might not fit.
    return over_replicas(one, task, (policies, train), axis=axis, sequential=True)


def _tile(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), tree)
