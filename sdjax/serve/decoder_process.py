"""The process that decodes pictures for `sdjax.serve.decoder`: hostile bytes meet a decoder here alone.

It reads a request (a line of JSON and the file's bytes), answers with a line of JSON and the pixels, and waits for the
next one until its input ends. It limits its own processor time and memory, so that it ends even without its parent.
"""

import json
import sys
from typing import Any, BinaryIO

from PIL import Image, ImageOps

from sdjax.serve.pictures import BROKEN, ORIENTATION, Limits, PictureError, read_picture

CPU_SECONDS = 10
"""Processor time of one picture; the largest that is taken needs about one second."""
MEMORY = 3 << 30
"""Bytes of address space; the largest picture needs about 400 MB."""


def main() -> None:
    """Answer requests until the input ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _limit_memory()
    _send(answers, {"is_ready": True})
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"])
        _limit_time()
        try:
            picture = read_picture(data, Limits(**request["limits"]))
            ImageOps.exif_transpose(picture)  # as the engine will: EXIF data can be broken in ways of its own
            pixels = picture.tobytes()
            head = {**described(picture), "bytes": len(pixels)}
        except PictureError as error:
            pixels, head = b"", {"error": str(error)}
        except MemoryError:
            pixels, head = b"", {"error": "it needs too much memory"}
        except Exception:  # decoders answer to broken bytes with errors of any kind
            pixels, head = b"", {"error": BROKEN}
        _send(answers, head, pixels)


def described(picture: Image.Image) -> dict[str, Any]:
    """What makes a picture again with its pixels, as JSON; see `sdjax.serve.decoder.rebuilt`."""
    palette, transparency = picture.palette, picture.info.get("transparency")
    orientation = picture.getexif().get(ORIENTATION)
    return {
        "mode": picture.mode,
        "size": picture.size,
        "format": picture.format,
        "orientation": orientation if isinstance(orientation, int) else None,
        "palette": None if palette is None else [palette.mode, list(picture.getpalette(palette.mode) or ())],
        "transparency": list(transparency) if isinstance(transparency, bytes | tuple) else transparency,
        "is_bytes": isinstance(transparency, bytes),
    }


def _send(answers: BinaryIO, head: dict[str, Any], pixels: bytes = b"") -> None:
    answers.write(json.dumps(head).encode() + b"\n" + pixels)
    answers.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows; the parent's deadline holds there, too
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))


def _limit_time() -> None:
    """Let the system end this process when the next picture has had its time."""
    try:
        import resource
    except ImportError:
        return
    spent = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
