"""First-order and quasi-Newton methods: any optax rule on any gradient estimator."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffmbrl.core import GradientEstimator, State, Task, all_finite, as_float, cond_once
from diffmbrl.gradients.bptt import BPTT
from diffmbrl.info import Info
from diffmbrl.rollout import mean_return


class OptaxCarry(NamedTuple):
    """Optax's state, the fingerprint of the objective that its line search evaluated last, and the updates made so far."""

    state: optax.OptState
    fingerprint: Float[Array, ""]
    updates: Int[Array, ""]


class OptaxSolver(eqx.Module):
    r"""Any optax rule on a policy's parameters: $\theta \leftarrow \theta + \mathrm{rule}(\nabla_\theta(-J))$.

    A rule with a line search (`optax.lbfgs`) is given the true return, and its last value and gradient are used again in the
    next update unless task, starts or key have changed. A non-finite update is rejected and counted in `Info.nonfinite`.

    Args:
        rule: A constructor such as `optax.adam` or `optax.lbfgs`, or a function that returns an `optax.chain`.
        gradient: The estimator of dJ/dtheta, `BPTT()` by default.
        anneal: Number of updates over which the step falls to 0: that of update k, counted from 0, is multiplied by
            $(1 + \cos(\pi \min(k / \mathrm{anneal}, 1))) / 2$. The count continues through the stages of a `Continuation`,
            which restart the rule; None for a constant rate.
        hyperparameters: Arguments of the rule. Floats and arrays become leaves, so that a sweep over learning rates is a
            `vmap` and a new rate does not recompile; all others are static.

    Raises:
        TypeError: If `rule` is not a constructor.
        ValueError: If `anneal` is not positive, or is given for a rule with a line search, which chooses its step lengths.

    Cost: one gradient, or one for each line-search trial.
    Reference: the rule's; Liu and Nocedal 1989 for L-BFGS; Loshchilov and Hutter 2017, equation 5, for the cosine.

    >>> import jax, optax
    >>> from diffmbrl import Neural, solve, tasks
    >>> task = tasks.cartpole_balance(horizon=20)
    >>> key = jax.random.key(0)
    >>> solver = OptaxSolver(optax.adam, learning_rate=1e-2)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 8), key, steps=5)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    gradient: GradientEstimator
    hyperparameters: dict[str, Array]
    anneal: Float[Array, ""] | None
    rule: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(
        self,
        rule: Any,
        *,
        gradient: GradientEstimator | None = None,
        anneal: float | None = None,
        **hyperparameters: Any,
    ):
        if not callable(rule):  # an optax rule itself is a tuple of functions
            raise TypeError(
                f"rule must be a constructor such as optax.adam, its arguments given as keywords: "
                f"OptaxSolver(optax.adam, learning_rate=1e-2); got {type(rule).__name__}"
            )
        self.rule = cast(Callable[..., optax.GradientTransformation], rule)
        if anneal is not None and not anneal > 0:
            raise ValueError(f"anneal must be a positive number of updates, or None for a constant rate; got {anneal}")
        self.gradient = BPTT() if gradient is None else gradient
        self.anneal = None if anneal is None else as_float(anneal)
        numeric = {name: x for name, x in hyperparameters.items() if isinstance(x, float | jax.Array)}
        self.hyperparameters = {name: as_float(x) for name, x in numeric.items()}
        self.options = tuple(sorted((name, x) for name, x in hyperparameters.items() if name not in numeric))

    @property
    def kind(self) -> str:
        """It takes a batch of starts."""
        return "policy"

    def init(self, policy: Any, task: Task) -> OptaxCarry:
        state = _strong(self._rule().init(policy))
        if self.anneal is not None and self.searches(policy):
            raise ValueError("a line search chooses the length of its steps: anneal must be None")
        # NaN equals no fingerprint, so the first update evaluates its own gradient.
        return OptaxCarry(state, jnp.full((), jnp.nan, task.weights.dtype), jnp.zeros((), jnp.int32))

    def searches(self, policy: Any) -> bool:
        """Whether the rule has a line search."""
        state = jax.eval_shape(lambda pi: self._rule().init(pi), policy)
        return any(map(_is_line_search, jax.tree.leaves(state, is_leaf=_is_line_search)))

    def annealed(self, updates: Int[Array, ""]) -> Float[Array, ""]:
        """The factor on the step after some number of updates; 1 for a constant rate."""
        if self.anneal is None:
            return jnp.ones(())
        done = jnp.minimum(updates.astype(self.anneal.dtype) / self.anneal, 1)
        return (1 + jnp.cos(jnp.pi * done)) / 2

    def on_objective_change(self, policy: Any, carry: OptaxCarry, task: Task) -> OptaxCarry:
        """Restart the rule, whose moments are of another objective, and retain the count for annealing."""
        return self.init(policy, task)._replace(updates=carry.updates)

    def update(
        self, policy: Any, carry: OptaxCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Any, OptaxCarry, Info]:
        batch = jax.tree.leaves(s0)[0].shape[0]
        rule = self._rule()
        fingerprint = _fingerprint(task, s0, key)
        cost, gradient, evaluations = self._at(policy, carry, task, s0, key, fingerprint)

        def objective(pi):
            return -mean_return(pi, task, s0, key, remat=self.gradient.remat)

        # Optax raises floats to powers of whole numbers: let it, also where a user has forbidden that to JAX.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optax.with_extra_args_support(rule).update(
                gradient, carry.state, policy, value=cost, grad=gradient, value_fn=objective
            )
        if self.anneal is not None:
            factor = self.annealed(carry.updates)
            updates = jax.tree.map(lambda u: u * factor.astype(u.dtype), updates)
        moved = jax.tree.map(lambda x, u: (x + u).astype(x.dtype), policy, updates)
        finite = jnp.isfinite(cost) & all_finite(gradient) & all_finite(moved)
        differs = jnp.stack([jnp.any(x != y) for x, y in zip(*map(jax.tree.leaves, (moved, policy)), strict=True)])

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y).astype(y.dtype), new, old)

        trials = _trials(state)
        once = self.gradient.work(task, batch)
        info = Info(
            J=-cost,
            gradient_norm=optax.tree.norm(gradient),
            accepted=finite & jnp.any(differs),
            damping=jnp.zeros_like(cost),
            inner_iterations=trials,
            nonfinite=(~finite).astype(jnp.int32),
            work=jax.tree.map(lambda x: x * (evaluations + trials), once),
        )
        # A rejected update keeps the whole carry of the last good one: value, gradient and the fingerprint of their objective.
        carry = keep(OptaxCarry(state, fingerprint, carry.updates + 1), carry)
        return keep(moved, policy), carry, info

    def _rule(self) -> optax.GradientTransformation:
        return self.rule(**dict(self.options), **self.hyperparameters)

    def _at(self, policy, carry, task, s0, key, fingerprint):
        """Value and gradient of -J, and the number of evaluations: 0 where the line search has stored them."""

        def evaluate():
            J, gradient = self.gradient(policy, task, s0, key)
            return -J, jax.tree.map(jnp.negative, gradient)

        value, stored = _stored(carry.state)
        if stored is None:
            return *evaluate(), jnp.ones((), jnp.int32)
        stale = ~(jnp.isfinite(value) & (fingerprint == carry.fingerprint))
        value, gradient = cond_once(stale, lambda _: evaluate(), (value, stored))
        return value, gradient, stale.astype(jnp.int32)


def _stored(state: Any) -> tuple[Any, Any]:
    """Value and gradient that a line search has stored of its last trial, or None."""
    for part in jax.tree.leaves(state, is_leaf=_is_line_search):
        if _is_line_search(part) and part.grad is not None:
            return part.value, part.grad
    return None, None


def _trials(state: Any) -> Array:
    """Gradients evaluated by the line search of this update."""
    for part in jax.tree.leaves(state, is_leaf=_is_line_search):
        if _is_line_search(part):
            return jnp.asarray(part.info.num_linesearch_steps, jnp.int32)
    return jnp.zeros((), jnp.int32)


def _is_line_search(part: Any) -> bool:
    return isinstance(part, optax.ScaleByZoomLinesearchState | optax.ScaleByBacktrackingLinesearchState)


def _strong(tree: Any) -> Any:
    """Remove weak types, which the first update would drop, so that the second would compile again."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(jnp.asarray(x), jnp.asarray(x).dtype), tree)


def _fingerprint(task: Task, s0: State, key: PRNGKeyArray | None) -> Float[Array, ""]:
    """A number that changes when the task's parameters or weights, the starts or the noise do."""
    leaves = [x for x in jax.tree.leaves((task, s0)) if jnp.issubdtype(x.dtype, jnp.floating)]
    if key is not None:
        # Multiplied over the range of integers, since those of small seeds are small.
        scattered = jax.random.key_data(key) * jnp.uint32(2654435769)
        leaves.append(scattered.astype(leaves[0].dtype) / 2.0**32)
    flat = jnp.concatenate([jnp.where(jnp.isfinite(x), x, 0).ravel() for x in leaves])
    return jnp.sum(flat * jnp.cos(jnp.arange(1, flat.size + 1, dtype=flat.dtype)))
