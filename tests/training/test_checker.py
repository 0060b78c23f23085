from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from training.checker import Verdict, check, read
from training.drawings import (
    COLORS,
    KINDS,
    OPPOSITE,
    PALETTE,
    Kind,
    Picture,
    Scene,
    Shape,
    draw,
    sample_group,
    sample_scene,
    sample_training_scene,
)

CRITERIA = ("background", "colors", "kinds", "count", "relation", "place", "everything")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def pictures(scenes) -> list[Picture]:
    return [draw(scene) for scene in scenes]


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    answers = {name: [getattr(v, name) for v in verdicts] for name in CRITERIA}
    return {name: float(np.mean([a for a in answer if a is not None])) for name, answer in answers.items()}


def blurred(picture: Picture, sigma: float, noise: float, rng: np.random.Generator) -> Picture:
    levels = ndimage.gaussian_filter(picture.astype(np.float64), (sigma, sigma, 0))
    return np.clip(levels + rng.normal(0, noise, levels.shape), 0, 255).round().astype(np.uint8)


def test_true_drawings_pass_every_criterion(scenes, pictures):
    passed = shares([check(p, s) for p, s in zip(pictures, scenes, strict=True)])
    assert min(passed.values()) >= 0.997, passed


def test_a_little_blur_and_noise_do_not_matter(scenes):
    rng = np.random.default_rng(1)
    degraded = [blurred(draw(s, size=128), 0.7, 4, rng) for s in scenes[:500]]
    passed = shares([check(p, s) for p, s in zip(degraded, scenes, strict=False)])
    assert min(passed.values()) >= 0.99, passed


def test_shifted_colors_do_not_matter(scenes, pictures):
    rng = np.random.default_rng(2)
    shifted = [np.clip(p + rng.uniform(-20, 20, 3), 0, 255).round().astype(np.uint8) for p in pictures[:500]]
    passed = shares([check(p, s) for p, s in zip(shifted, scenes, strict=False)])
    assert min(passed.values()) >= 0.99, passed


def test_specks_are_not_shapes(scenes):
    rng = np.random.default_rng(3)
    specked = [draw(s, size=128).copy() for s in scenes[:300]]
    for picture in specked:
        for row, column in rng.integers(0, 125, (6, 2)):
            picture[row : row + 3, column : column + 2] = rng.choice(list(PALETTE.values()))
    passed = shares([check(p, s) for p, s in zip(specked, scenes, strict=False)])
    assert min(passed.values()) >= 0.99, passed


def test_true_drawings_of_the_size_that_the_model_learns_pass_groups_included():
    rng = np.random.default_rng(8)
    sample = [sample_training_scene(rng) for _ in range(1000)]
    passed = shares([check(draw(s, size=128), s) for s in sample])
    assert min(passed.values()) >= 0.997, passed


def lone(kind: Kind, size: int = 128) -> tuple[Scene, Picture]:
    scene = Scene("white", (Shape(kind, "blue", "small", 0.2, (0.5, 0.5)),), place="center")
    return scene, draw(scene, size)


def stretched(picture: Picture, by: float) -> Picture:
    """The picture, wider by a factor about its middle."""
    middle = picture.shape[1] / 2 - 0.5
    levels = ndimage.affine_transform(
        picture.astype(np.float64), [1, 1 / by, 1], offset=[0, middle - middle / by, 0], order=1, mode="nearest"
    )
    return levels.round().astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_more_than_a_tenth_too_wide_or_too_high_is_of_no_kind(kind):
    scene, picture = lone(kind)
    for by, right in ((1.0, True), (1.06, True), (1.15, False), (1 / 1.06, True), (1 / 1.15, False)):
        assert check(stretched(picture, by), scene).kinds == right, by


@pytest.mark.parametrize("size", [64, 128])
def test_a_star_whose_points_are_melted_is_no_star(size):
    scene, picture = lone("star", size)
    rounder = ndimage.gaussian_filter(picture.astype(np.float64), (size / 32, size / 32, 0))
    assert check(picture, scene).kinds
    inside = rounder[..., :1] < (PALETTE["blue"][0] + 255) / 2
    melted = np.where(inside, np.uint8(PALETTE["blue"]), np.uint8(255))
    assert read(melted).shapes[0].likeness == "star"
    assert not check(melted, scene).kinds


def test_a_ring_with_two_holes_and_a_ring_without_one_are_no_rings():
    scene, picture = lone("ring")
    closed, halved = picture.copy(), picture.copy()
    closed[48:80, 48:80] = PALETTE["blue"]
    halved[40:88, 60:68] = PALETTE["blue"]
    assert check(picture, scene).kinds
    assert not check(closed, scene).kinds
    assert read(halved).shapes[0].holes == 2
    assert not check(halved, scene).kinds


def test_a_circle_with_a_hole_is_no_circle():
    scene, picture = lone("circle")
    picture = picture.copy()
    picture[60:68, 60:68] = 255
    assert not check(picture, scene).kinds


