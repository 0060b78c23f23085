"""Pictures and masks come in many modes, and mean the same in all of them."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from sdjax.canvas import canvas, latent_mask, pasted, untouched
from sdjax.errors import RequestError
from sdjax.images import to_mask, to_rgb

GRADIENT = np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))


def in_mode(mode):
    grey = Image.fromarray(GRADIENT)
    if mode == "I;16":
        return Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    if mode == "I;16 in a PNG":
        file = io.BytesIO()
        Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 99).save(file, "PNG")
        return Image.open(file)
    if mode == "I of 16 bits":
        return Image.fromarray(GRADIENT.astype(np.int32) * 257)
    if mode == "CMYK":
        return grey.convert("RGB").convert("CMYK")
    if mode == "P with transparency":
        paletted = grey.convert("P")
        paletted.info["transparency"] = bytes([255] * 256)
        return paletted
    if mode == "array":
        return GRADIENT
    if mode == "array of floats":
        return np.repeat(GRADIENT[..., None] / 255, 3, axis=2)
    return grey.convert(mode)


MODES = ("L", "RGB", "P", "LA", "RGBA", "PA", "I;16", "I;16 in a PNG", "I", "I of 16 bits", "F", "CMYK", "YCbCr", "HSV")
MODES += ("P with transparency", "array", "array of floats")


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_the_same_in_every_mode(mode):
    off = 2 if mode in ("YCbCr", "HSV") else 0  # these round
    np.testing.assert_allclose(to_rgb(in_mode(mode)).astype(int), GRADIENT[..., None].repeat(3, axis=2), atol=off)


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_is_the_same_in_every_mode(mode):
    off = 2 / 255 if mode in ("YCbCr", "HSV") else 1e-6
    np.testing.assert_allclose(to_mask(in_mode(mode)), GRADIENT / 255, atol=off)


def test_a_mask_of_one_bit_is_black_and_white():
    half = Image.new("1", (4, 2))
    half.paste(1, (0, 0, 2, 2))
    assert to_mask(half).tolist() == [[1, 1, 0, 0]] * 2
    assert to_rgb(half)[0, :, 0].tolist() == [255, 255, 0, 0]


def test_transparent_parts_are_laid_on_white_and_said():
    see_through = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    see_through.putpixel((0, 0), (255, 0, 0, 255))
    with pytest.warns(UserWarning, match="image has transparent parts; they are laid on white"):
        pixels = to_rgb(see_through)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[1, 1].tolist() == [255, 255, 255]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))


def test_white_strokes_on_a_transparent_mask_are_what_is_repainted():
    strokes = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    strokes.putpixel((1, 2), (255, 255, 255, 255))
    assert np.argwhere(to_mask(strokes)).tolist() == [[2, 1]]


def test_a_mask_whose_alpha_alone_says_something_is_refused():
    with pytest.raises(RequestError, match="only its transparency says"):
        to_mask(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    assert not to_mask(Image.new("RGBA", (4, 4), (0, 0, 0, 255))).any()


SHAPE = np.pad(np.ones((3, 2), int), [(1, 2), (2, 3)])
"""0 and 1, as from a segmentation model."""


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_a_mask_of_0_and_1_is_black_and_white_in_every_type(dtype):
    assert np.array_equal(to_mask(SHAPE.astype(dtype)), SHAPE)
    assert np.array_equal(to_mask(SHAPE.astype(dtype)[..., None]), SHAPE)
    assert not to_mask((0 * SHAPE).astype(dtype)).any()
    assert to_mask(np.ones((2, 2), dtype)).all()


@pytest.mark.parametrize("value", [1, 2, 128, 254, 255])
def test_a_mask_of_two_whole_numbers_is_black_and_white(value):
    levels = (value * SHAPE).astype(np.uint8)
    for mask in (levels, levels.astype(np.int64), np.stack([levels] * 3, -1), Image.fromarray(levels)):
        assert np.array_equal(to_mask(mask), SHAPE)


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGB", "RGBA", "I", "I;16", "F"])
def test_a_mask_of_0_and_1_in_a_file_is_black_and_white(mode):
    levels = SHAPE.astype(np.uint8)
    if mode in ("I", "I;16", "F"):
        mask = Image.fromarray(levels.astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    elif mode == "P":
        mask = Image.fromarray(levels, "P")
        mask.putpalette([0, 0, 0, 128, 0, 0])  # as segmentation data sets paint their second class
    else:
        mask = Image.fromarray(levels).convert(mode)
    assert mask.mode == mode
    assert np.array_equal(to_mask(mask), SHAPE)


@pytest.mark.parametrize(
    "mask", [[[0, 1, 2]], [[0, 1, 30]], [[7, 7]], [[0, 5], [9, 0]]], ids=["labels", "dark", "one label", "three"]
)
def test_a_mask_whose_numbers_may_be_labels_is_refused(mask):
    with pytest.raises(RequestError, match="may be labels"):
        to_mask(np.array(mask, np.uint8))


@pytest.mark.parametrize("mask", [[[0, -1]], [[-1, 0, 1]], [[0, 1, 300]]])
def test_a_mask_of_other_whole_numbers_is_refused(mask):
    with pytest.raises(RequestError, match="an array of int64"):
        to_mask(np.array(mask))


def test_floats_and_soft_masks_mean_what_they_are():
    np.testing.assert_allclose(to_mask(np.array([[0, 0.5]])), [[0, 0.5]], atol=1 / 255)
    np.testing.assert_allclose(to_mask(np.array([[0, 64, 128]], np.uint8)), [[0, 64 / 255, 128 / 255]])


def test_a_picture_of_the_bytes_0_and_1_is_refused_instead_of_read_as_black():
    with pytest.raises(RequestError, match="0 and 1 alone"):
        to_rgb(SHAPE.astype(np.uint8), name="control[0].image")
    assert to_rgb(SHAPE.astype(bool)).max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :8, 0] = 255
    turns = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180}
    turns |= {4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}
    turns |= {7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(upright)
    stored = stored if orientation == 1 else stored.transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    assert np.array_equal(to_rgb(Image.open(file)), upright)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("photo.png", "must be a PIL image or an array"),
        (None, "must be a PIL image or an array"),
        (np.zeros((4, 4, 2), np.uint8), r"not an array of shape \(4, 4, 2\)"),
        (np.zeros((0, 4), np.uint8), "not an array of shape"),
        (np.full((4, 4), np.nan), "must lie in 0..1"),
        (np.full((4, 4), 2.0), "must lie in 0..1"),
        (np.zeros((4, 4), np.int64), "an array of int64"),
    ],
)
def test_what_is_no_picture_is_refused(picture, said):
    with pytest.raises(RequestError, match=said):
        to_rgb(picture)


arrays = hnp.arrays(
    st.sampled_from([np.uint8, np.float32, np.float64, np.bool_, np.int16]),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6),
)


@settings(deadline=None)
@given(arrays)
def test_any_array_is_read_or_refused(array):
    for read, shape in ((to_rgb, (3,)), (to_mask, ())):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                pixels = read(array)
        except RequestError:
            continue
        assert pixels.shape == (*array.shape[:2], *shape)


sides = st.integers(1, 90)


@settings(deadline=None, max_examples=60)
@given(sides, sides, st.none() | st.integers(1, 6), st.none() | st.integers(1, 6), sides, sides, st.data())
def test_any_picture_and_mask_fit_and_what_is_kept_stays_to_the_byte(width, height, wide, tall, mw, mh, data):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    mask = (rng.uniform(size=(mh, mw)) < data.draw(st.sampled_from([0, 0.02, 0.5, 1]))).astype(np.uint8) * 255
    padding = data.draw(st.none() | st.integers(0, 9))
    size = (None if wide is None else 8 * wide, None if tall is None else 8 * tall)
    made = canvas(
        image, mask, size=size, multiple=8, largest=64, padding=padding, feather=data.draw(st.sampled_from([0, 2]))
    )
    assert made.pixels.shape[:2] == made.mask.shape
    assert all(side % 8 == 0 and side > 0 for side in made.mask.shape)
    assert latent_mask(made.mask, 8).shape == (made.mask.shape[0] // 8, made.mask.shape[1] // 8, 1)
    result = pasted(made, rng.uniform(size=made.pixels.shape).astype(np.float32))
    kept = made.paste == 0
    assert np.array_equal(np.round(result * 255).astype(np.uint8)[kept], made.whole[kept])
    assert np.array_equal(np.round(pasted(untouched(made), 0 * result[:8, :8]) * 255), made.whole)


def test_a_picture_of_the_right_size_is_not_touched():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    assert np.array_equal(canvas(image, None, size=(None, None), multiple=8, largest=64).pixels, image)


def test_rounding_takes_no_crop_out_of_its_picture():
    too_far = [(width, side) for width in range(1, 91) for side in range(8, 513, 8) if width / side * side > width]
    assert too_far
    for width, side in too_far:
        image = np.full((90, width, 3), 255, np.uint8)
        made = canvas(image, None, size=(side, side), multiple=8, largest=64)
        assert made.pixels.min() == 255


def test_a_picture_is_cropped_around_its_centre():
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    assert (canvas(image, None, size=(16, 16), multiple=8, largest=64).pixels == 255).mean() > 0.95


def test_a_mask_of_another_size_lies_over_the_whole_picture():
    made = canvas(np.zeros((64, 32, 3), np.uint8), np.eye(2) > 0, size=(None, None), multiple=8, largest=64)
    assert made.mask[:16, :8].min() > 0.9
    assert made.mask[48:, :8].max() < 0.1


def test_the_masked_region_alone_gets_the_whole_size():
    mask = np.zeros((96, 200), np.uint8)
    mask[40:60, 100:130] = 255
    made = canvas(np.zeros((96, 200, 3), np.uint8), mask, size=(64, 64), multiple=8, largest=64, padding=5)
    assert made.box == (95, 30, 135, 70)  # 40 wide with its surroundings, and as tall, for the target is square
    assert made.pixels.shape == (64, 64, 3)
    assert made.mask.mean() == pytest.approx(20 * 30 / 40**2, abs=0.02)
