"""Reads a drawing back from its pixels, and checks it against the scene that it should show. Strictly.

The reader has the palette and each kind's outline, but neither prompt nor scene. Pixels are named by their nearest
palette colour in OKLab (Ottosson, "A perceptual color space for image processing", 2020), where the frame of the
picture gives the background. An edge between two colours passes through others (red to yellow through orange), so a
colour counts only where it is thick, and a shape's outline comes from how far each pixel lies on the way from the
background's colour to the shape's own.

Every connected piece is a shape of its own. It is of a kind only if it has as many holes as the kind, is at most a
tenth wider or higher than it, and covers, once its position and scale are aligned, at least 85% of what either covers.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from training.drawings import COLORS, KINDS, PALETTE, Color, Kind, Picture, Place, Point, Relation, Scene, Shape, draw

Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]
Statement: TypeAlias = Literal["background", "color", "relation", "place"]

STATEMENTS: tuple[Statement, ...] = get_args(Statement)
"""What a prompt may leave unsaid. Kinds and the number of shapes are always said."""
LEAST_FIT = 0.85
MOST_STRETCH = 1.1
HOLES: dict[Kind, int] = {"circle": 0, "square": 0, "triangle": 0, "star": 0, "ring": 1}

# Fractions of the picture: the smallest piece and the smallest hole that count. The drawings' smallest shape has 0.025.
_LEAST_AREA = 0.002
_LEAST_HOLE = 0.002
_FRAME = 1 / 16
# How far off the middle a centre is no longer central: centred shapes stay within 2/64, those at an edge beyond 8/64.
_OFF_CENTER = 5 / 64
_GRID = 64
_SCALES = (0.94, 0.97, 1.0, 1.03, 1.06)


@dataclass(frozen=True, slots=True)
class FoundShape:
    """A piece read from pixels.

    `center` is the middle (x, y) of its bounding box in fractions of the side, `area` its share of the picture, `fit`
    the overlap (intersection over union, 0 to 1) with `likeness`, the kind that it is most like, `stretch` how many
    times wider or higher than it the piece is, and `holes` their number.
    """

    likeness: Kind
    color: Color
    center: Point
    area: float
    fit: float
    stretch: float
    holes: int

    @property
    def kind(self) -> Kind | None:
        """The kind that the piece is a good drawing of; None if it is none."""
        good = self.fit >= LEAST_FIT and self.stretch <= MOST_STRETCH and self.holes == HOLES[self.likeness]
        return self.likeness if good else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows: its background and its pieces, the largest first."""

    background: Color
    shapes: tuple[FoundShape, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which of a scene's statements hold in a picture; None for what was not said or does not apply.

    background: the frame's colour is the scene's.
    colors: the pieces' colours are exactly the scene's, none missing and none besides.
    kinds: for each of the scene's shapes there is a piece of its kind and colour.
    count: as many pieces as the scene has shapes.
    relation: two shapes, told apart by their colours, stand as said; equal ones along the axis that was said.
    place: the lone shape is where it should be.
    """

    background: bool | None
    colors: bool | None
    kinds: bool
    count: bool
    relation: bool | None
    place: bool | None

    @property
    def everything(self) -> bool:
        """Whether all that was said holds."""
        return False not in (self.background, self.colors, self.kinds, self.count, self.relation, self.place)


def read(picture: Picture) -> Reading:
    """Background and pieces of a picture, uint8 sRGB (height, width, 3), at least 32 pixels a side."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or min(picture.shape[:2]) < 32:
        raise ValueError(
            f"the picture is {picture.dtype} {picture.shape}, but must be uint8 (height, width, 3), at least 32 a side"
        )
    names = _nearest_colors(picture)
    frame = max(1, round(_FRAME * min(names.shape)))
    inside = np.zeros(names.shape, dtype=bool)
    inside[frame:-frame, frame:-frame] = True
    ground = int(np.bincount(names[~inside], minlength=len(COLORS)).argmax())
    ground_rgb = np.median(picture[names == ground], axis=0)

    shapes = []
    for name in np.flatnonzero(np.bincount(names.ravel(), minlength=len(COLORS)) >= _LEAST_AREA * names.size):
        if name != ground:
            for part, core in _thick_parts(names == name):
                coverage = _coverage(picture, part, ground_rgb, picture[core].mean(axis=0))
                shapes.append(_found(coverage, COLORS[name]))
    return Reading(COLORS[ground], tuple(sorted(shapes, key=lambda shape: -shape.area)))


def check(picture: Picture, scene: Scene, said: Collection[Statement] = STATEMENTS) -> Verdict:
    """Whether the picture, as for `read`, shows the scene, as far as it was said. Sizes aren't judged."""
    reading = read(picture)
    shapes = reading.shapes
    colored = "color" in said
    wanted = Counter((shape.kind, shape.color if colored else None) for shape in scene.shapes)
    drawn = Counter((shape.kind, shape.color if colored else None) for shape in shapes)
    return Verdict(
        background=reading.background == scene.background if "background" in said else None,
        colors={shape.color for shape in shapes} == {shape.color for shape in scene.shapes} if colored else None,
        kinds=wanted <= drawn,
        count=len(shapes) == len(scene.shapes),
        relation=_related(shapes, scene, scene.relation) if scene.relation and "relation" in said else None,
        place=_placed(shapes, scene, colored=colored) if scene.place and "place" in said else None,
    )


def _placed(shapes: tuple[FoundShape, ...], scene: Scene, *, colored: bool) -> bool:
    fitting = [shape for shape in shapes if not colored or shape.color == scene.shapes[0].color]
    return bool(fitting) and _place(fitting[0].center) == scene.place


def _related(shapes: tuple[FoundShape, ...], scene: Scene, relation: Relation) -> bool:
    if scene.is_group:
        if len(shapes) < 2:
            return False
        first, second = shapes[0].center, shapes[1].center
        return _stands(relation, first, second) or _stands(relation, second, first)
    by_color = {shape.color: shape.center for shape in reversed(shapes)}  # the largest of a colour stands for it
    centers = [by_color.get(shape.color) for shape in scene.shapes]
    return centers[0] is not None and centers[1] is not None and _stands(relation, centers[0], centers[1])


def _nearest_colors(picture: Picture) -> NDArray[np.intp]:
    """For each pixel the index in COLORS of the nearest colour."""
    palette = _oklab(np.array([PALETTE[color] for color in COLORS], dtype=np.uint8))
    # |pixel - color|^2 without the part that is the same for all colours
    distances: Floats = (palette**2).sum(axis=-1) - 2 * _oklab(picture) @ palette.T
    nearest: NDArray[np.intp] = distances.argmin(axis=-1)
    return nearest


def _oklab(rgb: NDArray[np.uint8]) -> Floats:
    """OKLab coordinates of sRGB colours, uint8 (..., 3) to float32 (..., 3); matrices from Ottosson's article."""
    linear_to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ],
        dtype=np.float32,
    )
    lms_to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ],
        dtype=np.float32,
    )
    lms = _srgb_to_linear()[rgb] @ linear_to_lms.T
    lab: Floats = np.cbrt(lms) @ lms_to_lab.T
    return lab


