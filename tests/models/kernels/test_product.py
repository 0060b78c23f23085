"""Products in bfloat16 on a CPU are summed in float32, which is also what its bfloat16 instructions do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sdjax.devices.target import CPU
from sdjax.models.kernels import attend, convolve, forms_for
from sdjax.models.kernels.product import multiply_wide

FORMS = forms_for(CPU)


def products(function, *shapes):
    """The matrix products of a program, inner ones too, as (dtypes of factors, dtype of sums)."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield {v.aval.dtype.name for v in equation.invars}, equation.outvars[0].aval.dtype.name
            for inner in jaxprs_in_params(equation.params):
                yield from inside(inner)

    return list(
        inside(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).jaxpr)
    )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (multiply_wide, [(2, 9, 8), (5, 8)]),
        (partial(attend, FORMS), [(1, 9, 2, 8)] * 3),
        (partial(attend, FORMS), [(1, 256, 2, 8)] * 3),  # in blocks
        (partial(convolve, FORMS, stride=1, padding=(1, 1)), [(1, 16, 16, 320), (320, 320, 3, 3)]),
        (partial(convolve, FORMS, stride=1, padding=(1, 1)), [(1, 8, 8, 320), (320, 320, 3, 3)]),
    ],
    ids=["linear", "short attention", "attention in blocks", "places", "columns"],
)
def test_factors_stay_in_bfloat16_and_sums_are_in_float32(function, shapes):
    found = products(function, *shapes)
    assert found
    assert all(pair == ({"bfloat16"}, "float32") for pair in found)


def test_a_long_sum_is_rounded_once():
    x, weight = (jnp.full(shape, 1 + 2**-7, jnp.bfloat16) for shape in [(1, 4096), (3, 4096)])
    assert multiply_wide(x, weight).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(multiply_wide(x, weight), np.float64), 4096 * (1 + 2**-7) ** 2, rtol=2**-8)
