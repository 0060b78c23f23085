"""Files of LyCORIS, against its own package: every algorithm, and the spellings that its files come in."""

import copy

import numpy as np
import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file, save_file

import sdjax
from sdjax.loading import apply_lora, read_lora
from sdjax.loading.saving import tensors_of
from tests.parity.reference import pipeline

ALGORITHMS = {
    "LoCon": {"algo": "locon"},
    "LoCon with a core": {"algo": "locon", "use_tucker": True},
    "LoCon with a scalar": {"algo": "locon", "use_scalar": True},
    "rank-stabilised LoCon": {"algo": "locon", "rs_lora": True},
    # LyCORIS multiplies these two by alpha / rank twice when it merges, and once when it runs. Here that factor is 1;
    # others are checked against NumPy in test_lora.py.
    "LoHa": {"algo": "loha", "linear_alpha": 4, "conv_alpha": 4},
    "LoHa with a core": {"algo": "loha", "linear_alpha": 4, "conv_alpha": 4, "use_tucker": True},
    "LoKr": {"algo": "lokr", "linear_alpha": 4, "conv_alpha": 4, "factor": 4},
    "LoKr of two whole matrices": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full differences": {"algo": "full"},
    "OFT": {"algo": "diag-oft"},
    "OFT with a constraint": {"algo": "diag-oft", "constraint": 0.01},
    "OFT with factors": {"algo": "diag-oft", "rescaled": True},
    "BOFT": {"algo": "boft"},
    "BOFT with a constraint and factors": {"algo": "boft", "constraint": 0.01, "rescaled": True},
    "(IA)^3": {"algo": "ia3"},
    "(IA)^3 on inputs": {"algo": "ia3", "train_on_input": True},
    "GLoRA": {"algo": "glora"},
}
MODULES = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
TARGETS = {"target_module": MODULES, "target_name": ["time_embedding.*"], "enable_conv": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    reference = pipeline("sd-v1-5", folder)
    return reference.unet, sdjax.Pipeline.from_pretrained(folder / "model", dtype="float32").params


def created(unet, settings):
    LycorisNetwork.apply_preset(TARGETS)
    return create_lycoris(unet, 1.0, **{"linear_dim": 4, "linear_alpha": 3, "train_norm": True, **settings})


def trained(unet, file, settings):
    """Save an adapter of the UNet whose every number has moved."""
    torch.manual_seed(2)
    network = created(copy.deepcopy(unet), settings)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}, file)
    return file


def by_lycoris(unet, file, weight, settings):
    """All weights of the UNet with the adapter merged by LyCORIS itself."""
    model = copy.deepcopy(unet)
    if settings["algo"] == "ia3":  # LyCORIS 4.1 fails to make these from a file
        network, tensors = created(model, settings), load_file(file)
        for part in network.loras:
            prefix = f"{part.lora_name}."
            part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    else:
        network, _ = create_lycoris_from_weights(weight, str(file), model)
    network.merge_to(weight)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("weight", [1.0, 0.6])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_changes_the_weights_as_in_lycoris(pair, algorithm, weight, tmp_path):
    unet, params = pair
    settings = ALGORITHMS[algorithm]
    file = trained(unet, tmp_path / "style.safetensors", settings)
    adapter = read_lora(file, params)
    assert not adapter.unused
    merged = tensors_of(apply_lora(params, [(adapter, weight)])["unet"])
    expected, before = by_lycoris(unet, file, weight, settings), unet.state_dict()
    assert sum(not np.array_equal(expected[name], before[name].numpy()) for name in before) > 40
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor.reshape(merged[name].shape), atol=1e-5, err_msg=name)