@cache
def _srgb_to_linear() -> Floats:
    """The transfer function of sRGB (IEC 61966-2-1) as a table of 256 values."""
    encoded = np.arange(256, dtype=np.float32) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _thick_parts(mask: Mask) -> list[tuple[Mask, Mask]]:
    """The mask's connected parts that aren't mere specks or outlines, each with its core: the part without its rim."""
    rim = max(1, min(mask.shape) // 64)
    square = np.ones((3, 3), dtype=bool)
    core = ndimage.binary_erosion(mask, square, iterations=rim)
    thick = ndimage.binary_dilation(core, square, iterations=rim)
    parts, count = ndimage.label(mask, square)
    areas = np.bincount(parts[thick], minlength=count + 1)
    return [(parts == i, core & (parts == i)) for i in range(1, count + 1) if areas[i] >= _LEAST_AREA * mask.size]


def _coverage(picture: Picture, part: Mask, ground_rgb: NDArray[np.float64], rgb: NDArray[np.float64]) -> Floats:
    """How much of each pixel the shape covers, 0 to 1: its place on the line from the background's colour to its own.

    The drawings are antialiased in sRGB values, so the line is straight there. It is followed for two pixels (at a side
    of 64) beyond the part, which is less than the gap between two shapes. Its outer quarters are cut off: that makes a
    blurred edge sharp again and silences noise in flat areas.
    """
    reach = max(2, min(part.shape) // 32)
    near = ndimage.binary_dilation(part, np.ones((3, 3), dtype=bool), iterations=reach)
    direction = (rgb - ground_rgb) / np.sum((rgb - ground_rgb) ** 2)
    along = (picture - ground_rgb) @ direction
    return np.where(near, np.clip(2 * (along - 0.25), 0, 1), 0).astype(np.float32)


def _found(coverage: Floats, color: Color) -> FoundShape:
    height, width = coverage.shape
    rows, columns = (np.flatnonzero((coverage > 0.5).any(axis=axis)) for axis in (1, 0))
    center = (float(columns[0] + columns[-1] + 1) / 2 / width, float(rows[0] + rows[-1] + 1) / 2 / height)
    templates, shapes = _templates()
    fits = np.max([_overlaps(templates, _unit_outline(coverage, scale)) for scale in _SCALES], axis=0)
    best = int(fits.argmax())
    stretch = _width_over_height(coverage) / shapes[best]
    return FoundShape(
        KINDS[best],
        color,
        center,
        float(coverage.mean()),
        float(fits[best]),
        float(max(stretch, 1 / stretch)),
        _count_holes(coverage),
    )


def _overlaps(templates: Floats, outline: Floats) -> Floats:
    overlaps: Floats = np.minimum(templates, outline).sum(axis=(1, 2)) / np.maximum(templates, outline).sum(axis=(1, 2))
    return overlaps


def _width_over_height(coverage: Floats) -> float:
    """The sides' ratio of the bounding box, to a fraction of a pixel."""
    return float(coverage.max(axis=0).sum() / coverage.max(axis=1).sum())


def _count_holes(coverage: Floats) -> int:
    solid = coverage > 0.5
    holes, count = ndimage.label(ndimage.binary_fill_holes(solid) & ~solid)
    return int((np.bincount(holes.ravel(), minlength=count + 1)[1:] >= _LEAST_HOLE * solid.size).sum())


def _unit_outline(coverage: Floats, scale: float = 1.0) -> Floats:
    """The coverage resampled to 64x64, moved to its centre of mass and scaled to a root-mean-square radius of one."""
    rows, columns = np.indices(coverage.shape, dtype=np.float32)
    mass = coverage.sum()
    row, column = (coverage * rows).sum() / mass, (coverage * columns).sum() / mass
    radius = np.sqrt((coverage * ((rows - row) ** 2 + (columns - column) ** 2)).sum() / mass)
    steps = np.linspace(-2.2, 2.2, _GRID, dtype=np.float32) * (radius * scale)
    grid = np.meshgrid(row + steps, column + steps, indexing="ij")
    outline: Floats = ndimage.map_coordinates(coverage, grid, order=1, output=np.float32)
    return outline


@cache
def _templates() -> tuple[Floats, tuple[float, ...]]:
    """Each kind's unit outline, and its width over its height."""
    drawings = [
        draw(Scene("white", (Shape(kind, "black", "large", radius=0.4, center=(0.5, 0.5)),), place="center"), 256)
        for kind in KINDS
    ]
    coverages = [1 - np.float32(1 / 255) * drawing[..., 0].astype(np.float32) for drawing in drawings]
    return np.stack([_unit_outline(c) for c in coverages]), tuple(_width_over_height(c) for c in coverages)


def _stands(relation: Relation, first: Point, second: Point) -> bool:
    right, down = first[0] - second[0], first[1] - second[1]
    if relation in ("above", "below"):
        return abs(down) > abs(right) and (down < 0) == (relation == "above")
    return abs(right) > abs(down) and (right < 0) == (relation == "left of")


def _place(center: Point) -> Place | None:
    """The place's name; None for a corner, which is no place that the drawings know."""
    right, down = center[0] - 0.5, center[1] - 0.5
    off_axis = abs(right) > _OFF_CENTER, abs(down) > _OFF_CENTER
    match off_axis:
        case (False, False):
            return "center"
        case (True, False):
            return "left" if right < 0 else "right"
        case (False, True):
            return "top" if down < 0 else "bottom"
    return None
