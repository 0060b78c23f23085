"""The families whose denoiser is a UNet: Stable Diffusion 1 and 2, and SDXL with its refiner."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sdjax.devices.sharding import INPUT, OUTPUT, Split
from sdjax.models.clip import CLIPText, CLIPTextConfig
from sdjax.models.family import Conditions, Family, Text, TextPart
from sdjax.models.layers import timestep_embedding
from sdjax.models.unet.config import UNetConfig
from sdjax.models.unet.unet import AddedConditioning, UNet
from sdjax.models.vae import VAEConfig

SPLITS = tuple(
    Split(re.compile(rf"^(unet|controlnet\w*)\..*{pattern}"), axis)
    for pattern, axis in (
        (r"\.attn\d\.to_[qkv]\.weight", OUTPUT),
        (r"\.attn\d\.to_out\.0\.weight", INPUT),
        (r"\.ff\.net\.0\.proj\.(weight|bias)", OUTPUT),
        (r"\.ff\.net\.2\.weight", INPUT),
        (r"\.resnets\.\d+\.(conv1|time_emb_proj)\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.norm2\.(weight|bias)", OUTPUT),
        (r"\.resnets\.\d+\.conv2\.weight", INPUT),
    )
)
"""Parameters that a mesh splits over `model`. The rest is whole on every device: text encoders and autoencoder, which
run once a picture; convolutions without a second one to pair with; biases of a sum; norms of what is whole."""


TIME_IDS = (5, 6)
"""Numbers of SDXL's micro-conditioning: sizes and crop (6), or sizes, crop and an aesthetic score (5, a refiner)."""


def _check(config: UNetConfig, vae: VAEConfig, texts: Sequence[CLIPTextConfig]) -> None:
    """Check that the parts fit each other: each may be well formed, and from another checkpoint."""
    text = sum(text.hidden_size for text in texts)
    if config.context_channels != text:
        raise ValueError(
            f"the UNet's cross_attention_dim is {config.context_channels}, and the text encoders give {text} channels"
        )
    inpainting = 2 * vae.latent_channels + 1
    if config.in_channels not in (vae.latent_channels, inpainting):
        raise ValueError(
            f"the UNet's in_channels is {config.in_channels}, and only {vae.latent_channels} (the latents) and "
            f"{inpainting} (for inpainting a mask and masked latents too) are supported"
        )
    if config.projection_input_dim is not None:
        pooled = texts[-1].projection_dim or texts[-1].hidden_size
        each = config.addition_time_embed_dim or 0
        if each <= 0 or config.projection_input_dim not in (pooled + ids * each for ids in TIME_IDS):
            raise ValueError(
                f"the UNet's projection_class_embeddings_input_dim is {config.projection_input_dim}, which is not the "
                f"pooled text's {pooled} and {' or '.join(map(str, TIME_IDS))} time ids of {each}"
            )


def _context_alone(states: Sequence[Array], pooled: Sequence[Array]) -> Text:
    return Text(jnp.concatenate(states, axis=-1), None)


def _with_last_pooled(states: Sequence[Array], pooled: Sequence[Array]) -> Text:
    return Text(jnp.concatenate(states, axis=-1), pooled[-1])


def _guidance(config: UNetConfig, text: Text, conditions: Conditions) -> Array | None:
    """Embed the guidance scale (guidance, batch, channels), as latent consistency models read it (arXiv 2310.04378)."""
    if config.time_cond_proj_dim is None:
        return None
    scale = jax.device_put(np.full(text.context.shape[1], 1000 * (conditions.guidance_scale - 1), np.float32))
    return timestep_embedding(scale, config.time_cond_proj_dim, flip_sin_to_cos=False, freq_shift=1)[None]


def _added(config: UNetConfig, text: Text, conditions: Conditions) -> AddedConditioning | None:
    guidance = _guidance(config, text, conditions)
    return None if guidance is None else AddedConditioning(guidance=guidance)


def _added_of_sdxl(config: UNetConfig, text: Text, conditions: Conditions) -> AddedConditioning:
    """Add the micro-conditioning of SDXL (Podell et al. 2023, arXiv 2307.01952): sizes and crop, or a score."""
    assert text.pooled is not None, "SDXL reads pooled text"
    halves, batch, channels = text.pooled.shape
    count = config.time_ids(channels)
    common = (*conditions.original_size, *conditions.crop)
    by_half = {
        6: [(*common, *conditions.target_size)] * 2,
        5: [(*common, score) for score in conditions.aesthetic_scores],
    }
    ids = np.array(by_half[count], np.float32)[-halves:, None]
    time_ids: Array = jax.device_put(np.broadcast_to(ids, (halves, batch, count)))
    return AddedConditioning(text.pooled, time_ids, _guidance(config, text, conditions))


def _clip(component: str, *, skipped_layers: int, normalises: bool) -> TextPart:
    return TextPart(
        component=component,
        tokenizer=component.replace("text_encoder", "tokenizer"),
        model=CLIPText,
        read_config=CLIPTextConfig.from_dict,
        skipped_layers=skipped_layers,
        normalises=normalises,
    )


SD = Family(
    name="sd",
    component="unet",
    model=UNet,
    read_config=UNetConfig.from_dict,
    texts=(_clip("text_encoder", skipped_layers=0, normalises=True),),
    check=_check,
    join_texts=_context_alone,
    added=_added,
    zeroes_empty_prompts=False,
    ays="ays",
    splits=SPLITS,
)
SDXL = Family(
    name="sd-xl",
    component="unet",
    model=UNet,
    read_config=UNetConfig.from_dict,
    # A refiner has the second encoder alone.
    texts=(
        _clip("text_encoder", skipped_layers=1, normalises=False),
        _clip("text_encoder_2", skipped_layers=1, normalises=False),
    ),
    check=_check,
    join_texts=_with_last_pooled,
    added=_added_of_sdxl,
    zeroes_empty_prompts=True,
    ays="ays_xl",
    splits=SPLITS,
)
