"""Training steps with bfloat16 products: convolutions and matrix products by a CPU's matrix instructions (AMX).

    loss = with_half_products(loss)

gives a function of the same arguments and results whose convolutions and products round their factors to bfloat16 and
sum in float32, forwards and backwards. Parameters, norms, sums and the optimiser stay in float32. The function is
traced, and its program is run again with other operations in the place of these: the models need not know of it.

Without such a processor, or without a C++ compiler to build `training.native`, the function is left as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from training.native import available

ROWS_AT_ONCE = (256, 128, 64, 32)
"""Rows of a matrix that are one picture to the kernel, the first that divides them."""

CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "remat", "checkpoint")
"""Functions within a program, whose operations are replaced too; those with a backward rule of their own are kept."""

Loss = TypeVar("Loss", bound=Callable[..., Any])


def with_half_products(loss: Loss) -> Loss:
    """The same function with bfloat16 factors, to be differentiated and compiled like the one given."""
    if not available():
        return loss

    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(loss, return_shape=True)(*args)
        out = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run  # type: ignore[return-value]


def _run(program: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, args, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in program.eqns:
        given = [value(atom) for atom in equation.invars]
        out = _operation(equation, given)
        values.update(zip(equation.outvars, out, strict=True))
    return [value(atom) for atom in program.outvars]


def _operation(equation: Any, given: list[Any]) -> Sequence[Any]:
    name, settings = equation.primitive.name, equation.params
    if name in CALLS:
        inner = settings.get("jaxpr", settings.get("call_jaxpr"))
        return _run(inner.jaxpr, inner.consts, given) if isinstance(inner, ClosedJaxpr) else _run(inner, (), given)
    if name == "conv_general_dilated" and (result := _as_convolution(given, settings)) is not None:
        return [result]
    if name == "dot_general" and (result := _as_product(given, settings)) is not None:
        return [result]
    if name == "custom_vjp_call":
        pairs = zip(equation.invars, given, strict=True)
        variables = [(atom, one) for atom, one in pairs if not isinstance(atom, Literal)]
        inside = settings["call_jaxpr"].jaxpr.debug_info
        alone = Jaxpr((), [atom for atom, _ in variables], equation.outvars, [equation], debug_info=inside)
        return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(one for _, one in variables))
    out = equation.primitive.bind(*given, **settings)
    return out if equation.primitive.multiple_results else [out]


def _as_convolution(given: Sequence[Array], settings: dict[str, Any]) -> Array | None:
    """A 3x3 or 1x1 convolution of pictures, channels last; None for others."""
    x, kernel = given
    numbers = settings["dimension_numbers"]
    if numbers.lhs_spec != (0, 3, 1, 2) or numbers.out_spec != (0, 3, 1, 2) or settings["feature_group_count"] != 1:
        return None
    weight = kernel.transpose(numbers.rhs_spec)  # (out, in, height, width)
    size = weight.shape[-1]
    stride, padding = settings["window_strides"][0], settings["padding"]
    if size == 1 and stride == 1:
        return product(x, weight[..., 0, 0])
    if size != 3:
        return None
    if padding == ((1, 1), (1, 1)):
        return convolve(x, weight)[:, ::stride, ::stride]
    if padding == ((0, 1), (0, 1)) and stride == 2:  # an even number of pixels: the same, seen from the next pixel
        return convolve(x, weight)[:, 1::2, 1::2]
    return None


def _as_product(given: Sequence[Array], settings: dict[str, Any]) -> Array | None:
    """Rows times a weight (out, in) or (in, out); None for batches of products."""
    x, weight = given
    ((left, right), (batch, _)) = settings["dimension_numbers"]
    if batch or weight.ndim != 2 or tuple(left) != (x.ndim - 1,) or x.ndim < 2:
        return None
    return product(x, weight if tuple(right) == (1,) else weight.T)


@jax.custom_vjp
def convolve(x: Array, weight: Array) -> Array:
    """Convolve x (batch, height, width, in) with weight (out, in, 3, 3), padded by one pixel of zeros; float32."""
    return _convolve(x, weight, border=1, transposed=False)


convolve.defvjp(
    lambda x, weight: (convolve(x, weight), (x, weight)),
    lambda kept, gradient: (
        _convolve(gradient, kept[1], border=1, transposed=True),
        _kernel_gradient(kept[0], gradient, border=1),
    ),
)


def product(x: Array, weight: Array) -> Array:
    """Multiply x (..., in) by weight (out, in), both float32: (..., out)."""
    rows = x.size // x.shape[-1]
    some = next((size for size in ROWS_AT_ONCE if rows % size == 0), rows)
    out = _product(x.reshape(rows // some, some, 1, -1), weight[..., None, None])
    return out.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x: Array, weight: Array) -> Array:
    return _convolve(x, weight, border=0, transposed=False)


_product.defvjp(
    lambda x, weight: (_product(x, weight), (x, weight)),
    lambda kept, gradient: (
        _convolve(gradient, kept[1], border=0, transposed=True),
        _kernel_gradient(kept[0], gradient, border=0),
    ),
)


def _convolve(x: Array, weight: Array, *, border: int, transposed: bool) -> Array:
    out = weight.shape[1] if transposed else weight.shape[0]
    call = jax.ffi.ffi_call("sdjax_convolve", jax.ShapeDtypeStruct((*x.shape[:3], out), jnp.float32))
    return call(x, weight, border=border, transposed=transposed)


def _kernel_gradient(x: Array, gradient: Array, *, border: int) -> Array:
    size = 2 * border + 1
    shape = (gradient.shape[-1], x.shape[-1], size, size)
    return jax.ffi.ffi_call("sdjax_kernel_gradient", jax.ShapeDtypeStruct(shape, jnp.float32))(
        x, gradient, border=border
    )
