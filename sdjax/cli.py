"""The command line. What a command prints on standard output is its result; all else goes to standard error."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sdjax import arguments, bench_cli, jobs_cli
from sdjax.errors import PromptWarning, RequestError, SdjaxError
from sdjax.terminal import keep_compiled_programs, printable, show, stages, uncollected
from sdjax.xla_flags import set_flags

if TYPE_CHECKING:
    from sdjax import Output

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="sdjax",
    help="Stable Diffusion in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(jobs_cli.app, name="jobs")
app.command()(bench_cli.bench)


def main() -> NoReturn:
    """Run a command; every failure is one line on standard error."""
    set_flags()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Releases of the command-line library differ in whether an interrupt comes out as a code or is raised.
            if app(standalone_mode=False) == INTERRUPTED:
                raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        print("sdjax: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # The compiled loop goes on in threads that an orderly end of the interpreter would pull the ground from under.
        os._exit(INTERRUPTED)
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except RequestError as error:
        _quit(str(error), USAGE)
    except SdjaxError as error:
        _quit(str(error), FAILURE)
    except OSError as error:
        _quit(f"{error.filename or 'the system'}: {error.strerror or error}", FAILURE)
    except MemoryError:
        _quit("out of memory: ask for a smaller size or fewer pictures", FAILURE)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line library
            _quit(error.format_message(), USAGE)
        raise
    raise SystemExit(0)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; several are drawn in turn.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A file of prompts, one a line.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .png file or a folder; several pictures are numbered.")
    ] = Path("out.png"),
    model: Annotated[
        str | None, typer.Option(help="A name of `sdjax models`, a hub id, a folder or a .safetensors file.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; up to 1: not at all.")
    ] = None,
    rescale: Annotated[float, typer.Option(help="0 to 1: how much of the contrast that guidance adds to undo.")] = 0.0,
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, ...")] = None,
    schedule: Annotated[str | None, typer.Option(help="karras, exponential, beta or ays.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones follow.")] = None,
    size: Annotated[str | None, typer.Option(help="In pixels: 512, or 512x768 (width x height).")] = None,
    num: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[float, typer.Option(help="How much of it to paint anew, 0 to 1.")] = 0.8,
    mask: Annotated[Path | None, typer.Option(help="A picture, white where --image is to be repainted.")] = None,
    feather: Annotated[float, typer.Option(help="Pixels over which the repainted part fades in.")] = 0.0,
    mask_padding: Annotated[
        int | None, typer.Option(help="Work on the masked part alone, with this many pixels around it.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="An adapter; may be given several times.")
    ] = None,
    lora_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where <lora:name:0.8> in a prompt is looked for.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option(metavar="FOLDER:IMAGE[:SCALE]", help="A ControlNet and what it is to see.")
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WORD]", help="A learned word (textual inversion).")
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="Layers of the text encoder to leave out.")] = None,
    chunk: Annotated[bool, typer.Option("--chunk", help="Read long prompts in chunks, uncut.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    weights: Annotated[str | None, typer.Option(help="int8: keep them in a quarter of the memory.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weight files, such as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of a hub repository.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a picture instead of its path.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Draw pictures from words and print the path of each."""
    wanted = [*(prompts or []), *(_prompts_of(prompts_file) if prompts_file else [])]
    if not wanted:
        raise RequestError('there is no prompt: give one, such as "a red circle on a blue background"')
    width, height = arguments.size_if_given(size)
    arguments.check_model(model)
    paths = _paths(output, len(wanted) * num)
    from sdjax.images import open_picture

    with stages(quiet) as stage, ExitStack() as up_to_the_first:
        up_to_the_first.enter_context(uncollected())
        stage("loading")
        settings = {
            "steps": steps,
            "guidance_scale": guidance,
            "guidance_rescale": rescale,
            "sampler": sampler,
            "schedule": schedule,
            "width": width,
            "height": height,
            "num_images": num,
            "image": None if image is None else open_picture(image),
            "strength": strength,
            "mask": None if mask is None else open_picture(mask),
            "feather": feather,
            "padding_mask_crop": mask_padding,
            "loras": [arguments.with_number(given, 1.0) for given in lora or ()],
            "lora_dir": lora_dir,
            "control": [_control(given) for given in control or ()],
            "embeddings": [_with_word(given) for given in embedding or ()],
            "clip_skip": clip_skip,
            "long_prompts": "chunk" if chunk else "truncate",
        }
        keep_compiled_programs()
        from sdjax import Pipeline

        pipe = Pipeline.from_pretrained(
            model, dtype=dtype, weights=weights, variant=variant, revision=revision, local_files_only=offline
        )
        # Everything is checked before the first picture is drawn; each is on disk before the next one is begun.
        requests = [pipe.resolve(prompt, negative, **{**settings, "seed": seed}) for prompt in wanted]  # type: ignore[arg-type]
        for message in dict.fromkeys(message for request in requests for message in request.warnings):
            _show_warning(message)
        warnings.simplefilter("ignore", PromptWarning)
        first = requests[0].seeds[0]
        stage("compiling")
        for index, prompt in enumerate(wanted):
            began = time.monotonic()
            place = (first + index * num) % 2**64
            out = pipe(prompt, negative, **{**settings, "seed": place}, progress=stage.steps)  # type: ignore[arg-type]
            seconds = time.monotonic() - began
            written = _written(out, paths[index * num :][:num], prompt, negative)
            for path, described in written:
                if as_json:
                    print(json.dumps({"path": str(path), "prompt": prompt, **described, "seconds": round(seconds, 3)}))
                else:
                    print(path, flush=True)
            if not as_json:
                show(out.images)
            up_to_the_first.close()


