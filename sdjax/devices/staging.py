"""Functions split by what their parts depend on, so that a loop computes only what changes from turn to turn.

The models stay plain functions of their parameters. That a kernel's transform, or a prompt's keys and values, does not
depend on the latents is read from the traced program, instead of being written down for every layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

NOT_KEPT = "dequantised"
"""The name of an inner function whose results, and what depends on them alone, are never kept: it dequantises weights,
and keeping those in floating point would undo the saving."""
CHEAP = frozenset({"broadcast_in_dim", "convert_element_type", "iota", "neg", "reshape", "slice", "squeeze"})
"""Operations that are cheaper to recompute than to store."""
LARGEST_KEPT = 2**21
"""Numbers in an array above which it is recomputed: the few largest kernels take the most memory and gain the least."""


class Staged(NamedTuple):
    """A function of (constants, still, moving) of which a loop changes `moving` alone.

    Attributes:
        prepare: of (constants, still), to what to compute before the loop.
        apply: of (constants, still, prepared, moving), to the function's result.
    """

    prepare: Callable[[Any, Any], Any]
    apply: Callable[[Any, Any, Any, Any], Any]


def stage_rows(
    function: Callable[[Any, Any, Any], Any],
    constants: Any,
    still: Any,
    moving: Any,
    *,
    at_once: int | None = None,
    tie_constants: bool = False,
) -> Staged:
    """Split a function of a batch for a loop, and call it with some rows at a time.

    Args:
        function: of trees of arrays, without side effects. The leaves of `still`, `moving` and the result have a
            leading batch axis.
        constants: what rows share; only shapes and dtypes are read.
        still: what a row keeps through the loop, likewise.
        moving: what changes from turn to turn, likewise.
        at_once: rows of a call, which divide the batch; None is all.
        tie_constants: keep the work on constants inside the loop, where XLA would hoist it and hold its results.
    """
    batch = jax.tree.leaves(moving)[0].shape[0]
    rows = batch if at_once is None else at_once

    def turns(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), tree)

    def shapes(tree: Any) -> Any:
        return jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], turns(tree)), tree)

    of_constants, of_still, of_moving = split(function, constants, shapes(still), shapes(moving))

    def prepare(constants: Any, still: Any) -> Any:
        kept = of_constants(constants)
        return kept, _map(lambda row: of_still(constants, kept, row), turns(still))

    def apply(constants: Any, still: Any, prepared: Any, moving: Any) -> Any:
        kept, kept_rows = prepared
        each = turns(still), kept_rows, turns(moving)
        if tie_constants:
            constants, each = lax.optimization_barrier((constants, each))  # type: ignore[no-untyped-call]
        result = _map(lambda row: of_moving(constants, kept, *row), each)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), result)

    return Staged(prepare, apply)


def _map(function: Callable[[Any], Any], rows: Any) -> Any:
    """`lax.map`, without a loop where there is one turn."""
    if jax.tree.leaves(rows)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))
    return lax.map(function, rows)


def split(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], ...]:
    """Split a function into a part that depends on its first argument alone, one on the first two alone, and so on.

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
    """Make a function of trees whose leaves are the program's inputs; `structure` None gives a list."""
    evaluate = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))

    def function(*arguments: Any) -> Any:
        results = evaluate(*jax.tree.leaves(arguments))
        return results if structure is None else jax.tree.unflatten(structure, results)

    return function


def _divide(jaxpr: Jaxpr, count: int) -> tuple[Jaxpr, Jaxpr]:
    """Divide a program into the part that depends on its first `count` inputs alone, and the rest.

    Returns:
        A program from those inputs to the values to keep; and one from those inputs, the kept values and the other
        inputs to the results.
    """
    known, varying = jaxpr.invars[:count], jaxpr.invars[count:]
    available, early = {*jaxpr.constvars, *known}, []
    restored: set[Any] = set()  # weights from int8, and what depends on them alone
    for equation in jaxpr.eqns:
        if not equation.effects and all(isinstance(v, Literal) or v in available for v in equation.invars):
            available.update(equation.outvars)
            early.append(equation)
            read = [v for v in equation.invars if not isinstance(v, Literal)]
            if equation.params.get("name") == NOT_KEPT or (read and restored.issuperset(read)):
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
