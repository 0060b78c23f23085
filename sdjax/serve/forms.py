"""Forms with pictures, as OpenAI's clients send them."""

from typing import Any

import anyio
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from sdjax.serve import bodies
from sdjax.serve.problems import ProblemError, invalid, shown

LARGEST_FIELD = 1 << 18
MOST_FILES = 32
"""Of a form: as many pictures as OpenAI's clients may send, and some more, so that `image` is what the error names."""


async def read_form(request: Request) -> tuple[list[bytes], bytes | None, dict[str, Any]]:
    """Pictures, mask and fields of the form that a request holds.

    Raises:
        ProblemError: it is none, has too many files, or doesn't arrive.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise invalid("image", "an edit is sent as multipart/form-data, with the picture as the file `image`")
    try:
        with anyio.fail_after(bodies.ARRIVES_WITHIN):
            form = await request.form(max_files=MOST_FILES, max_fields=64, max_part_size=LARGEST_FIELD)
            return await _files(form)
    except HTTPException as error:
        if "Too many files" in error.detail:
            raise invalid("image", f"image must be one picture, not more than {MOST_FILES}") from None
        raise
    except TimeoutError:
        message = f"the body did not arrive within {bodies.ARRIVES_WITHIN:g} s"
        raise ProblemError(408, "timeout", message, headers={"Connection": "close"}) from None
    finally:
        await request.close()


async def _files(form: FormData) -> tuple[list[bytes], bytes | None, dict[str, Any]]:
    """Pictures, mask and fields of a form.

    Raises:
        ProblemError: a field is given twice, or a file where a field should be, or the reverse.
    """
    images: list[bytes] = []
    mask: bytes | None = None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        is_file = isinstance(value, UploadFile)
        field = name.removesuffix("[]")
        if is_file != (field in ("image", "mask")):
            raise invalid(field[:60], f"{shown(field)} must be {'text' if is_file else 'a file'}")
        if isinstance(value, UploadFile):
            content = await value.read()
            if field == "image":
                images.append(content)
            elif mask is not None:
                raise invalid("mask", "mask is given twice")
            else:
                mask = content
        elif name in fields:
            raise invalid(name[:60], f"{shown(name)} is given twice")
        else:
            fields[name] = value
    return images, mask, fields
