"""Many runs of one method as one program: lanes over learning rates and seeds, or over start states for planners.

`PolicyLanes` and `PlanLanes` have the same methods, which `compare` calls; arrays that they return have axes [rates, seeds].
Draws that are shared out among devices (`shared`) are worked on where they are: policies share the starts of each seed, and
add up what they say of them; planners share the plans.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffmbrl.core import Solver, State, Task, keeps_limits
from diffmbrl.curvature import gauss_newton
from diffmbrl.devices import along, beside, local, mesh_of, share
from diffmbrl.diagnostics.nonfinite import locate
from diffmbrl.diagnostics.spectrum import eigenvalues
from diffmbrl.diagnostics.spread import Spread, in_chunks, spread
from diffmbrl.gradients import BPTT
from diffmbrl.looks import Looks
from diffmbrl.policies import Affine, Neural, OpenLoop, first_plan
from diffmbrl.rollout import returns, rollout, rollouts, values
from diffmbrl.solve import CHUNK, iterate
from diffmbrl.tally import Tally
from diffmbrl.tasks.squash import squashed

NOISE = 2**31 - 1  # folded into a seed's key for the noise of its updates


@runtime_checkable
class Lanes(Protocol):
    """What `compare` needs of a method's runs."""

    count: int
    parameters: int

    def compile(self) -> float: ...
    def advance(self, done: int, updates: int) -> None: ...
    @property
    def state(self) -> Any: ...
    def restore(self, looks: Looks) -> None: ...
    def evaluate(self) -> dict[str, np.ndarray]: ...
    def profile(self, rate: int) -> np.ndarray: ...
    def spectrum(self, rate: int) -> np.ndarray: ...
    def path(self, rate: int) -> dict[str, np.ndarray] | None: ...
    def broken(self, rate: int) -> str | None: ...


def draw(task: Task, seeds: int, starts: int, held_out: int, key: int) -> tuple[State, State, Any]:
    """Start states [seeds, starts, ...], held-out starts [held_out, ...] and a key for each seed's policy.

    Seed k's draws depend on k and `key` alone, so the first seeds of a longer comparison are those of a shorter one.
    """
    root = jax.random.key(key)
    seed_keys = jax.vmap(lambda k: jax.random.fold_in(root, k))(jnp.arange(seeds))
    train_keys, policy_keys = jax.vmap(lambda k: jax.random.split(k))(seed_keys).T
    train = jax.vmap(lambda k: task.starts(k, starts))(train_keys)
    # Outside the range of the seeds' numbers.
    test = task.starts(jax.random.fold_in(root, 2**31 - 1), held_out)
    return train, test, policy_keys


def shared(draws: tuple[State, State, Any], devices: int) -> tuple[State, State, Any]:
    """The draws with each seed's starts, and the held-out starts, shared out among so many devices.

    Raises: `ValueError` if the devices do not divide them, or are not there.
    """
    if devices == 1 and jax.process_count() == 1:
        return draws
    train, test, keys = draws
    mesh = mesh_of(devices)
    return share(train, mesh, what="starts", axis=1), share(test, mesh, what="held-out starts"), keys


