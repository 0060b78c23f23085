"""Random adapters for the tiny checkpoints, written in every spelling, and what diffusers and peft make of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from sdjax.loading.lora_names import original_names
from sdjax.loading.saving import tensors_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Layer:
    """One layer's part of a random adapter, in PyTorch's orientation; alpha None leaves it out."""

    component: str
    name: str
    up: np.ndarray
    down: np.ndarray
    alpha: float | None

    @property
    def delta(self):
        scale = 1.0 if self.alpha is None else self.alpha / len(self.down)
        return scale * np.tensordot(self.up.reshape(len(self.up), -1), self.down, 1)


def weights_of(params) -> dict[str, np.ndarray]:
    """The weights of every layer by published name, "unet.conv_in"."""
    return {
        f"{component}.{name.removesuffix('.weight')}": tensor
        for component in params
        for name, tensor in tensors_of(params[component]).items()
        if name.endswith(".weight") and tensor.ndim > 1
    }


def random_layers(params, endings: Mapping[str, tuple[str, ...]], *, seed=0, alphas=(None,), ranks=(4,)) -> list[Layer]:
    """An adapter of the layers whose names end so, in each component; ranks and alphas are dealt out in turn."""
    rng = np.random.default_rng(seed)
    layers = []
    for full, weight in sorted(weights_of(params).items()):
        component, _, name = full.partition(".")
        if not name.endswith(tuple(endings.get(component, ()))) or component not in endings:
            continue
        rank = ranks[len(layers) % len(ranks)]
        up = 0.3 * rng.normal(size=(weight.shape[0], rank, *(1,) * (weight.ndim - 2)))
        down = 0.3 * rng.normal(size=(rank, *weight.shape[1:]))
        alpha = alphas[len(layers) % len(alphas)]
        layers.append(Layer(component, name, up.astype(np.float32), down.astype(np.float32), alpha))
    return layers


def kohya(layers, params=None) -> dict[str, np.ndarray]:
    """sd-scripts' keys; with `params` those of SDXL: two encoders, and the original layout's names."""
    original = original_names(name.removeprefix("unet.") for name in weights_of(params)) if params else {}
    prefixes = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te1_" if params else "lora_te_",
        "text_encoder_2": "lora_te2_",
    }
    tensors = {}
    for layer in layers:
        name = original.get(layer.name, layer.name) if layer.component == "unet" else layer.name
        key = prefixes[layer.component] + name.replace(".", "_")
        tensors |= {f"{key}.lora_up.weight": layer.up, f"{key}.lora_down.weight": layer.down}
        if layer.alpha is not None:
            tensors[f"{key}.alpha"] = np.float32(layer.alpha)
    return tensors


def scaled(layers) -> list[Layer]:
    """The same adapter without alphas: they are multiplied into "up"."""
    factor = {id(layer): (layer.alpha or len(layer.down)) / len(layer.down) for layer in layers}
    return [Layer(x.component, x.name, np.float32(x.up * factor[id(x)]), x.down, None) for x in layers]


def new_diffusers(layers, unet="unet") -> dict[str, np.ndarray]:
    """diffusers' keys of today, which have no alphas; `unet` is what stands before the UNet's layers."""
    tensors = {}
    for layer in scaled(layers):
        key = f"{unet if layer.component == 'unet' else layer.component}.{layer.name}"
        tensors |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
    return tensors


def old_diffusers(layers) -> dict[str, np.ndarray]:
    """diffusers' keys of before peft: `processor.to_q_lora` in the UNet, `lora_linear_layer` in the encoders."""
    tensors = {}
    for layer in scaled(layers):
        key = f"{layer.component}.{layer.name}"
        if layer.component != "unet":
            spelled = f"{key}.lora_linear_layer"
        elif layer.name.endswith(ATTENTION):
            block, _, last = key.partition(".attn")
            number, _, projection = last.partition(".")
            spelled = f"{block}.attn{number}.processor.{projection.removesuffix('.0')}_lora"
        else:
            spelled = f"{key}.lora"
        tensors |= {f"{spelled}.down.weight": layer.down, f"{spelled}.up.weight": layer.up}
    return tensors


def write(tensors: Mapping[str, np.ndarray], file: Path, metadata=None) -> Path:
    """Save a file, and give its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file, metadata)
    return file


def effective_weights(pipe) -> dict[str, np.ndarray]:
    """The weights that diffusers' pipeline computes with now: fused on a copy of each layer, the pipeline untouched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        if model is None:
            continue
        prefix = "" if component == "unet" or hasattr(model, "text_model") else "text_model."
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                weights[f"{component}.{prefix}{name}"] = _merged(module)
    return weights


def _merged(module) -> np.ndarray:
    """A layer's weight with the adapters that are active, measured by what the layer does to unit inputs."""
    base = module.get_base_layer()
    with torch.no_grad():
        if isinstance(base, torch.nn.Linear):
            probe = torch.eye(base.in_features)
            bias = 0 if base.bias is None else base.bias
            return (module(probe) - bias).T.numpy()
        # A unit impulse in each channel, wide enough that every tap of the kernel is seen once.
        size = base.kernel_size[0]
        side = 2 * size - 1
        weight = np.zeros(base.weight.shape, np.float32)
        stride, base.stride = base.stride, (1, 1)
        padding, base.padding = base.padding, (0, 0)
        for down in module.lora_A.values():
            down.stride, down.padding = (1, 1), (0, 0)
        for channel in range(base.in_channels):
            probe = torch.zeros(1, base.in_channels, side, side)
            probe[0, channel, size - 1, size - 1] = 1
            out = module(probe) - (0 if base.bias is None else base.bias[None, :, None, None])
            weight[:, channel] = out[0].numpy()[:, ::-1, ::-1]
        base.stride, base.padding = stride, padding
        for down in module.lora_A.values():
            down.stride, down.padding = stride, padding
        return weight
