"""Values of config.json files that are of another form than usual: honoured as in diffusers, or refused by name."""

import json

import diffusers
import pytest

import sdjax
from sdjax.errors import CheckpointError
from sdjax.models import CLIPTextConfig, ControlNetConfig, UNetConfig, VAEConfig
from sdjax.serve.served import served_model
from tests.parity.reference import UNET, pipeline

SIDES = [6, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    pipeline("sd-v1-5", folder)
    for part, size in (("unet", SIDES), ("vae", [48, 64])):
        file = folder / "model" / part / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "sample_size": size}))
    return folder / "model"


def test_a_sample_size_of_two_sides_is_height_and_width_as_in_diffusers(folder):
    pipe = sdjax.Pipeline.from_pretrained(folder)
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    theirs = reference("the cat", num_inference_steps=1, output_type="pil").images[0]
    ours = pipe("the cat", steps=1).images[0]
    factor = pipe.definition.vae_config.factor
    assert pipe.definition.native_size == (SIDES[1] * factor, SIDES[0] * factor)
    assert ours.size == theirs.size == pipe.definition.native_size
    assert pipe("the cat", steps=1, width=6 * factor).images[0].size == (6 * factor, 6 * factor)


def test_a_server_draws_such_a_model_s_own_size(folder):
    served = served_model(sdjax.Pipeline.from_pretrained(folder), None)
    factor = served.size // max(SIDES)
    assert (served.side("width"), served.side("height")) == (8 * factor, 6 * factor)
    assert served.least_side <= 6 * factor


READERS = {
    "UNet": (UNetConfig, UNET),
    "VAE": (VAEConfig, {}),
    "text": (CLIPTextConfig, {}),
    "net": (ControlNetConfig, UNET),
}
WRONG = {
    "three sides": ("UNet", {"sample_size": [6, 8, 1]}, r"sample_size is \[6, 8, 1\], .* or two, height and width"),
    "a text as a size": ("UNet", {"sample_size": "64"}, "sample_size is '64'"),
    "a size of 0": ("VAE", {"sample_size": 0}, "sample_size is 0"),
    "a list of channels": ("UNet", {"in_channels": [4]}, r"in_channels is \[4\], which should be a whole number"),
    "a fraction of channels": ("UNet", {"out_channels": 4.5}, "out_channels is 4.5, which should be a whole number"),
    "one number for widths": ("UNet", {"block_out_channels": 32}, "block_out_channels is 32, which should be a list"),
    "a text among widths": ("UNet", {"block_out_channels": [16, "32"]}, r"block_out_channels is \(16, '32'\)"),
    "nested lists": ("UNet", {"transformer_layers_per_block": [[1], [2]]}, r"transformer_layers is \(\[1\], \[2\]\)"),
    "a list of groups": ("UNet", {"norm_num_groups": [8]}, r"norm_num_groups is \[8\]"),
    "a block as a list": ("UNet", {"down_block_types": [["DownBlock2D"]]}, "down_block_types is .* a list of names"),
    "one block's name": ("UNet", {"up_block_types": "UpBlock2D"}, "up_block_types is 'UpBlock2D'"),
    "a middle block as a list": ("UNet", {"mid_block_type": ["UNetMidBlock2D"]}, "mid_block_type is"),
    "a text as a switch": ("UNet", {"use_linear_projection": "yes"}, "use_linear_projection is 'yes', .*true or false"),
    "a list of scales": ("VAE", {"scaling_factor": [0.18]}, r"scaling_factor is \[0.18\], which should be a number"),
    "a VAE of one width": ("VAE", {"block_out_channels": 8}, "block_out_channels is 8, which should be a list"),
    "a list of layers": ("text", {"num_hidden_layers": [3]}, r"num_hidden_layers is \[3\]"),
    "an activation as a list": ("text", {"hidden_act": ["gelu"]}, "hidden_act is"),
    "a text encoder's kind": ("text", {"architectures": "CLIPTextModel"}, "architectures is 'CLIPTextModel'"),
    "one width of hints": ("net", {"conditioning_embedding_out_channels": 16}, "embedding_out_channels is 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_another_type_is_refused_by_its_name(case):
    kind, changed, words = WRONG[case]
    reader, config = READERS[kind]
    with pytest.raises(ValueError, match=words):
        reader.from_dict({**config, **changed})


def test_the_error_of_a_folder_names_the_field(folder, tmp_path):
    pipeline("sd-v1-5", tmp_path)
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": {"height": 6}}))
    with pytest.raises(CheckpointError, match="UNet config: sample_size is"):
        sdjax.Pipeline.from_pretrained(tmp_path / "model")
