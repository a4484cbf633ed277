"""Collecting experience: the steps of a policy on environments that continue from call to call."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from diffmbrl.core import Policy, State, Stateful, Task, all_finite, is_plan, is_stateful
from diffmbrl.models.buffer import Transition
from diffmbrl.planners.mpc import Memory
from diffmbrl.policies import centre_and_half
from diffmbrl.rollout import is_done, step_keys, transition
from diffmbrl.tasks.transforms.plant import accept_std, perturbed


class Unknown(eqx.Module):
    """The dynamics in an agent's view of a task, which cannot be called."""

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        raise TypeError("an agent does not know the true dynamics: learn a model and use it in their place")


class ExactSensor(eqx.Module):
    """A sensor that shows the state exactly."""

    def __call__(self, s: State, key: PRNGKeyArray) -> State:
        return s


class NoisySensor(eqx.Module):
    r"""A sensor with normal noise, $s + \sigma \epsilon$, $\epsilon \sim N(0, I)$; process noise is `tasks.noisy`.

    Args:
        std: Standard deviation sigma, one number or one for each state variable (a pytree like the state).

    Raises:
        ValueError: If `std` is negative or not finite.

    >>> from diffmbrl import tasks
    >>> system = System(tasks.pendulum(), sensor=NoisySensor(0.01))
    """

    std: PyTree = eqx.field(converter=accept_std)

    def __call__(self, s: State, key: PRNGKeyArray) -> State:
        return perturbed(s, self.std, key)


# (the plant's state, key) -> the reading.
Sensor = Callable[[State, PRNGKeyArray], State]
# The batch axes of an agent and its system, as `in_axes` of `jax.vmap`.
Axes = tuple[int | None, int | None]


class Acting(eqx.Module):
    """The function from an agent's carry to the policy that it acts with.

    Args:
        agent: The agent.
        task: The task as the agent knows it.
        role: The agent's method that returns the policy: `first`, `policy` or `best`.
        over: Batch axes of agent and task: 0 if each seed has its own, on a leading axis of every leaf, else None.
    """

    agent: Any
    task: Any
    role: str = eqx.field(static=True)
    over: Axes = eqx.field(static=True, default=(None, None))

    @property
    def axes(self) -> "Acting":
        """Its `in_axes` for `jax.vmap`."""
        return Acting(*self.over, self.role, self.over)

    def __call__(self, carry: Any) -> Any:
        return getattr(self.agent, self.role)(carry, self.task)


