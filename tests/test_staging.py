"""A function that was split computes what it did, and keeps only what is worth keeping."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.staging import split

KNOWN = {"matrix": jnp.arange(9.0).reshape(3, 3), "bias": jnp.array([1.0, -2.0, 3.0])}
VARYING = jnp.linspace(-1, 1, 12).reshape(4, 3)


def function(known, varying):
    squared = known["matrix"] @ known["matrix"]
    return {"product": jax.nn.gelu(varying @ squared.T) + known["bias"], "alone": jnp.exp(squared), "same": varying}


def test_a_split_function_gives_the_same_tree():
    early, late = split(function, KNOWN, VARYING)
    jax.tree.map(np.testing.assert_array_equal, late(KNOWN, early(KNOWN), VARYING), function(KNOWN, VARYING))


def test_only_results_of_arithmetic_are_kept():
    early, _ = split(function, KNOWN, VARYING)
    assert sorted(x.shape for x in early(KNOWN)) == [(3, 3), (3, 3)]  # the square and its exponential; no bias


def test_the_rest_does_not_repeat_the_work():
    early, late = split(function, KNOWN, VARYING)
    program = str(jax.make_jaxpr(late)(KNOWN, early(KNOWN), VARYING))
    assert program.count("dot_general") == 1


def test_derivatives_pass_through_both_parts():
    def total(known, varying):
        return sum(x.sum() for x in function(known, varying).values())

    def staged(known, varying):
        early, late = split(total, known, varying)
        return late(known, early(known), varying)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        jax.grad(staged)(KNOWN, VARYING),
        jax.grad(total)(KNOWN, VARYING),
    )


def test_what_is_not_kept_is_made_on_both_sides_where_both_need_it():
    def uses_twice(known, varying):
        turned = known["matrix"].T  # cheap, so not kept
        return varying @ turned + jnp.exp(turned).sum()

    early, late = split(uses_twice, KNOWN, VARYING)
    assert [x.shape for x in early(KNOWN)] == [()]
    np.testing.assert_allclose(late(KNOWN, early(KNOWN), VARYING), uses_twice(KNOWN, VARYING), rtol=1e-6)
