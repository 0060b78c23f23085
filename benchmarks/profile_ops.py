"""A model's step by kinds of operation, each timed alone at its own shapes, ours beside PyTorch's.

    python -m benchmarks.profile_ops unet sd-v1-5

A CPU's processor seconds stand beside the clock's: they say what an operation costs on a machine that others use too.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch.nn import functional

from benchmarks import random_values
from benchmarks.cases import Case
from sdjax.devices.staging import split
from sdjax.devices.target import local_target
from sdjax.models import UNet, UNetConfig, VAEConfig, attention, bind, define, layers, vae
from sdjax.models.kernels import attend, convolve, forms_for

FORMS = forms_for(local_target())


class Operation(NamedTuple):
    """A kind of operation and all that its time depends on: the shapes of its inputs, and its settings."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.kind} {shapes} {' '.join(map(str, self.settings))}".strip()


def operations(case: Case) -> Counter[Operation]:
    """Trace a case's model, and count the operations that it calls."""
    seen: Counter[Operation] = Counter()

    @contextmanager
    def recorded(owner: Any, name: str, describe: Callable[..., Operation]) -> Iterator[None]:
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            seen[describe(*arguments, **settings)] += 1
            return original(*arguments, **settings)

        with mock.patch.object(owner, name, call):
            yield

    def attended(forms: Any, query: Any, key: Any, value: Any, **_: Any) -> Operation:
        return Operation("attention", (query.shape, key.shape))

    with ExitStack() as stack:
        for owner, name, describe in (
            (
                layers,
                "convolve",
                lambda forms, x, weight, *, stride, padding: Operation(
                    "convolution", (x.shape, weight.shape), (stride, padding)
                ),
            ),
            (attention, "attend", attended),
            (vae, "attend", attended),
            (layers.Linear, "__call__", lambda self, x: Operation("linear", (x.shape, self.weight.shape))),
            (layers.GroupNorm, "__call__", lambda self, x: Operation("group norm, SiLU", (x.shape,), (self.groups,))),
            (layers.LayerNorm, "__call__", lambda self, x: Operation("layer norm", (x.shape,))),
            (attention.GEGLU, "__call__", lambda self, x: Operation("GEGLU", ((*x.shape[:2], 8 * x.shape[2]),))),
        ):
            stack.enter_context(recorded(owner, name, describe))
        _trace(case)
    return seen


def _trace(case: Case) -> None:
    side = case.sizes.latent_size

    def zeros(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if case.what == "unet":
        rows, config = case.sizes.rows * case.batch, UNetConfig.from_dict(case.sizes.unet)
        unet, shapes = define(UNet, config, dtype=case.dtype, param_dtype=case.dtype)
        inputs = zeros(rows, side, side, config.in_channels), zeros(rows), zeros(rows, 77, config.context_channels)
        jax.eval_shape(lambda params, inputs: bind(unet, params)(*inputs), shapes, inputs)
    else:
        autoencoder_config = VAEConfig.from_dict(case.sizes.vae)
        autoencoder, shapes = define(vae.VAE, autoencoder_config, dtype=case.dtype, param_dtype=case.dtype)
        latents = zeros(case.batch, side, side, autoencoder_config.latent_channels)
        jax.eval_shape(lambda params, latents: bind(autoencoder, params).decode(latents), shapes, latents)


class Sides(NamedTuple):
    """The same operation as sdjax and PyTorch do it, each with its inputs in place."""

    ours: Callable[[], object]
    theirs: Callable[[], object]


def prepare(operation: Operation, dtype: str) -> Sides:
    """Make an operation ready on both sides; PyTorch's pictures are channels-last."""
    values = [random_values.normal(shape, i) for i, shape in enumerate(operation.shapes)]
    arrays = [jnp.asarray(x, dtype) for x in values]
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in values]
    ours, theirs = BY_KIND[operation.kind](arrays, tensors, *operation.settings)

    def run_theirs() -> None:
        with torch.inference_mode():
            theirs()

    return Sides(ours, run_theirs)


def _compiled(function: Callable[..., Any], known: Any, *varying: Any) -> Callable[[], object]:
    """A jitted function of (known, varying), with what depends on `known` alone done before, as in the loop."""
    early, late = split(function, known, varying)
    kept = jax.block_until_ready(jax.jit(early)(known))
    compiled = jax.jit(late).lower(known, kept, varying).compile()
    return lambda: jax.block_until_ready(compiled(known, kept, varying))


