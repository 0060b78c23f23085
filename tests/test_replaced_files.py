"""A call is drawn to its end with what the files held when it began."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import sdjax
from tests.loading import lora_files

SETTINGS = {"seed": 3, "steps": 6, "output": "latents"}


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


def replaced_midway(pipe, prompt, replace, **settings):
    """Latents of a call during which files are replaced, between two slices."""
    done_before = []

    def progress(done, total):
        if done == 1:
            replace()
            done_before.append(total - done)

    drawn = pipe(prompt, progress=progress, **SETTINGS, **settings).images
    assert done_before == [5]
    return drawn


def check(pipe, prompt, replace, **settings):
    """Nothing of that call changes; the next one has the new file."""
    before = pipe(prompt, progress=lambda *_: None, **SETTINGS, **settings).images
    np.testing.assert_array_equal(replaced_midway(pipe, prompt, replace, **settings), before)
    assert np.abs(pipe(prompt, **SETTINGS, **settings).images - before).max() > 0.01


def test_a_lora_replaced_midway_changes_nothing_of_that_call(pipe, tmp_path):
    file = tmp_path / "style.safetensors"

    def write(seed):
        layers = lora_files.random_layers(pipe.params, {"unet": ("attn2.to_q", "attn2.to_v", "conv1")}, seed=seed)
        lora_files.write(lora_files.new_diffusers(layers), file)

    write(1)
    check(pipe, "a red circle", lambda: write(2), loras=[(file, 0.8)])


def test_a_lora_named_in_the_prompt_and_replaced_midway_changes_nothing_of_that_call(pipe, tmp_path):
    def write(seed):
        layers = lora_files.random_layers(pipe.params, {"unet": ("attn2.to_q", "conv1")}, seed=seed)
        lora_files.write(lora_files.new_diffusers(layers), tmp_path / "style.safetensors")

    write(1)
    check(pipe, "a red circle <lora:style:0.8>", lambda: write(2), lora_dir=tmp_path)


def test_an_embedding_replaced_midway_changes_nothing_of_that_call(pipe, tmp_path):
    width = pipe.checkpoint.configs["text_encoder"]["hidden_size"]
    file = tmp_path / "toy.safetensors"

    def write(seed):
        vectors = np.random.default_rng(seed).normal(size=(2, width)).astype(np.float32)
        save_file({"emb_params": vectors}, file)

    write(1)
    check(pipe, "a toy circle", lambda: write(2), embeddings=[file])
