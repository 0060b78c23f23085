"""The drawings that the bundled model learns from: one to three flat shapes on a plain background.

A `Scene` says what is in a picture; `draw` turns it into pixels. All lengths are fractions of the picture's side, with
x to the right and y down, so one scene can be drawn at any size.

**Held out.** About a tenth of all *combinations* never occurs in training and is kept for evaluation. A combination is
the background's colour, each shape's kind and colour, and (for two that differ) their relation, or (for equal ones)
their number; sizes and exact places do not count. "A above B" and "B below A" are one combination, and so are "A left
of B" and "B right of A". Whether a combination is held out depends on a hash of its words alone: the same on every
machine, in every run. Each word and nearly every pair of words is therefore seen in training; new in a held-out prompt
is how they come together.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Kind: TypeAlias = Literal["circle", "square", "triangle", "star", "ring"]
Color: TypeAlias = Literal["red", "green", "blue", "yellow", "orange", "purple", "black", "white"]
Size: TypeAlias = Literal["small", "large"]
Relation: TypeAlias = Literal["above", "below", "left of", "right of"]
Place: TypeAlias = Literal["center", "left", "right", "top", "bottom"]
Point: TypeAlias = tuple[float, float]
Picture: TypeAlias = NDArray[np.uint8]

KINDS: tuple[Kind, ...] = get_args(Kind)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
PLACES: tuple[Place, ...] = get_args(Place)

OPPOSITE: dict[Relation, Relation] = {
    "above": "below",
    "below": "above",
    "left of": "right of",
    "right of": "left of",
}

PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (40, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (250, 225, 50),
    "orange": (250, 135, 20),
    "purple": (145, 50, 175),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}

# Lengths in 64ths of the side. Shapes are large because one latent covers 4x4 of these units, and what is smaller than
# a few latents has no shape left.
_UNIT = 1 / 64
_RADII: dict[int, dict[Size, tuple[float, float]]] = {
    1: {"small": (12, 14), "large": (17, 20)},
    2: {"small": (9.5, 10.5), "large": (12.5, 14)},
    3: {"small": (9, 10), "large": (11.5, 13)},
}
_MARGIN, _GAP, _DRIFT, _JITTER = 2.0, 3.0, 6.0, 2.0
_TWO_SHAPES_SHARE = 0.65
GROUP_SHARES = {2: 0.09, 3: 0.11}
"""How many of the training scenes are groups of equal shapes, by their number."""
_HELD_OUT_SHARE = 0.1

_STAR_INNER = 0.45
_RING_HOLE = 0.5
_SQUARE_HALF_SIDE = 0.88
_SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape. `radius` is half the side of the box that it stays within, `center` that box's middle (x, y)."""

    kind: Kind
    color: Color
    size: Size
    radius: float
    center: Point


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: a lone shape, two shapes of different colours, or a group of two or three equal shapes.

    A lone shape has a `place`. Two shapes have a `relation`, read as "the first is `relation` the second"; so has a
    group of two. Three have neither.
    Raises ValueError for anything else, or where two colours are equal that must differ.
    """

    background: Color
    shapes: tuple[Shape, ...]
    relation: Relation | None = None
    place: Place | None = None

    def __post_init__(self) -> None:
        count = len(self.shapes)
        if count not in (1, 2, 3):
            raise ValueError(f"a scene has 1 to 3 shapes, not {count}")
        if (self.relation is not None) != (count == 2):
            raise ValueError(f"relation is {self.relation!r}, but there are {count} shapes: two shapes have one")
        if (self.place is not None) != (count == 1):
            raise ValueError(f"place is {self.place!r}, but there are {count} shapes: a lone shape has one")
        if count == 3 and not self.is_group:
            raise ValueError("three shapes of a scene are equal in kind, colour and size")
        colors = [self.background, *(shape.color for shape in (self.shapes[:1] if self.is_group else self.shapes))]
        if len(set(colors)) < len(colors):
            raise ValueError(f"the colours of a scene must differ, background first: {colors}")

    @property
    def is_group(self) -> bool:
        """Whether there are several shapes, equal in kind, colour and size."""
        return len(self.shapes) > 1 and len({(shape.kind, shape.color, shape.size) for shape in self.shapes}) == 1


def sample_group(rng: np.random.Generator, count: int) -> Scene:
    """A group of two or three equal shapes, held out or not; kind, colours, size and arrangement are uniform."""
    background, color = (COLORS[i] for i in rng.permutation(len(COLORS))[:2])
    kind, size = KINDS[rng.integers(len(KINDS))], SIZES[rng.integers(len(SIZES))]
    radius = rng.uniform(*_RADII[count][size])
    relation = RELATIONS[rng.integers(len(RELATIONS))] if count == 2 else None
    centers = _triangle(rng, radius) if relation is None else _related_centers(rng, relation, radius, radius)
    shapes = tuple(Shape(kind, color, size, radius * _UNIT, (x * _UNIT, y * _UNIT)) for x, y in centers)
    return Scene(background, shapes, relation)


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene of one shape or two of different colours, held out or not; all that is said of it is uniform."""
    count = 2 if rng.random() < _TWO_SHAPES_SHARE else 1
    background, *colors = (COLORS[i] for i in rng.permutation(len(COLORS))[: count + 1])
    kinds = [KINDS[i] for i in rng.integers(len(KINDS), size=count)]
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=count)]
    radii = [rng.uniform(*_RADII[count][size]) for size in sizes]
    centers: tuple[Point, ...]
    relation: Relation | None = None
    place: Place | None = None
    if count == 2:
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        centers = _related_centers(rng, relation, radii[0], radii[1])
    else:
        place = PLACES[rng.integers(len(PLACES))]
        centers = (_placed_center(rng, place, radii[0]),)
    shapes = tuple(
        Shape(kind, color, size, radius * _UNIT, (x * _UNIT, y * _UNIT))
        for kind, color, size, radius, (x, y) in zip(kinds, colors, sizes, radii, centers, strict=True)
    )
    return Scene(background, shapes, relation, place)


