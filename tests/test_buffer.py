"""The replay buffer: it wraps, keeps order, draws windows of single episodes, and says when it cannot."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from diffmbrl import tasks
from diffmbrl.models.buffer import Buffer, Transition


def numbered(first: int, count: int) -> Transition:
    """Steps whose every number is their own."""
    x = np.arange(first, first + count, dtype=np.float32)
    no = np.zeros(count, bool)
    steps = Transition(np.stack([x, x], 1), x[:, None], x, np.stack([x + 1, x + 1], 1), no, no)
    return jax.tree.map(jnp.asarray, steps)


add = jax.jit(lambda buffer, *steps: buffer.add(*steps))
runs = jax.jit(lambda buffer, length: buffer.runs(length), static_argnums=1)
windows = jax.jit(lambda buffer, length: buffer.windows(jax.random.key(0), 200, length), static_argnums=1)


def filled(capacity: int, lengths: list[int], chunk: int = 3) -> Buffer:
    """Episodes of such lengths, one after another, added in chunks."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    t = np.concatenate([np.arange(n) for n in lengths])
    buffer = Buffer.empty(tasks.lqr(), capacity)
    for i in range(0, len(t), chunk):
        part = slice(i, min(i + chunk, len(t)))
        rows = numbered(i, part.stop - i)
        buffer = add(buffer, rows, jnp.asarray(episode[part], jnp.int32), jnp.asarray(t[part], jnp.int32))
    return buffer


@hypothesis.given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), length=st.integers(1, 4))
def test_windows_are_consecutive_steps_of_one_episode(lengths, length):
    capacity = 12
    buffer = filled(capacity, lengths)
    total = sum(lengths)
    kept = range(max(0, total - capacity), total)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    possible = {i for i in kept if i + length <= total and episode[i] == episode[i + length - 1]}
    assert np.sum(runs(buffer, length)) == len(possible)
    if not possible:
        with pytest.raises(ValueError, match=f"{length} transitions in a row"):
            buffer.windows(jax.random.key(0), 8, length)
        return
    drawn = np.asarray(windows(buffer, length).r)
    assert (np.diff(drawn, axis=1) == 1).all()
    assert set(drawn[:, 0].astype(int)) <= possible
    if len(possible) < 5:
        assert set(drawn[:, 0].astype(int)) == possible


def test_it_wraps_and_keeps_the_latest():
    buffer = filled(10, [4, 4, 4, 5])
    assert int(buffer.size) == 10 and int(buffer.added) == 17
    drawn = np.asarray(buffer.sample(jax.random.key(1), 500).r)
    assert set(drawn.astype(int)) == set(range(7, 17))


def test_rows_that_are_not_to_be_kept_leave_no_gap():
    buffer = Buffer.empty(tasks.lqr(), 8)
    keep = jnp.array([True, False, True, False, True])
    zeros = jnp.zeros(5, jnp.int32)
    buffer = buffer.add(numbered(0, 5), zeros, jnp.arange(5, dtype=jnp.int32), keep)
    assert int(buffer.size) == 3
    assert buffer.rows.r[:3].tolist() == [0, 2, 4]
    # Steps 0 and 2 follow one another in the buffer but not in the episode.
    assert int(buffer.runs(2).sum()) == 0


def test_it_compiles_once_as_it_fills():
    @jax.jit
    @chex.assert_max_traces(1)
    def step(buffer, rows, key):
        zeros = jnp.zeros(3, jnp.int32)
        buffer = buffer.add(rows, zeros, jnp.arange(3, dtype=jnp.int32))
        return buffer, buffer.sample(key, 4), buffer.windows(key, 4, 2)

    buffer = Buffer.empty(tasks.lqr(), 7)
    for i in range(4):
        buffer, *_ = step(buffer, numbered(3 * i, 3), jax.random.key(i))
    assert int(buffer.size) == 7


def test_an_empty_buffer_is_an_error_or_nan():
    buffer = Buffer.empty(tasks.lqr(), 5)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(jax.random.key(0), 3)
    drawn = jax.jit(lambda b: b.sample(jax.random.key(0), 3))(buffer)
    assert np.isnan(np.asarray(drawn.s)).all() and np.isnan(np.asarray(drawn.r)).all()
    windows = jax.jit(lambda b: b.windows(jax.random.key(0), 3, 2))(buffer)
    assert np.isnan(np.asarray(windows.r)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Buffer.empty(tasks.lqr(), 0), "capacity .* got 0"),
        (lambda: filled(4, [5], chunk=5), "5 transitions do not fit a buffer of 4"),
        (lambda: filled(4, [4]).windows(jax.random.key(0), 3, 0), "length .* got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
