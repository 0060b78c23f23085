from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from training.checker import Verdict, check, read
from training.drawings import KINDS, OPPOSITE, PALETTE, Picture, Scene, Shape, draw, sample_scene

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
    assert min(passed.values()) >= 0.999, passed


def test_blur_and_noise_do_not_matter(scenes, pictures):
    rng = np.random.default_rng(1)
    degraded = [blurred(p, 0.7, 4, rng) for p in pictures]
    passed = shares([check(p, s) for p, s in zip(degraded, scenes, strict=True)])
    assert min(passed.values()) >= 0.99, passed


def test_shifted_colors_do_not_matter(scenes, pictures):
    rng = np.random.default_rng(2)
    shifted = [np.clip(p + rng.uniform(-20, 20, 3), 0, 255).round().astype(np.uint8) for p in pictures[:500]]
    passed = shares([check(p, s) for p, s in zip(shifted, scenes, strict=False)])
    assert min(passed.values()) >= 0.99, passed


def test_specks_are_not_shapes(scenes, pictures):
    rng = np.random.default_rng(3)
    specked = [p.copy() for p in pictures[:500]]
    for picture in specked:
        for row, column in rng.integers(0, 61, (6, 2)):
            picture[row : row + 3, column : column + 2] = rng.choice(list(PALETTE.values()))
    passed = shares([check(p, s) for p, s in zip(specked, scenes, strict=False)])
    assert min(passed.values()) >= 0.99, passed


def test_drawings_of_twice_the_size_pass_too(scenes):
    passed = shares([check(draw(s, size=128), s) for s in scenes[:300]])
    assert min(passed.values()) >= 0.99, passed


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
