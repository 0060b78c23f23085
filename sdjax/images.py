"""Pictures: arrays to PIL and back."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_pil(pictures: NDArray[np.float32]) -> list[Image.Image]:
    """Turn (batch, height, width, 3) floats in 0..1 into pictures, each channel rounded to 256 levels."""
    levels = np.round(pictures * 255).astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def to_png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


def to_html(pictures: Sequence[Image.Image], captions: Sequence[str]) -> str:
    """A row of pictures with captions, each inlined as a PNG: what a notebook shows."""
    figures = []
    for picture, caption in zip(pictures, captions, strict=True):
        source = "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()
        said = html.escape(caption)
        figures.append(
            f'<figure style="display:inline-block;margin:4px"><img src="{source}" alt="{said}">'
            f"<figcaption>{said}</figcaption></figure>"
        )
    return "".join(figures)
