"""Tiny random checkpoints in both layouts: a diffusers folder, and the original layout by an inverse mapping.

The mapping here goes from diffusers' names to the original ones and shares no line with the one under test;
`test_diffusers_reads_the_same_weights_from_the_file` holds it against diffusers' own converter.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from safetensors.torch import save_file

from sdjax.loading.saving import save_tokenizer
from sdjax.loading.tokenizer import END, published_tokenizer

torch.set_num_threads(1)

WORDS = 49408
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LEADING = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
SD_SCHEDULE = {**LEADING, "set_alpha_to_one": False}

SD1_UNET = {
    "sample_size": 64,
    "layers_per_block": 2,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 8,
}
SD2_UNET = {
    **SD1_UNET,
    "sample_size": 96,
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
}
XL_UNET = {
    **SD2_UNET,
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 192,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 128 + 6 * 16,
}
REFINER_UNET = {
    **XL_UNET,
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 128 + 5 * 16,
}
NINE = {"in_channels": 9}


class Family(NamedTuple):
    """A family's tiny UNet, its scheduler, and the original prefixes of its text encoders (None: absent)."""

    unet: dict
    scheduler: object
    clip: str | None
    open_clip: str | None
    is_xl: bool = False


def _v(**changes):
    return diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False, prediction_type="v_prediction", **changes)


PNDM = diffusers.PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True)
DDIM = diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False)
EULER = diffusers.EulerDiscreteScheduler(**LEADING)
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")

FAMILIES = {
    "sd1": Family(SD1_UNET, PNDM, SD1_TEXT, None),
    "sd1-inpaint": Family({**SD1_UNET, **NINE}, DDIM, SD1_TEXT, None),
    "sd2": Family(SD2_UNET, _v(), None, SD2_TEXT),
    "sd2-inpaint": Family({**SD2_UNET, **NINE, "sample_size": 64}, DDIM, None, SD2_TEXT),
    "sdxl": Family(XL_UNET, EULER, *XL_TEXT, is_xl=True),
    "sdxl-inpaint": Family({**XL_UNET, **NINE}, EULER, *XL_TEXT, is_xl=True),
    "refiner": Family(REFINER_UNET, EULER, None, "conditioner.embedders.0.model.", is_xl=True),
}


def text_encoder(kind: type, width: int, activation: str) -> torch.nn.Module:
    """A random text encoder with CLIP's own vocabulary; its projection is random, so far from symmetric."""
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=WORDS - 2,
        eos_token_id=WORDS - 1,
        pad_token_id=WORDS - 1,
    )
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # At initialisation biases are zero and norms one: a mix-up of two would go unseen.
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter if parameter.ndim == 1 else 0))
    return model


def pipeline(name: str) -> diffusers.DiffusionPipeline:
    """Make a family's tiny checkpoint."""
    family = FAMILIES[name]
    torch.manual_seed(sorted(FAMILIES).index(name))
    parts = {
        "unet": diffusers.UNet2DConditionModel(**family.unet).eval(),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            scaling_factor=0.13025 if family.is_xl else 0.18215,
            sample_size=1024 if family.is_xl else 768 if name == "sd2" else 512,
        ).eval(),
        "scheduler": family.scheduler,
    }
    for part in ("unet", "vae"):
        with torch.no_grad():
            for parameter in parts[part].parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    if not family.is_xl:
        width = 128
        activation = "quick_gelu" if family.clip else "gelu"
        parts["text_encoder"] = text_encoder(transformers.CLIPTextModel, width, activation)
        parts["tokenizer"] = tokenizer(END if family.clip else "!")
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind = diffusers.StableDiffusionInpaintPipeline if "inpaint" in name else diffusers.StableDiffusionPipeline
        return kind(**parts)
    parts |= {"text_encoder": None, "tokenizer": None}
    if family.clip:
        parts["text_encoder"] = text_encoder(transformers.CLIPTextModel, 64, "quick_gelu")
        parts["tokenizer"] = tokenizer(END)
    parts["text_encoder_2"] = text_encoder(transformers.CLIPTextModelWithProjection, 128, "gelu")
    parts["tokenizer_2"] = tokenizer("!")
    if name == "refiner":
        return diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False
        )
    xl = diffusers.StableDiffusionXLInpaintPipeline if "inpaint" in name else diffusers.StableDiffusionXLPipeline
    return xl(**parts, add_watermarker=False)


