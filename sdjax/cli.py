"""The command line. What a command prints on standard output is its result; all else goes to standard error."""

import difflib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sdjax.errors import RequestError, SdjaxError

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from sdjax import Output, Pipeline

FAILURE, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="sdjax",
    help="Stable Diffusion in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run a command; every failure is one line on standard error."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _quit("interrupted", INTERRUPTED)
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
    sampler: Annotated[str | None, typer.Option(help="ddim, euler, dpmpp_2m, unipc, ...")] = None,
    schedule: Annotated[str | None, typer.Option(help="karras, exponential, beta or ays.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next ones follow.")] = None,
    size: Annotated[str | None, typer.Option(help="In pixels: 512, or 512x768 (width x height).")] = None,
    num: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
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
    width, height = _size(size)
    _check_model(model)
    paths = _paths(output, len(wanted) * num)
    with _stages(quiet) as stages:
        stages("loading")
        _keep_compiled_programs()
        from sdjax import Pipeline

        pipe = Pipeline.from_pretrained(
            model, dtype=dtype, variant=variant, revision=revision, local_files_only=offline
        )
        stages("compiling")
        began = time.monotonic()
        out = pipe(
            wanted,
            negative,
            steps=steps,
            guidance_scale=guidance,
            sampler=sampler,
            schedule=schedule,
            seed=seed,
            width=width,
            height=height,
            num_images=num,
            progress=stages.steps,
        )
        seconds = time.monotonic() - began
    drawn_prompts = [prompt for prompt in wanted for _ in range(num)]
    for path, prompt, described in zip(
        paths, drawn_prompts, _written(pipe, out, paths, drawn_prompts, negative), strict=True
    ):
        if as_json:
            print(json.dumps({"path": str(path), "prompt": prompt, **described, "seconds": round(seconds, 3)}))
        else:
            print(path)
    if not as_json:
        _show(out.images)


@app.command()
def models() -> None:
    """List the models that have a name."""
    from rich.console import Console
    from rich.table import Table

    from sdjax.variants import VARIANTS

    grid = Table("name", "pixels", "steps", "guidance", "what it is", "where it lies", box=None, pad_edge=False)
    for name, row in VARIANTS.items():
        grid.add_row(name, str(row.size), str(row.steps), f"{row.guidance_scale:g}", row.note, row.source)
    Console(width=None if sys.stdout.isatty() else 160).print(grid)


@app.command()
def inspect(
    picture: Annotated[Path, typer.Argument(help="A PNG that sdjax, or a tool with the same convention, wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print the parameters that a picture was made with."""
    from sdjax import metadata

    parameters = metadata.read(picture)
    if as_json:
        print(json.dumps(parameters, ensure_ascii=False))
        return
    for name, value in parameters.items():
        if value is not None:
            print(f"{name}: {value}")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Answer jobs over HTTP until told to stop."""
    try:
        from sdjax.serve.cli import run
    except ModuleNotFoundError as error:
        raise SdjaxError(f"the server needs {error.name}: pip install 'sdjax[server]'") from error
    run(context.args, _keep_compiled_programs)


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
    print("devices " + ", ".join(str(device) for device in jax.devices()))


def _prompts_of(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not a text file in UTF-8") from error
    if not any(lines):
        raise RequestError(f"{file} holds no prompts: write one a line")
    return [line for line in lines if line]


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise RequestError(f"--size must be like 512 or 512x768 (width x height), not {text!r}")
    width = int(match[1])
    return width, int(match[2] or width)


def _check_model(model: str | None) -> None:
    """A word that is neither a known name nor a path is a slip of the keyboard: say what is near it."""
    from sdjax.variants import VARIANTS

    if model is None or model in VARIANTS or "/" in model or Path(model).exists():
        return
    near = difflib.get_close_matches(model, VARIANTS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(VARIANTS)}, hub ids (owner/name) and paths"
    raise RequestError(f"there is no model {model!r}: {hint}")


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
    pipe: "Pipeline", out: "Output", paths: Sequence[Path], prompts: Sequence[str], negative: str | None
) -> Iterator[dict[str, Any]]:
    """Write each picture whole or not at all, and give the settings it was made with."""
    from sdjax import metadata

    for path, image, seed, prompt in zip(paths, out.images, out.seeds, prompts, strict=True):
        settings = {**out.settings, "seed": seed, "size": f"{image.width}x{image.height}"}
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            image.save(part, "PNG", pnginfo=metadata.chunks(metadata.to_text(prompt, negative, settings)))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        yield {"negative_prompt": negative, "seed": seed, **out.settings}


def _keep_compiled_programs() -> None:
    """Compile once per machine: programs go to the user's cache folder, unless that can't be written."""
    import jax
    from platformdirs import user_cache_path

    folder = Path(os.environ.get("SDJAX_CACHE_DIR") or user_cache_path("sdjax")) / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"compiled programs are not kept: {folder}: {error.strerror}", stacklevel=2)
        return
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)  # type: ignore[no-untyped-call]


class _Stages:
    """What is going on, told on standard error where a person can see it."""

    def __init__(self, console: "Console | None") -> None:
        self._bar: Any = None
        if console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
            self._bar = Progress(*columns, TextColumn("{task.fields[speed]}"), console=console, transient=True)
            self._task = self._bar.add_task("", total=None, speed="")
            self._bar.start()
        self._first: tuple[float, int] | None = None

    def __call__(self, stage: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=stage)

    def steps(self, done: int, total: int) -> None:
        """Show the sampler's progress; its speed is counted from the first slice on, which may have compiled."""
        if self._bar is None or done == 0:
            return
        now = time.monotonic()
        self._first = self._first or (now, done)
        began, before = self._first
        speed = f"{(done - before) / (now - began):.1f} it/s" if done > before else ""
        stage = "decoding" if done == total else "drawing"
        self._bar.update(self._task, description=stage, completed=done, total=total, speed=speed)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def _stages(quiet: bool) -> Iterator[_Stages]:
    console = None
    if not quiet and sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
    stages = _Stages(console)
    try:
        yield stages
    finally:
        stages.stop()


def _show(pictures: "Sequence[Image.Image]") -> None:
    """Show pictures in terminals that have a protocol for it: iTerm2's, which WezTerm speaks too, or kitty's."""
    if not sys.stdout.isatty():
        return
    from sdjax.images import to_png

    is_kitty = "kitty" in os.environ.get("TERM", "") or os.environ.get("TERM_PROGRAM") == "ghostty"
    if not is_kitty and os.environ.get("TERM_PROGRAM") not in ("iTerm.app", "WezTerm"):
        return
    import base64

    for picture in pictures:
        data = base64.b64encode(to_png(picture)).decode()
        if is_kitty:
            parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
            for i, part in enumerate(parts):
                more = int(i < len(parts) - 1)
                head = f"a=T,f=100,m={more}" if i == 0 else f"m={more}"
                sys.stdout.write(f"\x1b_G{head};{part}\x1b\\")
        else:
            sys.stdout.write(f"\x1b]1337;File=inline=1:{data}\a")
        sys.stdout.write("\n")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sdjax: warning: {message}", file=sys.stderr)


def _quit(message: str, code: int) -> NoReturn:
    print(f"sdjax: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
