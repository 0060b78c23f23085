"""What a notebook shows."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

import sdjax


@pytest.fixture(scope="module")
def out():
    return sdjax.Pipeline.from_pretrained()("a red circle", seed=1, steps=2, num_images=2)


def test_an_output_shows_its_pictures(out):
    shown = out._repr_html_()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert len(found) == 2
    for data, image in zip(found, out.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(image))
    assert "seed 1" in shown
    assert "seed 2" in shown


def test_an_output_of_arrays_shows_as_text():
    out = sdjax.Pipeline.from_pretrained()("a red circle", seed=1, steps=1, output="latents")
    assert "img" not in out._repr_html_()


def test_progress_counts_steps(capsys):
    seen = []
    pipe = sdjax.Pipeline.from_pretrained()
    pipe("a red circle", steps=5, sampler="heun", progress=lambda *said: seen.append(said))
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    pipe("a red circle", steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
