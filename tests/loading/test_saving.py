"""What is saved is what was loaded, for us and for diffusers, and a failed save leaves what was there."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch

import sdjax
from sdjax import CheckpointError
from sdjax.loading import load, save_folder, saving
from sdjax.pipeline import BUNDLED_FOLDER


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_round_trip_changes_no_bit(dtype, tmp_path):
    checkpoint = load(BUNDLED_FOLDER, dtype=dtype)
    save_folder(checkpoint, tmp_path / "saved")
    again = load(tmp_path / "saved", dtype=dtype)
    assert same(again.params, checkpoint.params)
    assert again.definition == checkpoint.definition
    assert again.scheduler == checkpoint.scheduler
    text = "a red circle, above: a BLUE square!"
    assert [words.words(text) for words in again.tokenizers] == [words.words(text) for words in checkpoint.tokenizers]


@pytest.mark.parametrize("name", ["sd1", "sd2-inpaint", "sdxl", "refiner"])
def test_diffusers_loads_what_was_saved_from_a_file(name, layouts, loaded, tmp_path):
    both = layouts(name)
    save_folder(loaded(name), tmp_path / "saved")
    ours, theirs = (diffusers.DiffusionPipeline.from_pretrained(path) for path in (tmp_path / "saved", both.folder))
    assert type(ours) is type(theirs)
    assert ours.config.get("requires_aesthetics_score") == theirs.config.get("requires_aesthetics_score")
    assert ours.config.get("force_zeros_for_empty_prompt") == theirs.config.get("force_zeros_for_empty_prompt")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model, expected = getattr(ours, part, None), getattr(theirs, part, None)
        assert (model is None) == (expected is None)
        if expected is not None:
            state, wanted = model.state_dict(), expected.state_dict()
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert ours.vae.config.scaling_factor == theirs.vae.config.scaling_factor
    words = "tokenizer_2" if name in ("sdxl", "refiner") else "tokenizer"
    prompt = "a fox! in the snow"
    assert getattr(ours, words)(prompt).input_ids == getattr(theirs, words)(prompt).input_ids


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_diffusers_draws_what_we_draw_from_what_was_saved(name, loaded, tmp_path):
    save_folder(loaded(name), tmp_path / "saved")
    reference = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    expected = reference(
        "a fox",
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images
    pipe = sdjax.Pipeline.from_pretrained(tmp_path / "saved")
    drawn = pipe(
        "a fox", steps=3, guidance_scale=4.0, height=64, width=64, sampler="ddim", latents=noise, output="latents"
    )
    np.testing.assert_allclose(drawn.images, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=0)


def test_diffusers_loads_bfloat16_as_bfloat16(tmp_path):
    save_folder(load(BUNDLED_FOLDER, dtype="bfloat16"), tmp_path / "saved")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    kept = load(BUNDLED_FOLDER, dtype="bfloat16").params["unet"]["conv_in"]["bias"]
    assert pipe.unet.conv_in.bias.dtype == torch.bfloat16
    assert np.array_equal(np.asarray(kept, np.float32), pipe.unet.conv_in.bias.detach().float().numpy())
    assert pipe.text_encoder.dtype == torch.bfloat16


def test_an_override_of_the_prediction_type_is_saved(tmp_path):
    save_folder(load(BUNDLED_FOLDER, dtype="float32", prediction_type="sample"), tmp_path / "saved")
    assert load(tmp_path / "saved", dtype="float32").scheduler.prediction_type == "sample"


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    checkpoint = load(BUNDLED_FOLDER, dtype="float32")
    save_folder(checkpoint, tmp_path / "saved")
    before = contents(tmp_path / "saved")
    written = []

    def full_disk(tensors, file, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(file)
        file.write_bytes(b"half")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_folder(load(BUNDLED_FOLDER, dtype="float16"), tmp_path / "saved")
    assert contents(tmp_path / "saved") == before
    with pytest.raises(OSError, match="No space left"):
        save_folder(checkpoint, tmp_path / "fresh")
    assert contents(tmp_path / "fresh") == {}


def test_saving_over_another_model_leaves_none_of_its_weights(tmp_path):
    folder = tmp_path / "saved"
    checkpoint = load(BUNDLED_FOLDER, dtype="float32")
    save_folder(checkpoint, folder)
    # Left by a sharded model that was here before: its index would win over the single file.
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("mine")
    save_folder(checkpoint, folder)
    assert same(load(folder, dtype="float32").params, checkpoint.params)
    assert (folder / "README.md").read_text() == "mine"
    assert not list(folder.glob(".saving-*"))


def test_a_file_in_the_folders_place_is_not_overwritten(tmp_path):
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file, and a checkpoint is saved as a folder"):
        save_folder(load(BUNDLED_FOLDER, dtype="float32"), tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


def test_a_checkpoint_may_be_saved_over_the_folder_it_came_from(tmp_path):
    save_folder(load(BUNDLED_FOLDER, dtype="float32"), tmp_path / "saved")
    checkpoint = load(tmp_path / "saved", dtype="float32")
    save_folder(checkpoint, tmp_path / "saved")
    assert same(load(tmp_path / "saved", dtype="float32").params, checkpoint.params)
