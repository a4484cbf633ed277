r"""An agent on a system whose reward or end is not given: both are fitted to the buffer before each of its updates.

$$\hat r \approx r(s, a),\qquad \hat p(s') \approx P(\text{the task is over at } s')$$
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from diffmbrl.agents.learn import Agent
from diffmbrl.core import Task
from diffmbrl.models import EndModel, RewardModel, Training, train
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.tasks.adapters.gymnasium import NotGiven

KINDS = {"reward": RewardModel, "end": EndModel}


class JudgedCarry(NamedTuple):
    """What the agent within has learned, and what it is judged by."""

    inner: Any
    models: dict[str, Any]  # of `KINDS`, those that are not given; a leading axis of one member


class WithLearnedReward(eqx.Module):
    r"""Fits $\hat r$ and $\hat p$ wherever a `RewardModel` or an `EndModel` stands in the task, or in an agent that plans.

    Every fit goes on from the weights of the last. Evaluations and records are of the true reward all the same.
    Cost of an update: the agent's, and a fit of each model. Use `with_learned_reward`, which leaves alone an agent
    that needs none of it.
    """

    inner: Any
    training: Training

    @property
    def warmup(self) -> int:
        return self.inner.warmup

    @property
    def every(self) -> int:
        return self.inner.every

    @property
    def environments(self) -> int:
        return self.inner.environments

    def init(self, task: Task, key: PRNGKeyArray) -> JudgedCarry:
        asked = {"reward": task.reward, "end": task.done}
        models = {name: model for name, model in asked.items() if isinstance(model, KINDS[name])}
        return JudgedCarry(self.inner.init(task, key), jax.tree.map(lambda x: x[None], models))

    def first(self, carry: JudgedCarry, task: Task) -> Any:
        return informed(self.inner, carry).first(carry.inner, informed(task, carry))

    def policy(self, carry: JudgedCarry, task: Task) -> Any:
        return informed(self.inner, carry).policy(carry.inner, informed(task, carry))

    def best(self, carry: JudgedCarry, task: Task) -> Any:
        return informed(self.inner, carry).best(carry.inner, informed(task, carry))

    def model(self, carry: JudgedCarry, task: Task) -> Any:
        """The inner agent's."""
        return self.inner.model(carry.inner, informed(task, carry))

    def update(
        self, carry: JudgedCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[JudgedCarry, dict[str, Array]]:
        """Fit what is not given, then let the agent learn with it."""
        key_fit, key_update = jax.random.split(key)
        models, said = {}, {}
        for i, (name, model) in enumerate(carry.models.items()):
            models[name], curves = train(model, buffer.rows, buffer.size, jax.random.fold_in(key_fit, i), self.training)
            said |= {f"{name}_error": curves.holdout[0], f"{name}_rejected": jnp.sum(curves.rejected)}
        carry = JudgedCarry(carry.inner, models)
        agent, told = informed(self.inner, carry), informed(task, carry)
        inner, own = agent.update(carry.inner, told, buffer, fresh, key_update)
        return JudgedCarry(inner, models), said | own


def informed(tree: Any, carry: JudgedCarry) -> Any:
    """A task or an agent with the models as they are fitted in place of those that it was made with."""
    kinds = {KINDS[name]: jax.tree.map(lambda x: x[0], model) for name, model in carry.models.items()}
    return jax.tree.map(lambda x: kinds.get(type(x), x), tree, is_leaf=lambda x: type(x) in kinds)


def learnable(task: Task, *, hidden: tuple[int, ...] = (64, 64)) -> Task:
    """The task with a model to be trained in place of a reward and of an end that are not given."""
    key_reward, key_end = jax.random.split(jax.random.key(0))
    if isinstance(task.reward, NotGiven):
        task = eqx.tree_at(lambda t: t.reward, task, RewardModel.init(task, hidden=hidden, key=key_reward))
    if isinstance(task.done, NotGiven):
        task = eqx.tree_at(lambda t: t.done, task, EndModel.init(task, hidden=hidden, key=key_end))
    return task


def with_learned_reward(agent: Agent, task: Task) -> Agent:
    """The agent, or where the reward or the end of `task` is to be learned, the agent `WithLearnedReward`."""
    if not isinstance(task.reward, RewardModel) and not isinstance(task.done, EndModel):
        return agent
    return WithLearnedReward(agent, Training(epochs=100, patience=10, batch=64))
