"""Everything that can be set, in one class: flags win over the environment, and that over a TOML file."""

import ipaddress
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from platformdirs import user_data_path
from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sdjax import arguments
from sdjax.errors import RequestError
from sdjax.serve.forwarded import PREFIX
from sdjax.serve.store import ATTEMPTS

AREA = 4
"""A job's pictures may have so many times the area of the model's own: others wait while large ones are compiled."""


def _listed(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _sizes(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        arguments.size(value)
    return values


def _size(value: str) -> str:
    try:
        arguments.size(value)
    except RequestError as error:
        raise ValueError(str(error).removeprefix("--size: ")) from None
    return value


def _url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must be a URL like http://localhost:7835, not {value!r}")
    return value.rstrip("/")


def _hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if urlsplit(f"//{value}").hostname != value.lower() or urlsplit(f"//{value}").port is not None:
            raise ValueError(f"must be a name like studio.example, without scheme and port, not {value!r}")
    return tuple(value.lower() for value in values)


def _root_path(value: str) -> str:
    path = value.rstrip("/")
    if not PREFIX.fullmatch(path):
        raise ValueError(f"must be a path like /sdjax, not {value!r}")
    return path


def _networks(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        try:
            if value != "*":
                ipaddress.ip_network(value)
        except ValueError:
            raise ValueError(
                f"must be an address like 10.0.0.5, a network like 10.0.0.0/8, or *, not {value!r}"
            ) from None
    return values


def _also(name: str) -> AliasChoices:
    """The variable has the name that the original worker reads, or ours."""
    return AliasChoices(name, f"sdjax_{name}")


class Settings(BaseSettings):
    """How a server runs. Each is a flag, a variable (SDJAX_ and the name in capitals) and a key of the TOML file."""

    model_config = SettingsConfigDict(
        env_prefix="SDJAX_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(8600, ge=0, le=65535, validation_alias=_also("port"), description="0 is any free one.")
    worker_id: str | None = Field(
        None, min_length=1, max_length=200, validation_alias=_also("worker_id"), description="What the hive calls us."
    )
    callback_url: Annotated[str, AfterValidator(_url)] | None = Field(
        None, validation_alias=_also("callback_url"), description="The hive that hears our heartbeats."
    )
    sd_version: Literal["v1-5", "v1-5-inpaint", "v2-1", "v2-inpaint", "xl", "xl-inpaint", "turbo"] | None = Field(
        None, validation_alias=_also("sd_version"), description="A published checkpoint, or what --model-path holds."
    )
    model: str | None = Field(
        None, description="What is served: a name of `sdjax models`, a hub id, a folder, a file; default: the bundled."
    )
    model_path: Path | None = Field(
        None, validation_alias=_also("model_path"), description="A folder or file with the weights of --sd-version."
    )
    revision: str | None = Field(None, description="A branch, tag or commit of a hub repository.")
    variant: str | None = Field(None, description="Of the weight files, such as fp16.")
    vae: str | None = Field(None, description="Another autoencoder: a folder, file or hub id, with @VARIANT behind it.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="Of parameters and arithmetic.")
    devices: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        1, description="Devices that share the pictures, the first so many, or all."
    )
    data_dir: Path = Field(
        default_factory=partial(user_data_path, "sdjax"), description="Folder of the jobs and their pictures."
    )
    lora_dir: Path | None = Field(None, description="Folder of the adapters that jobs may name.")
    api_key: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="A key that requests must carry; may be repeated."
    )
    allow_unauthenticated: bool = Field(False, description="Listen at a public address without a key.")
    cors_origin: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="A web page's origin that may call us; may be repeated."
    )
    allow_host: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_hosts)] = Field(
        (), description="A name, without a port, by which a reverse proxy is reached; may be repeated."
    )
    root_path: Annotated[str, AfterValidator(_root_path)] = Field(
        "", description="The path under which a reverse proxy serves us, such as /sdjax."
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_networks)] = (
        Field(
            ("127.0.0.1", "::1"),
            validation_alias=_also("forwarded_allow_ips"),
            description="A proxy's address or network whose X-Forwarded-Proto, -For, -Host and -Prefix are believed; "
            "* is any; may be repeated; default: 127.0.0.1 and ::1.",
        )
    )
    connections: int = Field(1000, ge=8, le=100_000, description="Connections that may be open at a time.")
    access_log: bool = Field(False, description="Log every request: method, path, status, seconds.")
    alias: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (), description="Another name by which requests may ask for the model, such as gpt-image-1; may be repeated."
    )
    any_model: bool = Field(False, description="Draw with the model served whatever model OpenAI's clients name.")
    slots: int | None = Field(
        None, ge=1, le=256, description="Pictures that are drawn at once; default: what the device is best at."
    )
    size: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_sizes)] = Field(
        (), description="512 or WIDTHxHEIGHT to compile before we are ready; may be repeated; default: the model's own."
    )
    max_size: Annotated[str, AfterValidator(_size)] | None = Field(
        None,
        description="512 or WIDTHxHEIGHT: jobs may ask for as many pixels; default: 4 times the model's, or --size.",
    )
    queue_limit: int = Field(100, ge=1, description="Jobs that may wait.")
    attempts: int = Field(
        ATTEMPTS, ge=1, description="Times that a job is begun: one that went down with so many processes is given up."
    )
    key_limit: int | None = Field(None, ge=1, description="Unfinished jobs that one key may have.")
    max_body: int = Field(32 * 2**20, ge=1024, description="Bytes of a request's body.")
    keep_alive: float = Field(15.0, gt=0, le=3600, description="Seconds between comments on a silent stream.")
    drain: float = Field(30.0, ge=0, le=3600, description="Seconds that running jobs have when we are told to stop.")
    keep_days: float | None = Field(None, gt=0, description="Age at which finished jobs are deleted.")
    keep_bytes: int | None = Field(None, gt=0, description="Size beyond which the oldest finished jobs are deleted.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of the lines on stderr.")
    log_json: bool = Field(False, description="One JSON object a line.")

    @model_validator(mode="after")
    def _check_model(self) -> "Settings":
        if self.model is not None and (self.model_path is not None or self.sd_version is not None):
            raise ValueError("model: give either --model, or --sd-version and --model-path")
        return self

    @model_validator(mode="after")
    def _check_address(self) -> "Settings":
        if not self.is_loopback and not self.api_key and not self.allow_unauthenticated:
            raise ValueError(
                f"host: {self.host} can be reached from other machines: give --api-key, or --allow-unauthenticated "
                "if something in front of this server checks who calls"
            )
        if any(not key.get_secret_value() for key in self.api_key):
            raise ValueError("api_key: a key is empty")
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...] | None:
        """`size` in pixels; None where none is given."""
        return tuple(map(arguments.size, self.size)) or None

    def most_pixels(self, native: int) -> int:
        """The largest area of a job's pictures, in pixels, where the model's own have an area of `native`."""
        if self.max_size is not None:
            return math.prod(arguments.size(self.max_size))
        return max(AREA * native, *map(math.prod, self.sizes or ((1, 1),)))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """See pydantic-settings."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Combine flags (None: not given), environment and file.

    Raises:
        RequestError: a value is wrong, or the file can't be read; the message names the flag.
    """
    if file is not None and not file.is_file():
        raise RequestError(f"--config: there is no file {str(file)!r}")
    given = {name: value for name, value in flags.items() if value is not None}

    class WithFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return WithFile(**given)
    except ValidationError as error:
        raise RequestError("; ".join(map(_sentence, error.errors()))) from None
    except ValueError as error:  # of the TOML parser
        raise RequestError(f"--config: {file}: {error}") from None


def _sentence(error: Any) -> str:
    """One of pydantic's errors; its input isn't repeated, since it may be a secret."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        name, _, message = message.partition(": ")
    else:
        name = str(error["loc"][0])
    flag = name.lower().removeprefix("sdjax_").replace("_", "-")
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such setting"
    message = message.removeprefix(f"--{flag}: ")
    return f"--{flag}: {message[:1].lower()}{message[1:]}"
