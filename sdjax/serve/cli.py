"""The command `sdjax serve`. Its flags are the fields of `Settings`."""

import inspect
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from sdjax.serve.settings import Settings, load_settings


def run(args: Sequence[str]) -> None:
    """Run the command with what stood after its name.

    Raises:
        RequestError: a flag, a variable or the file holds a wrong value.
        SdjaxError: the address or the folder can't be had.
    """
    _command().main(args=list(args), prog_name="sdjax serve", standalone_mode=False)


def _parameters() -> list[inspect.Parameter]:
    """What typer asks a function's signature for, made from the settings."""
    file = typer.Option("--config", envvar="SDJAX_CONFIG", metavar="FILE", help="A TOML file of settings.")
    copy = typer.Option("--backup", metavar="FOLDER", help="Copy jobs and pictures into a folder, and end.")
    found = [_parameter("config", Path | None, file), _parameter("backup", Path | None, copy)]
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            found.append(_parameter(name, bool | None, typer.Option(flag, help=field.description)))
        elif get_origin(field.annotation) is tuple:
            found.append(_parameter(name, list[str] | None, typer.Option(flag, metavar="TEXT", help=field.description)))
        else:
            option = typer.Option(flag, metavar=_metavar(field.annotation), help=_help(field))
            found.append(_parameter(name, str | None, option))
    return found


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _metavar(annotation: Any) -> str:
    """What a value looks like. Values are checked by the settings, whichever source they come from."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(option for option in get_args(annotation) if option is not type(None))
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _help(field: FieldInfo) -> str:
    has_default = field.default_factory is None and field.default is not None
    return f"{field.description or ''}{f' (default: {field.default})' if has_default else ''}"  # [ ] would be markup


def _command() -> Any:
    def serve(config: Path | None = None, backup: Path | None = None, **flags: Any) -> None:
        """Answer jobs over HTTP until told to stop.

        A variable SDJAX_NAME, or the key `name` of the file, sets the flag --name. WORKER_ID, SD_VERSION, PORT,
        CALLBACK_URL and MODEL_PATH are read too.
        """
        settings = load_settings(flags, config)
        from sdjax.serve.boot import back_up, serve_until_stopped

        if backup is not None:
            typer.echo(back_up(settings, backup))
        else:
            serve_until_stopped(settings)

    serve.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
    names = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=names)
    app.command()(serve)
    return typer.main.get_command(app)
