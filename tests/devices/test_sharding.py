"""Eight simulated devices draw what one draws, each its part, and tell each other what they must and no more."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, PartitionSpec
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax.devices.sharding import check_mesh, make_mesh, param_sharding
from sdjax.errors import RequestError
from sdjax.models.unet.families import SPLITS
from tests.loading.lora_files import ATTENTION, kohya, random_layers
from tests.parity.reference import channels_first, channels_last, pipeline

PROMPT, NEGATIVE = "the cat sat on the mat", "a"
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast|send|recv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What many_devices.py has drawn and written down."""
    folder, programs = tmp_path_factory.mktemp("devices"), tmp_path_factory.mktemp("programs")
    reference = pipeline("sd-v1-5", folder)
    torch.manual_seed(1)
    control = diffusers.ControlNetModel.from_unet(reference.unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    control.save_pretrained(folder / "control")
    params = sdjax.Pipeline.from_pretrained(folder / "model").params
    endings = {"unet": (*ATTENTION, "conv1", "ff.net.0.proj")}
    save_file(kohya(random_layers(params, endings)), folder / "lora.safetensors")
    np.save(folder / "noise.npy", np.random.default_rng(5).normal(size=(8, 8, 8, 4)).astype(np.float32))
    flags = (
        f"--xla_force_host_platform_device_count=8 --xla_dump_to={programs} --xla_dump_hlo_as_text "
        # Not the numbers, but how fast they come, are left unoptimised: most of the time is compiling.
        "--xla_dump_hlo_module_re=.*jit_denoise.* --xla_backend_optimization_level=0"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__).with_name("many_devices.py")), str(folder), str(programs)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pictures(folder):
    with np.load(folder / "pictures.npz") as opened:
        return dict(opened)


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def said(folder):
    """How often each collective stands in the compiled loop of each mesh."""
    return {
        name: Counter(re.findall(rf"(?<= )({COLLECTIVES})(?:-start)?\(", (folder / f"{name}.hlo").read_text()))
        for name in ("one", "data", "model", "guidance", "all")
    }


@pytest.fixture(scope="module")
def layers(facts):
    """How many layers of the UNet have each of these ends."""
    names = [name for name in facts["one"] if name.startswith("unet.")]
    ends = {"attention": ".to_out.0.weight", "feed-forward": ".ff.net.2.weight", "resnet": ".conv2.weight"}
    return {kind: sum(name.endswith(end) for name in names) for kind, end in ends.items()}


def levels(one, other):
    """The greatest difference, of 255 levels."""
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other.astype(int)).max()


def test_rows_on_eight_devices_are_the_one_devices_pictures_to_the_byte(pictures):
    assert len(pictures["one plain"]) == 8
    assert len({picture.tobytes() for picture in pictures["one plain"]}) == 8
    np.testing.assert_array_equal(pictures["data plain"], pictures["one plain"])


@pytest.mark.parametrize("name", ["model", "guidance", "all"])
def test_weights_and_guidance_on_two_devices_each_draw_the_same_within_one_level(pictures, name):
    assert levels(pictures[f"{name} plain"], pictures["one plain"]) <= 1


def test_without_guidance_the_devices_for_its_halves_do_the_same(pictures):
    assert levels(pictures["guidance unguided"], pictures["one unguided"]) <= 1
    assert levels(pictures["guidance unguided"], pictures["guidance plain"]) > 1


def test_fewer_pictures_than_devices_are_padded_and_cut(pictures, facts):
    np.testing.assert_array_equal(pictures["data three"], pictures["one plain"][:3])
    np.testing.assert_array_equal(pictures["data told"], pictures["one plain"][:3])
    assert facts["reported"][0] == [0, 3]
    assert facts["reported"][-1] == [3, 3]


def test_repainting_is_spread_too(pictures):
    np.testing.assert_array_equal(pictures["data repainted"], pictures["one repainted"])
    assert levels(pictures["data repainted"], pictures["data plain"]) > 1


def test_a_seed_has_the_same_noise_on_one_device_and_on_many(pictures):
    assert len(pictures["one noise"]) == 4
    np.testing.assert_array_equal(pictures["guidance noise"], pictures["one noise"])


def test_eight_devices_draw_what_pytorch_draws(folder, pictures):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        [PROMPT] * 8, negative_prompt=[NEGATIVE] * 8, num_inference_steps=3, guidance_scale=5.0, height=64, width=64,
        latents=channels_first(np.load(folder / "noise.npy")), output_type="latent",
    ).images  # fmt: skip
    np.testing.assert_allclose(pictures["data latents"], channels_last(expected), atol=1e-4, rtol=0)


def test_a_checkpoint_saved_from_a_mesh_is_the_one_that_was_loaded(folder):
    for component in ("unet", "vae"):
        file = f"{component}/diffusion_pytorch_model.safetensors"
        before, after = load_file(folder / "model" / file), load_file(folder / "saved" / file)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor)


def test_devices_that_draw_rows_of_their_own_say_nothing_to_each_other(said):
    assert said["one"] == {}
    assert said["data"] == {}


