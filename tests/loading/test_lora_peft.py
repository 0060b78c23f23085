"""Folders that peft saves, against what `PeftModel.from_pretrained` makes of them on the same weights."""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model

import sdjax
from sdjax.loading import apply_lora, read_lora
from sdjax.loading.saving import tensors_of
from tests.parity.reference import pipeline

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "proj_in"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}
UNET = {
    "the defaults": LoraConfig(**LORA),
    "another start of the factors": LoraConfig(**LORA, init_lora_weights="gaussian"),
    "orthogonal factors": LoraConfig(**LORA, init_lora_weights="orthogonal"),
    "the smallest singular values": LoraConfig(**LORA, init_lora_weights="mica"),
    "PiSSA": LoraConfig(**LORA, init_lora_weights="pissa"),
    "PiSSA with a scale": LoraConfig(**LORA, init_lora_weights="pissa", use_rslora=True, rank_pattern={"to_q": 2}),
    "PiSSA and DoRA": LoraConfig(**LORA, init_lora_weights="pissa", use_dora=True),
    "OLoRA": LoraConfig(**LORA, init_lora_weights="olora"),
    "convolutions": LoraConfig(r=2, lora_alpha=3, target_modules=[*ATTENTION, *CONVOLUTIONS]),
    "patterns": LoraConfig(
        **LORA, rank_pattern={"to_k": 2, "mid_block.*to_v": 6}, alpha_pattern={r"down_blocks\.0\..*\.to_q": 9}
    ),
    "patterns from the start of a name": LoraConfig(**LORA, alpha_pattern={"^mid_block.*to_q": 9}),
    "rank-stabilised": LoraConfig(**LORA, use_rslora=True),
    "fan in and fan out": LoraConfig(**LORA, fan_in_fan_out=True),
    "DoRA": LoraConfig(**LORA, use_dora=True),
    "biases of its layers": LoraConfig(**LORA, bias="lora_only"),
    "all biases": LoraConfig(**LORA, bias="all"),
    "a bias of the factors": LoraConfig(r=4, lora_alpha=6, target_modules=["to_out.0", "conv1"], lora_bias=True),
    "whole modules": LoraConfig(**LORA, modules_to_save=["conv_in", "time_embedding", "norm1"]),
    "(IA)^3": IA3Config(target_modules=["to_k", "to_v", "ff.net.2", "conv1"], feedforward_modules=["ff.net.2"]),
    "(IA)^3 on inputs": IA3Config(target_modules=["to_out.0", "conv2"], feedforward_modules=["to_out.0", "conv2"]),
    "OFT": OFTConfig(oft_block_size=8, target_modules=[*ATTENTION, "proj_in"]),
    "exact OFT": OFTConfig(r=2, oft_block_size=0, target_modules=ATTENTION, use_cayley_neumann=False),
    "OFT of two terms": OFTConfig(oft_block_size=8, target_modules=ATTENTION, num_cayley_neumann_terms=2),
    "OFT of three terms": OFTConfig(oft_block_size=8, target_modules=ATTENTION, num_cayley_neumann_terms=3),
    "OFT of seven terms": OFTConfig(oft_block_size=8, target_modules=ATTENTION, num_cayley_neumann_terms=7),
    "OFT with a constraint": OFTConfig(oft_block_size=8, target_modules=ATTENTION, coft=True, eps=0.3),
    "OFT of shared blocks": OFTConfig(oft_block_size=8, target_modules=ATTENTION, block_share=True),
    "BOFT": BOFTConfig(boft_block_size=4, target_modules=["to_q", "to_k", "conv1", "proj_in"]),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=[*ATTENTION, *CONVOLUTIONS], use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=4, alpha=6, target_modules=[*ATTENTION, *CONVOLUTIONS], use_effective_conv2d=True),
    "LoKr of two whole matrices": LoKrConfig(r=64, alpha=6, target_modules=ATTENTION, rank_pattern={"to_q": 48}),
    "LoKr of four factors": LoKrConfig(r=2, alpha=6, target_modules=ATTENTION, decompose_both=True),
}
TEXT = {
    "the defaults": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"]),
    "some layers": LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1, 2]),
    "one layer": LoraConfig(r=4, target_modules=["v_proj"], layers_to_transform=1, layers_pattern="layers"),
    "all but some": LoraConfig(r=4, target_modules=["q_proj", "fc1"], exclude_modules=["layers.0.mlp.fc1"]),
    "by a regular expression": LoraConfig(r=4, target_modules=r".*layers\.[02]\.mlp\.fc\d"),
    "embeddings": LoraConfig(r=4, lora_alpha=2, target_modules=["token_embedding", "q_proj"]),
    "whole embeddings": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["token_embedding"]),
    "some tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"token_embedding": [3, 17, 20]}),
    "PiSSA": LoraConfig(r=4, target_modules=["q_proj", "fc2"], init_lora_weights="pissa"),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    reference = pipeline("sd-v1-5", folder)
    return reference, sdjax.Pipeline.from_pretrained(folder / "model", dtype="float32")


def trained(model, config, folder):
    """Save an adapter whose every parameter, and all that it trains with it, has moved."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def by_peft(model, folder):
    """All weights of a model that peft has loaded an adapter into and merged."""
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    merged = adapted.merge_and_unload()
    names = {name: tensor for name, tensor in merged.state_dict().items() if "position_ids" not in name}
    return {name.removeprefix("text_model."): tensor.numpy() for name, tensor in names.items()}


def assert_same(merged, component, expected):
    ours = {name.removeprefix("text_model."): tensor for name, tensor in tensors_of(merged[component]).items()}
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(1.0, float(np.abs(tensor).max()))
        np.testing.assert_allclose(ours[name], tensor.reshape(ours[name].shape), atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("case", UNET)
def test_a_folder_changes_the_unet_as_in_peft(pair, case, tmp_path):
    reference, pipe = pair
    folder = trained(reference.unet, UNET[case], tmp_path / "unet")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*this model has no layer.*")
        merged = apply_lora(pipe.params, [(read_lora(folder, pipe.params), 1.0)])
    expected = by_peft(reference.unet, folder)
    assert_same(merged, "unet", expected)
    before = reference.unet.state_dict()
    assert any(np.abs(tensor - before[name].numpy()).max() > 0.01 for name, tensor in expected.items())


@pytest.mark.parametrize("case", TEXT)
def test_a_folder_changes_the_text_encoder_as_in_peft(pair, case, tmp_path):
    reference, pipe = pair
    folder = trained(reference.text_encoder, TEXT[case], tmp_path / "text_encoder")
    merged = apply_lora(pipe.params, [(read_lora(folder, pipe.params), 1.0)])
    assert_same(merged, "text_encoder", by_peft(reference.text_encoder, folder))
