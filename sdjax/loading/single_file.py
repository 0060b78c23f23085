"""One .safetensors file in the original layout (CompVis, Stability): SD 1, SD 2, SDXL, its refiner, and inpainting.

Such a file has no config: sizes are read from the tensors (`original_unet`, `original_vae`, `original_text` have the
tables), and the rest from the family, which the text encoders' names tell:

| | SD 1 | SD 2 | SDXL | SDXL refiner |
| --- | --- | --- | --- | --- |
| text encoders | `cond_stage_model.transformer` | `cond_stage_model.model` | `conditioner.embedders.0.transformer`, `….1.model` | `conditioner.embedders.0.model` |
| a level's heads | 8 | of 64 channels | of 64 channels | of 64 channels |
| latents' scale | 0.18215 | 0.18215 | 0.13025 | 0.13025 |
| padding token | the end token | "!" | the end token, "!" | "!" |
| trained side | 512 | 768 as a v-model, else 512 | 1024 | 1024 |
| time ids | | | 6 | 5 |
| scheduler | PNDM | DDIM | Euler | Euler |

The scheduler is that of the published folder (leading spacing, offset 1); with 9 input channels SD 1 and 2 take DDIM.
Turbo files have SDXL's tensors and shapes, so nothing can tell them: they get SDXL's settings, and their caller asks for
trailing steps and no guidance (or loads the folder, whose config says so).

What the network predicts is, in this order:

1. what the caller says (`prediction_type`);
2. what the file says: a tensor called `v_pred` (of any size, mostly none) means v-prediction; the metadata
   `prediction_type`, `modelspec.prediction_type` or `modelspec.predict_key` is taken at its word; two that contradict
   each other are an error;
3. v for SD 2 with 4 input channels: 768-v and 512-base have the same shapes, and like diffusers we take it for the
   former;
4. epsilon for all others, SD 2 inpainting among them.

A tensor called `ztsnr` means betas rescaled to a zero terminal signal-to-noise ratio.
"""  # noqa: E501 (a table)

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from sdjax.errors import CheckpointError
from sdjax.loading.checkpoint import TEXT_ENCODERS, Parts
from sdjax.loading.original_text import clip_tensors, open_clip_tensors, text_config
from sdjax.loading.original_unet import unet_config, unet_tensors
from sdjax.loading.original_vae import vae_config, vae_tensors
from sdjax.loading.passengers import TRAINING, TRAINING_PREFIXES
from sdjax.loading.renaming import shape_of
from sdjax.loading.tokenizer import END, ClipTokenizer, published_tokenizer
from sdjax.loading.weights import Tensor, open_metadata, open_tensors, read_number

Family: TypeAlias = Literal["SD 1", "SD 2", "SDXL", "SDXL refiner"]
Tensors: TypeAlias = Mapping[str, Tensor]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD1_TEXT, SD2_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_TEXT = "conditioner.embedders.0.model."
PREFIXES = (UNET, VAE, SD1_TEXT, SD2_TEXT, XL_CLIP, XL_OPEN_CLIP, REFINER_TEXT)

IGNORED_PREFIXES = (*TRAINING_PREFIXES, "first_stage_model.loss.", "first_stage_model.model_ema.")
IGNORED = (*TRAINING, "cond_stage_model.logit_scale")
EMBEDDINGS = "text_model.embeddings.token_embedding.weight"
SCALE, SCALE_TOLERANCE = "scale_factor", 0.01
"""Of latents, as training measured it."""
DIFFUSERS_VERSION = "0.42.1"
"""Whose folder layout `model_index.json` is in; some of diffusers' pipelines insist on being told."""
V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
METADATA_KEYS = ("prediction_type", "modelspec.prediction_type", "modelspec.predict_key")
PREDICTION_NAMES = {
    "v": "v_prediction",
    "v_pred": "v_prediction",
    "v_prediction": "v_prediction",
    "velocity": "v_prediction",
    "eps": "epsilon",
    "epsilon": "epsilon",
    "sample": "sample",
}


class Traits(NamedTuple):
    """What a family's tensors do not show: side in pixels, the scale of latents, SDXL's time ids, the scheduler."""

    side: int
    scaling_factor: float
    time_ids: int
    scheduler: str
    pipeline: str
    inpainting: str


