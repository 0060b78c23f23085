"""ControlNets and autoencoders by themselves: folders, variants, single files of both layouts, against diffusers."""

import json
import shutil
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from originals import FAMILIES, unet_name
from PIL import Image
from safetensors.torch import load_file, save_file

import sdjax
from sdjax.arguments import with_variant
from sdjax.devices.target import local_target
from sdjax.errors import CheckpointError, RequestError
from sdjax.loading.controlnet import load_controlnet
from sdjax.loading.saving import tensors_of
from sdjax.models import UNetConfig

STEM = "diffusion_pytorch_model"
HINTS = (16, 32, 96, 256)
UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """A random ControlNet of each family, saved by diffusers in a folder of its own."""

    @cache
    def made(name):
        torch.manual_seed(3)
        unet = diffusers.UNet2DConditionModel(**FAMILIES[name].unet)
        net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINTS)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(name)
        net.save_pretrained(folder / "net")
        return unet, net, folder

    return made


def loaded(unet, source):
    like = UNetConfig.from_dict(dict(unet.config))
    _, params, config = load_controlnet(
        source, like=like, dtype="float32", target=local_target(), place=lambda _, array: array
    )
    # The size that it was trained on is not a part of what it computes.
    config = replace(config, unet=replace(config.unet, native_size=(1, 1)))
    return {name: np.asarray(tensor) for name, tensor in tensors_of(params).items()}, config


def original_names_of(unet, net):
    """A ControlNet's tensors as the original layout spells them."""
    tensors = {}
    for key, tensor in net.state_dict().items():
        module, _, leaf = key.rpartition(".")
        part, *rest = module.split(".")
        blocks = 2 * (len(HINTS) - 1)
        if part == "controlnet_cond_embedding":
            place = {"conv_in": 0, "conv_out": 2 * (blocks + 1)}.get(rest[0])
            spelled = f"input_hint_block.{2 * (int(rest[1]) + 1) if place is None else place}.{leaf}"
        elif part == "controlnet_down_blocks":
            spelled = f"zero_convs.{rest[0]}.0.{leaf}"
        elif part == "controlnet_mid_block":
            spelled = f"middle_block_out.0.{leaf}"
        else:
            spelled = unet_name(key, unet)
        tensors[spelled] = tensor.contiguous()
    return tensors


def assert_same(found, net):
    state = net.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy().reshape(found[name].shape), err_msg=name)


@pytest.mark.parametrize("prefix", ["", "control_model."])
@pytest.mark.parametrize("family", UNETS)
def test_a_controlnet_of_one_file_in_the_original_layout_is_that_of_its_folder(nets, family, prefix, tmp_path):
    unet, net, folder = nets(family)
    tensors = original_names_of(unet, net)
    theirs = convert_controlnet_checkpoint(dict(tensors), dict(net.config))
    # diffusers' converter leaves out what SDXL's ControlNets have beside the others.
    known = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("add_embedding")}
    assert theirs.keys() == known.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in known.items())
    beside = {"global_step": torch.tensor(3)}
    save_file({prefix + name: tensor for name, tensor in tensors.items()} | beside, tmp_path / "net.safetensors")
    found, config = loaded(unet, sdjax.Part(tmp_path / "net.safetensors"))
    assert_same(found, net)
    assert config == loaded(unet, sdjax.Part(folder / "net"))[1]


@pytest.mark.parametrize("family", UNETS)
def test_a_controlnet_of_one_file_under_the_names_of_diffusers_is_that_of_its_folder(nets, family, tmp_path):
    unet, net, folder = nets(family)
    shutil.copy(folder / "net" / f"{STEM}.safetensors", tmp_path / "canny.safetensors")
    found, config = loaded(unet, sdjax.Part(tmp_path / "canny.safetensors"))
    assert_same(found, net)
    assert config == loaded(unet, sdjax.Part(folder / "net"))[1]
    # A folder's file by its own path has the folder's config.
    assert loaded(unet, sdjax.Part(folder / "net" / f"{STEM}.safetensors"))[1] == config


