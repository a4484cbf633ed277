r"""Which entries of a Hessian are zero whatever the numbers, and the Hessian from as few tangents as that allows.

    dependencies(f, z)        which derivatives df_i / dz_j can differ from zero, read off f's jaxpr
    colours(pattern)          columns of one colour go together: the sum of their tangents tells them apart
    compression(gradient, z)  the Hessian from one tangent of the gradient for each colour, in the place of one for each input

A pattern errs on the side of more: of an equation that is not known here every output depends on every input. So do those of
a `scan`, whose loop is not followed. Positions that dynamics add up, and actions whose effort alone is curved, cost no tangent
of their own.

Reference: Curtis, Powell and Reid 1974; Griewank and Walther 2008, Evaluating Derivatives, sections 7.2 and 8.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Bool, Float, Int

# fmt: off
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "clamp", "copy", "cos", "cosh",
    "convert_element_type", "div", "erf", "erfc", "exp", "exp2", "expm1", "integer_pow", "log", "log1p", "logistic", "max",
    "min", "mul", "neg", "pow", "rem", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh",
))
# fmt: on
REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"))
RESHAPES = frozenset(("reshape", "squeeze", "expand_dims"))
CALLS = frozenset(("jit", "pjit"))


def compression(
    gradient: Callable[[Array], Array], z: Float[Array, " d"]
) -> tuple[Float[np.ndarray, "colours d"], Callable[[Array], Array]]:
    r"""Seeds such that the Hessian follows from the gradient's tangents along them alone, and the function that it follows by.

    It takes the tangents as columns, [.., d, colours], and returns the Hessians [.., d, d]: exact, symmetric, and zero where
    the pattern is. Which entries can differ from zero is found while tracing; the numbers in z do not matter.

    >>> gradient = jax.grad(lambda z: z[0] ** 2 + z[1] ** 2 * z[2])
    >>> z = jnp.array([1.0, 2.0, 3.0])
    >>> seeds, expand = compression(gradient, z)
    >>> _, push = jax.linearize(gradient, z)
    >>> len(seeds), expand(jax.vmap(push, out_axes=1)(seeds)).tolist()
    (2, [[2.0, 0.0, 0.0], [0.0, 6.0, 4.0], [0.0, 4.0, 0.0]])
    """
    pattern = dependencies(gradient, z)
    pattern = pattern & pattern.T
    colour = colours(pattern)
    number = int(colour.max(initial=-1)) + 1
    if number == z.size:
        return np.eye(z.size, dtype=z.dtype), lambda columns: columns
    of = np.arange(number)[:, None] == colour
    alone, index = _alone(pattern, of), np.broadcast_to(np.arange(z.size), pattern.shape)
    rows, columns = np.where(alone, index.T, index), np.where(alone, colour, colour[:, None])
    return of.astype(z.dtype), lambda tangents: jnp.where(pattern, tangents[..., rows, columns], jnp.zeros((), z.dtype))


def colours(pattern: Bool[np.ndarray, "d d"]) -> Int[np.ndarray, " d"]:
    """A colour for each column of a symmetric pattern, so that each entry or its mirror image can be told apart; greedy.

    Entry (i, j) is read off row i where no other column of j's colour has that row, else off row j.

    >>> arrow = np.array([[True, True, True], [True, True, False], [True, False, True]])
    >>> colours(arrow).tolist()
    [0, 1, 1]
    """
    d = len(pattern)
    found = np.full(d, -1)
    for column in np.argsort(-pattern.sum(axis=0), kind="stable"):
        for colour in range(d):
            found[column] = colour
            seen = found >= 0
            among = pattern & seen & seen[:, None]
            alone = _alone(among, np.arange(d)[:, None] == found)
            if np.all((alone | alone.T)[among]):
                break
    return found


def _alone(pattern: Any, of: Any) -> Any:
    """Whether an entry is the only one in its row of those whose columns have one colour; `of` says which have which."""
    return pattern & (pattern.astype(int) @ of.T == 1)[:, np.argmax(of, axis=0)]


def dependencies(f: Callable[[Array], Array], z: Float[Array, " d"]) -> Bool[np.ndarray, "*shape d"]:
    """Which derivatives df / dz can differ from zero at some z.

    >>> dependencies(lambda z: jnp.stack([z[0] * z[1], 2 * z[2]]), jnp.zeros(3)).tolist()
    [[True, True, False], [False, False, True]]
    """
    closed = jax.make_jaxpr(f)(z)
    return _follow(closed.jaxpr, [np.eye(z.size, dtype=bool)], z.size)[0]


def _follow(jaxpr: Any, given: list[Any], d: int) -> list[Any]:
    """The patterns of a jaxpr's outputs, of those of its inputs; its constants depend on nothing."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def of(var: Any) -> Any:
        shape: tuple[int, ...] = getattr(var.aval, "shape", ())
        constant = isinstance(var, Literal) or var not in known
        return np.zeros((*shape, d), bool) if constant else known[var]

    for equation in jaxpr.eqns:
        patterns = [of(var) for var in equation.invars]
        for var, pattern in zip(equation.outvars, _through(equation, patterns, d), strict=True):
            # What is no float has no derivative: of a choice, that of what is chosen.
            if jnp.issubdtype(var.aval.dtype, jnp.inexact):
                known[var] = pattern
    return [of(var) for var in jaxpr.outvars]


