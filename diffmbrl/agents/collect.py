"""Acting on a system: the steps of a policy on environments that go on from call to call."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from diffmbrl.core import State, Task, all_finite, is_plan, is_stateful
from diffmbrl.models.buffer import Transition
from diffmbrl.policies import centre_and_half
from diffmbrl.rollout import is_done, step_keys, terminal_reward, transition
from diffmbrl.tasks.transforms.plant import accept_std, perturbed


class Unknown(eqx.Module):
    """The dynamics as an agent is given them."""

    def __call__(self, s: State, a: Float[Array, " m"], *, key: PRNGKeyArray | None = None) -> State:
        raise TypeError("the true dynamics are not known to an agent: learn a model, and put it in their place")


class ExactSensor(eqx.Module):
    """A sensor that shows the state as it is."""

    def __call__(self, s: State, key: PRNGKeyArray) -> State:
        return s


class NoisySensor(eqx.Module):
    r"""A sensor that shows $s + \sigma \epsilon$, $\epsilon \sim N(0, I)$: `System(plant, sensor=NoisySensor(0.01))`.

    `std` is one number or one for each state variable (a pytree like the state). Raises: `ValueError` if it is negative or not
    finite. (Noise of the process is the plant's: `tasks.noisy`.)
    """

    std: Any = eqx.field(converter=accept_std)

    def __call__(self, s: State, key: PRNGKeyArray) -> State:
        return perturbed(s, self.std, key)


Axes = tuple[int | None, int | None]  # of an agent and its system


class Acting(eqx.Module):
    """What an agent does with what it has learned: carry -> policy, in its role `first`, `policy` or `best`.

    `over` says, as `vmap` does, whether each seed has an agent, and a task, of its own, on a leading axis of every leaf.
    """

    agent: Any
    task: Any
    role: str = eqx.field(static=True)
    over: Axes = eqx.field(static=True, default=(None, None))

    @property
    def axes(self) -> "Acting":
        """Its `in_axes`."""
        return Acting(*self.over, self.role, self.over)

    def __call__(self, carry: Any) -> Any:
        return getattr(self.agent, self.role)(carry, self.task)


@runtime_checkable
class Real(Protocol):
    """What `learn` needs of a real system: S seeds of it side by side, each of N environments.

    `System` is compiled with everything around it; `host.HostSystem` steps what is no JAX. Places (where the environments are
    between two calls) are the system's own but for `episode` [S, N], its number.
    """

    @property
    def view(self) -> Task:
        """The task as the agent is given it, whose dynamics nobody may call."""
        ...

    @property
    def horizon(self) -> int:
        """Time steps of an episode at most."""
        ...

    def begin(self, who: Acting, carries: Any, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]) -> Any:
        """`count` environments of each seed at the start of their episodes, which are numbered from `first` on."""
        ...

    def collect(
        self, who: Acting, carries: Any, places: Any, keys: Key[Array, " S"], *, steps: int
    ) -> tuple[Any, "Collected"]:
        """`steps` steps of each environment; every leaf of what is collected is [S, N, steps, ...]."""
        ...

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """A jitted function of `arguments` that begins and collects, compiled as far as this system can be."""
        ...


class System(eqx.Module):
    """What an agent meets: the plant, the task as the agent knows it, and a sensor from the plant's states to the agent's.

    The `view` is a task of what the sensor shows, whose dynamics nobody may call; what the buffer keeps is what is seen. The
    rewards come from the plant's true states.
    """

    plant: Task
    view: Task
    sensor: Any

    def __init__(self, plant: Task, *, view: Task | None = None, sensor: Any = None):
        seen = plant if view is None else view
        self.plant = plant
        self.view = eqx.tree_at(lambda t: t.dynamics, seen, Unknown())
        self.sensor = ExactSensor() if sensor is None else sensor
        shown = jax.eval_shape(self.sensor, plant.state_shape, jax.random.key(0))
        if shown != self.view.state_shape:
            raise ValueError(f"the sensor shows {shown}; the agent's task '{seen.name}' has states {seen.state_shape}")

    @property
    def horizon(self) -> int:
        """The plant's."""
        return self.plant.horizon

    def begin(self, who: Acting, carries: Any, keys: Key[Array, " S"], count: int, first: Int[Array, " S"]) -> "Place":
        """`reset_places`, for each seed."""
        each = jax.vmap(
            lambda system, who, carry, key, e: reset_places(who(carry), system, key, count, e),
            in_axes=(who.over[1], who.axes, 0, 0, 0),
        )
        return each(self, who, carries, keys, first)

    def collect(
        self, who: Acting, carries: Any, places: "Place", keys: Key[Array, " S"], *, steps: int
    ) -> tuple["Place", "Collected"]:
        """`collect_steps`, for each seed."""
        each = jax.vmap(
            lambda system, who, carry, place, key: collect_steps(who(carry), system, place, key, steps=steps),
            in_axes=(who.over[1], who.axes, 0, 0, 0),
        )
        return each(self, who, carries, places, keys)

    def ready(self, function: Callable, *arguments: Any, **sizes: Any) -> Callable:
        """All of it as one compiled program."""
        return function.lower(*arguments, **sizes).compile()  # type: ignore[attr-defined]


class RandomActions(eqx.Module):
    """Actions drawn evenly within the limits; standard normal where there are none.

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
    """Where an environment is between two steps."""

    s: State  # the plant's
    seen: State  # what the sensor shows of it
    memory: Any  # the policy's, if it has one
    t: Int[Array, ""]  # step of the episode
    episode: Int[Array, ""]
    J: Float[Array, ""]  # return of the episode so far


class Collected(NamedTuple):
    """k steps of N environments."""

    steps: Transition  # as seen
    episode: Int[Array, "*S N k"]
    t: Int[Array, "*S N k"]
    keep: Bool[Array, "*S N k"]  # False where something is not finite, or the episode was over before its first step
    J: Float[
        Array, "*S N k"
    ]  # return of the episode that ends with this step (`steps.last`); NaN where something was not finite
    met: Int[Array, "*S N k"]  # values that were not finite in the rollouts of a policy that plans, before this step


def reset_places(policy: Any, system: System, key: PRNGKeyArray, count: int, first: Int[Array, ""] | int = 0) -> Place:
    """`count` environments at the start of their episodes, which are numbered from `first` on.

    Raises: `TypeError` for a plan, which has no action for a second episode.
    """
    if is_plan(policy):
        raise TypeError(f"a plan acts in one episode alone; got {type(policy).__name__}: put it into an MPC")
    number = jnp.asarray(first, jnp.int32) + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda k, e: _fresh(policy, system, k, e))(jax.random.split(key, count), number)


def collect_steps(
    policy: Any, system: System, places: Place, key: PRNGKeyArray, *, steps: int
) -> tuple[Place, Collected]:
    r"""`steps` steps of each of N environments: $a \sim \pi(o)$, $s' = f(s, a)$, $o'$ what the sensor shows of $s'$.

    An episode ends at the plant's horizon, when it is `done`, or where an action, a reward or a state is not finite; the next
    begins at once. A return is weighted as the task says, the terminal reward included.
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
    phi = terminal_reward(plant, s_next, timeout & ~done, place.s)
    J = place.J + plant.weights[place.t] * r + plant.weights[-1] * phi
    J = jnp.where(over, place.J, jnp.where(finite, J, jnp.nan))
    last = timeout | done | over | ~finite
    row = Transition(place.seen, a, r, seen_next, done, last)
    on = Place(s_next, seen_next, memory, place.t + 1, place.episode, J)
    again = _fresh(policy, system, key_next, place.episode + count)
    after = jax.tree.map(lambda x, y: jnp.where(last, x, y), again, on)
    return after, Collected(row, place.episode, place.t, finite & ~over, J, met(memory))


def met(memory: Any) -> Int[Array, "*batch"]:
    """How many values were not finite in the rollouts that a policy with this memory has just planned on; 0 for one without."""
    info = getattr(memory, "info", None)
    return jnp.zeros((), jnp.int32) if info is None else info.nonfinite.astype(jnp.int32)


def _fresh(policy: Any, system: System, key: PRNGKeyArray, episode: Int[Array, ""]) -> Place:
    key_s, key_seen = jax.random.split(key)
    s = system.plant.initial(key_s)
    memory = policy.start(system.plant) if is_stateful(policy) else None
    zero = jnp.zeros((), jnp.int32)
    return Place(s, system.sensor(s, key_seen), memory, zero, episode, jnp.zeros((), system.plant.weights.dtype))
