"""Links to pictures that open without a key: signed, and good for an hour."""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from sdjax.errors import SdjaxError

GOOD_FOR = 3600
"""Seconds."""
FILE = "link-secret"
_PICTURE = re.compile(r"/v1/jobs/[0-9a-f]{32}/images/[0-9]{1,4}", re.ASCII)


def link_secret(folder: Path) -> bytes:
    """The secret that signs the links of a data folder, made at the first call; every server on the folder reads it.

    Raises:
        SdjaxError: the file can't be read or written.
    """
    file = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _write_once(file, secrets.token_bytes(32))
        secret = file.read_bytes()
    except OSError as error:
        raise SdjaxError(f"can't read or write {str(file)!r}: {error.strerror or error}") from error
    if len(secret) < 32:
        raise SdjaxError(f"{str(file)!r} holds no secret of 32 bytes: delete it, and another one is made")
    return secret


def signed(path: str, secret: bytes, now: float | None = None) -> str:
    """A picture's path with `expires`, in seconds since the epoch, and `signature`."""
    expires = int(time.time() if now is None else now) + GOOD_FOR
    return f"{path}?expires={expires}&signature={_signature(path, expires, secret)}"


def is_signed(path: str, query: Mapping[str, str], secret: bytes, now: float | None = None) -> bool:
    """Whether a path is a picture's, and its query a signature that is good still."""
    expires, signature = query.get("expires", ""), query.get("signature", "")
    if not _PICTURE.fullmatch(path) or not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
        return False
    good = _signature(path, int(expires), secret)
    is_right = hmac.compare_digest(good.encode(), signature.encode("utf-8", "replace"))
    return is_right and int(expires) > (time.time() if now is None else now)


def _signature(path: str, expires: int, secret: bytes) -> str:
    return hmac.new(secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


def _write_once(file: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all; the first of several writers wins."""
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content)
        try:
            os.link(part, file)
        except FileExistsError:
            return
    finally:
        part.unlink()