def tokenizer(pad: str) -> transformers.CLIPTokenizer:
    """transformers' tokenizer, from files of CLIP's real vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(published_tokenizer(pad), Path(folder))
        return transformers.CLIPTokenizer.from_pretrained(folder)


def original(name: str, pipe: diffusers.DiffusionPipeline) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in the original layout."""
    family = FAMILIES[name]
    tensors = {f"model.diffusion_model.{unet_name(key, pipe.unet)}": t for key, t in pipe.unet.state_dict().items()}
    tensors |= {f"first_stage_model.{vae_name(key)}": _as_conv(key, t) for key, t in pipe.vae.state_dict().items()}
    if family.clip:
        for key, tensor in pipe.text_encoder.state_dict().items():
            tensors[f"{family.clip}text_model.{key.removeprefix('text_model.')}"] = tensor
    if family.open_clip:
        encoder = pipe.text_encoder_2 if family.is_xl else pipe.text_encoder
        tensors |= {family.open_clip + key: tensor for key, tensor in open_clip(encoder, whole=family.is_xl).items()}
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_name(key: str, unet) -> str:
    """A UNet's tensor's name in the original layout, by the arithmetic of equally deep levels."""
    layers, ends = unet.config.layers_per_block, len(unet.config.block_out_channels) - 1
    fixed = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    module, leaf = key.rsplit(".", 1)
    if module in fixed:
        return f"{fixed[module]}.{leaf}"
    part, *found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key).groups()
    level, kind, index, rest = int(found[0] or 0), found[1], int(found[2]), found[3]
    if kind == "resnets":
        layer, leaf = rest.rsplit(".", 1)
        rest = f"{RESNET[layer]}.{leaf}"
    if part == "mid":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        attends = unet.config.up_block_types[level].startswith("CrossAttn")
        return f"output_blocks.{(layers + 1) * level + layers}.{2 if attends else 1}.conv.{leaf}"
    place = 0 if kind == "resnets" else 1
    assert level <= ends
    if part == "down":
        return f"input_blocks.{(layers + 1) * level + index + 1}.{place}.{rest}"
    return f"output_blocks.{(layers + 1) * level + index}.{place}.{rest}"


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_name(key: str) -> str:
    """An autoencoder's tensor's name in the original layout (four levels)."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if found := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(\w+)", key):
        return f"{found[1]}.mid.attn_1.{VAE_ATTENTION[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", key):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d)\.resnets\.(.*)", key):
        return f"encoder.down.{found[1]}.block.{found[2]}"
    if found := re.fullmatch(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.(.*)", key):
        return f"encoder.down.{found[1]}.downsample.{found[2]}"
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d)\.resnets\.(.*)", key):
        return f"decoder.up.{3 - int(found[1])}.block.{found[2]}"
    if found := re.fullmatch(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.(.*)", key):
        return f"decoder.up.{3 - int(found[1])}.upsample.{found[2]}"
    return key


def _as_conv(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original's attention is made of 1x1 convolutions."""
    return tensor[:, :, None, None] if ".attentions." in key and tensor.ndim == 2 else tensor


def open_clip(encoder: torch.nn.Module, *, whole: bool) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP stores it; SD 2's has one more layer, which is never read, and a projection."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": state["text_projection.weight"].T if whole else torch.randn(128, 128),
    }
    for layer in range(3):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for leaf in ("weight", "bias"):
            parts = [state[f"{old}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            tensors[f"{new}.attn.in_proj_{leaf}"] = torch.cat(parts)
            tensors[f"{new}.attn.out_proj.{leaf}"] = state[f"{old}.self_attn.out_proj.{leaf}"]
            tensors[f"{new}.ln_1.{leaf}"] = state[f"{old}.layer_norm1.{leaf}"]
            tensors[f"{new}.ln_2.{leaf}"] = state[f"{old}.layer_norm2.{leaf}"]
            tensors[f"{new}.mlp.c_fc.{leaf}"] = state[f"{old}.mlp.fc1.{leaf}"]
            tensors[f"{new}.mlp.c_proj.{leaf}"] = state[f"{old}.mlp.fc2.{leaf}"]
    if not whole:
        last = {key: torch.randn_like(t) for key, t in tensors.items() if key.startswith("transformer.resblocks.2.")}
        tensors |= {key.replace("resblocks.2.", "resblocks.3."): tensor for key, tensor in last.items()}
    return tensors


def open_clip_shapes(width: int, layers: int) -> dict[str, torch.Tensor]:
    """What OpenCLIP's `TextTransformer` holds at a size, without numbers."""
    sizes = {
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "token_embedding.weight": (WORDS, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    layer = {"ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width)}
    layer |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        sizes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        for name, size in layer.items():
            sizes |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[:1]}
    return {name: torch.empty(size, device="meta") for name, size in sizes.items()}


class Both(NamedTuple):
    """One checkpoint in both layouts: `folder`, `file`, and the file's `tensors`."""

    name: str
    folder: Path
    file: Path
    tensors: dict[str, torch.Tensor]


def both_layouts(name: str, folder: Path) -> Both:
    """Save a family's tiny checkpoint in both layouts."""
    pipe = pipeline(name)
    pipe.save_pretrained(folder / "model")
    if FAMILIES[name].is_xl:
        # Published folders keep these keys of the scheduler before Euler, and another sampler reads them.
        config = folder / "model/scheduler/scheduler_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"set_alpha_to_one": False, "clip_sample": False})
        )
    tensors = original(name, pipe)
    save_file(tensors, folder / "model.safetensors")
    return Both(name, folder / "model", folder / "model.safetensors", tensors)
