"""From the parts of one layer, as a file has them, to the changes of the layer's leaves."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdjax.errors import CheckpointError
from sdjax.loading.lora import Change
from sdjax.loading.lora_kinds import (
    Difference,
    Factor,
    Generalised,
    Hadamard,
    Kind,
    Kronecker,
    LowRank,
    Replacement,
    Rescaled,
    Rows,
    described,
)
from sdjax.loading.lora_rotations import Butterfly, InputRotation, Rotation, cayley, peft_oft_rotations
from sdjax.loading.lora_settings import PeftSettings
from sdjax.loading.weights import LeafPath, tensor_name

Parts = dict[str, NDArray[Any]]
"""The parts of one layer, by their role in `lora_names.PARTS`."""
BIAS = ("up_bias", "bias_difference", "bias")


class Layer(NamedTuple):
    """A layer of the model.

    Attributes:
        path: in the parameters, without the leaf.
        shapes: of its leaves, by name ("weight", "bias").
        weight: gives the weight itself, float32.
        where: how errors begin.
        settings: peft's, where there are any.
    """

    path: LeafPath
    shapes: Mapping[str, tuple[int, ...]]
    weight: Callable[[], NDArray[np.float32]]
    where: str
    settings: PeftSettings | None

    @property
    def name(self) -> str:
        """Within its component."""
        return tensor_name(self.path[1:])

    def error(self, what: str) -> CheckpointError:
        """An error about it."""
        return CheckpointError(f"{self.where}: {tensor_name(self.path)} {what}")


def layer_changes(layer: Layer, parts: Parts) -> dict[str, Change]:
    """The changes of a layer's leaves, by the leaf's name, each checked against the leaf's shape.

    Raises:
        CheckpointError: the parts do not make an adapter, or fit another model; the layer and the parts are named.
    """
    of_weight = {role: part for role, part in parts.items() if role not in BIAS}
    of_bias = {role: part for role, part in parts.items() if role in BIAS}
    changes = {}
    scale = 1.0
    if of_weight:
        changes["weight"] = _weight_change(layer, of_weight)
        scale = changes["weight"].scale
    if "ia3_l" in parts and layer.settings and not layer.settings.feeds_forward(layer.name) and "bias" in layer.shapes:
        changes["bias"] = Change(Rescaled(parts["ia3_l"].astype(np.float32).reshape(-1) - 1))
        _check_fit(layer, "bias", changes["bias"].factors)
    for role, part in of_bias.items():
        if "bias" not in layer.shapes:
            raise layer.error(f"has a {_SPELLED[role]} in the file, and no bias in this model")
        if "bias" in changes:
            raise layer.error(f"has two changes of its bias, one of them a {_SPELLED[role]}")
        if role == "bias":
            changes["bias"] = Change(Replacement(_whole(layer, "bias", part)))
        else:
            changes["bias"] = Change(Difference(part), scale if role == "up_bias" else 1.0)
        _check_fit(layer, "bias", changes["bias"].factors)
    return changes


def _check_fit(layer: Layer, leaf: str, kind: Kind) -> None:
    if not kind.fits(layer.shapes[leaf]):
        raise layer.error(
            f"({leaf}) is of another shape: the factors of the LoRA are {described(kind)}, and this model's layer is "
            f"{layer.shapes[leaf]}; it was made for another base model"
        )


_SPELLED = {"up_bias": "lora_B.bias", "bias_difference": "diff_b (or b_norm)", "bias": "bias"}


def _weight_change(layer: Layer, parts: Parts) -> Change:
    parts = dict(parts)
    alpha, scalar = (_number(layer, name, parts.pop(name, None)) for name in ("alpha", "scalar"))
    vectors = {name: parts.pop(name) for name in ("magnitude", "dora_scale") if name in parts}
    kind, rank = _kind(layer, parts, alpha)
    _check_fit(layer, "weight", kind)
    settings = layer.settings
    low_rank = isinstance(kind, LowRank | Hadamard | Kronecker)
    if vectors and not low_rank:
        raise layer.error(f"has {' and '.join(vectors)} beside {', '.join(sorted(parts))}, which is not supported")
    if settings and low_rank and "use_dora" in settings.values and settings.values["use_dora"] != bool(vectors):
        has = "and no magnitudes" if not vectors else f"and {' and '.join(vectors)}"
        raise layer.error(f"has use_dora = {settings.values['use_dora']} in its settings, {has} in the file")
    if alpha is not None:
        scale = alpha / rank if rank else 1.0
    elif settings and isinstance(kind, LowRank | Hadamard | Kronecker | Generalised):
        scale = settings.scale(layer.name, rank)
    else:
        scale = 1.0
    if scalar is not None:
        scale *= scalar
    if settings and settings.base_change and isinstance(kind, LowRank):
        kind, scale = _less_what_it_began_with(layer, kind, scale, settings.base_change), 1.0
    if vectors and "embeddings" in layer.path:
        raise layer.error("has DoRA magnitudes, which are not supported for an embedding")
    if len(vectors) > 1:
        raise layer.error(f"has both {' and '.join(vectors)}")
    magnitude = None
    for name, values in vectors.items():
        magnitude = _magnitude(layer, values, by_output=name == "magnitude")
    return Change(kind, scale, magnitude)


def _kind(layer: Layer, parts: Parts, alpha: float | None) -> tuple[Kind, int | None]:
    """The arrays as the kind that their names make, and the rank, which is None where a scale has no meaning."""
    names = set(parts)
    if names == {"down", "up"}:
        return LowRank((_matrix(parts["up"]), parts["down"])), _rank(layer, parts["down"])
    if names == {"down", "mid", "up"}:
        return LowRank((_matrix(parts["up"]), parts["mid"], _matrix(parts["down"]))), _rank(layer, parts["down"])
    if names == {"embedding_down", "embedding_up"}:
        # peft keeps these transposed: A is (rank, words) and B is (channels, rank).
        return LowRank((parts["embedding_down"].T, parts["embedding_up"].T)), _rank(layer, parts["embedding_down"])
    if names == {"difference"}:
        return Difference(parts["difference"]), None
    if names == {"weight"}:
        return Replacement(_whole(layer, "weight", parts["weight"])), None
    if names in ({"weight", "on_input"}, {"ia3_l"}):
        return _rescaled(layer, parts), None
    if names == {"token_rows"}:
        return _rows(layer, parts["token_rows"]), None
    if names in ({"oft_blocks"}, {"oft_blocks", "rescale"}):
        return _rotation(layer, parts, alpha or 0.0), None
    if names == {"oft_r"}:
        return _oft_of_peft(layer, parts["oft_r"]), None
    if names == {"boft_r", "boft_s"}:
        return _boft_of_peft(layer, parts["boft_r"], parts["boft_s"]), None
    glora = {"a1", "a2", "b1", "b2"}
    if names in (glora, {*glora, "bm"}):
        inner = _matrix(parts["a1"]), _matrix(parts["a2"])
        core = (parts["bm"], _matrix(parts["b2"])) if "bm" in parts else (parts["b2"],)
        return Generalised(inner, (_matrix(parts["b1"]), *core)), _rank(layer, parts["a2"])
    for kind, cores in ((Hadamard, ("hada_t1", "hada_t2")), (Kronecker, (None, "lokr_t2"))):
        stem = "hada_w" if kind is Hadamard else "lokr_w"
        (first, used), (second, used_too) = (_lycoris(parts, f"{stem}{i}", core) for i, core in enumerate(cores, 1))
        if first and second and names == used | used_too:
            ranked = [parts[f"{stem}{i}_b"] for i in (2, 1) if f"{stem}{i}_b" in parts]
            return kind(first, second), _rank(layer, ranked[0]) if ranked else None
    raise layer.error(f"has the parts {', '.join(sorted(names)) or 'alpha alone'}, which do not make a LoRA")


def _whole(layer: Layer, leaf: str, part: NDArray[Any]) -> NDArray[Any]:
    """A whole parameter in the model's place, where the settings say so."""
    if layer.settings is None or not layer.settings.replaces(layer.name, leaf):
        raise layer.error(f"has a whole {leaf} in the file, and no modules_to_save (or bias) that asks for it")
    return part


