"""No loop's test does arithmetic on floats, so that a loop under `vmap` ends.

`vmap` of a `while_loop` works the condition out twice: in the loop's test, and in the body, where a member for which it is
false keeps its state. The two are compiled apart and may round to different sides. A member that the test sends on and the
body holds back turns the loop for ever. A condition may compare what the body computed; it may not compute.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from diffmbrl.planners.riccati_sweeps import BoxConstrained
from diffmbrl.second_order.krylov import conjugate_gradients
from tests.solvers import SOLVERS
from tests.test_solvers import KEY, case

EXACT = {
    *("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "reshape", "select_n", "slice", "squeeze"),
    *("abs", "max", "min", "neg", "reduce_max", "reduce_min", "stop_gradient", "transpose"),
}


def jaxprs(of: Jaxpr):
    """`of` and all within it."""
    yield of
    for eqn in of.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from jaxprs(getattr(value, "jaxpr", value))


def rounding(of: ClosedJaxpr) -> set[str]:
    """Primitives by which the condition of some loop of it computes a float."""
    tests = [
        eqn.params["cond_jaxpr"].jaxpr for j in jaxprs(of.jaxpr) for eqn in j.eqns if eqn.primitive.name == "while"
    ]
    eqns = [eqn for test in tests for j in jaxprs(test) for eqn in j.eqns]
    nested = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call"}
    floats = [eqn for eqn in eqns if any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)]
    return {eqn.primitive.name for eqn in floats} - EXACT - nested


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * row.slow) for row in SOLVERS]
)
def test_no_loop_of_a_solver_computes_in_its_condition(row):
    solver, *lane, task, s0 = case(row)
    assert not rounding(jax.make_jaxpr(lambda p, c: solver.update(p, c, task, s0, key=KEY))(*lane))


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: BoxConstrained().minimise(jnp.eye(2) * x[0], x, -jnp.abs(x), jnp.abs(x)),
        lambda x: conjugate_gradients(lambda v: 2 * v, x),
    ],
    ids=["projected Newton", "conjugate gradients"],
)
def test_nor_do_those_within_them(loop):
    jaxpr = jax.make_jaxpr(loop)(jnp.ones(2))
    assert any(eqn.primitive.name == "while" for j in jaxprs(jaxpr.jaxpr) for eqn in j.eqns)
    assert not rounding(jaxpr)


def test_a_condition_that_computes_is_found():
    loop = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x * x) > 1, lambda x: x / 2, x))(jnp.ones(2))
    assert rounding(loop) == {"mul", "reduce_sum"}
