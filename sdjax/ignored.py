"""Arguments of a call that do nothing beside the others: each is named in the request's warnings."""

from collections.abc import Iterator, Mapping
from typing import Any

from sdjax.models import Definition

NEUTRAL: Mapping[str, Any] = {
    "negative_prompt": None,
    "guidance_rescale": 0.0,
    "strength": 0.8,
    "feather": 0.0,
    "padding_mask_crop": None,
    "original_size": None,
    "crop": (0, 0),
    "target_size": None,
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
}
"""Arguments that may do nothing, and the value of each that asks for nothing."""
SIZES = ("original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score")


def ignored_arguments(definition: Definition, given: Mapping[str, Any], guidance_scale: float) -> Iterator[str]:
    """Describe the arguments that have no effect, a line each.

    Args:
        definition: of the checkpoint.
        given: the arguments of a call, `negative_prompt` among them.
        guidance_scale: with its default filled in.
    """
    asked = [name for name, neutral in NEUTRAL.items() if not _asks_nothing(given.get(name, neutral), neutral)]
    reasons: dict[str, str] = {}
    if guidance_scale <= 1:
        why = f"guidance_scale is {guidance_scale:g}, and up to 1 there is no guidance"
        reasons |= dict.fromkeys(("negative_prompt", "guidance_rescale"), why)
    elif definition.denoiser_config.embeds_guidance:
        why = "this model reads the guidance scale, and is called without a negative prompt"
        reasons |= dict.fromkeys(("negative_prompt", "guidance_rescale"), why)
    if given.get("image") is None:
        reasons["strength"] = "there is no image"
    if given.get("mask") is None:
        reasons |= dict.fromkeys(("feather", "padding_mask_crop"), "there is no mask")
    if not definition.denoiser_config.reads_sizes:
        reasons |= dict.fromkeys(SIZES, "this model reads no sizes (SDXL does)")
    for name in asked:
        if name in reasons:
            yield f"{name} has no effect: {reasons[name]}"


def _asks_nothing(value: Any, neutral: Any) -> bool:
    """Whether a value is the neutral one, or a list of negative prompts has no word."""
    if isinstance(value, list) and neutral is None:
        return not any(value)
    return value is None or value == neutral or (isinstance(value, list) and tuple(value) == neutral)
