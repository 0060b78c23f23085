"""What an engine compiles before it takes jobs."""

from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from sdjax.pipeline import Pipeline
from sdjax.serve import drawing
from sdjax.serve.drawing import Row


def foreseen(pipe: Pipeline, sizes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """One row of every kind that jobs will have; making it compiles what prepares the like, from words or pictures.

    Args:
        pipe: draws them.
        sizes: (width, height) in pixels.
    """
    for width, height in sizes:
        painted: dict[str, Any] = {
            "image": Image.new("RGB", (width, height), "gray"),
            "mask": Image.new("L", (width, height), "white"),
            "strength": 1.0,
        }
        for guidance_scale in (0.0, 2.0):
            for given in [painted] if pipe.definition.inpaints else [painted, {}]:
                request = pipe.resolve(
                    "", "", guidance_scale=guidance_scale, steps=2, seed=0, width=width, height=height, **given
                )
                (row,) = drawing.prepare(pipe, "", [request])
            yield row
