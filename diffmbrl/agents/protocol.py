"""The protocol of an agent, which `learn` runs and every wrapper of agents forwards."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, PRNGKeyArray

from diffmbrl.core import Dynamics, Policy, Stateful, Task
from diffmbrl.models.buffer import Buffer, Transition


@runtime_checkable
class Agent(Protocol):
    """Learns from a real system: a module whose leaves are hyperparameters, and a carry with all that it has learned.

    The `task` that an agent is given has the system's reward, end, features, limits and starts, but its dynamics raise when
    they are called. The carry is a pytree of arrays.
    """

    @property
    def warmup(self) -> int:
        """Real steps before the first update, at least `every`."""
        ...

    @property
    def every(self) -> int:
        """Real steps between two updates."""
        ...

    @property
    def environments(self) -> int:
        """Real systems in parallel, which share these steps."""
        ...

    def init(self, task: Task, key: PRNGKeyArray) -> Any:
        """The carry before the first update."""
        ...

    def first(self, carry: Any, task: Task) -> Policy | Stateful:
        """The policy of the warm-up: `RandomActions(task)`, or the agent's own if it learns from no other steps."""
        ...

    def policy(self, carry: Any, task: Task) -> Policy | Stateful:
        """The policy that collects, with exploration; it draws from the key of the step."""
        ...

    def best(self, carry: Any, task: Task) -> Policy | Stateful:
        """The policy that is evaluated, without exploration."""
        ...

    def model(self, carry: Any, task: Task) -> Dynamics | None:
        """The learned dynamics, which reports compare with the true ones; None for an agent that learns none."""
        ...

    def update(
        self, carry: Any, task: Task, buffer: Buffer, fresh: Transition, key: PRNGKeyArray
    ) -> tuple[Any, dict[str, Array]]:
        """The carry after learning from the buffer, or from the latest `every` steps [N, every / N], and scalar metrics."""
        ...
