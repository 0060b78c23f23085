"""An adapter's file may be replaced at any time: a job is drawn to its end with what the file held when it began."""

import numpy as np
import pytest

from sdjax.serve import drawing
from tests.loading import lora_files
from tests.serve.engine.jobs import PROMPT, REQUEST, pixels

ENDINGS = {"unet": ("attn2.to_q", "attn2.to_v", "conv1")}
STRENGTH = 0.8


def write(pipe, file, seed):
    return lora_files.write(lora_files.new_diffusers(lora_files.random_layers(pipe.params, ENDINGS, seed=seed)), file)


@pytest.fixture
def adapters(pipe, tmp_path):
    """A path that jobs name, holding the first adapter, and both adapters elsewhere."""
    path, old, new = (
        write(pipe, tmp_path / name / "style.safetensors", seed) for name, seed in (("at", 1), ("old", 1), ("new", 2))
    )
    return path, old, new


def by_library(pipe, job, adapter):
    asked = {name: job.request[name] for name in ("seed", "steps", "guidance_scale", "sampler")}
    return np.asarray(pipe(PROMPT, loras=[(adapter, STRENGTH)], **asked).images[0])


def test_a_file_replaced_between_two_slices_changes_no_picture_and_two_contents_share_no_batch(
    pipe, store, start, submit, ended, adapters, monkeypatch
):
    path, old, new = adapters
    loras = [{"path": str(path), "strength": STRENGTH}]
    expected, later = [], []
    walk = drawing.walk

    def replacing(pipe, rows, *rest):
        after = walk(pipe, rows, *rest)
        if rows[0].job_id and not later and rows[0].left > 20:
            write(pipe, path, seed=2)
            later.append(submit(loras=loras, seed=1, steps=40))
        return after

    start()
    monkeypatch.setattr(drawing, "walk", replacing)
    first = submit(loras=loras, seed=1, steps=120)
    ended([first])
    ended(later)
    expected = [by_library(pipe, first, old), by_library(pipe, later[0], new)]
    np.testing.assert_array_equal(pixels(store, first), expected[0])
    np.testing.assert_array_equal(pixels(store, later[0]), expected[1])


def test_all_pictures_of_a_job_have_the_same_adapter(pipe, adapters, monkeypatch):
    path, *_ = adapters
    asked = {**REQUEST, "loras": [{"path": str(path), "strength": STRENGTH}], "num_images": 2}
    prepare = type(pipe).prepare

    def replacing(self, request, *weights):
        prepared = prepare(self, request, *weights)
        write(pipe, path, seed=2)
        return prepared

    monkeypatch.setattr(type(pipe), "prepare", replacing)
    first, second = drawing.prepare(pipe, "", drawing.requests(pipe, None, asked))
    assert first.weights is second.weights


def test_the_key_of_a_batch_is_the_adapters_content(pipe, adapters):
    path, old, new = adapters

    def key(file, strength=STRENGTH):
        asked = {**REQUEST, "loras": [{"path": str(file), "strength": strength}] if file else []}
        (row,) = drawing.prepare(pipe, "", drawing.requests(pipe, None, asked))
        return drawing.key(row)

    assert key(path) == key(old) != key(new)
    assert key(old) != key(old, 0.5)
    assert key(None) == key(old, 0.0) != key(old)
    before = key(path)
    write(pipe, path, seed=2)
    assert key(path) == key(new) != before