_SD = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
FAMILIES: Mapping[Family, Traits] = {
    "SD 1": Traits(512, 0.18215, 0, "PNDMScheduler", *_SD),
    "SD 2": Traits(768, 0.18215, 0, "DDIMScheduler", *_SD),
    "SDXL": Traits(
        1024, 0.13025, 6, "EulerDiscreteScheduler", "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"
    ),
    "SDXL refiner": Traits(
        1024,
        0.13025,
        5,
        "EulerDiscreteScheduler",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
}


def read_file(file: Path, *, prediction_type: str | None) -> Parts:
    """List what a file holds, under the names that the same model has in a folder; weights stay in the file.

    Args:
        file: .safetensors.
        prediction_type: what the network predicts, over what the file says; None leaves it to the rules above.

    Raises:
        CheckpointError: it is no Stable Diffusion model in the original layout, a tensor is unknown, or the file
            contradicts itself.
    """
    where = str(file)
    tensors = open_tensors(file)
    groups, markers = _grouped(tensors, where)
    family = _family(groups, where)
    traits = FAMILIES[family]
    if SCALE in tensors:
        _check_scale(tensors[SCALE], traits.scaling_factor, f"{where} ({family})")
    unet, vae = groups[UNET], groups[VAE]
    if ("label_emb.0.0.weight" in unet) != (traits.time_ids > 0):
        has = "no label_emb, through which" if traits.time_ids else "a label_emb, through which only"
        raise CheckpointError(
            f"{where}: its text encoder is that of {family}, but its UNet has {has} SDXL hears its size"
        )
    texts, tokenizers = _text_encoders(family, groups, where)
    configs = {name: config for name, (config, _) in texts.items()}
    named: dict[str, Tensors] = {name: of_text for name, (_, of_text) in texts.items()}

    named["vae"] = vae_tensors(vae, where=where)
    inpainting = _inpaints(unet, vae, where)
    predicts = prediction_type or _prediction_type(file, family, markers, inpainting=inpainting)
    side = 512 if family == "SD 2" and predicts == "epsilon" else traits.side
    configs["vae"] = vae_config(vae, scaling_factor=traits.scaling_factor, sample_size=side, where=where)
    named["unet"] = unet_tensors(unet, where=where)
    configs["unet"] = unet_config(
        unet,
        heads_of_sd1=family == "SD 1",
        sample_size=side >> (len(configs["vae"]["block_out_channels"]) - 1),
        time_ids=traits.time_ids,
        pooled=configs.get("text_encoder_2", {}).get("projection_dim", 0),
        where=where,
    )
    configs["scheduler"] = _scheduler(family, predicts, zero_snr=ZERO_SNR_MARKER in markers, inpainting=inpainting)
    configs["model_index"] = _model_index(family, named, configs["scheduler"]["_class_name"], inpainting=inpainting)
    return Parts(where, configs, named, tokenizers)


def _check_scale(stored: Tensor, used: float, where: str) -> None:
    """Warn of another scale of latents than the family's, which is used as in diffusers: few files hold one."""
    scale = read_number(stored)
    if abs(scale - used) > SCALE_TOLERANCE * used:
        warnings.warn(
            f"{where} holds {SCALE} = {scale:g}, which is not used: latents are scaled by {used}", stacklevel=2
        )


def _grouped(tensors: Tensors, where: str) -> tuple[dict[str, dict[str, Tensor]], set[str]]:
    """Sort tensors by the prefix of their model, which they lose, and list the markers among the rest."""
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PREFIXES}
    unknown, markers = [], set()
    for name, tensor in tensors.items():
        if name in (V_MARKER, ZERO_SNR_MARKER):
            markers.add(name)
        elif name not in IGNORED and not name.startswith(IGNORED_PREFIXES):
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                unknown.append(name)
            else:
                groups[prefix][name.removeprefix(prefix)] = tensor
    for prefix, model in ((UNET, "UNet"), (VAE, "autoencoder")):
        if not groups[prefix]:
            raise CheckpointError(_no_model(where, prefix, model, unknown))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"{where} holds {unknown[0]!r}{more}, which no Stable Diffusion model has a place for")
    return groups, markers


def _no_model(where: str, prefix: str, model: str, unknown: list[str]) -> str:
    hint = ""
    if any("lora" in name for name in unknown):
        hint = "; it looks like a LoRA, which goes with a checkpoint"
    elif any(name.startswith(("conv_in.", "encoder.", "text_model.")) for name in unknown):
        hint = "; it looks like one part of a folder in diffusers layout: give the folder that has model_index.json"
    return f"{where} is no whole checkpoint in the original layout: it has no {model} ({prefix}*){hint}"


def _family(groups: Mapping[str, Tensors], where: str) -> Family:
    texts = {prefix for prefix in PREFIXES if prefix not in (UNET, VAE) and groups[prefix]}
    known: dict[frozenset[str], Family] = {
        frozenset({SD1_TEXT}): "SD 1",
        frozenset({SD2_TEXT}): "SD 2",
        frozenset({XL_CLIP, XL_OPEN_CLIP}): "SDXL",
        frozenset({REFINER_TEXT}): "SDXL refiner",
    }
    family = known.get(frozenset(texts))
    if family is None:
        found = " and ".join(f"{prefix}*" for prefix in sorted(texts)) or "none"
        wanted = ", or ".join(" with ".join(f"{prefix}*" for prefix in sorted(prefixes)) for prefixes in known)
        raise CheckpointError(f"{where}: of text encoders it has {found}, and it needs {wanted}")
    return family


