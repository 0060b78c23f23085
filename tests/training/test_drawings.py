from dataclasses import replace

import numpy as np
import pytest

from training.drawings import (
    COLORS,
    KINDS,
    OPPOSITE,
    PALETTE,
    Color,
    Kind,
    Scene,
    Shape,
    draw,
    held_out,
    sample_held_out_scene,
    sample_scene,
    sample_training_scene,
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def shape(kind: Kind, color: Color, x: float = 0.5, y: float = 0.5, radius: float = 0.2) -> Shape:
    return Shape(kind, color, "small", radius, (x, y))


def test_a_drawing_has_the_area_that_geometry_gives():
    radius = 0.4
    outer = radius / np.cos(np.radians(18))  # a five-pointed star as wide as the box
    area = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.88 * radius) ** 2,
        "triangle": np.sqrt(3) * radius**2,
        "star": 5 * 0.45 * outer**2 * np.sin(np.radians(36)),
        "ring": np.pi * radius**2 * 0.75,
    }
    for kind in KINDS:
        picture = draw(Scene("white", (shape(kind, "black", radius=radius),), place="center"), size=128)
        assert 1 - picture.mean() / 255 == pytest.approx(area[kind], abs=0.005), kind


def test_every_kind_is_centered_in_its_box_to_a_fraction_of_a_pixel():
    for kind in KINDS:
        scene = Scene("white", (shape(kind, "black", radius=0.4),), place="center")
        rows, columns = np.nonzero(draw(scene, size=512)[..., 0] < 128)
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(256, abs=1), kind
        assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(256, abs=1), kind


def test_flat_areas_are_exactly_the_palette():
    scene = Scene("green", (shape("circle", "orange"),), place="center")
    picture = draw(scene)
    assert picture.dtype == np.uint8
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == PALETTE["green"]
    assert tuple(picture[32, 32]) == PALETTE["orange"]


def test_shapes_keep_off_the_edge_and_each_other():
    for scene in scenes(2000):
        for s in scene.shapes:
            assert all(s.radius <= c - 2 / 64 + 1e-9 and s.radius <= 1 - 2 / 64 - c + 1e-9 for c in s.center)
        if len(scene.shapes) == 2:
            first, second = scene.shapes
            apart = np.abs(np.subtract(first.center, second.center)).max()
            assert apart >= first.radius + second.radius + 3 / 64 - 1e-9


def test_the_first_shape_stands_as_the_relation_says():
    for scene in scenes(2000):
        if scene.relation is not None:
            right, down = np.subtract(scene.shapes[0].center, scene.shapes[1].center)
            along = {"above": -down, "below": down, "left of": -right, "right of": right}[scene.relation]
            across = right if scene.relation in ("above", "below") else down
            assert along > 4 * abs(across)


def test_two_thirds_of_scenes_have_two_shapes_and_every_word_is_about_as_frequent():
    sample = scenes(8000)
    assert np.mean([len(s.shapes) == 2 for s in sample]) == pytest.approx(0.65, abs=0.02)
    kinds = [s.kind for scene in sample for s in scene.shapes]
    assert all(kinds.count(kind) / len(kinds) == pytest.approx(1 / 5, abs=0.02) for kind in KINDS)
    colors = [s.color for scene in sample for s in scene.shapes]
    assert all(colors.count(color) / len(colors) == pytest.approx(1 / 8, abs=0.02) for color in COLORS)


def test_a_tenth_of_scenes_is_held_out():
    for shapes in (1, 2):
        sides = [held_out(scene) for scene in scenes(16000) if len(scene.shapes) == shapes]
        assert 0.08 <= np.mean(sides) <= 0.12


def test_what_is_held_out_is_pinned_down_for_all_time():
    red = shape("circle", "red")
    lone = [g for g in COLORS if g != "red" and held_out(Scene(g, (red,), place="center"))]
    assert lone == ["orange", "white"]
    green = shape("circle", "green")
    others = [shape("square", c) for c in COLORS if c not in ("green", "yellow")]
    pairs = [other.color for other in others if held_out(Scene("yellow", (green, other), relation="above"))]
    assert pairs == ["orange", "black", "white"]


def test_held_out_does_not_depend_on_how_the_relation_is_said():
    for scene in scenes(2000):
        if scene.relation is not None:
            assert held_out(scene) == held_out(
                replace(scene, shapes=scene.shapes[::-1], relation=OPPOSITE[scene.relation])
            )


def test_held_out_does_not_depend_on_sizes_and_places():
    for scene in scenes(2000):
        other = tuple(replace(s, size="large", radius=0.19, center=(0.4, 0.4)) for s in scene.shapes)
        assert held_out(scene) == held_out(replace(scene, shapes=other))


def test_training_never_sees_a_held_out_combination():
    rng = np.random.default_rng(0)
    assert not any(held_out(sample_training_scene(rng)) for _ in range(2000))
    assert all(held_out(sample_held_out_scene(rng)) for _ in range(200))


def test_a_scene_that_cannot_be_told_apart_is_refused():
    with pytest.raises(ValueError, match="must differ"):
        Scene("red", (shape("circle", "red"),), place="center")
    with pytest.raises(ValueError, match="must differ"):
        Scene("white", (shape("circle", "red"), shape("star", "red")), relation="above")
    with pytest.raises(ValueError, match="relation"):
        Scene("white", (shape("circle", "red"), shape("star", "blue")))
    with pytest.raises(ValueError, match="place"):
        Scene("white", (shape("circle", "red"),))
    with pytest.raises(ValueError, match="1 to 3 shapes"):
        Scene("white", ())
