"""Tiles of the autoencoder against the whole picture."""

from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax.generation.tiling import in_tiles
from sdjax.pipeline import decode, encode
from training.drawings import draw, sample_scene

coded = jax.jit(encode, static_argnums=(0, 3))
decoded = jax.jit(decode, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.mark.parametrize("size", [(72, 104), (130, 66), (5, 7), (16, 16), (17, 40)])
def test_a_local_function_is_the_same_in_tiles(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    np.testing.assert_allclose(in_tiles(lambda part: 2 * part + 1, 16, 1, 1)(x), 2 * x + 1, atol=1e-5)


def mosaic(width, height):
    rng = np.random.default_rng(1)
    rows = [np.concatenate([draw(sample_scene(rng)) for _ in range(width)], axis=1) for _ in range(height)]
    return np.concatenate(rows, axis=0)[None].astype(np.float32) / 255


@pytest.mark.parametrize(("width", "height"), [(5, 3), (2, 6)])
def test_tiles_differ_little_from_the_whole(pipe, width, height):
    """The norms of a tile see other pictures than the whole's: that is the difference, and this its measure."""
    picture = mosaic(width, height)
    latents = coded(pipe.definition, pipe.params, picture, None)
    tiled = coded(pipe.definition, pipe.params, picture, 32)
    assert tiled.shape == latents.shape
    assert np.abs(tiled - latents).mean() < 0.06 * np.std(latents)
    whole = np.asarray(decoded(pipe.definition, pipe.params, latents, None))
    parts = np.asarray(decoded(pipe.definition, pipe.params, latents, 32))
    assert parts.shape == whole.shape
    assert np.abs(parts - whole).mean() < 2 / 255


def test_there_is_no_seam(pipe):
    """Steps between neighbouring pixels are no larger where tiles begin and end than they are in the whole picture."""
    soft = Image.fromarray(np.random.default_rng(2).integers(0, 256, (3, 5, 3), np.uint8)).resize((320, 192))
    latents = coded(pipe.definition, pipe.params, np.asarray(soft, np.float32)[None] / 255, None)
    steps = [
        np.abs(np.diff(np.asarray(decoded(pipe.definition, pipe.params, latents, tile))[0], axis=1)).mean((0, 2))
        for tile in (None, 32)
    ]
    begins = np.array([96, 192])  # in pixels: tiles of 128 that overlap by 32 on 320
    seams = np.concatenate([begins, begins + 32]) - 1
    assert np.max((steps[1] - steps[0])[seams]) < 1 / 255


def test_tiles_are_chosen_by_size_and_said(pipe):
    assert pipe.resolve("a star", width=1024, height=1024).tile is None
    large = pipe.resolve("a star", width=1024, height=1028)
    assert large.tile == 256
    assert [line for line in large.warnings if "1024x1028 is encoded and decoded in tiles" in line]
    assert pipe.resolve("a star", width=2048, height=2048, tiling=False).tile is None
    assert pipe.resolve("a star", tiling=True).tile == 256


def decoding_peak(pipe, batch, side, tile):
    """Bytes that decoding takes beside what it returns."""
    latents = jax.ShapeDtypeStruct((batch, side, side, 4), np.float32)
    compiled = decoded.lower(pipe.definition, pipe.params, latents, tile).compile()
    return compiled.memory_analysis().temp_size_in_bytes - batch * 3 * 4 * (4 * side) ** 2


def test_memory_stops_growing_with_the_picture(pipe):
    peak = partial(decoding_peak, pipe, 1)
    assert peak(128, None) > 3 * peak(64, None)
    assert peak(256, 64) < 1.6 * peak(128, 64)


def test_memory_stops_growing_with_the_batch(pipe):
    peak = partial(decoding_peak, pipe, side=128, tile=None)
    assert peak(16) < 1.3 * peak(4)  # four pictures of 512 x 512 are the most that is decoded at once
