"""A style for the drawings: every shape is hollow, a thick line of its colour around the background.

The scene, its caption and where things are stay what they were; a ring, hollow already, stays as it is.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from training.drawings import Kind, Picture, Scene, Shape, draw

HOLE: dict[Kind, tuple[Kind, float]] = {
    "circle": ("circle", 0.55),
    "square": ("square", 0.52),
    "triangle": ("triangle", 0.42),
    "star": ("circle", 0.3),
}
"""What is cut out of a shape, and how large, in the shape's own radii.

One latent covers 4 x 4 pixels, so thinner lines, or a star within a star, cannot be drawn.
"""
MIDDLE: dict[Kind, float] = {"triangle": 0.289, "star": 0.1}
"""How far below the middle of its box a shape's centre lies, in radii."""
_DIFFERENT = 90
_LEAST_AREA = 0.01


def draw_outlined(scene: Scene, size: int = 64) -> Picture:
    """The scene as `training.drawings.draw` has it, with hollow shapes."""
    solid = draw(scene, size).astype(np.float32)
    ground = solid[:1, :1]
    for shape in scene.shapes:
        if shape.kind in HOLE:
            solid += _hole(shape, size)[..., None] * (ground - solid)
    return np.round(solid).astype(np.uint8)


def _hole(shape: Shape, size: int) -> NDArray[np.float32]:
    """How much of each pixel a shape's hole covers: the same kind, smaller, about the shape's centre."""
    x, y = shape.center
    kind, scale = HOLE[shape.kind]
    down = (MIDDLE.get(shape.kind, 0.0) - scale * MIDDLE.get(kind, 0.0)) * shape.radius
    hole = replace(shape, kind=kind, color="black", radius=scale * shape.radius, center=(x, y + down))
    return 1 - draw(Scene("white", (hole,), place="center"), size)[..., 0].astype(np.float32) / 255


def hollow_share(picture: Picture) -> float:
    """How many of the picture's shapes, from 0 to 1, have background at their middle; NaN for a picture without shapes.

    The background is what the picture's corner shows; a shape is what stands out from it, its hole included.
    """
    different = np.abs(picture.astype(int) - picture[:1, :1].astype(int)).sum(-1) > _DIFFERENT
    shapes, count = ndimage.label(ndimage.binary_fill_holes(different))
    found = [
        middle
        for i, middle in enumerate(ndimage.center_of_mass(shapes > 0, shapes, range(1, count + 1)), start=1)
        if (shapes == i).mean() >= _LEAST_AREA
    ]
    return float(np.mean([not different[round(y), round(x)] for y, x in found])) if found else float("nan")


def filled(picture: Picture) -> Picture:
    """The picture with every hole painted in the colour around it, so that the checker can name an outlined shape."""
    different = np.abs(picture.astype(int) - picture[:1, :1].astype(int)).sum(-1) > _DIFFERENT
    # The rim of a hole is a blend of two colours, so it is painted over too.
    holes = ndimage.binary_dilation(ndimage.binary_fill_holes(different) & ~different, iterations=1)
    core = different & ~ndimage.binary_dilation(~different)
    shapes, count = ndimage.label(ndimage.binary_fill_holes(different))
    painted = picture.copy()
    for shape in range(1, count + 1):
        if (within := core & (shapes == shape)).any():
            painted[holes & (shapes == shape)] = np.median(picture[within], axis=0)
    return painted