@app.command()
def models() -> None:
    """List the models that have a name, and whether a download is needed first."""
    from rich.console import Console
    from rich.table import Table

    from sdjax.loading import cached
    from sdjax.variants import BUNDLED, VARIANTS

    grid = Table("name", "pixels", "steps", "guidance", "here", "what it is", "where it lies", box=None, pad_edge=False)
    for name, row in VARIANTS.items():
        here = "yes" if name == BUNDLED or cached(row.source) else "no"
        grid.add_row(name, str(row.size), str(row.steps), f"{row.guidance_scale:g}", here, row.note, row.source)
    Console(width=None if sys.stdout.isatty() else 160).print(grid)


@app.command()
def inspect(
    picture: Annotated[
        Path, typer.Argument(help="A PNG, JPEG, WebP, AVIF or GIF that sdjax or another tool with a prompt wrote.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print the parameters that a picture was made with, or else the texts that its file holds."""
    from sdjax import metadata

    parameters = metadata.read(picture)
    if as_json:
        print(json.dumps(parameters, ensure_ascii=False, allow_nan=False))
        return
    if "texts" in parameters:
        warnings.warn(f"{picture}: no tool's parameters are found; these are the texts in the file", stacklevel=1)
        parameters = parameters["texts"]
    for name, value in parameters.items():
        if value is not None:
            print(printable(f"{name}: {value}"))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Answer jobs over HTTP until told to stop."""
    try:
        from sdjax.serve.cli import run
    except ModuleNotFoundError as error:
        raise SdjaxError(f"the server needs {error.name}: pip install 'sdjax[server]'") from error
    run(context.args)


@app.command()
def version() -> None:
    """Print the versions of sdjax and of what it stands on."""
    from importlib.metadata import version as version_of

    import jax

    import sdjax

    print(f"sdjax {sdjax.__version__}")
    for package in ("jax", "flax", "numpy"):
        print(f"{package} {version_of(package)}")
    print(f"python {sys.version.split()[0]}")
    print(f"xla flags {os.environ.get('XLA_FLAGS') or 'none'}")
    print("devices " + ", ".join(str(device) for device in jax.devices()))


def _prompts_of(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not a text file in UTF-8") from error
    if not any(lines):
        raise RequestError(f"{file} holds no prompts: write one a line")
    return [line for line in lines if line]


def _paths(output: Path, count: int) -> list[Path]:
    """Where the pictures go: `out.png`, or `out-1.png`, `out-2.png`, ... when there are several."""
    if count < 1:
        raise RequestError("--num must be at least 1")
    if output.is_dir():
        output = output / "out.png"
    if output.suffix.lower() != ".png":
        raise RequestError(f"--output must be a .png file or an existing folder, not {str(output)!r}")
    if not output.parent.is_dir():
        raise RequestError(f"--output: there is no folder {str(output.parent)!r}; make it first")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i + 1}{output.suffix}") for i in range(count)]


def _written(
    out: "Output", paths: Sequence[Path], prompt: str, negative: str | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write each picture whole or not at all, and give the settings it was made with."""
    from sdjax import metadata

    for path, image, seed in zip(paths, out.images, out.seeds, strict=True):
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                metadata.save(image, file, "png", prompt, negative, {**out.settings, "seed": seed})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        yield path, {"negative_prompt": negative, "seed": seed, **out.settings}


def _with_word(given: str) -> Any:
    name, colon, word = given.rpartition(":")
    return (name, word) if colon and not Path(given).exists() else given


def _control(given: str) -> tuple[str, Any, float]:
    from sdjax.images import open_picture

    rest, scale = arguments.with_number(given, 1.0)
    folder, colon, picture = rest.rpartition(":")
    if not colon:
        raise RequestError(f"--control must be FOLDER:IMAGE or FOLDER:IMAGE:SCALE, not {given!r}")
    return folder, open_picture(Path(picture)), scale


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sdjax: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _quit(message: str, code: int) -> NoReturn:
    print(f"sdjax: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
