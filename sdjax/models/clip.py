"""The CLIP text encoder (Radford et al. 2021), as transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array
from typing_extensions import Unpack

from sdjax.models.config import check_names, check_types
from sdjax.models.kernels import attend
from sdjax.models.layers import Embedding, LayerNorm, Linear, Setup, gelu, quick_gelu

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "quick_gelu": quick_gelu,
        "gelu": gelu,
    }
)


@dataclass(frozen=True)
class CLIPTextConfig:
    """The sizes of a text encoder, as its config.json has them.

    `eos_token_id` is where the pooled vector is taken. Old configs say 2, which never was the end token's id: there the
    end token is the last of the vocabulary. `projection_dim` is None in an encoder without projection.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
        """Read a config.json; its keys about training and text generation do not matter here.

        Raises:
            ValueError: the activation or the kind of model is not supported, or padding is to be masked.
        """
        values = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        check_names(config, ("architectures",), model="text encoder")
        architectures = config.get("architectures") or ["CLIPTextModel"]
        if architectures[0] not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ValueError(
                f"text encoder config: architectures is {architectures}, and only CLIPTextModel and "
                "CLIPTextModelWithProjection are supported"
            )
        if architectures[0] == "CLIPTextModel":
            values["projection_dim"] = None
        else:
            values.setdefault("projection_dim", 512)
        if values.get("eos_token_id", 2) == 2:
            values["eos_token_id"] = values.get("vocab_size", cls.vocab_size) - 1
        if config.get("use_attention_mask"):
            raise ValueError(
                f"text encoder config: use_attention_mask is {config['use_attention_mask']!r}, which is not supported"
            )
        if values.get("hidden_act", cls.hidden_act) not in tuple(ACTIVATIONS):
            raise ValueError(
                f"text encoder config: hidden_act is {values['hidden_act']!r}, and only "
                f"{' and '.join(map(repr, ACTIVATIONS))} are supported"
            )
        return check_types(cls(**values), model="text encoder")


class TextEncoding(NamedTuple):
    """What the encoder makes of token ids.

    `hidden_states`: the input of the first layer, then the output of each, every one (batch, tokens, hidden).
    `pooled`: (batch, projection_dim), or (batch, hidden) without projection, taken at the first end token.
    """

    hidden_states: tuple[Array, ...]
    pooled: Array


class _Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, **setup)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, **setup)

    def __call__(self, token_ids: Array, vectors: Array | None) -> Array:
        if vectors is None:
            tokens = self.token_embedding(token_ids)
        else:
            beyond = token_ids - self.token_embedding.weight.shape[0]
            known = self.token_embedding(jnp.where(beyond < 0, token_ids, 0))
            learned = vectors[jnp.maximum(beyond, 0)].astype(known.dtype)
            tokens = jnp.where(beyond[..., None] < 0, known, learned)
        return tokens + self.position_embedding(jnp.arange(token_ids.shape[1]))


class _SelfAttention(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        linear = partial(Linear, config.hidden_size, config.hidden_size, **setup)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.heads = config.num_attention_heads
        self.forms = setup["forms"]

    def __call__(self, x: Array) -> Array:
        split = (*x.shape[:-1], self.heads, -1)
        query, key, value = (project(x).reshape(split) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(self.forms, query, key, value, causal=True).reshape(x.shape))


class _MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **setup)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **setup)
        self.activation = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class _Layer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        norm = partial(LayerNorm, config.hidden_size, epsilon=config.layer_norm_eps, **setup)
        self.layer_norm1 = norm()
        self.self_attn = _SelfAttention(config, **setup)
        self.layer_norm2 = norm()
        self.mlp = _MLP(config, **setup)

    def __call__(self, x: Array) -> Array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Encoder(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        self.layers = nnx.List([_Layer(config, **setup) for _ in range(config.num_hidden_layers)])


class _TextTransformer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        self.embeddings = _Embeddings(config, **setup)
        self.encoder = _Encoder(config, **setup)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **setup)


class CLIPText(nnx.Module):
    """A causal transformer over token ids."""

    def __init__(self, config: CLIPTextConfig, **setup: Unpack[Setup]) -> None:
        self.text_model = _TextTransformer(config, **setup)
        self.text_projection = (
            None
            if config.projection_dim is None
            else Linear(config.hidden_size, config.projection_dim, use_bias=False, **setup)
        )
        self.config = config

    def __call__(self, token_ids: Array, vectors: Array | None = None) -> TextEncoding:
        """Encode (batch, tokens) int32 ids, each row with an end token.

        Ids from `vocab_size` on are rows of `vectors`, (rows, hidden): learned words beside the vocabulary. Ids out of
        range are clamped by JAX without a word: whoever makes them must check them.

        The pooled vector is taken at the first end token whatever words were learned. diffusers, where a config's
        `eos_token_id` is 2, takes it at the largest id, which is a learned word's.
        """
        states = [self.text_model.embeddings(token_ids, vectors)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        end = jnp.argmax(token_ids == self.config.eos_token_id, axis=-1)
        pooled = self.final_norm(jnp.take_along_axis(states[-1], end[:, None, None], axis=1)[:, 0])
        if self.text_projection is not None:
            pooled = self.text_projection(pooled)
        return TextEncoding(tuple(states), pooled)

    def final_norm(self, hidden_state: Array) -> Array:
        """Normalise a hidden state (..., hidden), as SD 1 and 2 do before the UNet sees it."""
        normal: Array = self.text_model.final_layer_norm(hidden_state)
        return normal
