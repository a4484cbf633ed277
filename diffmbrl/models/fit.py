r"""Training of learned models: a whole ensemble in one compiled call, with early stopping of each member.

A `Trainable` model has a `net`, a `normalizer`, and the loss of a row of data. `train` fits the normaliser to the data, then
the nets of all members by any optax rule on mini-batches. A member ends when it stops improving on held-out rows, and its best
weights are returned.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from diffmbrl.core import as_float, is_concrete
from diffmbrl.models.buffer import Transition
from diffmbrl.models.ensemble import member
from diffmbrl.models.ensemble import size as count_members
from diffmbrl.models.protocols import FittedUnits, Trainable


class Curves(NamedTuple):
    """Learning curves of E members; NaN after the end of a member. Losses are those of `row_loss`.

    Args:
        train: Mean training loss of each epoch, shape [E, epochs].
        heldout: Hold-out loss before the first epoch and after each, shape [E, epochs + 1].
        holdout: Hold-out loss of the returned weights, shape [E]; infinite if it was never finite.
        epochs: Number of epochs trained, shape [E].
        rejected: 1 for a member that became non-finite or had too few rows, shape [E].
    """

    train: Float[Array, "*batch E epochs"]
    heldout: Float[Array, "*batch E epochs+1"]
    holdout: Float[Array, "*batch E"]
    epochs: Int[Array, "*batch E"]
    rejected: Int[Array, "*batch E"]


class Training(eqx.Module):
    r"""How members are trained: by an optax rule on mini-batches, until the hold-out loss stops falling.

    The random split depends on the position of a row alone, so rows that were held out mostly stay so while a buffer grows.

    Args:
        rule: Constructor of an optax rule, such as `optax.adam`.
        epochs: Largest number of epochs.
        patience: A member ends after this many epochs without an improvement.
        batch: Number of rows in a mini-batch.
        holdout: Fraction of the rows held out. With 0, members are trained and judged on all rows.
        improvement: Relative decrease of the hold-out loss that counts as an improvement.
        bootstrap: Whether each member draws its rows with replacement; otherwise all use the same rows, each in its
            own order.
        together: Number of members trained at once. 1 is fastest on a CPU, whose caches hold the weights and
            moments of one member; a GPU should train all at once.
        **hyperparameters: Arguments of `rule`; floats are leaves, so a sweep over them is a `vmap`.

    Raises:
        ValueError: If a size is below 1 or a fraction is outside [0, 1).
        TypeError: If `rule` is not a constructor.

    >>> Training(optax.adamw, learning_rate=1e-3, weight_decay=1e-4, epochs=20).epochs
    20
    """

    hyperparameters: dict[str, Array]
    patience: Int[Array, "*batch"]
    holdout: Float[Array, "*batch"]
    improvement: Float[Array, "*batch"]
    bootstrap: Bool[Array, "*batch"]
    rule: Callable[..., optax.GradientTransformation] = eqx.field(static=True)
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    epochs: int = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    together: int = eqx.field(static=True)

    def __init__(
        self,
        rule: Any = optax.adam,
        *,
        epochs: int = 100,
        patience: int = 5,
        batch: int = 256,
        holdout: float = 0.1,
        improvement: float = 0.01,
        bootstrap: bool = True,
        together: int = 1,
        **hyperparameters: Any,
    ):
        if not callable(rule):  # an optax rule itself is a tuple of functions
            raise TypeError(
                f"rule must be a constructor such as optax.adam, its arguments given as keywords: "
                f"Training(optax.adam, learning_rate=1e-3); got {type(rule).__name__}"
            )
        for name, value in (("epochs", epochs), ("patience", patience), ("batch", batch), ("together", together)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, share in (("holdout", holdout), ("improvement", improvement)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be a share of at least 0 and below 1, got {share!r}")
        if rule is optax.adam:
            hyperparameters.setdefault("learning_rate", 1e-3)
        self.rule = cast(Callable[..., optax.GradientTransformation], rule)
        numeric = {name: x for name, x in hyperparameters.items() if isinstance(x, float | jax.Array)}
        self.hyperparameters = {name: as_float(x) for name, x in numeric.items()}
        self.options = tuple(sorted((name, x) for name, x in hyperparameters.items() if name not in numeric))
        self.patience = jnp.asarray(patience, jnp.int32)
        self.holdout, self.improvement = as_float(holdout), as_float(improvement)
        self.bootstrap = jnp.asarray(bootstrap)
        self.epochs, self.batch, self.together = epochs, batch, together


def train(
    members: Any,
    transitions: Transition,
    size: Int[Array, ""] | int,
    key: PRNGKeyArray,
    training: Training | None = None,
) -> tuple[Any, Curves]:
    """Train all members of an ensemble on the first `size` rows.

    Args:
        members: `Trainable` models whose every leaf has a leading axis E. Training continues from their weights,
            with fresh moments of the rule.
        transitions: Rows [capacity, ...] of a buffer, or windows [capacity, k, ...], whose loss is that of the
            models' own rollouts of k steps.
        size: Number of rows that are data; it may be traced, so a growing buffer compiles nothing.
        key: Key of the mini-batches.
        training: How to train; None for `Training()`.

    Returns:
        The trained members, and their learning curves. A member whose loss becomes non-finite returns its best
        weights, or its first ones, and counts as rejected; so do all members if a traced `size` is too small to
        train and hold out.

    Raises:
        ValueError: If a known `size` is too small for the split or exceeds the rows, or if the members have no
            common leading axis.

    Cost: per epoch and member, a gradient of each training row and a loss of each held-out row.

    >>> import jax
    >>> from diffmbrl import tasks
    >>> from diffmbrl.models import NetworkDynamics
    >>> task = tasks.pendulum()
    >>> s, a = task.starts(jax.random.key(0), 150), jax.random.normal(jax.random.key(1), (150, 1))
    >>> no = jax.numpy.zeros(150, bool)
    >>> rows = Transition(s, a, jax.vmap(task.reward)(s, a), jax.vmap(task.dynamics)(s, a), no, no)
    >>> members = jax.vmap(lambda k: NetworkDynamics.init(task, hidden=[8], key=k))(jax.random.split(jax.random.key(2), 3))
    >>> members, curves = train(members, rows, 150, jax.random.key(3), Training(epochs=10, learning_rate=1e-2))
    >>> bool((curves.holdout < curves.heldout[:, 0]).all())
    True
    """
    training = Training() if training is None else training
    axes = {leaf.shape[:1] for leaf in jax.tree.leaves(members)}
    if len(axes) != 1 or () in axes:
        raise ValueError("every leaf of the members needs the same leading axis: draw them under vmap")
    capacity = transitions.a.shape[0]
    if is_concrete(size, training.holdout):
        # By numpy: inside a trace jnp would trace even known numbers.
        rows, share = np.asarray(size), np.asarray(training.holdout)
        least = 2 if share.max() > 0 else 1
        if not least <= rows.min() or rows.max() > capacity:
            raise ValueError(
                f"training takes {least} to {capacity} of the {capacity} rows (holdout {training.holdout:.3g}), got {size}"
            )
    return _train(members, transitions, jnp.asarray(size, jnp.int32), key, training)


@jax.jit
def _train(members: Any, transitions: Transition, size: Array, key: PRNGKeyArray, training: Training):
    rows, held = holdout_split(transitions.a.shape[0], size, training.holdout)
    normalizer = _normalizer(member(members, 0), transitions, size)
    one = partial(
        _one, normalizer=normalizer, transitions=transitions, rows=rows, held=held, size=size, training=training
    )
    at_once = None if training.together == 1 else training.together
    keys = jax.random.split(key, count_members(members))
    return jax.lax.map(lambda x: one(*x), (members, keys), batch_size=at_once)


def holdout_split(
    capacity: int, size: Int[Array, ""], holdout: Float[Array, ""]
) -> tuple[Int[Array, " rows"], Int[Array, ""]]:
    """Order the rows below `size` at random, and count how many of the first are held out.

    At least one is held out if `holdout` is positive. The random numbers of the rows are the same in every call, so a growing
    buffer holds out nearly the same rows again.
    """
    drawn = jax.random.uniform(jax.random.key(0), (capacity,))
    place = jnp.arange(capacity, dtype=jnp.int32)
    rows = jnp.argsort(jnp.where(place < size, drawn, 2)).astype(jnp.int32)
    share = jnp.round(holdout * size.astype(holdout.dtype)).astype(jnp.int32)
    return rows, jnp.where(holdout > 0, jnp.maximum(share, 1), 0)


def _normalizer(model: Trainable, transitions: Transition, size: Array) -> FittedUnits:
    """Fit the normaliser to the rows below `size`, transitions or windows."""
    lead = transitions.a.shape[:-1]
    data = jnp.broadcast_to(jnp.arange(lead[0], dtype=jnp.int32).reshape(-1, *[1] * (len(lead) - 1)) < size, lead)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(lead) :]), transitions)
    return model.normalizer.fitted(rows, data.ravel())


class _State(NamedTuple):
    net: PyTree
    moments: PyTree  # of the rule
    best: PyTree  # weights
    lowest: Array  # loss of the best
    mark: Array  # loss that the next must fall below to count as an improvement
    since: Array  # epochs without one
    epoch: Array
    finite: Array
    train: Array
    heldout: Array


def _one(
    model: Trainable,
    key: PRNGKeyArray,
    *,
    normalizer: FittedUnits,
    transitions: Transition,
    rows: Array,
    held: Array,
    size: Array,
    training: Training,
) -> tuple[Any, Curves]:
    """Train one member."""
    capacity, batch = rows.shape[0], min(training.batch, rows.shape[0])
    rule = optax.with_extra_args_support(training.rule(**dict(training.options), **training.hyperparameters))
    place = jnp.arange(capacity, dtype=jnp.int32)
    number = jnp.maximum(size - held, 0)
    key_rows, key_epochs = jax.random.split(key)
    drawn = jax.random.randint(key_rows, (capacity,), 0, jnp.maximum(number, 1), jnp.int32)
    mine = rows[jnp.minimum(held + jnp.where(training.bootstrap, drawn, place), capacity - 1)]
    # Judged by the rows held out, or by all.
    judging = jnp.where(held > 0, held, size)

    def loss(net, chosen, weight):
        f = eqx.tree_at(lambda f: (f.net, f.normalizer), model, (net, normalizer))
        losses = jax.vmap(f.row_loss)(jax.tree.map(lambda x: x[chosen], transitions))
        return jnp.sum(jnp.where(weight, losses, 0)) / jnp.maximum(jnp.sum(weight), 1).astype(losses.dtype)

    def batches(table, count, step, carry):
        """Apply `step` to each batch of the first `count` rows of a table; the last batch is padded with rows of weight 0.

        The padding is the first row, not a row without data: a NaN there would meet its weight of 0 in the reverse pass.
        """

        def body(j, carry):
            at = j * batch + jnp.arange(batch, dtype=jnp.int32)
            return step(carry, table[jnp.where(at < count, at, 0)], at < count)

        return jax.lax.fori_loop(0, -(-count // batch), body, carry)

    def judge(net):
        def step(total, chosen, weight):
            return total + loss(net, chosen, weight) * jnp.sum(weight).astype(total.dtype)

        return batches(rows, judging, step, zero) / jnp.maximum(judging, 1).astype(zero.dtype)

    def update(carry, chosen, weight):
        net, moments, total = carry
        value, gradient = jax.value_and_grad(loss)(net, chosen, weight)
        # Optax raises floats to integer powers, which a user may have forbidden to JAX.
        with jax.numpy_dtype_promotion("standard"):
            extra = {"value": value, "grad": gradient, "value_fn": lambda net: loss(net, chosen, weight)}
            change, moments = rule.update(gradient, moments, net, **extra)
        net = jax.tree.map(lambda x, u: x + u.astype(x.dtype), net, change)
        return net, moments, total + value * jnp.sum(weight).astype(value.dtype)

    def epoch(state):
        order = jnp.argsort(
            jnp.where(place < number, jax.random.uniform(jax.random.fold_in(key_epochs, state.epoch), (capacity,)), 2)
        )
        # The first turn trains on nothing, so the same program evaluates the given weights.
        count = jnp.where(state.epoch < 0, 0, number)
        net, moments, total = batches(mine[order], count, update, (state.net, state.moments, zero))
        value = jnp.where(enough, judge(net), jnp.nan)
        finite = jnp.isfinite(value)
        better = value < state.lowest
        least = jnp.where(jnp.isinf(state.mark), 0, training.improvement.astype(value.dtype) * jnp.abs(state.mark))
        improved = value < state.mark - least
        return _State(
            net=net,
            moments=moments,
            best=jax.tree.map(lambda x, y: jnp.where(better, x, y), net, state.best),
            lowest=jnp.where(better, value, state.lowest),
            mark=jnp.where(improved, value, state.mark),
            since=jnp.where(improved, 0, state.since + 1),
            epoch=state.epoch + 1,
            finite=finite,
            train=state.train.at[state.epoch + 1].set(total / jnp.maximum(count, 1).astype(total.dtype)),
            heldout=state.heldout.at[state.epoch + 1].set(value),
        )

    def going(state):
        return (state.epoch < training.epochs) & (state.since < training.patience) & state.finite

    zero = jnp.zeros((), transitions.a.dtype)
    enough = (number > 0) & (judging > 0)
    curve = jnp.full(training.epochs + 1, jnp.nan, zero.dtype)
    none = jnp.zeros((), jnp.int32)
    start = _State(
        net=model.net,
        moments=_strong(rule.init(model.net)),
        best=model.net,
        lowest=jnp.full_like(zero, jnp.inf),
        mark=jnp.full_like(zero, jnp.inf),
        since=none,
        epoch=none - 1,
        finite=jnp.array(True),
        train=curve,
        heldout=curve,
    )
    end = jax.lax.while_loop(going, epoch, start)
    usable = jnp.isfinite(end.lowest)
    trained = eqx.tree_at(lambda f: (f.net, f.normalizer), model, (end.best, normalizer))
    trained = jax.tree.map(lambda x, y: jnp.where(usable, x, y), trained, model)
    holdout = jnp.where(usable, end.lowest, jnp.inf)
    return trained, Curves(end.train[1:], end.heldout, holdout, end.epoch, (~end.finite).astype(jnp.int32))


def _strong(tree: PyTree) -> PyTree:
    """Return the arrays without weak types, which the first update would drop."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(jnp.asarray(x), jnp.asarray(x).dtype), tree)
