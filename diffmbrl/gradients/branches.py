r"""Branch averaging: a `where` with the exact value and with the derivative of an average over both branches, jump included.

Automatic differentiation of `where(c >= 0, x, y)` follows the branch that was taken and ignores the condition: a step has
derivative 0. With the condition blurred by normal noise of standard deviation h, the mean of the value is
$\Phi(c/h)\,x + (1 - \Phi(c/h))\,y$, and its derivative

$$\Phi(c/h)\,dx + (1 - \Phi(c/h))\,dy + \tfrac1h\,\varphi(c/h)\,(x - y)\,dc$$

contains the missing parts: the other branch's derivative near the switch, and the jump times the rate of switching. `branch`
uses it for the derivative alone; trajectories stay those of the true task.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def branch(c: float | Float[Array, ""], x: PyTree, y: PyTree, *, width: float | Float[Array, ""]) -> PyTree:
    r"""`where(c >= 0, x, y)`, for trees of arrays, with the derivative of its average over $c + h N(0, 1)$, h = `width`.

    In dynamics or rewards it replaces `where` at a contact, so that pathwise estimators (BPTT and all mixtures) see across it.
    If c already has normal noise of standard deviation $\sigma$, the mean derivative of a step is the density
    $N(c; 0, \sigma^2 + h^2)$ instead of $N(c; 0, \sigma^2)$: a bias of order $h^2/\sigma^2$, for a variance of order $1/h$.

    Args:
        c: The condition, a scalar.
        x: Result for c >= 0, a tree of arrays. Both branches are evaluated and differentiated, and must be finite.
        y: Result for c < 0, like x.
        width: Standard deviation h of the blur, in the units of c.

    Returns:
        x or y.

    Raises:
        ValueError: If x and y are not alike, c is not a scalar, or the width is not positive.

    Reference: Chaudhuri and Solar-Lezama 2010, Smooth interpretation; Kreikemeyer and Andelfinger 2023, Smoothing methods for
    automatic differentiation across conditional branches. They smooth the values as well; here only the derivative is.

    >>> print(jax.grad(lambda c: branch(c, 1.0, 0.0, width=0.5))(0.0))
    0.7978846
    """
    if isinstance(width, float | int) and not width > 0:
        raise ValueError(f"width must be positive, in the units of c, got {width}")
    c = jnp.asarray(c)
    if c.ndim:
        raise ValueError(f"the condition must be a scalar, got shape {list(c.shape)}; vmap branch for many")
    x, y = jax.tree.map(jnp.asarray, (x, y))
    if jax.tree.structure(x) != jax.tree.structure(y) or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    ):
        raise ValueError(f"both branches must have the same structure, shapes and dtypes, got {x} and {y}")
    return jax.tree.map(lambda a, b: _branch(c, a, b, jnp.asarray(width, c.dtype)), x, y)


@jax.custom_jvp
def _branch(c: Array, x: Array, y: Array, width: Array) -> Array:
    return jnp.where(c >= 0, x, y)


@_branch.defjvp
def _average(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (c, x, y, width), (dc, dx, dy, _) = primals, tangents
    z = c / width
    share = jax.scipy.stats.norm.cdf(z).astype(x.dtype)
    rate = (jax.scipy.stats.norm.pdf(z) / width).astype(x.dtype)
    return _branch(c, x, y, width), share * dx + (1 - share) * dy + rate * (x - y) * dc.astype(x.dtype)
