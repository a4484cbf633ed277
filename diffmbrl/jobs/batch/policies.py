"""A policy solver at several learning rates, from several seeds, as one program."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Solver, State, Task
from diffmbrl.devices import replicate_like, to_local
from diffmbrl.diagnostics.sample_statistics import SampleStatistics, gradient_samples, sample_statistics
from diffmbrl.diagnostics.spectrum import curvature_eigenvalues
from diffmbrl.gradients import BPTT
from diffmbrl.jobs.batch.metric_accumulator import MetricAccumulator
from diffmbrl.jobs.batch.programs import action_gradients, chunks, replica, replica_updates, timed
from diffmbrl.jobs.batch.starts import NOISE
from diffmbrl.policies import Neural
from diffmbrl.rollout import episode_returns, returns, rollouts
from diffmbrl.solve.checkpointer import Checkpointer
from diffmbrl.solve.nonfinite import locate


class BatchedPolicyRuns:
    """A policy solver at several learning rates, from several seeds; lane r * seeds + k has rate r and seed k.

    A solver that `draws` has a key for each seed, and update i uses `fold_in(key, i)`; the others see no noise. Evaluation is
    of the policy without noise.
    """

    def __init__(
        self,
        solvers: Sequence[Solver],
        task: Task,
        hidden: Sequence[int],
        draws: tuple[State, State, Any],
        *,
        sequential: bool,
        draws_noise: bool = False,
    ):
        train, self.test, keys = draws
        self.task, self.rates, self.seeds = task, len(solvers), keys.shape[0]
        self.count = self.rates * self.seeds
        self.solvers = jax.tree.map(lambda *xs: jnp.repeat(jnp.stack(xs), self.seeds, axis=0), *solvers)
        self.train = _tile(train, self.rates)
        self.policies = _tile(jax.vmap(lambda k: Neural.init(task, hidden=hidden, key=k))(keys), self.rates)
        self.carries = jax.vmap(lambda solver, policy: solver.init(policy, task))(self.solvers, self.policies)
        self.parameters = ravel_pytree(self.policies)[0].size // self.count
        # Apart from the seed's policy, which is drawn from the key itself.
        noise = jax.vmap(lambda k: jax.random.fold_in(k, NOISE))(keys) if draws_noise else None
        self.keys = None if noise is None else jnp.tile(noise, self.rates)
        kept = (self.solvers, self.policies, self.carries, self.keys)
        self.solvers, self.policies, self.carries, self.keys = replicate_like(train, kept)
        self.tally = MetricAccumulator(self.rates, self.seeds)
        self.map = _one_by_one if sequential else _together

    def compile(self) -> float:
        """Seconds to trace and compile an update."""
        return timed(lambda: self._run(0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make so many updates, number `done` and on."""
        for first, count in chunks(done, updates):
            policies, carries, info, made = self._run(first, count)
            self.policies, self.carries = replicate_like(self.train, (policies, carries))
            self.tally.add(*to_local((info, made)))

    @property
    def state(self) -> Any:
        """All that changes from update to update."""
        return {"policies": self.policies, "carries": self.carries, "tally": self.tally.state}

    def restore(self, checkpointer: Checkpointer) -> None:
        """Go on from a look after at least one update."""
        policies, carries, info, _ = jax.eval_shape(self._update, jnp.int32(0), jnp.int32(1))
        state = checkpointer.restore({"policies": policies, "carries": carries, "tally": self.tally.after(info)})
        self.policies, self.carries = replicate_like(self.train, (state["policies"], state["carries"]))
        self.tally.restore(state["tally"], info)

    def evaluate(self) -> dict[str, np.ndarray]:
        """Mean returns on training and held-out starts, success, what the last updates reported, and the gradient's health:
        the spread of each training start's BPTT gradient of the full objective."""
        train, test, success = to_local(_evaluate(self.policies, self.task, self.train, self.test))
        shape = (self.rates, self.seeds)
        out = {"train": train, "test": test} | ({} if success is None else {"success": success})
        health = to_local(_spreads(self.policies, self.task, self.train))
        out |= {f"spread_{name}": x for name, x in health._asdict().items()}
        return {name: np.asarray(x).reshape(shape) for name, x in out.items()} | self.tally.fields()

    def profile(self, rate: int) -> np.ndarray:
        """[T]: root mean square over seeds, starts and action dimensions of dJ/da_t through the closed loop."""
        lanes = self._of(rate)
        g = to_local(action_gradients(replica(self.policies, lanes), self.task, replica(self.train, lanes)))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, rate: int) -> np.ndarray:
        """Eigenvalues of the Gauss-Newton matrix of the first seed's policy."""
        lane = rate * self.seeds
        return curvature_eigenvalues(*self._one(lane))

    def path(self, rate: int) -> dict[str, np.ndarray] | None:
        """The candidates of the first seed's first update, by the model and in truth; None for a method without a model."""
        model = self.tally.first
        if model is None:
            return None
        lane = rate * self.seeds
        return {name: np.asarray(getattr(model, name)[lane]) for name in ("dampings", "predicted", "improved")}

    def broken(self, rate: int) -> str | None:
        """Where a seed of this rate met a non-finite value and stopped, if one did."""
        seed = self.tally.broken(rate)
        if seed is None:
            return None
        lane = rate * self.seeds + seed
        return f"{locate(*self._one(lane))}, seed {seed}"

    def _one(self, lane: int) -> tuple[Neural, Task, State]:
        policy, train = to_local((replica(self.policies, lane), replica(self.train, lane)))
        return policy, self.task, train

    def _of(self, rate: int) -> slice:
        return slice(rate * self.seeds, (rate + 1) * self.seeds)

    def _run(self, done: int, updates: int):
        return jax.block_until_ready(self._update(jnp.int32(done), jnp.int32(updates)))

    def _update(self, done: Any, updates: Any):
        lanes = (self.solvers, self.policies, self.carries, self.train, self.keys)
        return self.map(lanes, self.task, done, updates)


@jax.jit
def _together(lanes, task, done, updates):
    return jax.vmap(replica_updates, in_axes=(0, None, None, None))(lanes, task, done, updates)


@jax.jit
def _one_by_one(lanes, task, done, updates):
    return jax.lax.map(lambda lane: replica_updates(lane, task, done, updates), lanes)


@jax.jit
def _evaluate(policies, task, train, test):
    def one(policy, train):
        trajectories = rollouts(policy, task, test)
        success = None if task.success is None else jnp.mean(jax.vmap(task.success)(trajectories.s_T))
        held_out = jax.vmap(lambda tau: returns(tau, task))(trajectories)
        return jnp.mean(episode_returns(policy, task, train)), jnp.mean(held_out), success

    return jax.vmap(one)(policies, train)


@jax.jit
def _spreads(policies, task, train) -> SampleStatistics:
    # One lane after another: the gradients of all starts of all lanes at once might not fit.
    return jax.lax.map(
        lambda lane: sample_statistics(gradient_samples(BPTT(), lane[0], task, lane[1], None)[1]), (policies, train)
    )


def _tile(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), tree)
