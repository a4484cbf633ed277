"""The matrix products of an ensemble's layers alone: the lower bound of any forward pass."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

KEY = jax.random.key(0)
# Of a layer [o, i] with the rows as rows or as columns: one member after another, or all e in one product.
LAYOUTS = {
    "rows": "oi,bi->bo",
    "columns": "oi,ib->ob",
    "rows, members together": "eoi,ebi->ebo",
    "columns, members together": "eoi,eib->eob",
}


def layers(sizes: list[int], members: int) -> list[jax.Array]:
    """Weights [members, out, in] of each layer."""
    keys = jax.random.split(KEY, len(sizes) - 1)
    shapes = zip(keys, sizes[1:], sizes[:-1], strict=True)
    return [jax.random.normal(k, (members, out, into)) / into**0.5 for k, out, into in shapes]


def forward(sizes: list[int], members: int, share: int, times: int, layout: str) -> Callable[[], jax.Array]:
    """All layers on `share` rows for each member, `times` times one after another."""
    spec = LAYOUTS[layout]
    together = spec.startswith("e")
    shape = (share, sizes[0]) if layout.startswith("rows") else (sizes[0], share)

    def through(args):
        layers, y = args
        for W in layers:
            y = jnp.einsum(spec, W, y)
        return y

    @jax.jit
    def run(layers, x):
        def step(x, _):
            y = through((layers, x)) if together else jax.lax.map(through, (layers, x))
            return x + 1e-9 * jnp.sum(y), None

        return jax.lax.scan(step, x, None, length=times)[0]

    return partial(run, layers(sizes, members), jax.random.normal(KEY, (members, *shape)))