def test_guidance_on_two_devices_is_one_sum_a_step(said, folder):
    assert said["guidance"] == {"all-reduce": 1}
    (line,) = re.findall(r"= (.*) all-reduce\(", (folder / "guidance.hlo").read_text())
    assert re.sub(r"\{[\d,]*\}", "", line) == "(f32[1,8,8,4], f32[1,1,1,1])"  # the latents, and how far they spread


def test_split_weights_cost_one_sum_for_each_pair_of_layers(said, layers):
    """This UNet is narrow: its convolutions are computed in the form that a TPU's are, not in one of a CPU's own."""
    assert layers == {"attention": 8, "feed-forward": 4, "resnet": 8}
    assert said["model"] == {
        "all-reduce": sum(layers.values()),
        # A gated unit's halves lie one behind the other in the checkpoint, so each device has to fetch its gates.
        "collective-permute": 2 * layers["feed-forward"],
    }


def test_all_axes_together_say_what_each_says_alone(said):
    assert said["all"] == said["model"] + said["guidance"]


def test_parameters_lie_where_the_rules_say(facts):
    halved = {name: [a // b for a, b in zip(*shapes, strict=True)] for name, shapes in facts["model"].items()}
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    assert halved[f"{block}.attn1.to_q.weight"] == [2, 1]
    assert halved[f"{block}.attn2.to_out.0.weight"] == [1, 2]
    assert halved[f"{block}.attn2.to_out.0.bias"] == [1]
    assert halved[f"{block}.ff.net.0.proj.weight"] == [2, 1]
    assert halved[f"{block}.ff.net.0.proj.bias"] == [2]
    assert halved[f"{block}.ff.net.2.weight"] == [1, 2]
    assert halved["unet.mid_block.resnets.0.conv1.weight"] == [2, 1, 1, 1]
    assert halved["unet.mid_block.resnets.0.conv2.weight"] == [1, 2, 1, 1]
    whole = [name for name, parts in halved.items() if set(parts) == {1}]
    assert {name for name in halved if not name.startswith("unet.")} <= set(whole)
    assert all(shape == part for shape, part in facts["data"].values())
    split = sum(np.prod(facts["one"][name][0]) for name in halved if name not in whole)
    assert split > 0.7 * sum(np.prod(shape) for name, (shape, _) in facts["one"].items() if name.startswith("unet."))


def test_batches_are_split_by_rows_and_by_guidance(facts):
    assert facts["batch"] == {"context": [1, 1, 77, 32], "state": [1, 5, 8, 8, 4], "control": [1, 1, 2000]}


def test_an_adapter_leaves_every_parameter_where_it_is(pictures, facts):
    assert facts["moved"] == []
    assert levels(pictures["model adapted"], pictures["one adapted"]) <= 1
    assert levels(pictures["model adapted"], pictures["model plain"]) > 1


def test_a_controlnet_is_split_like_the_unet(facts):
    assert len(facts["controlnet_0"]) > 1
    assert set(facts["controlnet_0"]) == set(facts["unet"])


def test_what_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 1, 4), ("data", "guidance", "model"))
    path = ("unet", "down_blocks", 0, "attentions", 0, "transformer_blocks", 0, "attn1", "to_q", "weight")
    assert param_sharding(path, (16, 16), mesh, SPLITS).spec == PartitionSpec("model", None)
    assert param_sharding(path, (18, 16), mesh, SPLITS).spec == PartitionSpec()
    assert param_sharding(("vae", *path[1:]), (16, 16), mesh, SPLITS).spec == PartitionSpec()


def test_every_weight_of_the_bundled_unet_that_has_a_partner_is_split():
    mesh = jax.sharding.AbstractMesh((1, 1, 2), ("data", "guidance", "model"))
    leaves = flatten_dict(sdjax.Pipeline.from_pretrained().params)
    split = {
        path: param_sharding(path, leaf.shape, mesh, SPLITS).spec != PartitionSpec() for path, leaf in leaves.items()
    }
    sizes = {path: leaf.size for path, leaf in leaves.items() if path[0] == "unet"}
    assert sum(size for path, size in sizes.items() if split[path]) > 0.75 * sum(sizes.values())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"devices": 0}, "devices must be 1 to"),
        ({"devices": 1000}, "devices must be 1 to"),
        ({"guidance": 3}, "guidance must be 1 or 2"),
        ({"model": 0}, "at least 1"),
        ({"data": 3}, "can't be arranged"),
        ({"model": 7}, "can't be arranged"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(shape, words):
    with pytest.raises(RequestError, match=words):
        make_mesh(**shape)


def test_a_mesh_of_other_axes_is_refused():
    auto = (AxisType.Auto,)
    with pytest.raises(RequestError, match="'rows'"):
        check_mesh(jax.make_mesh((1,), ("rows",), axis_types=auto))
    with pytest.raises(RequestError, match="must have the axis data"):
        sdjax.Pipeline.from_pretrained(mesh=jax.make_mesh((1,), ("model",), axis_types=auto))
    with pytest.raises(RequestError, match=re.escape("AxisType.Auto")):
        check_mesh(jax.make_mesh((1,), ("data",)))
