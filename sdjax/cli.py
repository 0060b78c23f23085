"""The command line. What a command prints on standard output is its result; all else goes to standard error."""

import json
import os
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sdjax import arguments, bench_cli, generate_cli, jobs_cli
from sdjax.devices.xla_flags import set_flags
from sdjax.errors import RequestError, SdjaxError
from sdjax.terminal import print_table, printable, shortened

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
app.command()(generate_cli.generate)
app.command()(bench_cli.bench)


def main() -> NoReturn:
    """Run a command; every failure is one line on standard error."""
    set_flags()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            if not sys.warnoptions:  # what libraries will change is nothing to a person who draws
                warnings.simplefilter("ignore", DeprecationWarning)
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
def models(
    model: Annotated[
        str | None, typer.Argument(help="Show one: a name of the list, a hub id whose download is here, or a folder.")
    ] = None,
) -> None:
    """List the models that have a name, and whether a download is needed first; or show what one of them knows."""
    from sdjax.loading import cached
    from sdjax.variants import BUNDLED, VARIANTS

    if model is not None:
        _show_card(model)
        return

    header = ("name", "pixels", "steps", "guidance", "here", "what it is", "where it lies")
    rows = []
    for name, row in VARIANTS.items():
        here = "yes" if name == BUNDLED or cached(row.source) else "no"
        rows.append((name, str(row.size), str(row.steps), f"{row.guidance_scale:g}", here, row.note, row.source))
    print_table([header, *rows])


def _show_card(model: str) -> None:
    """Print a model's defaults and its vocabulary."""
    from sdjax.loading import Card, locate, read_card
    from sdjax.variants import BUNDLED, BUNDLED_FOLDER, VARIANTS

    arguments.check_model(model)
    row = VARIANTS.get(model)
    source = BUNDLED_FOLDER if model == BUNDLED else row.source if row else model
    place = locate(source, variant=None, revision=None, local_files_only=True)
    card = read_card(place) if place.is_dir() else Card()
    if row:
        card = card.over(Card(row.note, row.steps, row.guidance_scale))
    facts = {
        "model": model,
        "what it is": card.description,
        "steps": card.steps,
        "guidance": None if card.guidance_scale is None else f"{card.guidance_scale:g}",
        "where it lies": place,
        "words": ", ".join(card.vocabulary) or "its card lists none",
    }
    for name, value in facts.items():
        if value is not None:
            print(textwrap.fill(f"{name}: {value}", 100, subsequent_indent="  ", break_on_hyphens=False))


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


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sdjax: warning: {shortened(' '.join(str(message).split()))}", file=sys.stderr, flush=True)


def _quit(message: str, code: int) -> NoReturn:
    print(f"sdjax: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
