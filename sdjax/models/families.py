"""The table of families, and which of them a checkpoint belongs to."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdjax.models.family import Family
from sdjax.models.unet.families import SD, SDXL

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (SD, SDXL)})


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> Family:
    """Find the family of a checkpoint.

    Args:
        configs: the config.json of each of its components, by name.

    Raises:
        ValueError: it has no denoiser that is known.
    """
    if "unet" in configs:
        return SDXL if configs["unet"].get("addition_embed_type") == "text_time" else SD
    raise ValueError(f"it has no {' or '.join(sorted({family.component for family in FAMILIES.values()}))}")