def _picture(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def _convolution(arrays: list[Any], tensors: list[torch.Tensor], stride: int, padding: tuple[int, int]) -> Sides:
    x, weight = arrays
    picture, kernel = tensors
    kernel = kernel.to(memory_format=torch.channels_last)
    ours = _compiled(lambda weight, xs: convolve(FORMS, xs[0], weight, stride=stride, padding=padding), weight, x)
    return Sides(ours, lambda: functional.conv2d(_picture(picture), kernel, stride=stride, padding=max(padding)))


def _attention(arrays: list[Any], tensors: list[torch.Tensor]) -> Sides:
    """Query and key are given; values are like keys."""
    query, key = arrays
    ours = _compiled(lambda _, qkv: attend(FORMS, *qkv), (), query, key, key + 1)
    heads_first = [x.transpose(1, 2) for x in (*tensors, tensors[1] + 1)]
    return Sides(ours, lambda: functional.scaled_dot_product_attention(*heads_first))


def _linear(arrays: list[Any], tensors: list[torch.Tensor]) -> Sides:
    x, weight = arrays
    return Sides(
        _compiled(lambda weight, xs: FORMS.product(xs[0], weight), weight, x), lambda: functional.linear(*tensors)
    )


def _filled(shape: tuple[int, ...], mean: float, deviation: float) -> jax.Array:
    return jnp.full(shape, mean)


def _normalising(norm: Any, after: Callable[[Any], Any], x: Any) -> Callable[[], object]:
    """A norm whose parameters are arguments: as constants of the program, ones and zeros would be left out of it."""
    definition, params = nnx.split(norm)
    return _compiled(lambda params, xs: after(nnx.merge(definition, params)(xs[0])), params, x)


def _group_norm(arrays: list[Any], tensors: list[torch.Tensor], groups: int) -> Sides:
    (x,), (tensor,) = arrays, tensors
    norm = layers.GroupNorm(groups, x.shape[-1], epsilon=1e-5, dtype=x.dtype, forms=FORMS, make=_filled)
    weight = torch.ones(x.shape[-1], dtype=tensor.dtype)
    return Sides(
        _normalising(norm, layers.silu, x),
        lambda: functional.silu(functional.group_norm(_picture(tensor), groups, weight, weight, 1e-5)),
    )


def _layer_norm(arrays: list[Any], tensors: list[torch.Tensor]) -> Sides:
    (x,), (tensor,) = arrays, tensors
    norm = layers.LayerNorm(x.shape[-1], epsilon=1e-5, dtype=x.dtype, forms=FORMS, make=_filled)
    return Sides(_normalising(norm, lambda x: x, x), lambda: functional.layer_norm(tensor, tensor.shape[-1:]))


def _geglu(arrays: list[Any], tensors: list[torch.Tensor]) -> Sides:
    def theirs() -> torch.Tensor:
        linear, gate = tensors[0].chunk(2, dim=-1)
        return linear * functional.gelu(gate)

    return Sides(_compiled(lambda _, xs: attention.gated(xs[0]), (), *arrays), theirs)


BY_KIND: dict[str, Callable[..., Sides]] = {
    "convolution": _convolution,
    "attention": _attention,
    "linear": _linear,
    "group norm, SiLU": _group_norm,
    "layer norm": _layer_norm,
    "GEGLU": _geglu,
}


def timed(sides: Sides, seconds: float) -> list[tuple[float, float]]:
    """Run both sides in turns; median seconds and processor seconds of each."""
    runs: list[list[tuple[float, float]]] = [[], []]
    for run in sides:
        run()
    end = time.perf_counter() + seconds
    while len(runs[0]) < 3 or time.perf_counter() < end:
        for kept, run in zip(runs, sides, strict=True):
            began, computed = time.perf_counter(), time.process_time()
            run()
            kept.append((time.perf_counter() - began, time.process_time() - computed))
    return [(statistics.median(x[0] for x in kept), statistics.median(x[1] for x in kept)) for kept in runs]


def main() -> None:
    """Print a line for each operation, and the sum of each kind, in milliseconds of one step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_ops", description=__doc__)
    parser.add_argument("what", choices=("unet", "vae-decode"))
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation, at least")
    parser.add_argument("--kinds", nargs="+", choices=BY_KIND, default=list(BY_KIND))
    options = parser.parse_args()
    sums: Counter[tuple[str, int]] = Counter()
    heading = f"{'ours ms':>9} {'theirs':>9} {'ours cpu':>9} {'theirs':>9} {'times':>5}  operation"
    print(heading)
    for operation, times in sorted(operations(Case(options.what, options.model, dtype=options.dtype)).items()):
        if operation.kind not in options.kinds:
            continue
        figures = [1e3 * times * x for side in timed(prepare(operation, options.dtype), options.seconds) for x in side]
        figures = [figures[0], figures[2], figures[1], figures[3]]
        for column, figure in enumerate(figures):
            sums[operation.kind, column] += figure
        print(" ".join(f"{x:9.1f}" for x in figures), f"{times:5}  {operation}", flush=True)
    print(f"\n{heading}")
    for kind in options.kinds:
        print(" ".join(f"{sums[kind, column]:9.1f}" for column in range(4)), f"{'':5}  {kind}")


if __name__ == "__main__":
    main()
