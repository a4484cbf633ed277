r"""Learned rewards and ends: on a system that gives neither, both are fitted to the buffer before each update of an agent.

$$\hat r \approx r(s, a),\qquad \hat p(s') \approx P(\text{the task is over at } s')$$
"""

from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from diffmbrl.agents.protocol import Agent
from diffmbrl.core import Dynamics, Policy, Stateful, Task
from diffmbrl.models import EndModel, RewardModel, Training, train
from diffmbrl.models.buffer import Buffer, Transition
from diffmbrl.tasks.adapters.gymnasium import NotGiven

KINDS = {"reward": RewardModel, "end": EndModel}
Tree = TypeVar("Tree")


class JudgedCarry(NamedTuple):
    """The inner agent's carry, and the learned models.

    Args:
        inner: The inner agent's carry.
        models: By the names of `KINDS`, those that the system does not give, with a leading axis of one member.
    """

    inner: PyTree
    models: dict[str, RewardModel | EndModel]


class WithLearnedReward(eqx.Module):
    r"""Fits $\hat r$ and $\hat p$ in place of every `RewardModel` and `EndModel` in the task, and in an agent that plans.

    Every fit continues from the weights of the last one. Evaluations and records still use the true reward. Use
    `with_learned_reward`, which returns an agent unchanged if nothing has to be learned.

    Args:
        inner: The agent.
        training: How the models are trained.

    Cost: of an update, the agent's, and a fit of each model.
    """

    inner: Agent
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

    def first(self, carry: JudgedCarry, task: Task) -> Policy | Stateful:
        return informed(self.inner, carry).first(carry.inner, informed(task, carry))

    def policy(self, carry: JudgedCarry, task: Task) -> Policy | Stateful:
        return informed(self.inner, carry).policy(carry.inner, informed(task, carry))

    def best(self, carry: JudgedCarry, task: Task) -> Policy | Stateful:
        return informed(self.inner, carry).best(carry.inner, informed(task, carry))

    def model(self, carry: JudgedCarry, task: Task) -> Dynamics | None:
        """The inner agent's."""
        return self.inner.model(carry.inner, informed(task, carry))

    def update(
        self, carry: JudgedCarry, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[JudgedCarry, dict[str, Array]]:
        """Fit the models, then let the agent learn with them."""
        key_fit, key_update = jax.random.split(key)
        models, metrics = {}, {}
        for i, (name, model) in enumerate(carry.models.items()):
            models[name], curves = train(model, buffer.rows, buffer.size, jax.random.fold_in(key_fit, i), self.training)
            metrics |= {f"{name}_error": curves.holdout[0], f"{name}_rejected": jnp.sum(curves.rejected)}
        carry = JudgedCarry(carry.inner, models)
        agent, told = informed(self.inner, carry), informed(task, carry)
        inner, own = agent.update(carry.inner, told, buffer, fresh, key_update)
        return JudgedCarry(inner, models), metrics | own


def informed(tree: Tree, carry: JudgedCarry) -> Tree:
    """Replace the models in a task or an agent by the fitted ones."""
    kinds = {KINDS[name]: jax.tree.map(lambda x: x[0], model) for name, model in carry.models.items()}
    return jax.tree.map(lambda x: kinds.get(type(x), x), tree, is_leaf=lambda x: type(x) in kinds)


def learnable(task: Task, *, hidden: tuple[int, ...] = (64, 64)) -> Task:
    """Replace a reward and an end that a system does not give by models that can be trained.

    Args:
        task: The task, with `NotGiven` for its reward or end.
        hidden: The widths of the models' hidden layers.

    Returns:
        The task with untrained models; unchanged if the system gives both.
    """
    key_reward, key_end = jax.random.split(jax.random.key(0))
    if isinstance(task.reward, NotGiven):
        task = eqx.tree_at(lambda t: t.reward, task, RewardModel.init(task, hidden=hidden, key=key_reward))
    if isinstance(task.done, NotGiven):
        task = eqx.tree_at(lambda t: t.done, task, EndModel.init(task, hidden=hidden, key=key_end))
    return task


def with_learned_reward(agent: Agent, task: Task) -> Agent:
    """Wrap an agent in `WithLearnedReward` if the task's reward or end has to be learned.

    Args:
        agent: The agent.
        task: The task that `learnable` returned.

    Returns:
        The wrapped agent; the agent itself if nothing has to be learned.
    """
    if not isinstance(task.reward, RewardModel) and not isinstance(task.done, EndModel):
        return agent
    return WithLearnedReward(agent, Training(epochs=100, patience=10, batch=64))
