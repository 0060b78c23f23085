"""A function that was split computes what it did, and keeps only what is worth keeping."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.devices.staging import split

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
        negated = -known["matrix"]  # cheap, so not kept
        return varying @ negated + jnp.exp(negated).sum()

    early, late = split(uses_twice, KNOWN, VARYING)
    assert [x.shape for x in early(KNOWN)] == [()]
    np.testing.assert_allclose(late(KNOWN, early(KNOWN), VARYING), uses_twice(KNOWN, VARYING), rtol=1e-6)


def test_three_parts_each_compute_what_the_part_before_could_not():
    def nested(first, second, third):
        return jnp.sin(jnp.exp(first) * second) + jnp.cos(first) * third

    one, two, three = split(nested, *(jnp.full(2, x) for x in (0.5, 2.0, 3.0)))
    a, b, c = (jnp.array([x, -x]) for x in (0.3, 1.5, 4.0))
    kept = one(a)
    assert len(kept) == 2  # the exponential and the cosine
    kept_too = two(a, kept, b)
    assert "exp" not in str(jax.make_jaxpr(two)(a, kept, b))
    last = str(jax.make_jaxpr(three)(a, kept, b, kept_too, c))
    assert not any(name in last for name in ("exp", "sin", "cos"))
    np.testing.assert_allclose(three(a, kept, b, kept_too, c), nested(a, b, c), rtol=1e-6)


def test_however_many_parts_it_is_traced_once():
    traced = []

    def counted(first, second, third):
        traced.append(1)
        return first + second * third

    split(counted, *jnp.ones((3, 2)))
    assert len(traced) == 1