def _rescaled(layer: Layer, parts: Parts) -> Rescaled:
    """(IA)^3: LyCORIS keeps what is added to 1, and which side it is for; peft keeps the factor."""
    shape = layer.shapes["weight"]
    if "ia3_l" in parts:
        if layer.settings is None:
            raise layer.error("has ia3_l, and there is no adapter_config.json that says which side it multiplies")
        more = parts["ia3_l"].astype(np.float32).reshape(-1) - 1
        on_input = layer.settings.feeds_forward(layer.name)
    else:
        more = parts["weight"].astype(np.float32).reshape(-1)
        on_input = bool(_number(layer, "on_input", parts["on_input"]))
    ones = (1,) * (len(shape) - 2)
    return Rescaled(more.reshape((1, -1, *ones) if on_input else (-1, 1, *ones)))


def _rows(layer: Layer, values: NDArray[Any]) -> Rows:
    if layer.settings is None:
        raise layer.error("has trainable_tokens_delta, and there are no settings that say which tokens they are")
    indices = layer.settings.token_indices(layer.name)
    if any(index >= layer.shapes["weight"][0] for index in indices):
        raise layer.error(f"has no row {max(indices)}, which trainable_token_indices names")
    return Rows(np.array(indices, np.int32), values)


def _rotation(layer: Layer, parts: Parts, constraint: float) -> Rotation | Butterfly:
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise layer.error(f"has oft_blocks of shape {blocks.shape}: they are square, in 3 (OFT) or 4 (BOFT) dimensions")
    # LyCORIS and sd-scripts keep as alpha the constraint for each of a layer's outputs.
    rotations = cayley(blocks, constraint * layer.shapes["weight"][0]).astype(np.float32)
    return (Rotation if blocks.ndim == 3 else Butterfly)(rotations, rescale)