def _through(equation: Any, given: list[Any], d: int) -> list[Any]:
    """The patterns of one equation's outputs."""
    name, params = equation.primitive.name, equation.params
    shapes = [var.aval.shape for var in equation.outvars]
    if name in CALLS and isinstance(params.get("jaxpr"), ClosedJaxpr):
        return _follow(params["jaxpr"].jaxpr, given, d)
    if name in ELEMENTWISE:
        found = np.zeros((*shapes[0], d), bool)
        for x in given:
            found = found | x
        return [found]
    if name in REDUCTIONS:
        return [given[0].any(axis=tuple(params["axes"]))]
    if name in RESHAPES:
        return [given[0].reshape(*shapes[0], d)]
    if name == "broadcast_in_dim":
        sizes = [1] * len(shapes[0])
        for axis, size in zip(params["broadcast_dimensions"], given[0].shape[:-1], strict=True):
            sizes[axis] = size
        return [np.broadcast_to(given[0].reshape(*sizes, d), (*shapes[0], d))]
    if name == "transpose":
        return [given[0].transpose(*params["permutation"], given[0].ndim - 1)]
    if name == "rev":
        return [np.flip(given[0], params["dimensions"])]
    if name == "slice":
        strides = params["strides"] or (1,) * len(shapes[0])
        return [given[0][tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]]
    if name == "concatenate":
        return [np.concatenate(given, axis=params["dimension"])]
    if name == "stack":
        return [np.stack(given, axis=params["axis"])]
    if name == "split":
        return np.split(given[0], np.cumsum(params["sizes"])[:-1], axis=params["axis"])
    if name == "unstack":
        return [np.take(given[0], i, axis=params["axis"]) for i in range(len(shapes))]
    if name == "pad":
        return [_padded(given[0], given[1], params["padding_config"], shapes[0])]
    if name == "dot_general":
        return [_product(given[0], given[1], params["dimension_numbers"])]
    anything = np.zeros(d, bool)
    for x in given:
        anything = anything | x.reshape(-1, d).any(axis=0)
    return [np.broadcast_to(anything, (*shape, d)) for shape in shapes]


def _padded(x: Any, filling: Any, config: Any, shape: tuple[int, ...]) -> Any:
    found = np.broadcast_to(filling, (*shape, x.shape[-1])).copy()
    target, source = [], []
    for (low, _, between), size, room in zip(config, x.shape[:-1], shape, strict=True):
        places = low + np.arange(size) * (between + 1)
        inside = (places >= 0) & (places < room)
        target.append(places[inside])
        source.append(np.flatnonzero(inside))
    found[np.ix_(*target)] = x[np.ix_(*source)]
    return found


def _product(left: Any, right: Any, numbers: Any) -> Any:
    """Batch axes first, then what is left of the first factor, then of the second."""
    (sum_left, sum_right), (batch_left, batch_right) = numbers

    def free(x, summed, batch):
        kept = [axis for axis in range(x.ndim - 1) if axis not in summed and axis not in batch]
        return x.transpose(*batch, *kept, *summed, x.ndim - 1).any(
            axis=tuple(range(len(batch) + len(kept), x.ndim - 1))
        ), len(kept)

    left, of_left = free(left, sum_left, batch_left)
    right, of_right = free(right, sum_right, batch_right)
    batch, d = len(batch_left), left.shape[-1]
    left = left.reshape(*left.shape[:-1], *(1,) * of_right, d)
    right = right.reshape(*right.shape[:batch], *(1,) * of_left, *right.shape[batch:])
    return left | right
