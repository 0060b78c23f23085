"""The command `sdjax bench`: how fast this machine is at each part of drawing, with the model that a person names."""

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from sdjax import arguments
from sdjax.errors import RequestError
from sdjax.measuring import forget_peak, peak_bytes, peak_bytes_of_children, summary, timed
from sdjax.terminal import stages

if TYPE_CHECKING:
    from sdjax import Pipeline
    from sdjax.bench import Work

CASES: Mapping[str, str] = {
    "load": "the checkpoint's files to the device",
    "text-encoder": "prompts to hidden states",
    "unet": "one step",
    "vae-decode": "latents to pixels",
    "picture": "the three together",
    "first-cold": "a new process to its first picture, nothing compiled before",
    "first-warm": "the same, with the programs that the last one left",
}
PARTS = ("text-encoder", "unet", "vae-decode", "picture")
"""Cases that a loaded checkpoint is timed in; the others begin with its files."""


class Options(NamedTuple):
    """What the command was asked for, checked."""

    model: str | None
    dtype: str
    variant: str | None
    size: tuple[int | None, int | None]
    steps: int | None
    batch: int


def bench(
    cases: Annotated[
        list[str] | None, typer.Argument(metavar="[CASE]...", help=f"{', '.join(CASES)}; all without one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A name of `sdjax models`, a hub id, a folder or a .safetensors file.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a whole picture.")] = None,
    size: Annotated[str | None, typer.Option(help="In pixels: 512, or 512x768 (width x height).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once, in the parts and the whole of one.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs, after one that isn't counted.")] = 5,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of the table.")] = False,
) -> None:
    """Time the parts of drawing a picture, loading, and the first picture of a new process."""
    chosen = list(dict.fromkeys(cases or CASES))
    if unknown := [case for case in chosen if case not in CASES]:
        raise RequestError(f"there is no case {unknown[0]!r}: the cases are {', '.join(CASES)}")
    arguments.check_model(model)
    width_height = arguments.size_if_given(size)
    from sdjax.pipeline import checked_dtype

    options = Options(model, checked_dtype(dtype).name, variant, width_height, steps, batch)
    results = []
    with stages(as_json) as stage:
        for name, work in _works([case for case in CASES if case in chosen], options):
            results.append(_measured(name, work, options, repeats, stage))
    about = _about(options)
    if as_json:
        print(json.dumps({**about, "results": results}))
    else:
        _print(about, results)


def _works(cases: list[str], options: Options) -> "Iterator[tuple[str, Callable[[], Work]]]":
    """What makes each case ready. Files first: a checkpoint that is held would count as theirs."""
    from sdjax import bench

    if "load" in cases:
        yield "load", partial(bench.loading, options.model, dtype=options.dtype, variant=options.variant)
    if parts := [case for case in cases if case in PARTS]:
        from sdjax import Pipeline

        pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype, variant=options.variant)
        for part in parts:
            yield part, partial(_part, part, pipe, options)
        del pipe
    for case in cases:
        if case.startswith("first-"):
            yield case, partial(_first_picture, case, options)


def _part(case: str, pipe: "Pipeline", options: Options) -> "Work":
    from sdjax import bench

    checkpoint = pipe.checkpoint
    width, height = options.size
    request = pipe.resolve(bench.PROMPT, steps=options.steps, width=width, height=height)
    rows, columns, _ = request.latent_shape
    factor = pipe.definition.vae_config.factor
    inputs = bench.random_inputs(
        pipe.definition,
        [checkpoint.configs[name] for name, _ in pipe.definition.text_encoders],
        size=(columns * factor, rows * factor),
        batch=options.batch,
        guidance_scale=pipe.guidance_scale,
    )
    arrays = (pipe.definition, pipe.params, inputs)
    match case:
        case "text-encoder":
            return bench.text_encoder(*arrays)
        case "unet":
            return bench.unet_step(*arrays)
        case "vae-decode":
            return bench.vae_decode(*arrays, tile=request.tile)
    return bench.picture(*arrays, checkpoint.scheduler, request.settings["steps"], request.settings["sampler"])


def _first_picture(case: str, options: Options) -> "Work":
    from sdjax import bench

    more = []
    if None not in options.size:
        more += ["--size", "{}x{}".format(*options.size)]
    if options.variant is not None:
        more += ["--variant", options.variant]
    return bench.first_picture(
        options.model, steps=options.steps, dtype=options.dtype, options=more, keeps_programs=case == "first-warm"
    )


def _measured(
    name: str, prepare: "Callable[[], Work]", options: Options, repeats: int, stage: Callable[[str], None]
) -> dict[str, Any]:
    """Prepare a case, run it once uncounted, then as often as is asked for."""
    forget_peak()
    stage(f"{name}: preparing")
    work = prepare()
    first = timed(work.run).seconds
    seconds = []
    for turn in range(repeats):
        stage(f"{name}: run {turn + 1} of {repeats}")
        seconds.append(timed(work.run).seconds)
    of_processes = name.startswith("first-")
    runs = summary(seconds)
    pictures = options.batch if name in ("picture", "vae-decode") else 1 if of_processes else None
    return {
        "case": name,
        **runs._asdict(),
        "all_seconds": seconds,
        "first_seconds": first,
        "pictures_per_second": None if pictures is None else pictures / runs.seconds,
        "peak_host_bytes": peak_bytes_of_children() if of_processes else peak_bytes(),
        "peak_device_bytes": None if of_processes else _device_peak(),
        **work.notes,
    }


def _device_peak() -> int | None:
    """The most that the first device ever held for this process, where it tells: a CPU does not."""
    import jax

    told = jax.local_devices()[0].memory_stats()
    return told.get("peak_bytes_in_use") if told else None


def _about(options: Options) -> dict[str, Any]:
    import jax

    return {
        "model": options.model or "tiny",
        "batch": options.batch,
        "dtype": options.dtype,
        "device": f"{jax.local_devices()[0].platform} ({jax.local_devices()[0].device_kind})",
        "system": platform.platform(),
        "versions": {package: version(package) for package in ("sdjax", "jax", "flax", "numpy")},
    }


def _print(about: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table("case", "what it is", box=None, pad_edge=False)
    for name in ("seconds", "spread", "pictures/s", "compiling", "memory", "on the device"):
        grid.add_column(name, justify="right")
    for row in results:
        rate, device, compiling = row["pictures_per_second"], row["peak_device_bytes"], row.get("compile_seconds")
        grid.add_row(
            row["case"],
            CASES[row["case"]],
            f"{row['seconds']:.4g}",
            f"±{row['spread'] / 2:.0%}",
            "" if rate is None else f"{rate:.3g}",
            "" if compiling is None else f"{compiling:.1f} s",
            _gibibytes(row["peak_host_bytes"]),
            "" if device is None else _gibibytes(device),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(f"{about['model']}, {about['dtype']}, batch {about['batch']}, on {about['device']}", highlight=False)
    console.print(grid)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