@runtime_checkable
class Real(Protocol):
    """A real system as `learn` uses it: S independent copies (seeds), each of N environments.

    `System` is compiled together with the agent; `host.HostSystem` steps environments that are not written in JAX. The type of
    places (the environments' positions between two calls) is the system's own, with a field `episode` [S, N].
    """

    @property
    def view(self) -> Task:
        """The task as the agent knows it, whose dynamics cannot be called."""
        ...

    @property
    def horizon(self) -> int:
        """Largest number of time steps of an episode."""
        ...

    def begin(self, who: Acting, carries: PyTree, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]) -> Any:
        """Reset `count` environments of each seed; their episodes are numbered from `first`."""
        ...

    def collect(
        self, who: Acting, carries: Any, places: Any, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[Any, "Collected"]:
        """Make `steps` steps in each environment; every leaf of the result is [S, N, steps, ...]."""
        ...

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """Compile a jitted function that begins and collects, as far as this system can be compiled."""
        ...


class System(eqx.Module):
    """A simulated real system: the plant, a sensor, and the task as the agent knows it.

    The buffer stores the sensor's readings; the rewards come from the plant's true states.

    Args:
        plant: The true task.
        view: The agent's task, on the states that the sensor shows; the plant by default. Its dynamics cannot be called.
        sensor: Module (s, key) -> reading; exact by default.

    Raises:
        ValueError: If the readings are not like the states of `view`.

    >>> from diffmbrl import tasks
    >>> System(tasks.pendulum(horizon=50)).horizon
    50
    """

    plant: Task
    view: Task
    sensor: Sensor

    def __init__(self, plant: Task, *, view: Task | None = None, sensor: Sensor | None = None):
        seen = plant if view is None else view
        self.plant = plant
        self.view = eqx.tree_at(lambda t: t.dynamics, seen, Unknown())
        self.sensor = ExactSensor() if sensor is None else sensor
        shown = jax.eval_shape(self.sensor, plant.state_shape, jax.random.key(0))
        if shown != self.view.state_shape:
            raise ValueError(f"the sensor shows {shown}; the agent's task '{seen.name}' has states {seen.state_shape}")

    @property
    def horizon(self) -> int:
        """The plant's horizon."""
        return self.plant.horizon

    def begin(
        self, who: Acting, carries: PyTree, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]
    ) -> "Place":
        """Call `reset_places` for each seed."""
        each = jax.vmap(
            lambda system, who, carry, key, e: reset_places(who(carry), system, key, count, e),
            in_axes=(who.over[1], who.axes, 0, 0, 0),
        )
        return each(self, who, carries, keys, first)

    def collect(
        self, who: Acting, carries: PyTree, places: "Place", keys: Key[Array, " S"], *, steps: int
    ) -> tuple["Place", "Collected"]:
        """Call `collect_steps` for each seed."""
        each = jax.vmap(
            lambda system, who, carry, place, key: collect_steps(who(carry), system, place, key, steps=steps),
            in_axes=(who.over[1], who.axes, 0, 0, 0),
        )
        return each(self, who, carries, places, keys)

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """Compile the whole function as one program."""
        return function.lower(*arguments, **sizes).compile()  # type: ignore[attr-defined]


class RandomActions(eqx.Module):
    """Random actions: uniform within the limits, standard normal where there are none.

    Args:
        task: The task whose action limits are used.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> policy = RandomActions(tasks.pendulum())
    >>> policy(jax.numpy.zeros(2), key=jax.random.key(0)).shape
    (1,)
    """

    low: Float[Array, " m"]
    high: Float[Array, " m"]

    def __init__(self, task: Task):
        self.low, self.high = task.a_low, task.a_high

    def __call__(self, s: State, *, key: PRNGKeyArray | None = None) -> Float[Array, " m"]:
        centre, half = centre_and_half(self.low, self.high)
        if key is None:
            return centre
        limited = jnp.isfinite(self.low) & jnp.isfinite(self.high)
        key_even, key_normal = jax.random.split(key)
        even = jax.random.uniform(key_even, centre.shape, centre.dtype, -1, 1)
        return centre + half * jnp.where(limited, even, jax.random.normal(key_normal, centre.shape, centre.dtype))


class Place(NamedTuple):
    """The position of an environment between two steps.

    Args:
        s: The plant's state.
        seen: The sensor's reading of it.
        memory: The policy's memory; None for a policy without.
        t: Step of the episode.
        episode: Number of the episode.
        J: Return of the episode so far.
    """

    s: State
    seen: State
    memory: PyTree
    t: Int[Array, ""]
    episode: Int[Array, ""]
    J: Float[Array, ""]


class Collected(NamedTuple):
    """k steps of each of N environments.

    Args:
        steps: The transitions, as the sensor shows them.
        episode: Number of the episode.
        t: Step of the episode.
        keep: Whether the step is usable: False where a value is not finite, or the episode was over before its first step.
        J: Return of the episode that ends with this step (`steps.last`); NaN where a value was not finite.
        met: Number of values that were not finite in the rollouts of a policy that plans, before this step.
    """

    steps: Transition
    episode: Int[Array, "*S N k"]
    t: Int[Array, "*S N k"]
    keep: Bool[Array, "*S N k"]
    J: Float[Array, "*S N k"]
    met: Int[Array, "*S N k"]


