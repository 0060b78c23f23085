"""Splits a function by what its parts depend on, so that a loop does only what changes from turn to turn.

The models stay plain functions of their parameters; that a kernel's transform or a prompt's keys and values don't
depend on the latents is read off the traced program instead of being written down for every layer.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from sdjax.models.quantised import MARK

CHEAP = frozenset({"broadcast_in_dim", "convert_element_type", "iota", "neg", "reshape", "slice", "squeeze"})
"""Operations that make nothing new: their results are not kept where what they are made from is at hand."""
LARGEST_KEPT = 2**21
"""Numbers in an array above which it is made anew: the few largest kernels take the most memory and gain the least."""


def split(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], ...]:
    """Split a function in what depends on its first argument alone, what on the first two alone, and so on.

    It is traced once, however many parts there are.

    Args:
        function: of trees of arrays, without side effects.
        arguments: its arguments, or shapes and dtypes like them, those that change least first.

    Returns:
        A function for each argument. With two: `early(known)`, the list of values to keep, and
        `late(known, kept, varying)`, which gives what `function(known, varying)` does. With three:
        `first(a)`, `second(a, kept, b)` and `third(a, kept, b, kept_too, c)`.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    rest, known, parts = closed.jaxpr, 0, []
    for argument in arguments[:-1]:
        known += len(jax.tree.leaves(argument))
        early, rest = _divide(rest, known)
        known += len(early.outvars)
        parts.append(_as_function(early, closed.consts, None))
    return *parts, _as_function(rest, closed.consts, jax.tree.structure(shape))


def _as_function(jaxpr: Jaxpr, consts: list[Any], structure: Any) -> Callable[..., Any]:
    """A function of trees whose leaves are the program's inputs; None as the structure of its result is a list."""
    evaluate = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))

    def function(*arguments: Any) -> Any:
        results = evaluate(*jax.tree.leaves(arguments))
        return results if structure is None else jax.tree.unflatten(structure, results)

    return function


def _divide(jaxpr: Jaxpr, count: int) -> tuple[Jaxpr, Jaxpr]:
    """Divide a program in what depends on its first `count` inputs alone, and the rest.

    Returns:
        Of those inputs, what to keep; and of those inputs, what was kept and the other inputs, what the program gives.
    """
    known, varying = jaxpr.invars[:count], jaxpr.invars[count:]
    available, early = {*jaxpr.constvars, *known}, []
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
            and all(v.aval.size <= LARGEST_KEPT for v in equation.outvars)  # type: ignore[attr-defined]
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

    def part(inputs: list[Any], outputs: list[Any], equations: list[Any]) -> Jaxpr:
        return Jaxpr(jaxpr.constvars, inputs, outputs, equations, debug_info=jaxpr.debug_info)

    return part(known, kept, first), part([*known, *kept, *varying], jaxpr.outvars, rest)
