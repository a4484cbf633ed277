"""Gradient steps through short windows with a learned value at their end: SHAC, AHAC and SAPO."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Task, all_finite, as_float, is_plan, is_stateful, restart, where
from diffmbrl.info import EvaluationCounts, Info, count_evaluations
from diffmbrl.optimizers.optax_solver import OptaxSolver
from diffmbrl.optimizers.short_horizon.critic import Critic, fit, running_moments, td_lambda
from diffmbrl.optimizers.short_horizon.cuts import AdaptiveHorizon, StiffCut
from diffmbrl.optimizers.short_horizon.exploration import Noise, StateNoise
from diffmbrl.optimizers.short_horizon.windows import Environments, Steps, first_starts, start_environments, window
from diffmbrl.rollout import mean_return


class ShortHorizonCarry(NamedTuple):
    """The environments, everything learned besides the policy, and the number of updates.

    Args:
        environments: States of the environments, carried from window to window.
        critic: Critic.
        target: Target critic, a running average.
        critic_rule: State of the critic's optax rule.
        descend: Carry of the policy's rule, for the policy and its noise.
        spread: Noise, or None.
        log_temperature: Log of the temperature, or None without an entropy price.
        reach: State of the rule that cuts the gradient, or None.
        loss: The critic's loss in its last epoch, relative to the variance of symlog G.
        norm: Norm of the last window's gradient; NaN (no window yet, or a rejected one) makes all episodes begin.
        updates: Number of updates made.
    """

    environments: Environments
    critic: Critic
    target: Critic
    critic_rule: optax.OptState
    descend: PyTree
    spread: StateNoise | None
    log_temperature: Float[Array, ""] | None
    reach: PyTree
    loss: Float[Array, ""]
    norm: Float[Array, ""]
    updates: Int[Array, ""]


class ShortHorizon(eqx.Module):
    r"""Gradient steps through windows of h steps, with a critic's value at the end of each.

    $$\theta \leftarrow \theta + \mathrm{rule}\Big(\nabla_\theta \tfrac{1}{N} \sum_i \Big[\sum_{l<h}
      \gamma^l w_{t_i+l}\, r(s_l, a_l) + \gamma^h V'(s_h, t_i + h)\Big]\Big),$$
    $$V \leftarrow \arg\min_V \sum (V(s_l, t_i + l) - G^\lambda_l)^2,\qquad V' \leftarrow \kappa V' + (1 - \kappa) V$$

    N environments are carried from window to window and from episode to episode, each from the next of the given starts, at all
    phases of an episode from the first update on (`windows.start_environments`). The gradient passes through h steps instead of
    T, so it neither explodes nor vanishes with T, and the critic, a smooth function, estimates the rest. An episode is the
    task's: it ends at T with the terminal reward, and the critic sees t / T. With $\gamma$ = 1 and an exact critic the expected
    gradient is that of J for every h; below 1 it is biased towards early rewards, and less sensitive to the critic's errors.

    `Info.J` is J from the first N starts without exploration, by a rollout; the gradient's norm is of the window's objective.
    An update with a non-finite number is rejected, and all environments restart: one diverged state of an unstable system would
    spoil every later window. `Info` then has the gradient's norm of the window before; of two such windows in a row the second
    has NaN, which ends a run.

    Args:
        descend: Rule of the policy, an `OptaxSolver` without a line search; its gradient estimator is not used, and its
            `anneal` also applies to the critic's rule.
        noise: Exploration, or None. `Noise(entropy=Entropy())` has a learned price (SAPO).
        reach: Cuts of the gradient where the dynamics are stiff (`StiffCut`, `AdaptiveHorizon`: AHAC), or None.
        discount: $\gamma$.
        trace: $\lambda$ of the TD($\lambda$) targets, which use the target critic V'.
        mixing: Share $\kappa$ of the target critic that stays in an update.
        critic_rate: Learning rate of the critic, by Adam on gradients clipped to norm 1.
        key: Key of critic, exploration and mini-batches; the key of `update` draws the noise of policy and dynamics.
        window: Number of steps h.
        environments: Number of environments N.
        epochs: Number of the critic's passes through a window.
        batches: Number of mini-batches in a pass.
        hidden: Sizes of the critic's hidden layers.

    Raises:
        TypeError: If `descend` is not a rule, or for a plan or a policy with a memory.
        ValueError: For sizes below 1, fewer than `batches` steps in a window, a discount, trace or mixing outside [0, 1], a
            critic rate that is not positive, or a rule with a line search.

    Cost: A gradient through h steps of N environments, `epochs` passes of the critic over N h states, and a rollout of the
    first N starts.
    Reference: Xu et al. 2022 (SHAC); Georgiev et al. 2024 (AHAC); Xing et al. 2025 (SAPO).

    >>> import jax, optax
    >>> from diffmbrl import OptaxSolver, Neural, ShortHorizon, solve, tasks
    >>> task = tasks.pendulum_swingup(horizon=40)
    >>> key = jax.random.key(0)
    >>> solver = ShortHorizon(OptaxSolver(optax.adam, learning_rate=1e-2), window=8, environments=16)
    >>> policy, history = solve(solver, Neural.init(task, key=key), task, task.starts(key, 32), None, steps=10)
    >>> bool(history.info.J[-1] > history.info.J[0])
    True
    """

    descend: OptaxSolver
    noise: Noise | None
    reach: StiffCut | AdaptiveHorizon | None
    discount: Float[Array, ""]
    trace: Float[Array, ""]
    mixing: Float[Array, ""]
    critic_rate: Float[Array, ""]
    key: PRNGKeyArray
    window: int = eqx.field(static=True)
    environments: int = eqx.field(static=True)
    epochs: int = eqx.field(static=True)
    batches: int = eqx.field(static=True)
    hidden: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        descend: Any,
        *,
        noise: Noise | None = None,
        reach: StiffCut | AdaptiveHorizon | None = None,
        discount: ArrayLike = 0.97,
        trace: ArrayLike = 0.95,
        mixing: ArrayLike = 0.2,
        critic_rate: ArrayLike = 2e-3,
        key: PRNGKeyArray | None = None,
        window: int = 16,
        environments: int = 64,
        epochs: int = 4,
        batches: int = 4,
        hidden: Sequence[int] = (32, 32),
    ):
        if not isinstance(descend, OptaxSolver):
            raise TypeError(
                f"descend must be a rule, OptaxSolver(optax.adam, learning_rate=2e-3); got {type(descend).__name__}"
            )
        sizes = {"window": window, "environments": environments, "epochs": epochs, "batches": batches}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if window * environments < batches:
            raise ValueError(f"{window} steps of {environments} environments do not fill {batches} mini-batches")
        for name, share in {"discount": discount, "trace": trace, "mixing": mixing}.items():
            if not bool(jnp.all((jnp.asarray(share) >= 0) & (jnp.asarray(share) <= 1))):
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if not bool(jnp.all(jnp.asarray(critic_rate) > 0)):
            raise ValueError(f"critic_rate must be positive, got {critic_rate}")
        self.descend, self.noise, self.reach = descend, noise, reach
        self.discount, self.trace, self.mixing = as_float(discount), as_float(trace), as_float(mixing)
        self.critic_rate = as_float(critic_rate)
        self.key = jax.random.key(0) if key is None else key
        self.window, self.environments, self.epochs, self.batches = window, environments, epochs, batches
        self.hidden = tuple(hidden)

    @property
    def kind(self) -> str:
        """ "policy": it takes a batch of starts."""
        return "policy"

    def init(self, policy: Policy, task: Task) -> ShortHorizonCarry:
        if is_plan(policy) or is_stateful(policy):
            raise TypeError(f"windows need a policy that depends on the state alone; got {type(policy).__name__}")
        if self.descend.searches(policy):
            raise ValueError(
                "a line search would search another objective, the return of whole episodes: take another rule"
            )
        key_critic, key_spread = jax.random.split(self.key)
        dtype, N = task.weights.dtype, self.environments
        critic = Critic.init(task, hidden=self.hidden, key=key_critic)
        spread = None if self.noise is None else StateNoise.init(task, std=self.noise.std, key=key_spread)
        entropy = None if self.noise is None else self.noise.entropy
        # The first update begins the episodes, since it has the starts.
        nowhere = jax.tree.map(lambda x: jnp.zeros((N, *x.shape), x.dtype), task.state_shape)
        zero = jnp.zeros(N, jnp.int32)
        return ShortHorizonCarry(
            environments=Environments(nowhere, zero, zero),
            critic=critic,
            target=critic,
            critic_rule=self._critic_rule().init(cast(optax.Params, critic.net)),
            descend=self.descend.init((policy, spread), task),
            spread=spread,
            log_temperature=None if entropy is None else jnp.log(entropy.temperature).astype(dtype),
            reach=None if self.reach is None else self.reach.start(dtype),
            loss=jnp.full((), jnp.inf, dtype),
            norm=jnp.full((), jnp.nan, dtype),
            updates=jnp.zeros((), jnp.int32),
        )

    on_objective_change = restart

    def update(
        self, policy: Policy, carry: ShortHorizonCarry, task: Task, s0: State, *, key: PRNGKeyArray | None
    ) -> tuple[Policy, ShortHorizonCarry, Info]:
        fresh = start_environments(s0, self.environments, task)
        environments = where(jnp.isnan(carry.norm), fresh, carry.environments)
        key_noise, key_fit = jax.random.split(jax.random.fold_in(self.key, carry.updates + 1))
        (_, (environments, steps)), gradient = jax.value_and_grad(self._objective, has_aux=True)(
            (policy, carry.spread), carry, task, s0, environments, key, key_noise
        )
        J = mean_return(policy, *first_starts(task, s0, self.environments), key)
        descend = eqx.tree_at(lambda d: d.gradient, self.descend, _Given(J, gradient))
        (moved, spread), inner, info = descend.update((policy, carry.spread), carry.descend, task, s0, key=key)

        learned = self._learn(carry, steps, self.descend.annealed(carry.updates), key_fit)
        done = carry.updates + 1
        now = learned._replace(
            environments=environments, descend=inner, spread=spread, norm=info.gradient_norm, updates=done
        )
        restarted = carry._replace(norm=jnp.full_like(carry.norm, jnp.nan), updates=done)
        finite = (info.nonfinite == 0) & all_finite((learned.critic, learned.loss, learned.reach, environments.s))
        info = info._replace(
            gradient_norm=jnp.where(finite, info.gradient_norm, carry.norm),
            accepted=info.accepted & finite,
            nonfinite=(~finite).astype(jnp.int32),
            work=self._work(task, s0),
        )
        return *where(finite, (moved, now), (policy, restarted)), info

    def _objective(self, learned, carry, task, s0, environments, key, key_noise):
        """The window's objective, as a function of the policy and its noise."""
        policy, spread = learned
        shape = (self.environments, self.window, task.m)
        return window(
            policy,
            task,
            s0,
            environments,
            carry.target.held,
            length=self.window,
            discount=self.discount,
            key=key,
            spread=spread,
            epsilon=None if spread is None else jax.random.normal(key_noise, shape, task.weights.dtype),
            entropy=None if self.noise is None else self.noise.entropy,
            log_temperature=carry.log_temperature,
            reach=self.reach,
            reach_state=carry.reach,
        )

    def _learn(self, carry: ShortHorizonCarry, steps: Steps, factor: Array, key: PRNGKeyArray) -> ShortHorizonCarry:
        """The carry with critic, target, temperature and horizon after the window."""
        G = jax.vmap(lambda r, v, e: td_lambda(r, v, e, discount=self.discount, trace=self.trace))(
            steps.r, steps.value_next, steps.ended
        )
        scale = running_moments(carry.critic, G, jnp.where(jnp.isinf(carry.loss), 1.0, 0.1).astype(G.dtype))
        critic, target = carry.critic.rescaled(*scale), carry.target.rescaled(*scale)
        x = steps.x.reshape(-1, steps.x.shape[-1])
        sizes = {"epochs": self.epochs, "batches": self.batches}
        critic, state, loss = fit(
            critic, self._critic_rule(), carry.critic_rule, x, G.ravel(), key, factor=factor.astype(G.dtype), **sizes
        )
        net = jax.tree.map(lambda old, new: self.mixing * old + (1 - self.mixing) * new, target.net, critic.net)
        log_temperature, reach = carry.log_temperature, carry.reach
        entropy = None if self.noise is None else self.noise.entropy
        if entropy is not None and log_temperature is not None and steps.excess is not None:
            log_temperature = entropy.follow(log_temperature, jnp.mean(steps.excess))
        if self.reach is not None and steps.stiffness is not None:
            reach = self.reach.after(reach, steps.stiffness)
        return carry._replace(
            critic=critic,
            target=Critic(net, critic.mean, critic.std),
            critic_rule=state,
            loss=loss,
            log_temperature=log_temperature,
            reach=reach,
        )

    def _critic_rule(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(self.critic_rate, b1=0.7, b2=0.95))

    def _work(self, task: Task, s0: State) -> EvaluationCounts:
        """The window forward, recomputed and back, and the rollout of J."""
        steps = self.environments * self.window
        judged = min(self.environments, jax.tree.leaves(s0)[0].shape[0]) * task.horizon
        passes = max(1, -(-3 * self.window // task.horizon))
        jacobians = 0 if self.reach is None else 2 * task.n * steps
        return count_evaluations(forward=2 * steps + judged, jvp=jacobians, vjp=steps, sequential=passes)


class _Given(eqx.Module):
    """A gradient that is already known, in the place of an estimator."""

    J: Float[Array, ""]
    gradient: PyTree
    remat: int | None = eqx.field(static=True, default=1)

    def __call__(self, policy: PyTree, task: Task, s0: State, key: PRNGKeyArray | None) -> tuple[Array, PyTree]:
        """The given return and gradient."""
        return self.J, self.gradient

    def work(self, task: Task, batch: int) -> EvaluationCounts:
        """None of its own."""
        return count_evaluations()