class PolicyLanes:
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
        self.solvers, self.policies, self.carries, self.keys = beside(train, kept)
        self.tally = Tally(self.rates, self.seeds)
        self.map = _one_by_one if sequential else _together

    def compile(self) -> float:
        """Seconds to trace and compile an update."""
        return _timed(lambda: self._run(0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make updates number `done` and on."""
        policies, carries, info, made = self._run(done, updates)
        self.policies, self.carries = beside(self.train, (policies, carries))
        self.tally.add(*local((info, made)))

    @property
    def state(self) -> Any:
        """All that changes from update to update."""
        return {"policies": self.policies, "carries": self.carries, "tally": self.tally.state}

    def restore(self, looks: Looks) -> None:
        """Go on from a look after at least one update."""
        policies, carries, info, _ = jax.eval_shape(self._update, jnp.int32(0), jnp.int32(1))
        state = looks.restore({"policies": policies, "carries": carries, "tally": self.tally.after(info)})
        self.policies, self.carries = beside(self.train, (state["policies"], state["carries"]))
        self.tally.restore(state["tally"], info)

    def evaluate(self) -> dict[str, np.ndarray]:
        """Mean returns on training and held-out starts, success, what the last updates reported, and the gradient's health:
        the spread of each training start's BPTT gradient of the full objective."""
        train, test, success = local(_evaluate(self.policies, self.task, self.train, self.test))
        shape = (self.rates, self.seeds)
        out = {"train": train, "test": test} | ({} if success is None else {"success": success})
        health = local(_spreads(self.policies, self.task, self.train))
        out |= {f"spread_{name}": x for name, x in health._asdict().items()}
        return {name: np.asarray(x).reshape(shape) for name, x in out.items()} | self.tally.fields()

    def profile(self, rate: int) -> np.ndarray:
        """[T]: root mean square over seeds, starts and action dimensions of dJ/da_t through the closed loop."""
        lanes = self._of(rate)
        g = local(_profile(_take(self.policies, lanes), self.task, _take(self.train, lanes)))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, rate: int) -> np.ndarray:
        """Eigenvalues of the Gauss-Newton matrix of the first seed's policy."""
        lane = rate * self.seeds
        return eigenvalues(*self._one(lane))

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
        policy, train = local((_take(self.policies, lane), _take(self.train, lane)))
        return policy, self.task, train

    def _of(self, rate: int) -> slice:
        return slice(rate * self.seeds, (rate + 1) * self.seeds)

    def _run(self, done: int, updates: int):
        return jax.block_until_ready(self._update(jnp.int32(done), jnp.int32(updates)))

    def _update(self, done: Any, updates: Any):
        lanes = (self.solvers, self.policies, self.carries, self.train, self.keys)
        return self.map(lanes, self.task, done, updates)


class PlanLanes:
    """A planner from every training start of every seed, each planned on its own; held-out starts likewise, untimed.

    Action limits are moved into the plant, unless the planner keeps them itself. The returns are of the same task. Each start
    has a key of its own, by which a planner draws; update i of it uses `fold_in(key, i)`.
    """

    def __init__(self, solvers: Sequence[Solver], task: Task, draws: tuple[State, State, Any]):
        train, test, keys = draws
        self.solver, self.rates, self.seeds = solvers[0], 1, keys.shape[0]
        self.task = task if keeps_limits(self.solver) else squashed(task)
        self.starts = jax.tree.leaves(train)[0].shape[1]
        self.count = self.seeds * self.starts
        flat = jax.tree.map(lambda x: x.reshape(self.count, *x.shape[2:]), train)
        zero = first_plan(self.solver, self.task)
        self.parameters = zero.a.size
        held_out = jax.tree.leaves(test)[0].shape[0]
        seed_keys = jnp.repeat(keys, self.starts)
        train_keys = jax.vmap(jax.random.fold_in)(seed_keys, jnp.tile(jnp.arange(self.starts), self.seeds))
        test_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(keys[0], self.starts + jnp.arange(held_out))
        self.train = along(train, self._lanes(zero, flat, train_keys))
        self.test = along(train, self._lanes(zero, test, test_keys))
        self.tally = Tally(1, self.seeds, self.starts)
        self.done = self.behind = 0  # updates made on the training and on the held-out starts

    def compile(self) -> float:
        """Seconds to trace and compile an update."""
        return _timed(lambda: self._run(self.train, 0, 0))

    def advance(self, done: int, updates: int) -> None:
        """Make updates number `done` and on, on the training starts."""
        *lanes, info, made = self._run(self.train, done, updates)
        self.train = (*along(self.train, tuple(lanes)), *self.train[2:])
        self.tally.add(*local((info, made)))
        self.done = done + updates

    @property
    def state(self) -> Any:
        """All that changes from update to update: plans and carries of both sets of starts."""
        done = {"done": np.int64(self.done), "behind": np.int64(self.behind)}
        return {"train": self.train[:2], "test": self.test[:2], "tally": self.tally.state, **done}

    def restore(self, looks: Looks) -> None:
        """Go on from a look after at least one update."""
        *train, info, _ = jax.eval_shape(lambda: self._update(self.train, jnp.int32(0), jnp.int32(1)))
        *test, _, _ = jax.eval_shape(lambda: self._update(self.test, jnp.int32(0), jnp.int32(1)))
        count = {"done": np.int64(0), "behind": np.int64(0)}
        like = {"train": tuple(train), "test": tuple(test), "tally": self.tally.after(info), **count}
        state = looks.restore(like)
        self.train = (*along(self.train[2], state["train"]), *self.train[2:])
        self.test = (*along(self.test[2], state["test"]), *self.test[2:])
        self.tally.restore(state["tally"], info)
        self.done, self.behind = int(state["done"]), int(state["behind"])

    def evaluate(self) -> dict[str, np.ndarray]:
        """As `PolicyLanes.evaluate`; the held-out starts are planned as far as the others first."""
        while self.behind < self.done:
            count = min(self.done - self.behind, CHUNK)
            *lanes, _, _ = self._run(self.test, self.behind, count)
            self.test = (*along(self.test, tuple(lanes)), *self.test[2:])
            self.behind += count
        train, _ = local(_evaluate_plans(self.train[0], self.task, self.train[2]))
        test, success = local(_evaluate_plans(self.test[0], self.task, self.test[2]))
        out = {
            "train": np.asarray(train).reshape(self.seeds, self.starts).mean(1),
            "test": np.full(self.seeds, np.mean(np.asarray(test))),
        }
        if success is not None:
            out["success"] = np.full(self.seeds, np.mean(np.asarray(success)))
        return {name: x[None] for name, x in out.items()} | self.tally.fields()

    def profile(self, rate: int) -> np.ndarray:
        """[T]: root mean square over seeds, starts and action dimensions of dJ/da_t along the plans."""
        g = local(_profile(self.train[0], self.task, jax.tree.map(lambda x: x[:, None], self.train[2])))
        return np.sqrt(np.mean(np.square(np.asarray(g, np.float64)), axis=(0, 2, 3)))

    def spectrum(self, rate: int) -> np.ndarray:
        """Eigenvalues of M, the Gauss-Newton matrix of the first start's plan without its feedback."""
        plan, s0 = self._one(0)
        return eigenvalues(OpenLoop(plan.a), self.task, s0)

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
        return local((_take(self.train[0], lane), _take(self.train[2], slice(lane, lane + 1))))

    def _lanes(self, plan: Affine | OpenLoop, s0: State, keys: Any):
        count = jax.tree.leaves(s0)[0].shape[0]
        plans = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), plan)
        return plans, jax.vmap(lambda p: self.solver.init(p, self.task))(plans), s0, keys

    def _run(self, lanes: Any, done: int, updates: int):
        return jax.block_until_ready(self._update(lanes, jnp.int32(done), jnp.int32(updates)))

    def _update(self, lanes: Any, done: Any, updates: Any):
        return _plan(self.solver, *lanes, self.task, done, updates)