def test_a_variant_is_taken_when_it_is_asked_for_and_the_error_says_how(nets, tmp_path):
    unet, net, _ = nets("sd1")
    net.save_pretrained(tmp_path / "net", variant="fp16")
    found, _ = loaded(unet, sdjax.Part(tmp_path / "net", variant="fp16"))
    assert_same(found, net)
    with pytest.raises(CheckpointError, match=f'lacks {STEM}.safetensors.*ask for variant="fp16"'):
        loaded(unet, sdjax.Part(tmp_path / "net"))
    save_file({"x": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="is one file, and variant='fp16' picks among those of a folder"):
        loaded(unet, sdjax.Part(tmp_path / "net.safetensors", variant="fp16"))


def test_a_whole_pipeline_s_folder_gives_its_own_controlnet(nets, tmp_path):
    unet, net, folder = nets("sd1")
    shutil.copytree(folder / "net", tmp_path / "model" / "controlnet")
    found, _ = loaded(unet, sdjax.Part(tmp_path / "model"))
    assert_same(found, net)


def test_what_is_no_controlnet_is_refused_by_name(nets, tmp_path):
    unet, net, _ = nets("sd1")
    (tmp_path / "empty").mkdir()
    save_file(net.state_dict() | {"task_embedding": torch.zeros(6, 32)}, tmp_path / "union.safetensors")
    save_file(original_names_of(unet, net) | {"difference": torch.zeros(1)}, tmp_path / "difference.safetensors")
    state = {name: tensor for name, tensor in net.state_dict().items() if "mid_block.1" not in name}
    save_file({k: v for k, v in state.items() if "controlnet_mid" not in k}, tmp_path / "half.safetensors")
    for name, words in (
        ("empty", "has no config.json, nor has a folder 'controlnet' in it"),
        ("union.safetensors", "'task_embedding', which its config has no place for"),
        ("difference.safetensors", "'difference', which no Stable Diffusion model"),
        ("half.safetensors", "lacks 'controlnet_mid_block"),
        ("absent", "there is no folder or file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            loaded(unet, sdjax.Part(tmp_path / name))


def test_a_call_takes_a_file_and_a_variant(layouts, nets, tmp_path):
    pipe = sdjax.Pipeline.from_pretrained(layouts("sd1").folder, dtype="float32")
    unet, net, folder = nets("sd1")
    save_file(original_names_of(unet, net), tmp_path / "net.safetensors")
    net.save_pretrained(tmp_path / "net", variant="fp16")
    picture = Image.new("RGB", (64, 64), "red")
    settings = {"steps": 1, "seed": 1, "width": 64, "height": 64, "output": "latents"}

    def latents(model):
        return pipe("a cat", control=[(model, picture, 1.0)], **settings).images

    expected = latents(folder / "net")
    np.testing.assert_array_equal(latents(str(tmp_path / "net.safetensors")), expected)
    np.testing.assert_array_equal(latents(sdjax.Part(tmp_path / "net", variant="fp16")), expected)
    assert np.abs(expected - pipe("a cat", **settings).images).max() > 1e-3
    with pytest.raises(RequestError, match=r"control\[0\].model must be a folder, .* or a Part, not 3"):
        latents(3)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another autoencoder, with a scale of its own, saved in every form; and diffusers' own."""
    from originals import pipeline

    torch.manual_seed(9)
    made = pipeline("sd1").vae
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.register_to_config(scaling_factor=0.3)
    folder = tmp_path_factory.mktemp("other")
    made.save_pretrained(folder / "folder")
    made.save_pretrained(folder / "halves", variant="fp16")
    shutil.copytree(folder / "folder", folder / "pipeline" / "vae")
    return made, folder


def original_vae(vae, prefix):
    from originals import _as_conv, vae_name

    return {prefix + vae_name(k): _as_conv(k, t).contiguous() for k, t in vae.state_dict().items()}


VAES = {
    "a folder": lambda folder, _: folder / "folder",
    "a file of the folder": lambda folder, _: folder / "folder" / f"{STEM}.safetensors",
    "a variant": lambda folder, _: sdjax.Part(folder / "halves", variant="fp16"),
    "a pipeline's folder": lambda folder, _: str(folder / "pipeline"),
    "a file in the original layout": lambda folder, write: write(""),
    "a whole checkpoint's file": lambda folder, write: write("first_stage_model."),
}


@pytest.mark.parametrize("form", VAES)
def test_another_autoencoder_takes_the_place_of_the_checkpoint_s_own(layouts, other, form, tmp_path):
    vae, folder = other
    beside = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}

    def write(prefix):
        rest = layouts("sd1").tensors if prefix else beside
        save_file(rest | original_vae(vae, prefix), tmp_path / "vae.safetensors")
        return tmp_path / "vae.safetensors"

    plain = sdjax.Pipeline.from_pretrained(layouts("sd1").folder, dtype="float32")
    pipe = sdjax.Pipeline.from_pretrained(layouts("sd1").folder, dtype="float32", vae=VAES[form](folder, write))
    # A file without a config does not show the scale of latents: it is the checkpoint's own.
    assert pipe.definition.vae_config.scaling_factor == (0.18215 if "original" in form or "whole" in form else 0.3)
    for name, tensor in tensors_of(pipe.params["vae"]).items():
        expected = vae.state_dict()[name].numpy()
        np.testing.assert_array_equal(tensor, expected.reshape(tensor.shape), err_msg=name)
    for name, tensor in tensors_of(pipe.params["unet"]).items():
        np.testing.assert_array_equal(tensor, tensors_of(plain.params["unet"])[name])


def test_a_saved_pipeline_has_the_other_autoencoder_and_diffusers_reads_it(layouts, other, tmp_path):
    vae, folder = other
    sdjax.Pipeline.from_pretrained(layouts("sd1").folder, vae=folder / "folder").save_pretrained(tmp_path / "saved")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "saved" / "vae")
    assert again.config.scaling_factor == 0.3
    for name, tensor in vae.state_dict().items():
        assert torch.equal(again.state_dict()[name].reshape(tensor.shape), tensor)


def test_autoencoders_of_another_kind_or_width_are_refused(layouts, other, tmp_path):
    _, folder = other
    config = json.loads((folder / "folder" / "config.json").read_text())
    for name, changes, words in (
        ("tiny", {"_class_name": "AutoencoderTiny"}, "is an AutoencoderTiny, and only AutoencoderKL is supported"),
        ("wide", {"latent_channels": 16}, "decoder.conv_in.weight has shape|in_channels is 4"),
    ):
        shutil.copytree(folder / "folder", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=words):
            sdjax.Pipeline.from_pretrained(layouts("sd1").folder, vae=tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no folder or file"):
        sdjax.Pipeline.from_pretrained(layouts("sd1").folder, vae=tmp_path / "absent")
    with pytest.raises(RequestError, match="vae must be a folder"):
        sdjax.Pipeline.from_pretrained(layouts("sd1").folder, vae=3)
    assert load_file(folder / "folder" / f"{STEM}.safetensors")


def test_the_command_line_writes_a_variant_behind_an_at_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me@home").mkdir()
    assert with_variant("owner/net@fp16") == ("owner/net", "fp16")
    assert with_variant("owner/net") == ("owner/net", None)
    assert with_variant("me@home") == ("me@home", None)
    assert with_variant("me@home@fp16") == ("me@home", "fp16")
