"""What peft says about an adapter beside its tensors: `adapter_config.json`, or diffusers' copy of it in the metadata.

Every field is either followed, known not to matter once training is over, or refused by its name: an adapter is never
applied by half. The decisive ones are:

| field | what is done |
| --- | --- |
| `lora_alpha`, `alpha`, `alpha_pattern`, `use_rslora` | the scale: alpha / rank, or alpha / sqrt(rank) |
| `r`, `rank_pattern` | the rank is the tensors' own; they matter for a LoKr without one |
| `init_lora_weights` | "pissa" and "olora" changed the base weights first: taken into account; "loftq", "corda", "lora_ga" and PiSSA by random iteration did so in a way that can't be repeated: refused |
| `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern` | layers outside are left out, with a warning |
| `modules_to_save`, `bias` | whole parameters in the place of the model's |
| `trainable_token_indices` | rows of the token embedding in the place of the model's |
| `use_dora` | must agree with the tensors |
| `fan_in_fan_out` | as in peft, it means nothing for the layers of these models |
"""  # noqa: E501 (a table)

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sdjax.errors import CheckpointError
from sdjax.loading.lora_names import ENCODERS

DIFFUSERS_METADATA = "lora_adapter_metadata"
PEFT_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT")
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Of `init_lora_weights`: they chose the factors alone, which are in the file."""
BASE_CHANGING_STARTS = ("pissa", "olora")
"""Of `init_lora_weights`: the base weights lost what the factors began with, which follows from the base weights."""
FOLLOWED = (
    "alpha",
    "alpha_pattern",
    "bias",
    "block_share",
    "boft_block_num",
    "boft_block_size",
    "boft_n_butterfly_factor",
    "coft",
    "eps",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "modules_to_save",
    "num_cayley_neumann_terms",
    "oft_block_size",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "trainable_token_indices",
    "use_cayley_neumann",
    "use_dora",
    "use_rslora",
)
NAMING_MODULES = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "modules_to_save")
SWITCHES = ("block_share", "coft", "use_cayley_neumann", "use_dora", "use_rslora")
FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (lambda value: isinstance(value, bool), "true or false") for name in SWITCHES},
    "bias": (lambda value: isinstance(value, str), "a text"),
    "eps": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0"),
    "layers_to_transform": (lambda value: all(type(index) is int for index in _list(value)), "one layer or a list"),
    "num_cayley_neumann_terms": (lambda value: type(value) is int and 0 < value < 100, "a whole number from 1"),
}
"""What followed fields may be, beside None, where reading them does not show it."""
ONLY_IN_TRAINING = (
    "auto_mapping",
    "base_model_name_or_path",
    "boft_dropout",
    "corda_config",
    "decompose_both",
    "decompose_factor",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_ia3_weights",
    "init_weights",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "module_dropout",
    "peft_version",
    "qalora_group_size",
    "rank_dropout",
    "rank_dropout_scale",
    "revision",
    "runtime_config",
    "task_type",
    "use_effective_conv2d",
    "velora_config",
)


@dataclass(frozen=True)
class PeftSettings:
    """The settings of one component's adapter.

    Attributes:
        values: as peft writes them.
        where: the file, for messages.
        chooses_layers: whether layers that are not its targets are left out, as `PeftModel.from_pretrained` does;
            diffusers goes by the tensors alone.
    """

    values: Mapping[str, Any]
    where: str
    chooses_layers: bool

    def scale(self, layer: str, rank: int | None) -> float:
        """Alpha / rank of a layer.

        Args:
            layer: its name within the component.
            rank: of its factors; None takes the settings' own, for a LoKr of two whole matrices.

        Raises:
            CheckpointError: they do not give one.
        """
        try:
            if rank is None:
                if self.values.get("peft_type") != "LOKR":
                    return 1.0
                rank = int(self._by_pattern("rank_pattern", layer, self.values.get("r", 8)))
            alpha = self.values.get("lora_alpha", self.values.get("alpha", rank))
            alpha = float(self._by_pattern("alpha_pattern", layer, alpha))
            scale = alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank
        except (re.error, AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise CheckpointError(f"{self.where}: {layer}: its settings do not give an alpha: {error}") from error
        if not math.isfinite(scale):
            raise CheckpointError(f"{self.where}: {layer}: alpha is {alpha}")
        return scale

    def targets(self, layer: str) -> bool:
        """Whether the adapter is for this layer, by the rules of peft's `check_target_module_exists`."""
        targets = self.values.get("target_modules")
        if not self.chooses_layers or targets is None:
            return True
        return any(self._targets(name) for name in _spelled(layer))

    def replaces(self, layer: str, part: str) -> bool:
        """Whether `weight` or `bias` of a layer may be in the file as a whole."""
        if part == "bias" and self.values.get("bias", "none") != "none":
            return True
        saved = self.values.get("modules_to_save") or ()
        return any(f".{module}." in f".{name}." for module in saved for name in _spelled(layer))

    def feeds_forward(self, layer: str) -> bool:
        """Whether (IA)^3 multiplies this layer's inputs."""
        modules = self.values.get("feedforward_modules") or ()
        if isinstance(modules, str):
            return any(re.fullmatch(modules, name) for name in _spelled(layer))
        return layer.endswith(tuple(modules))

    def token_indices(self, layer: str) -> list[int]:
        """The rows of a token embedding that the adapter brings.

        Raises:
            CheckpointError: the settings do not have them.
        """
        indices = self.values.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = next((value for key, value in indices.items() if f".{layer}".endswith(f".{key}")), None)
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise CheckpointError(f"{self.where}: trainable_token_indices gives no rows for {layer}: {indices!r}")
        return indices

    @property
    def base_change(self) -> str | None:
        """How the base weights were changed before training: of `BASE_CHANGING_STARTS`, or None."""
        start = self.values.get("init_lora_weights")
        return start.lower() if isinstance(start, str) and start.lower() in BASE_CHANGING_STARTS else None

    def _by_pattern(self, field: str, layer: str, default: Any) -> Any:
        pattern = self.values.get(field) or {}
        names = _spelled(layer)
        return next(
            (value for key, value in pattern.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names)),
            default,
        )

    def _targets(self, name: str) -> bool:
        values = self.values
        targets = values["target_modules"]
        if _matches(values.get("exclude_modules") or (), name):
            return False
        if isinstance(targets, str):
            return targets == "all-linear" or _matches(targets, name)
        if name in targets:
            return True
        wanted = values.get("layers_to_transform")
        if not _matches(targets, name) or wanted in (None, []):
            return _matches(targets, name)
        patterns = _list(values.get("layers_pattern") or [])
        forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for form in forms if (match := re.match(form, name))), None)
        return found is not None and int(found[1]) in _list(wanted)