def _oft_of_peft(layer: Layer, vectors: NDArray[Any]) -> InputRotation:
    settings = layer.settings.values if layer.settings else {}
    if settings.get("peft_type") != "OFT":
        raise layer.error("has oft_R, and there is no adapter_config.json that says how it rotates")
    shape = layer.shapes["weight"]
    if any(side != 1 for side in shape[2:]):
        # There peft's layer folds what it has rotated, which no weight does.
        raise layer.error(f"has OFT of peft on a window of {shape[2:]}, which is not supported")
    size = (1 + math.isqrt(1 + 8 * vectors.shape[-1])) // 2
    if vectors.ndim != 2 or size * (size - 1) // 2 != vectors.shape[1] or shape[1] % size:
        raise layer.error(f"has oft_R of shape {vectors.shape}, which makes no blocks of its {shape[1]} inputs")
    rotations = peft_oft_rotations(
        vectors.astype(np.float64),
        size,
        largest_norm=settings.get("eps", 6e-5) / math.sqrt(len(vectors)) if settings.get("coft") else None,
        neumann_terms=settings.get("num_cayley_neumann_terms", 5) if settings.get("use_cayley_neumann") else None,
    )
    if settings.get("block_share"):
        rotations = np.broadcast_to(rotations, (shape[1] // size, size, size))
    return InputRotation(rotations.astype(np.float32), None)


def _boft_of_peft(layer: Layer, blocks: NDArray[Any], rescale: NDArray[Any]) -> InputRotation:
    if blocks.ndim != 4 or blocks.shape[-1] != blocks.shape[-2] or 0 in blocks.shape:
        raise layer.error(f"has boft_R of shape {blocks.shape}, which are no square blocks")
    if len(blocks) != 1:
        raise layer.error(f"has BOFT of peft with {len(blocks)} butterfly factors, and only 1 is supported")
    # peft halves Q, and rotates the other way round than LyCORIS.
    rotations = cayley(-0.5 * blocks[0].astype(np.float64), 0.0)
    return InputRotation(rotations.astype(np.float32), rescale)


def _less_what_it_began_with(layer: Layer, kind: LowRank, scale: float, start: str) -> LowRank:
    """A LoRA whose base lost, before training, what the factors began with: the difference of the two, at scale 1.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) took the largest singular values; OLoRA (Büyükakyüz 2024, arXiv
    2406.01775) the first columns of Q R, times the scale. Both follow from the unchanged weight.
    """
    if len(kind.product) != 2 or len(layer.shapes["weight"]) != 2:
        raise layer.error(f"has init_lora_weights = {start!r} in its settings, which peft does for matrices alone")
    up, down = (np.asarray(part, np.float32) for part in kind.product)
    rank = len(down)
    if start == "pissa":
        left, values, right = np.linalg.svd(layer.weight(), full_matrices=False)
        first_up, first_down = left[:, :rank] * values[:rank], right[:rank]
    else:
        q, r = np.linalg.qr(layer.weight())
        first_up, first_down = scale * q[:, :rank], r[:rank]
    return LowRank((np.concatenate([scale * up, -first_up], axis=1), np.concatenate([down, first_down])))


def _number(layer: Layer, name: str, part: NDArray[Any] | None) -> float | None:
    if part is None:
        return None
    if part.size != 1:
        raise layer.error(f"has an {name} of shape {part.shape}, which should be one number")
    return float(part.reshape(()))


def _matrix(part: NDArray[Any]) -> NDArray[Any]:
    """A pointwise convolution's kernel as the matrix that it is."""
    return part[..., 0, 0] if part.ndim == 4 and part.shape[2:] == (1, 1) else part


def _rank(layer: Layer, part: NDArray[Any]) -> int:
    if part.ndim < 2 or 0 in part.shape:
        raise layer.error(f"has a factor of shape {part.shape}, which has no rank")
    return int(part.shape[0])


def _lycoris(parts: Parts, name: str, core: str | None) -> tuple[Factor, set[str]]:
    """A factor in LyCORIS' spelling, and the names that it uses up; an empty one where a part is missing.

    It is `w1`, or `w1_a` times `w1_b`, or, with a core `t1` between, the transpose of `w1_a` times `t1` times `w1_b`.
    """
    pair = {f"{name}_a", f"{name}_b"}
    if name in parts:
        return (parts[name],), {name}
    if not pair <= parts.keys():
        return (), set()
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return ((a.T, parts[core], b), pair | {core}) if core in parts else ((a, b), pair)


def _magnitude(layer: Layer, values: NDArray[Any], *, by_output: bool) -> NDArray[Any]:
    """DoRA's magnitudes, shaped to multiply a weight.

    peft's vector has a number for each output, in whatever shape; that of LyCORIS says by its shape whether it is
    (out, 1, ...) or, as in its first releases, (1, in, ...).
    """
    shape = layer.shapes["weight"]
    out, width = shape[:2]
    ones = (1,) * (len(shape) - 2)
    if not by_output and values.ndim > 1 and values.shape[0] == 1 and values.size == width and out != 1:
        return values.reshape(1, width, *ones)
    if values.size != out:
        raise layer.error(f"has DoRA magnitudes of shape {values.shape}, and its weight here is {shape}")
    return values.reshape(out, 1, *ones)