def test_a_shape_in_two_pieces_and_a_shape_with_a_crumb_beside_it_are_not_one_shape():
    scene, picture = lone("circle")
    halves, crumb = picture.copy(), picture.copy()
    halves[:, 61:67] = 255
    crumb[10:18, 10:18] = PALETTE["blue"]
    assert not check(halves, scene).count
    assert not check(halves, scene).kinds
    assert not check(crumb, scene).count


def test_what_is_unsaid_is_not_judged():
    scene, picture = lone("circle")
    other = replace(scene, background="green", place="left", shapes=(replace(scene.shapes[0], color="red"),))
    assert check(picture, other, said=()) == Verdict(None, None, True, True, None, None)
    assert check(picture, other, said=("color",)) == Verdict(None, False, False, True, None, None)


def test_a_group_is_as_many_equal_shapes_as_were_said():
    rng = np.random.default_rng(9)
    for _ in range(100):
        three = sample_group(rng, 3)
        fewer = draw(Scene(three.background, three.shapes[:1], place="center"), 128)
        kind = "star" if three.shapes[0].kind != "star" else "ring"
        other = replace(three, shapes=tuple(replace(shape, kind=kind) for shape in three.shapes))
        assert check(draw(three, 128), three) == Verdict(True, True, True, True, None, None)
        assert check(fewer, three) == Verdict(True, True, False, False, None, None)
        assert check(draw(three, 128), other) == Verdict(True, True, False, True, None, None)
        two = sample_group(rng, 2)
        across = "above" if two.relation in ("left of", "right of") else "left of"
        assert check(draw(two, 128), two).relation
        assert not check(draw(two, 128), replace(two, relation=across)).relation


def test_pictures_of_other_scenes_pass_at_chance(scenes, pictures):
    """A criterion that names shapes by their colours holds by luck only where those colours happen to be there."""
    passed = shares([check(p, s) for p, s in zip(pictures, scenes[1:] + scenes[:1], strict=True)])
    assert passed["background"] == pytest.approx(1 / 8, abs=0.03)
    assert passed["count"] == pytest.approx(0.65**2 + 0.35**2, abs=0.04)
    assert max(passed[name] for name in ("colors", "kinds", "relation", "place")) < 0.06
    assert passed["everything"] < 0.01


def test_a_wrong_kind_is_told_whatever_the_kinds():
    for drawn in KINDS:
        for wanted in KINDS:
            shape = Shape(drawn, "red", "small", 0.16, (0.5, 0.5))
            scene = Scene("white", (shape,), place="center")
            verdict = check(draw(scene), replace(scene, shapes=(replace(shape, kind=wanted),)))
            assert verdict == Verdict(True, True, drawn == wanted, True, None, True)


def test_each_lie_fails_its_own_criterion_alone(scenes, pictures):
    for picture, scene in zip(pictures[:400], scenes, strict=False):
        free = next(c for c in PALETTE if c not in (scene.background, *(s.color for s in scene.shapes)))
        true = check(picture, scene)
        assert check(picture, replace(scene, background=free)) == replace(true, background=False)
        if scene.relation is not None:
            assert check(picture, replace(scene, relation=OPPOSITE[scene.relation])) == replace(true, relation=False)
        else:
            elsewhere = "center" if scene.place != "center" else "left"
            assert check(picture, replace(scene, place=elsewhere)) == replace(true, place=False)


def test_a_missing_and_a_surplus_shape_are_told():
    red = Shape("circle", "red", "small", 0.15, (0.3, 0.5))
    blue = Shape("star", "blue", "small", 0.15, (0.7, 0.5))
    one = Scene("white", (red,), place="left")
    two = Scene("white", (red, blue), relation="left of")
    assert check(draw(one), two) == Verdict(True, False, False, False, False, None)
    assert check(draw(two), one) == Verdict(True, False, True, False, None, True)


def test_a_reading_gives_center_and_area_of_what_was_drawn(scenes, pictures):
    for picture, scene in zip(pictures[:400], scenes, strict=False):
        found = {shape.color: shape for shape in read(picture).shapes}
        for shape in scene.shapes:
            assert found[shape.color].center == pytest.approx(shape.center, abs=1.1 / 64)
        covered = np.any(picture != PALETTE[scene.background], axis=-1).mean()
        assert sum(f.area for f in found.values()) == pytest.approx(covered, rel=0.25)


def test_a_shapeless_blot_has_no_kind():
    picture = np.full((64, 64, 3), 255, dtype=np.uint8)
    picture[20:24, 12:52] = picture[24:44, 12:16] = PALETTE["blue"]
    (blot,) = read(picture).shapes
    assert (blot.color, blot.kind) == ("blue", None)
    assert blot.likeness in KINDS
    assert blot.color in COLORS


def test_any_picture_can_be_read():
    rng = np.random.default_rng(4)
    for _ in range(100):
        texture = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (*rng.uniform(0, 8, 2), 0))
        texture = 128 + texture / texture.std() * rng.uniform(0, 100)
        read(np.clip(texture, 0, 255).astype(np.uint8))
    assert read(np.zeros((64, 64, 3), dtype=np.uint8)).shapes == ()


def test_what_is_no_picture_is_refused():
    for wrong in (np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            read(wrong)
