"""Tensors that come along in checkpoints and are no part of a model here: left out by name, never by being unknown.

diffusers and transformers leave out whatever they have no place for. Here a name must be known not to matter, so that a
misspelled weight is still an error.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

TRAINING = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "epoch",
    "global_step",
    "iteration",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "num_updates",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "scale_factor",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "step",
)
"""Counters, and numbers of the schedule that follow from its betas; `single_file` looks at `scale_factor` before."""
TRAINING_PREFIXES = ("model_ema.", "loss.", "denoiser.", "optimizer_states.", "lr_schedulers.", "callbacks.")
"""Averaged weights of the same model, the loss with its discriminator, and what a training run goes on from."""
VISION = ("logit_scale", "vision_model.", "visual_projection.", "visual.")
"""The rest of a whole CLIP beside its text encoder; a name that ends in a dot stands for all that begin so."""
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"unet": (), "vae": (), "text_encoder": VISION, "text_encoder_2": VISION, "controlnet": ()}
)
"""What may come along with one model of a folder, beside what training leaves."""

Tensor = TypeVar("Tensor")


def without_passengers(tensors: Mapping[str, Tensor], component: str, *, projected: bool = False) -> dict[str, Tensor]:
    """Leave out the tensors that are known to be no part of a model.

    Args:
        tensors: by name within the component.
        component: of `PARTS`.
        projected: whether a text encoder reads its projection; without one the projection is a passenger too.
    """
    names = (*TRAINING, *TRAINING_PREFIXES, *PARTS[component])
    if component in ("text_encoder", "text_encoder_2") and not projected:
        names += ("text_projection.weight",)
    return {name: tensor for name, tensor in tensors.items() if not is_one_of(name, names)}


def is_one_of(name: str, names: tuple[str, ...]) -> bool:
    """Whether a name is in a list, or begins with one of its entries that end in a dot."""
    return name in names or name.startswith(tuple(entry for entry in names if entry.endswith(".")))