def _text_encoders(
    family: Family, groups: Mapping[str, Tensors], where: str
) -> tuple[dict[str, tuple[dict[str, Any], Tensors]], dict[str, ClipTokenizer]]:
    """The configs, tensors and tokenizers of a family's text encoders, by their names in a folder."""
    found: dict[str, tuple[dict[str, Any], Tensors]] = {}
    tokenizers: dict[str, ClipTokenizer] = {}

    def add(name: str, tensors: Tensors, *, pad: str, hidden_act: str) -> None:
        words = tokenizers[name] = published_tokenizer(pad)
        rows, known = shape_of(tensors, EMBEDDINGS, where=where)[0], words.text.get_vocab_size()
        if rows > known:
            warnings.warn(
                f"{where}: {name} has {rows} words, and only the {known} of CLIP's vocabulary have names in a single "
                "file: load the model from its folder to write the others",
                stacklevel=2,
            )
        ids = {"start": words.start, "end": words.end, "pad": words.pad}
        found[name] = text_config(tensors, hidden_act=hidden_act, **ids, where=where), tensors

    if clip := groups[SD1_TEXT] or groups[XL_CLIP]:
        add("text_encoder", clip_tensors(clip, where=where), pad=END, hidden_act="quick_gelu")
    if open_clip := groups[SD2_TEXT] or groups[XL_OPEN_CLIP] or groups[REFINER_TEXT]:
        named = open_clip_tensors(open_clip, whole=family != "SD 2", where=where)
        if family != "SD 2" and "text_projection.weight" not in named:
            raise CheckpointError(f"{where} lacks the text_projection that {family} reads its pooled text through")
        add("text_encoder" if family == "SD 2" else "text_encoder_2", named, pad="!", hidden_act="gelu")
    return found, tokenizers


def _inpaints(unet: Tensors, vae: Tensors, where: str) -> bool:
    """Whether the UNet also reads a mask and masked latents."""
    channels = shape_of(unet, "input_blocks.0.0.weight", where=where)[1]
    latent = shape_of(vae, "decoder.conv_in.weight", where=where)[1]
    inpainting = 2 * latent + 1
    if channels not in (latent, inpainting):
        raise CheckpointError(
            f"{where}: its UNet reads {channels} channels, and only {latent} (text to image) and {inpainting} "
            "(inpainting) are supported"
        )
    return channels == inpainting


def _prediction_type(file: Path, family: Family, markers: set[str], *, inpainting: bool) -> str:
    said = {f"the tensor {V_MARKER!r}": "v_prediction"} if V_MARKER in markers else {}
    metadata = open_metadata(file)
    for key in METADATA_KEYS:
        if value := metadata.get(key):
            if value.lower() not in PREDICTION_NAMES:
                raise CheckpointError(
                    f"{file}: its metadata has {key} = {value!r}, and only {', '.join(PREDICTION_NAMES)} are known; "
                    "say what it predicts with prediction_type"
                )
            said[f"the metadata {key!r}"] = PREDICTION_NAMES[value.lower()]
    if len(set(said.values())) > 1:
        claims = ", ".join(f"{who} says {what}" for who, what in said.items())
        raise CheckpointError(f"{file} contradicts itself: {claims}; say which it is with prediction_type")
    if said:
        return next(iter(said.values()))
    return "v_prediction" if family == "SD 2" and not inpainting else "epsilon"


def _scheduler(family: Family, prediction_type: str, *, zero_snr: bool, inpainting: bool) -> dict[str, Any]:
    traits = FAMILIES[family]
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler" if inpainting and family in ("SD 1", "SD 2") else traits.scheduler,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    }
    return config | ({"rescale_betas_zero_snr": True} if zero_snr else {})


def _model_index(family: Family, tensors: Mapping[str, Tensors], scheduler: str, *, inpainting: bool) -> dict[str, Any]:
    """The `model_index.json` that diffusers would write, so that a saved folder loads there."""
    traits = FAMILIES[family]
    index: dict[str, Any] = {
        "_class_name": traits.inpainting if inpainting else traits.pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    is_xl = family.startswith("SDXL")
    for encoder, tokenizer in TEXT_ENCODERS.items():
        if encoder in tensors:
            kind = "CLIPTextModelWithProjection" if is_xl and encoder == "text_encoder_2" else "CLIPTextModel"
            index |= {encoder: ["transformers", kind], tokenizer: ["transformers", "CLIPTokenizer"]}
        elif is_xl:
            index |= {encoder: [None, None], tokenizer: [None, None]}
    if not is_xl:
        return index | {"safety_checker": [None, None], "requires_safety_checker": False}
    refines = family == "SDXL refiner"
    index["force_zeros_for_empty_prompt"] = not refines
    return index | ({"requires_aesthetics_score": True} if refines else {})
