"""Splits a function by what its parts depend on, so that a loop does only what changes from turn to turn.

The models stay plain functions of their parameters; that a kernel's transform or a prompt's keys and values don't
depend on the latents is read off the traced program instead of being written down for every layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from sdjax.models.quantised import MARK

Known = TypeVar("Known")
Varying = TypeVar("Varying")
Result = TypeVar("Result")

CHEAP = frozenset(
    {"broadcast_in_dim", "convert_element_type", "iota", "neg", "reshape", "slice", "squeeze", "transpose"}
)
"""Operations that make nothing new: their results are not kept where what they are made from is at hand."""
LARGEST_KEPT = 2**21
"""Numbers in an array above which it is made anew: the few largest kernels take the most memory and gain the least."""


def split(
    function: Callable[[Known, Varying], Result], known: Known, varying: Varying
) -> tuple[Callable[[Known], list[Array]], Callable[[Known, Sequence[Array], Varying], Result]]:
    """Split a function in what depends on its first argument alone, and the rest.

    Args:
        function: of two trees of arrays, without side effects.
        known: its first argument, or shapes and dtypes like it.
        varying: its second argument, likewise.

    Returns:
        `early(known)`, the values to keep, and `late(known, kept, varying)`, which gives what
        `function(known, varying)` does.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(known, varying)
    jaxpr = closed.jaxpr
    count = len(jax.tree.leaves(known))
    at_hand = {*jaxpr.constvars, *jaxpr.invars[:count]}
    available, early = set(at_hand), []
    restored: set[Any] = set()  # kernels from int8 and what is made of them alone: kept, they would undo the saving
    for equation in jaxpr.eqns:
        if not equation.effects and all(isinstance(v, Literal) or v in available for v in equation.invars):
            available.update(equation.outvars)
            early.append(equation)
            read = [v for v in equation.invars if not isinstance(v, Literal)]
            if equation.params.get("name") == MARK or (read and restored.issuperset(read)):
                restored.update(equation.outvars)
    early_ids = set(map(id, early))
    later, rest = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        is_early = id(equation) in early_ids
        is_kept = (
            equation.primitive.name not in CHEAP
            and restored.isdisjoint(equation.outvars)
            and all(v.aval.size <= LARGEST_KEPT for v in equation.outvars)
        )
        if not is_early or (not is_kept and not later.isdisjoint(equation.outvars)):
            later.update(v for v in equation.invars if not isinstance(v, Literal))
            rest.append(equation)
    rest.reverse()
    made_later = {v for equation in rest for v in equation.outvars}
    kept = [v for equation in early for v in equation.outvars if v in later and v not in made_later]
    sooner, first = set(kept), []
    for equation in reversed(early):
        if not sooner.isdisjoint(equation.outvars):
            sooner.update(v for v in equation.invars if not isinstance(v, Literal))
            first.append(equation)
    first.reverse()

    def run(inputs: Sequence[Any], outputs: Sequence[Any], equations: Sequence[Any]) -> Callable[..., list[Array]]:
        part = Jaxpr(jaxpr.constvars, inputs, outputs, equations, debug_info=jaxpr.debug_info)
        evaluated: Callable[..., list[Array]] = jaxpr_as_fun(ClosedJaxpr(part, closed.consts))
        return evaluated

    run_early = run(jaxpr.invars[:count], kept, first)
    run_late = run([*jaxpr.invars[:count], *kept, *jaxpr.invars[count:]], jaxpr.outvars, rest)
    structure = jax.tree.structure(shape)

    def evaluate_early(known: Known) -> list[Array]:
        return run_early(*jax.tree.leaves(known))

    def evaluate_late(known: Known, kept: Sequence[Array], varying: Varying) -> Result:
        result: Result = jax.tree.unflatten(
            structure, run_late(*jax.tree.leaves(known), *kept, *jax.tree.leaves(varying))
        )
        return result

    return evaluate_early, evaluate_late
