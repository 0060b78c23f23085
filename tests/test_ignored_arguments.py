"""An argument that does nothing is named in the warnings."""

import numpy as np
import pytest

import sdjax
from tests.parity.reference import pipeline

PICTURE = np.zeros((64, 64, 3), np.uint8)
MASK = np.ones((64, 64), bool)


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            {"negative_prompt": "a ring", "guidance_scale": 1},
            "negative_prompt has no effect: guidance_scale is 1, and up to 1 there is no guidance",
        ),
        ({"guidance_rescale": 0.7, "guidance_scale": 0}, "guidance_rescale has no effect: guidance_scale is 0, "),
        ({"strength": 0.5}, "strength has no effect: there is no image"),
        ({"feather": 3}, "feather has no effect: there is no mask"),
        ({"image": PICTURE, "padding_mask_crop": 8}, "padding_mask_crop has no effect: there is no mask"),
        ({"crop": (8, 8)}, "crop has no effect: this model reads no sizes (SDXL does)"),
        ({"original_size": (512, 512)}, "original_size has no effect: "),
        ({"aesthetic_score": 9.0}, "aesthetic_score has no effect: "),
    ],
)
def test_an_argument_without_an_effect_is_named(pipe, arguments, line):
    (warning,) = pipe.resolve("a star", **arguments).warnings
    assert warning.startswith(line)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"negative_prompt": "", "guidance_scale": 1},
        {"negative_prompt": [""], "guidance_scale": 1},
        {"negative_prompt": "a ring", "guidance_rescale": 0.7},
        {"image": PICTURE, "strength": 0.5},
        {"image": PICTURE, "mask": MASK, "feather": 3, "padding_mask_crop": 8},
        {"crop": (0, 0), "original_size": None, "strength": 0.8, "feather": 0},
    ],
)
def test_an_argument_with_an_effect_or_without_a_wish_is_not_named(pipe, arguments):
    assert pipe.resolve("a star", **arguments).warnings == ()


def test_sdxl_reads_sizes(tmp_path):
    pipeline("sd-xl", tmp_path)
    xl = sdjax.Pipeline.from_pretrained(tmp_path / "model")
    assert xl.resolve("a", crop=(8, 8), original_size=(512, 512)).warnings == ()
