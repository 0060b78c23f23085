"""A family of models: everything in which one differs from another, beside sizes.

Nothing outside `models` and `loading` asks which family it has. A denoiser of any family is called as
`model(sample, timesteps, context, added, residuals)`, and what `added` holds is the family's own affair.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jax import Array

from sdjax.devices.sharding import Split
from sdjax.models.vae import VAEConfig


class Text(NamedTuple):
    """Encoded prompts.

    Attributes:
        context: (..., tokens, channels), the text that the denoiser attends to.
        pooled: (..., channels), the text in one vector, of families that read it; else None.
    """

    context: Array
    pooled: Array | None


@dataclass(frozen=True)
class Conditions:
    """What conditions a denoiser beside its text. Each family reads what it was trained with.

    Attributes:
        guidance_scale: of models that read it instead of being called twice.
        original_size: (height, width) that the picture is to look like it was taken at.
        crop: (top, left) of the crop that it is to look like.
        target_size: (height, width) that it is to look like it was made for.
        aesthetic_scores: without and with the prompt, of 1 to 10.
    """

    guidance_scale: float
    original_size: tuple[float, float]
    crop: tuple[float, float]
    target_size: tuple[float, float]
    aesthetic_scores: tuple[float, float]


class DenoiserConfig(Protocol):
    """The facts that every denoiser's config gives."""

    @property
    def in_channels(self) -> int:
        """Channels of the latents that it sees, with a mask and masked latents where it was trained to inpaint."""

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width of the latents that it was trained on."""

    @property
    def patch(self) -> int:
        """Number that divides the sides of its latents."""

    @property
    def context_channels(self) -> int:
        """Channels of the text that it attends to."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether it reads the guidance scale, and so is called once a step."""

    @property
    def reads_sizes(self) -> bool:
        """Whether it reads the sizes, crop or scores of `Conditions`."""


@dataclass(frozen=True)
class TextPart:
    """A text encoder of a family.

    Attributes:
        component: its name in `params` and in a checkpoint's folder.
        tokenizer: its tokenizer's folder.
        model: its module, built as `model(config, dtype=, forms=, make=)`.
        read_config: makes its config of its config.json.
        skipped_layers: layers at its end that prompts do without.
        normalises: whether hidden states pass its final norm.
    """

    component: str
    tokenizer: str
    model: Callable[..., Any]
    read_config: Callable[[Mapping[str, Any]], Any]
    skipped_layers: int
    normalises: bool


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: of the table of families.
        component: the denoiser's name in `params` and in a checkpoint's folder.
        model: the denoiser's module, built as `model(config, dtype=, forms=, make=)`.
        read_config: makes the denoiser's config of its config.json.
        texts: its text encoders, in the order in which their texts are joined; a checkpoint may lack some.
        check: raises a ValueError where the denoiser's config does not fit the autoencoder's and the text encoders'.
        join_texts: from each encoder's hidden states (..., tokens, channels) and pooled vectors (..., channels).
        added: from the denoiser's config, the text and the conditions, a tree of arrays (guidance, batch, ...).
        zeroes_empty_prompts: whether a missing prompt is zeros instead of the encoding of no words.
        ays: the name of its schedule "ays", None where it has none.
        splits: parameters that a mesh splits over `model`.
    """

    name: str
    component: str
    model: Callable[..., Any]
    read_config: Callable[[Mapping[str, Any]], Any]
    texts: tuple[TextPart, ...]
    check: Callable[[Any, VAEConfig, Sequence[Any]], None]
    join_texts: Callable[[Sequence[Array], Sequence[Array]], Text]
    added: Callable[[Any, Text, Conditions], Any]
    zeroes_empty_prompts: bool
    ays: str | None
    splits: tuple[Split, ...]