def reset_places(
    policy: Policy | Stateful, system: System, key: PRNGKeyArray, count: int, first: Int[Array, ""] | int = 0
) -> Place:
    """Reset environments to the start of their episodes.

    Args:
        policy: The policy that will act, for the start of its memory.
        system: The system.
        key: Key of the start states and readings.
        count: Number of environments N.
        first: Number of the first environment's episode; the others follow.

    Returns:
        The places, with a leading axis of N.

    Raises:
        TypeError: For a plan, which has no action for a second episode.
    """
    if is_plan(policy):
        raise TypeError(f"a plan acts in one episode only; got {type(policy).__name__}: wrap it in an MPC")
    number = jnp.asarray(first, jnp.int32) + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda k, e: _fresh(policy, system, k, e))(jax.random.split(key, count), number)


def collect_steps(
    policy: Policy | Stateful, system: System, places: Place, key: PRNGKeyArray, *, steps: int
) -> tuple[Place, Collected]:
    r"""Make steps in each of N environments: $a \sim \pi(o)$, $s' = f(s, a)$, $o'$ the sensor's reading of $s'$.

    An episode ends at the plant's horizon, when it is `done`, or where an action, a reward or a state is not finite; the next
    one begins at once. Returns use the task's weights and include the terminal reward.

    Args:
        policy: The policy, which sees the readings.
        system: The system.
        places: Positions of the environments.
        key: Key of all draws; step i of environment j uses `step_keys(split(key, N)[j], i, 4)`.
        steps: Number of steps k.

    Returns:
        The places after the steps, and the steps, shape [N, k].
    """
    count = places.t.shape[0]

    def one(place: Place, key: PRNGKeyArray):
        def step(place, i):
            return _step(policy, system, place, step_keys(key, i, 4), count)

        return jax.lax.scan(step, place, jnp.arange(steps, dtype=jnp.int32))

    return jax.vmap(one)(places, jax.random.split(key, count))


def _step(policy: Any, system: System, place: Place, keys: tuple[Any, ...], count: int) -> tuple[Place, Collected]:
    plant = system.plant
    key_a, key_s, key_seen, key_next = keys
    memory = place.memory
    if is_stateful(policy):
        a, memory = policy.step(memory, place.seen, key=key_a)
    else:
        a = policy(place.seen, key=key_a)
    r, s_next = transition(plant, place.s, a, key_s)
    seen_next = system.sensor(s_next, key_seen)
    over = is_done(plant, place.s)  # before the first step
    done = is_done(plant, s_next)
    finite = all_finite((a, r, s_next, seen_next))
    timeout = place.t + 1 >= plant.horizon
    phi = jnp.where(timeout & ~done, plant.terminal(s_next), 0)
    J = place.J + plant.weights[place.t] * r + plant.weights[-1] * phi
    J = jnp.where(over, place.J, jnp.where(finite, J, jnp.nan))
    last = timeout | done | over | ~finite
    row = Transition(place.seen, a, r, seen_next, done, last)
    on = Place(s_next, seen_next, memory, place.t + 1, place.episode, J)
    again = _fresh(policy, system, key_next, place.episode + count)
    after = jax.tree.map(lambda x, y: jnp.where(last, x, y), again, on)
    return after, Collected(row, place.episode, place.t, finite & ~over, J, met(memory))


def met(memory: PyTree) -> Int[Array, "*batch"]:
    """Number of values that were not finite in a planning policy's last rollouts; 0 for a policy that does not plan."""
    return memory.info.nonfinite.astype(jnp.int32) if isinstance(memory, Memory) else jnp.zeros((), jnp.int32)


def _fresh(policy: Policy | Stateful, system: System, key: PRNGKeyArray, episode: Int[Array, ""]) -> Place:
    key_s, key_seen = jax.random.split(key)
    s = system.plant.initial(key_s)
    memory = cast(Stateful, policy).start(system.plant) if is_stateful(policy) else None
    zero = jnp.zeros((), jnp.int32)
    return Place(s, system.sensor(s, key_seen), memory, zero, episode, jnp.zeros((), system.plant.weights.dtype))
