"""Spellings of keys and numbers that LoRA files of the wild have, each against the plain one."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdjax.errors import CheckpointError
from sdjax.loading import apply_lora, read_lora
from tests.loading.lora_files import ATTENTION, TEXT, kohya, new_diffusers, random_layers, weights_of, write
from tests.loading.tiny_params import tiny_params

PARAMS, XL_PARAMS = tiny_params("sd"), tiny_params("xl")
BOTH = {"unet": (*ATTENTION, "conv1", "proj_in"), "text_encoder": TEXT}
LAYERS = random_layers(PARAMS, BOTH, alphas=(3.0,))


def merged(tensors, folder, params=PARAMS, metadata=None):
    adapter = read_lora(write(tensors, folder / "style.safetensors", metadata), params)
    assert not adapter.unused
    return weights_of(apply_lora(params, [(adapter, 1.0)]))


def assert_equal(one, other):
    for name, weight in one.items():
        np.testing.assert_allclose(other[name], weight, atol=2e-5, err_msg=name)


def keys(tensors, *replacements):
    spelled = {}
    for name, tensor in tensors.items():
        for old, new in replacements:
            name = name.replace(old, new)
        spelled[name] = tensor
    return spelled


def test_whole_numbers_as_alpha_are_read(tmp_path):
    tensors = kohya(LAYERS)
    for dtype in (np.int64, np.int32, np.uint8):
        whole = {k: np.asarray(v, dtype) if k.endswith("alpha") else v for k, v in tensors.items()}
        assert_equal(merged(tensors, tmp_path), merged(whole, tmp_path))


@pytest.mark.parametrize("name", ["default", "my_style", "default_0", "weight"])
def test_the_name_of_the_adapter_may_stand_in_the_keys(name, tmp_path):
    tensors = new_diffusers(LAYERS)
    named = keys(tensors, ("lora_A.weight", f"lora_A.{name}.weight"), ("lora_B.weight", f"lora_B.{name}.weight"))
    assert_equal(merged(tensors, tmp_path), merged(named, tmp_path))


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector.weight", "lora_magnitude_vector.style", "{}.style.weight"])
def test_magnitudes_are_read_with_a_name_too(spelling, tmp_path):
    tensors = new_diffusers(random_layers(PARAMS, {"unet": ("to_q",)}))
    name = "lora_magnitude_vector"
    rng = np.random.default_rng(0)
    for key in [key for key in tensors if "lora_B" in key]:
        tensors[key.replace("lora_B.weight", name)] = rng.uniform(1, 2, len(tensors[key])).astype(np.float32)
    assert_equal(merged(tensors, tmp_path), merged(keys(tensors, (name, spelling.format(name))), tmp_path))


def test_two_adapters_in_one_file_are_refused(tmp_path):
    tensors = new_diffusers(LAYERS)
    twice = keys(tensors, ("lora_A.", "lora_A.one."), ("lora_B.", "lora_B.one."))
    twice |= keys(tensors, ("lora_A.", "lora_A.two."), ("lora_B.", "lora_B.two."))
    with pytest.raises(CheckpointError, match="the same part of that layer under another name"):
        merged(twice, tmp_path)


@pytest.mark.parametrize(
    ("component", "prefix"),
    [
        ("unet", "lycoris_"),
        ("text_encoder", "lycoris_"),
        ("text_encoder", "lora_te_wrapped_transformer_"),
        ("text_encoder", "lora_te1_"),
    ],
)
def test_prefixes_of_lycoris_and_of_the_original_layout_are_known(component, prefix, tmp_path):
    layers = random_layers(PARAMS, {component: BOTH[component]}, alphas=(2.0,))
    tensors = kohya(layers)
    spelled = {name.replace("lora_unet_", prefix).replace("lora_te_", prefix): part for name, part in tensors.items()}
    assert_equal(merged(tensors, tmp_path), merged(spelled, tmp_path))


def test_a_text_encoder_s_prefixes_are_known_without_text_model_as_transformers_5_has_it(tmp_path):
    layers = random_layers(XL_PARAMS, {"text_encoder": TEXT, "text_encoder_2": TEXT}, alphas=(2.0,))
    tensors = kohya(layers, XL_PARAMS)
    assert_equal(merged(tensors, tmp_path, XL_PARAMS), merged(keys(tensors, ("_text_model", "")), tmp_path, XL_PARAMS))


def test_the_names_of_sd_2_s_original_text_encoder_are_known_and_joined_projections_refused(tmp_path):
    layers = random_layers(PARAMS, {"text_encoder": ("fc1", "fc2", "out_proj")}, alphas=(2.0,))
    tensors = kohya(layers)
    wrapped = keys(
        tensors,
        ("lora_te_text_model_encoder_layers_", "lora_te_wrapped_model_transformer_resblocks_"),
        ("mlp_fc1", "mlp_c_fc"),
        ("mlp_fc2", "mlp_c_proj"),
        ("self_attn", "attn"),
    )
    assert_equal(merged(tensors, tmp_path), merged(wrapped, tmp_path))
    joined = "lora_te_wrapped_model_transformer_resblocks_0_attn_in_proj"
    wrapped |= {f"{joined}.lora_up.weight": np.ones((96, 1), np.float32)}
    with pytest.raises(CheckpointError, match=r"attn_in_proj.* joined into one"):
        merged(wrapped, tmp_path)


def test_float8_factors_are_read_as_the_numbers_that_they_are(tmp_path):
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        rounded = {name: torch.from_numpy(part).to(dtype) for name, part in new_diffusers(LAYERS).items()}
        save_file(rounded, tmp_path / "small.safetensors")
        small = weights_of(apply_lora(PARAMS, [(read_lora(tmp_path / "small.safetensors", PARAMS), 1.0)]))
        assert_equal(merged({name: part.float().numpy() for name, part in rounded.items()}, tmp_path), small)


def test_norms_and_biases_are_changed_by_their_differences(tmp_path):
    rng = np.random.default_rng(1)
    layers = {
        "lora_unet_down_blocks_0_resnets_0_norm1": ("unet", "down_blocks", 0, "resnets", 0, "norm1"),
        "lora_unet_conv_norm_out": ("unet", "conv_norm_out"),
        "lora_unet_down_blocks_0_attentions_0_norm": ("unet", "down_blocks", 0, "attentions", 0, "norm"),
        "lora_unet_out_2": ("unet", "conv_out"),
        "lora_te_text_model_final_layer_norm": ("text_encoder", "text_model", "final_layer_norm"),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (
            *("text_encoder", "text_model", "encoder", "layers", 0, "mlp", "fc1"),
        ),
    }
    for weight_part, bias_part in (("w_norm", "b_norm"), ("diff", "diff_b")):
        tensors, expected = {}, {}
        for key, path in layers.items():
            leaves = PARAMS
            for step in path:
                leaves = leaves[step]
            for part, leaf in ((weight_part, "weight"), (bias_part, "bias")):
                difference = rng.normal(size=leaves[leaf].shape).astype(np.float32)
                tensors[f"{key}.{part}"] = difference
                expected[path, leaf] = leaves[leaf] + 0.5 * difference
        adapter = read_lora(write(tensors, tmp_path / "x.safetensors"), PARAMS)
        changed = apply_lora(PARAMS, [(adapter, 0.5)])
        assert len(adapter.changes) == len(tensors)
        for (path, leaf), value in expected.items():
            leaves = changed
            for step in path:
                leaves = leaves[step]
            np.testing.assert_allclose(leaves[leaf], value, atol=1e-6, err_msg=str(path))


def test_pissa_with_a_weight_goes_that_share_of_the_way(tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = weights_of(PARAMS)[f"unet.{layer}"].astype(np.float64)
    u, s, v = np.linalg.svd(before)
    rng = np.random.default_rng(4)
    down, up = rng.normal(size=(2, 32)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    tensors = {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
    metadata = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4, "unet.init_lora_weights": "pissa"}'}
    adapter = read_lora(write(tensors, tmp_path / "x.safetensors", metadata), PARAMS)
    for weight in (1.0, 0.3, -1.0):
        expected = before + weight * (2 * up @ down - (u[:, :2] * s[:2]) @ v[:2])
        ours = weights_of(apply_lora(PARAMS, [(adapter, weight)]))[f"unet.{layer}"]
        np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_rotations_keep_the_lengths_of_columns_and_a_weight_of_zero_changes_nothing(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = weights_of(PARAMS)[layer]
    blocks = np.random.default_rng(3).normal(size=(8, 4, 4)).astype(np.float32)
    for shape in ((8, 4, 4), (1, 8, 4, 4), (2, 4, 8, 8)):
        generators = np.resize(blocks, shape)
        adapter = read_lora(write({f"{layer}.oft_blocks": generators}, tmp_path / "x.safetensors"), PARAMS)
        after = weights_of(apply_lora(PARAMS, [(adapter, 1.0)]))[layer]
        np.testing.assert_allclose(np.linalg.norm(after, axis=0), np.linalg.norm(before, axis=0), rtol=1e-5)
        assert np.abs(after - before).max() > 0.1
        assert apply_lora(PARAMS, [(adapter, 0.0)]) is PARAMS


def test_an_adapter_of_any_kind_keeps_dtypes_and_adds_in_float32(tmp_path):
    params = tiny_params("sd", "bfloat16")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = np.random.default_rng(3).normal(size=32).astype(np.float32)
    tensors = {f"{layer}.weight": factors, f"{layer}.on_input": np.int64(1)}
    after = weights_of(apply_lora(params, [(read_lora(write(tensors, tmp_path / "x.safetensors"), params), 1.0)]))
    exact = weights_of(params)[layer].astype(np.float32) * (1 + factors)
    assert after[layer].dtype == jnp.bfloat16
    np.testing.assert_array_equal(after[layer], exact.astype(jnp.bfloat16))