def _iterate(lane, task, done, updates):
    solver, policy, carry, s0, key = lane
    zero = jnp.zeros((), task.weights.dtype)
    return iterate(solver, policy, carry, task=task, s0=s0, key=key, first=done, count=updates, tolerance=zero)


@jax.jit
def _together(lanes, task, done, updates):
    return jax.vmap(_iterate, in_axes=(0, None, None, None))(lanes, task, done, updates)


@jax.jit
def _one_by_one(lanes, task, done, updates):
    return jax.lax.map(lambda lane: _iterate(lane, task, done, updates), lanes)


@jax.jit
def _plan(solver, plans, carries, s0, keys, task, done, updates):
    return jax.vmap(lambda *lane: _iterate((solver, *lane), task, done, updates))(plans, carries, s0, keys)


@jax.jit
def _evaluate(policies, task, train, test):
    def one(policy, train):
        trajectories = rollouts(policy, task, test)
        success = None if task.success is None else jnp.mean(jax.vmap(task.success)(trajectories.s_T))
        held_out = jax.vmap(lambda tau: returns(tau, task))(trajectories)
        return jnp.mean(values(policy, task, train)), jnp.mean(held_out), success

    return jax.vmap(one)(policies, train)


@jax.jit
def _spreads(policies, task, train) -> Spread:
    # One lane after another: the gradients of all starts of all lanes at once might not fit.
    return jax.lax.map(lambda lane: spread(in_chunks(BPTT(), lane[0], task, lane[1], None)[1]), (policies, train))


@jax.jit
def _evaluate_plans(plans, task, s0):
    def one(plan, s):
        trajectory = rollout(plan, task, s)
        return returns(trajectory, task), None if task.success is None else task.success(trajectory.s_T)

    return jax.vmap(one)(plans, s0)


@jax.jit
def _profile(policies, task, s0):
    """dJ/da_t through the closed loop, [lanes, T, m, B]."""
    return jax.vmap(lambda policy, s: gauss_newton(policy, task, s).g)(policies, s0)


def _timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _take(tree: Any, lane: Any) -> Any:
    return jax.tree.map(lambda x: x[lane], tree)


def _tile(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), tree)
