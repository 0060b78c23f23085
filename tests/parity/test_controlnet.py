"""ControlNets against diffusers: one and several, scales, shares of the steps, guess mode."""

import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from reference import channels_first, channels_last, pipeline

import sdjax
from sdjax.pipeline import ControlInput

TOLERANCE = 1e-4
PROMPT, NEGATIVE = "the cat sat on the mat", "a"
RNG = np.random.default_rng(7)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2)]
NOISE = RNG.normal(size=(1, 8, 8, 4)).astype(np.float32)
SETTINGS = {"guidance_scale": 5.0, "height": 64, "width": 64}


def random_controlnet(unet, seed, folder):
    """A ControlNet whose layers of zeros hold random numbers, so that it is heard."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    net.save_pretrained(folder)
    return net.eval()


@pytest.fixture(scope="module", params=["sd-v1-5", "sd-xl"])
def controlled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = pipeline(request.param, folder)
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config, clip_sample=False)
    nets = [random_controlnet(reference.unet, seed, folder / f"control-{seed}") for seed in (0, 1)]
    pipe = sdjax.Pipeline.from_pretrained(folder / "model")
    return reference, nets, pipe, [folder / "control-0", folder / "control-1"]


def expected(reference, nets, **settings):
    is_xl = hasattr(reference, "text_encoder_2")
    kind = diffusers.StableDiffusionXLControlNetPipeline if is_xl else diffusers.StableDiffusionControlNetPipeline
    parts = {name: part for name, part in reference.components.items() if name != "image_encoder"}
    more = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    made = kind(**parts, controlnet=nets, **more)
    made.set_progress_bar_config(disable=True)
    return channels_last(
        made(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=8, latents=channels_first(NOISE),
            output_type="latent", **SETTINGS, **settings,
        ).images
    )  # fmt: skip


def drawn(pipe, control):
    settings = {"latents": NOISE, "output": "latents", **SETTINGS}
    return pipe(PROMPT, NEGATIVE, steps=8, control=control, **settings).images


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"scale": 0.8}, {"controlnet_conditioning_scale": 0.8}),
        (
            {"scale": 1.2, "start": 0.25, "end": 0.7},
            {"controlnet_conditioning_scale": 1.2, "control_guidance_start": 0.25, "control_guidance_end": 0.7},
        ),
        ({"scale": 1.0, "guess": True}, {"controlnet_conditioning_scale": 1.0, "guess_mode": True}),
    ],
    ids=["scale", "share of the steps", "guess mode"],
)
def test_one_controlnet_agrees(controlled, ours, theirs):
    reference, nets, pipe, folders = controlled
    want = expected(reference, nets[0], image=PICTURES[0], **theirs)
    got = drawn(pipe, [ControlInput(folders[0], PICTURES[0], **ours)])
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
    assert np.abs(got - drawn(pipe, ())).max() > 1e-2


def test_two_controlnets_agree(controlled):
    reference, nets, pipe, folders = controlled
    want = expected(
        reference, diffusers.MultiControlNetModel(nets), image=PICTURES, controlnet_conditioning_scale=[0.5, 0.9]
    )
    got = drawn(pipe, [(folders[0], PICTURES[0], 0.5), (folders[1], PICTURES[1], 0.9)])
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_a_scale_of_zero_is_no_controlnet(controlled):
    _, _, pipe, folders = controlled
    np.testing.assert_allclose(drawn(pipe, [(folders[0], PICTURES[0], 0.0)]), drawn(pipe, ()), atol=1e-5)


def test_another_scale_or_share_of_the_steps_compiles_nothing(controlled, compilations):
    _, _, pipe, folders = controlled
    drawn(pipe, [(folders[0], PICTURES[0], 0.5)])
    compilations.clear()
    drawn(pipe, [ControlInput(folders[0], PICTURES[1], 0.7, start=0.1, end=0.5)])
    drawn(pipe, [ControlInput(folders[0], PICTURES[1], -0.3, guess=True)])
    drawn(pipe, [(folders[1], PICTURES[1], 0.5)])
    assert compilations == []


def test_a_controlnet_replaced_between_two_slices_changes_nothing_of_that_call(controlled, tmp_path):
    _, _, pipe, folders = controlled
    folder = shutil.copytree(folders[0], tmp_path / "net")

    def replace(done, _):
        if done == 1:
            shutil.copytree(folders[1], folder, dirs_exist_ok=True)

    def latents(net, progress=None):
        return pipe(
            PROMPT, control=[(net, PICTURES[0], 1.0)], steps=6, seed=1, output="latents", progress=progress, **SETTINGS
        ).images

    before, after = (latents(net, lambda *_: None) for net in folders)
    np.testing.assert_array_equal(latents(folder, replace), before)
    np.testing.assert_array_equal(latents(folder, lambda *_: None), after)
    assert np.abs(after - before).max() > 0.01


def test_a_controlnet_of_another_model_is_refused(controlled, tmp_path):
    reference, _, pipe, _ = controlled
    config = {**reference.unet.config, "block_out_channels": (16, 16)}
    random_controlnet(diffusers.UNet2DConditionModel.from_config(config), 2, tmp_path)
    with pytest.raises(sdjax.RequestError, match=r"another model: its block_out_channels is \(16, 16\)"):
        drawn(pipe, [(tmp_path, PICTURES[0], 1.0)])


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ([("nowhere", PICTURES[0], 1.0)], "no folder or file 'nowhere'"),
        ([("nowhere",)], "control.0. must be"),
        ([("nowhere", PICTURES[0], float("nan"))], "control.0..scale must be a finite number"),
        ([("nowhere", PICTURES[0], 1.0, 0.5, 0.5)], "which is never"),
        ([("nowhere", "a picture", 1.0)], "control.0..image must be a PIL image"),
    ],
)
def test_what_makes_no_sense_is_refused(controlled, control, said):
    with pytest.raises(sdjax.SdjaxError, match=said):
        drawn(controlled[2], control)