def sample_training_scene(rng: np.random.Generator) -> Scene:
    """A scene of one to three shapes whose combination is not held out."""
    while held_out(scene := _sample_any(rng)):
        pass
    return scene


def sample_held_out_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A scene whose combination never occurs in training: a lone shape or two (or `count` of 1 or 2 shapes)."""
    while not held_out(scene := sample_scene(rng)) or count not in (None, len(scene.shapes)):
        pass
    return scene


def _sample_any(rng: np.random.Generator) -> Scene:
    at = rng.random()
    for count, share in GROUP_SHARES.items():
        if at < share:
            return sample_group(rng, count)
        at -= share
    return sample_scene(rng)


def held_out(scene: Scene) -> bool:
    """Whether the scene's combination is kept out of training; what a combination is, the module's docstring says."""
    words = [f"{shape.color} {shape.kind}" for shape in scene.shapes]
    if scene.is_group:
        words = [str(len(scene.shapes)), words[0]]
    elif scene.relation in ("above", "left of"):
        words.insert(1, scene.relation)
    elif scene.relation is not None:
        words = [words[1], OPPOSITE[scene.relation], words[0]]
    combination = ", ".join([scene.background, *words])
    digest = hashlib.blake2b(combination.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < _HELD_OUT_SHARE * 2**64


def draw(scene: Scene, size: int = 64) -> Picture:
    """The scene as sRGB pixels, uint8 (size, size, 3), with edges antialiased by a box filter of the sRGB values."""
    if size < 1:
        raise ValueError(f"size is {size}, but a picture has at least 1 pixel a side")
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), PALETTE[scene.background])
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        x, y, radius = (side * length for length in (*shape.center, shape.radius))
        if shape.kind in ("circle", "ring"):
            canvas.ellipse(_box(x, y, radius), fill=PALETTE[shape.color])
            if shape.kind == "ring":
                canvas.ellipse(_box(x, y, _RING_HOLE * radius), fill=PALETTE[scene.background])
        else:
            # Pillow fills a pixel whose centre, at a whole number, lies on or within the outline.
            corners = [(x + radius * u - 0.5, y + radius * v - 0.5) for u, v in _CORNERS[shape.kind]]
            canvas.polygon(corners, fill=PALETTE[shape.color])
    return np.asarray(image.reduce(_SUPERSAMPLING))


def _related_centers(rng: np.random.Generator, relation: Relation, first: float, second: float) -> tuple[Point, Point]:
    """Centres of two shapes with the given radii, their boxes at least `_GAP` apart along the relation's axis."""
    swapped = relation in ("below", "right of")
    near, far = (second, first) if swapped else (first, second)
    slack = 64 - 2 * (_MARGIN + near + far) - _GAP
    before, until = np.sort(rng.uniform(0, slack, size=2)).tolist()
    along = (_MARGIN + before + near, _MARGIN + until + 2 * near + _GAP + far)
    across = (32 + rng.uniform(-_DRIFT, _DRIFT) + rng.uniform(-_JITTER, _JITTER, size=2)).tolist()
    vertical = relation in ("above", "below")
    near_center, far_center = ((b, a) if vertical else (a, b) for a, b in zip(along, across, strict=True))
    return (far_center, near_center) if swapped else (near_center, far_center)


def _triangle(rng: np.random.Generator, radius: float) -> tuple[Point, ...]:
    """Centres of three shapes: one above or below the middle of two, with at least `_GAP` between their boxes."""
    slack = 64 - 2 * _MARGIN - 4 * radius - _GAP
    between = 2 * radius + _GAP + rng.uniform(0, slack)
    down = 2 * radius + _GAP + rng.uniform(0, slack)
    free = 64 - 2 * _MARGIN - 2 * radius
    left = _MARGIN + radius + rng.uniform(0, free - between)
    top = _MARGIN + radius + rng.uniform(0, free - down)
    alone, pair = (top, top + down) if rng.random() < 0.5 else (top + down, top)
    middle = left + between / 2 + rng.uniform(-_JITTER, _JITTER)
    return (middle, alone), (left, pair), (left + between, pair)


def _placed_center(rng: np.random.Generator, place: Place, radius: float) -> Point:
    edge = _MARGIN + radius + rng.uniform(0, _JITTER)
    x, y = (32 + rng.uniform(-_JITTER, _JITTER, size=2)).tolist()
    match place:
        case "center":
            return x, y
        case "left":
            return edge, y
        case "right":
            return 64 - edge, y
        case "top":
            return x, edge
        case "bottom":
            return x, 64 - edge


def _box(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius - 0.5, y - radius - 0.5, x + radius - 0.5, y + radius - 0.5


def _star() -> tuple[Point, ...]:
    # Scaled to touch the sides of the box, and moved down to its middle: a star reaches further up than down.
    outer = 1 / math.cos(math.radians(18))
    drop = outer * (1 - math.cos(math.radians(36))) / 2
    radii = [outer, _STAR_INNER * outer] * 5
    angles = [math.radians(36 * i) for i in range(10)]
    return tuple((r * math.sin(a), drop - r * math.cos(a)) for r, a in zip(radii, angles, strict=True))


_CORNERS: dict[Kind, tuple[Point, ...]] = {
    "square": tuple((_SQUARE_HALF_SIDE * u, _SQUARE_HALF_SIDE * v) for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))),
    "triangle": ((0, -math.sqrt(0.75)), (1, math.sqrt(0.75)), (-1, math.sqrt(0.75))),
    "star": _star(),
}