def folder_settings(file: Path) -> PeftSettings:
    """Read an `adapter_config.json`.

    Raises:
        CheckpointError: it is not one, or asks for what is not done here.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not readable: {error}") from error
    return _checked(_object(text, str(file)), str(file), chooses_layers=True)


def file_settings(file: Path) -> dict[str, PeftSettings]:
    """Read what diffusers writes into a file's metadata: the settings of peft, each behind its component's name.

    Raises:
        CheckpointError: the file is no safetensors file, or its settings ask for what is not done here.
    """
    try:
        with safe_open(file, "np") as opened:
            packed = (opened.metadata() or {}).get(DIFFUSERS_METADATA)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    if packed is None:
        return {}
    flat = _object(packed, f"{file}: {DIFFUSERS_METADATA}")
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component = next((name for name in ("unet", *ENCODERS) if key.startswith(f"{name}.")), None)
        if component is None:
            raise CheckpointError(f"{file}: {DIFFUSERS_METADATA} has {key!r}, which belongs to no part of these models")
        found.setdefault(component, {})[key.removeprefix(f"{component}.")] = value
    return {name: _checked(values, str(file), chooses_layers=False) for name, values in found.items()}


def _checked(values: Mapping[str, Any], where: str, *, chooses_layers: bool) -> PeftSettings:
    """Refuse what would change the result and is not done here."""
    kind = values.get("peft_type") or "LORA"
    if kind not in PEFT_TYPES:
        raise CheckpointError(f"{where} is a {kind} adapter, and only {', '.join(PEFT_TYPES)} are supported")
    start = values.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        named = start.lower() if isinstance(start, str) else start
        if named not in (*PLAIN_STARTS, *BASE_CHANGING_STARTS):
            raise CheckpointError(
                f"{where}: init_lora_weights is {start!r}, which changes the model's weights before training in a way "
                "that can't be repeated from the adapter's file; save the adapter with peft's "
                "path_initial_model_for_weight_conversion"
            )
    for name, (form, words) in FORMS.items():
        if (value := values.get(name)) is not None and not form(value):
            raise CheckpointError(f"{where}: {name} is {value!r}, which should be {words}")
    for name in NAMING_MODULES:
        _check_names(name, values.get(name), where)
    for name, value in values.items():
        # A field that is None, False, 0 or empty is off.
        if value and name not in FOLLOWED and name not in ONLY_IN_TRAINING:
            raise CheckpointError(f"{where} asks for {name} ({value!r}), which is not supported")
    return PeftSettings(dict(values), where, chooses_layers)


def _check_names(field: str, value: object, where: str) -> None:
    """Check that a field is a regular expression or a list of modules' names, or left out."""
    names = [value] if isinstance(value, str) else value
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: {field} must be a name or a list of names, not {value!r}")
    try:
        for name in names:
            re.compile(name)
    except re.error as error:
        raise CheckpointError(f"{where}: {field} is no regular expression: {error}") from error


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{where} holds a JSON {type(contents).__name__}, not an object")
    return contents


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _spelled(layer: str) -> tuple[str, ...]:
    """A layer's name, and as transformers 5 has it."""
    return tuple(dict.fromkeys((layer, layer.removeprefix("text_model."))))


def _matches(modules: str | Iterable[str], name: str) -> bool:
    """Whether a regular expression is a name, or a list has it or its end."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(f".{name}".endswith(f".{module}") for module in modules)
