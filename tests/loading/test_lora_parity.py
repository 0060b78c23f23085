"""LoRA files in every spelling, against diffusers with peft on the same tiny checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import sdjax
from sdjax.loading import apply_lora, read_lora
from sdjax.loading.lora_names import original_names
from tests.loading.lora_files import (
    ATTENTION,
    TEXT,
    effective_weights,
    kohya,
    new_diffusers,
    old_diffusers,
    random_layers,
    weights_of,
    write,
)
from tests.parity.reference import channels_first, pipeline

UNET_LAYERS = (*ATTENTION, "conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out")
UNET_LAYERS += ("time_emb_proj", "ff.net.0.proj", "ff.net.2", "conv_shortcut")
ENDINGS = {"unet": UNET_LAYERS, "text_encoder": TEXT}
XL_ENDINGS = {**ENDINGS, "text_encoder_2": TEXT}
FEW = {"unet": ATTENTION, "text_encoder": ("q_proj", "out_proj")}
PROMPT = "the cat"


class Pair:
    """A checkpoint in both libraries."""

    def __init__(self, name, folder):
        self.reference = pipeline(name, folder)
        self.ours = sdjax.Pipeline.from_pretrained(folder / "model", dtype="float32")
        self.endings = XL_ENDINGS if "xl" in name else ENDINGS
        self.is_xl = "xl" in name


@pytest.fixture(scope="module", params=["sd-v1-5", "sd-xl"])
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def loaded(reference, files, weights):
    """What diffusers computes with after loading files with weights; the pipeline is then as before."""
    for i, file in enumerate(files):
        reference.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{i}")
    reference.set_adapters([f"a{i}" for i in range(len(files))], weights)
    try:
        return effective_weights(reference)
    finally:
        reference.unload_lora_weights()


def assert_same_weights(params, merged, expected):
    """The layers that diffusers changed are ours to rounding, and all others are untouched."""
    before, after = weights_of(params), weights_of(merged)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == expected.keys()
    for name, weight in expected.items():
        ours = after[name].reshape(weight.shape)
        np.testing.assert_allclose(ours, weight, atol=2e-5 * np.abs(weight).max(), err_msg=name)


@pytest.mark.parametrize("spelling", ["new diffusers", "old diffusers", "kohya", "kohya without alpha"])
def test_a_file_changes_the_weights_as_in_diffusers(pair, spelling, tmp_path):
    # One alpha for all layers: diffusers loses alphas that differ between attention's layers (peft warns that its
    # pattern matched nothing). Ours are checked against the closed form in test_lora.py.
    params = pair.ours.params
    layers = random_layers(params, pair.endings, alphas=(None if "without" in spelling else 3.0,), ranks=(4, 2, 6))
    spell = {"new diffusers": new_diffusers, "old diffusers": old_diffusers}.get(
        spelling, lambda layers: kohya(layers, params if pair.is_xl else None)
    )
    file = write(spell(layers), tmp_path / "style.v1.5 ü.safetensors")
    merged = apply_lora(params, [(read_lora(file, params), 0.75)])
    assert_same_weights(params, merged, loaded(pair.reference, [file], [0.75]))


def test_an_adapter_saved_by_peft_with_its_settings_is_scaled_as_in_diffusers(pair, tmp_path):
    params = pair.ours.params
    for rslora in (False, True):
        torch.manual_seed(3)
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", "use_rslora": rslora}
        config = LoraConfig(
            target_modules=["to_q", "to_v", "conv1"], rank_pattern={"to_v": 2}, alpha_pattern={"to_v": 3}, **settings
        )
        pair.reference.unet.add_adapter(config)
        for name, parameter in pair.reference.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        expected = effective_weights(pair.reference)
        folder = tmp_path / f"rslora {rslora}"
        pair.reference.unet.save_lora_adapter(folder / "plain")
        type(pair.reference).save_lora_weights(
            folder / "diffusers",
            unet_lora_layers=get_peft_model_state_dict(pair.reference.unet),
            unet_lora_adapter_metadata=pair.reference.unet.peft_config["default"].to_dict(),
        )
        peft_folder = folder / "peft" / "unet"
        config.save_pretrained(peft_folder)
        state = {f"base_model.model.{k}": v.numpy() for k, v in get_peft_model_state_dict(pair.reference.unet).items()}
        write(state, peft_folder / "adapter_model.safetensors")
        pair.reference.unet.delete_adapters("default")
        for source in (folder / "diffusers", peft_folder, folder / "peft"):
            merged = apply_lora(params, [(read_lora(source, params), 1.0)])
            assert_same_weights(params, merged, expected)


def test_several_adapters_are_added_with_their_weights_as_in_diffusers(pair, tmp_path):
    params = pair.ours.params
    one = write(new_diffusers(random_layers(params, pair.endings, seed=1)), tmp_path / "one.safetensors")
    other = write(old_diffusers(random_layers(params, FEW, seed=2, ranks=(2,))), tmp_path / "other.safetensors")
    weights = [0.5, -1.25]
    merged = apply_lora(params, [(read_lora(f, params), w) for f, w in zip((one, other), weights, strict=True)])
    assert_same_weights(params, merged, loaded(pair.reference, [one, other], weights))


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_dora_is_as_in_peft(pair, weight, tmp_path):
    params = pair.ours.params
    rng = np.random.default_rng(5)
    layers = random_layers(params, {"unet": (*ATTENTION, "conv1", "conv_shortcut")}, seed=6)
    tensors = new_diffusers(layers)
    for layer in layers:
        magnitude = rng.uniform(0.5, 2, len(layer.up)).astype(np.float32)
        shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
        tensors[f"unet.{layer.name}.lora_magnitude_vector"] = magnitude.reshape(shape)
    file = write(tensors, tmp_path / "dora.safetensors")
    merged = apply_lora(params, [(read_lora(file, params), weight)])
    assert_same_weights(params, merged, loaded(pair.reference, [file], [weight]))


def test_the_whole_picture_is_diffusers_picture(pair, tmp_path):
    params = pair.ours.params
    layers = random_layers(params, pair.endings, seed=4)
    small = [layer for layer in layers if layer.component == "unet" or layer.name.endswith(("q_proj", "out_proj"))]
    file = write(kohya(small, params if pair.is_xl else None), tmp_path / "style.safetensors")
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    settings = {"guidance_scale": 5.0, "width": 64, "height": 64}
    pair.reference.load_lora_weights(str(file), adapter_name="a")
    pair.reference.set_adapters(["a"], [0.3])
    expected = pair.reference(
        PROMPT, num_inference_steps=4, latents=channels_first(noise), output_type="np", **settings
    ).images
    pair.reference.unload_lora_weights()

    settings |= {"steps": 4, "sampler": "ddim", "latents": noise, "output": "numpy"}
    drawn = pair.ours(PROMPT, loras=[(file, 0.3)], **settings).images
    without = pair.ours(PROMPT, **settings).images
    assert np.abs(drawn - expected).max() < 1e-3
    assert np.abs(drawn - without).max() > 1e-2


def test_all_spellings_of_one_adapter_are_one_adapter(pair, tmp_path):
    params = pair.ours.params
    layers = random_layers(params, {**pair.endings, "unet": (*ATTENTION, "conv1")}, seed=8, alphas=(1.0, 4.0, 8.0))
    names = original_names(name.removeprefix("unet.") for name in weights_of(params))
    spelled = {
        "kohya": kohya(layers, params if pair.is_xl else None),
        "kohya with diffusers' blocks": kohya(layers),
        "kohya with the original layout's blocks": kohya(layers, params),
        "old diffusers": old_diffusers(layers),
        "new diffusers": new_diffusers(layers),
        "the original layout": new_diffusers(
            [replace(x, name=names[x.name]) if x.component == "unet" else x for x in layers], unet="diffusion_model"
        ),
    }
    merged = [
        flatten_dict(apply_lora(params, [(read_lora(write(tensors, tmp_path / f"{name}.safetensors"), params), 0.5)]))
        for name, tensors in spelled.items()
    ]
    for other in merged[1:]:
        for path, leaf in merged[0].items():
            np.testing.assert_allclose(other[path], leaf, atol=1e-5, err_msg=str(path))
