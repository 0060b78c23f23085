"""What a checkpoint's `scheduler_config.json` says about how its network was trained and wants to be sampled.

A key that the file leaves out takes the default of a diffusers class. Where it concerns the *training* (betas) that is
the class named in the file; where it concerns the *sampling* (spacing, where the last step lands) the field is None
here and the chosen sampler puts in its own default. This is what diffusers'
`OtherScheduler.from_config(pipe.scheduler.config)` does, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

Float64: TypeAlias = NDArray[np.floating[Any]]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
FinalSigmas = Literal["zero", "sigma_min"]
SigmaSchedule = Literal["karras", "exponential", "beta", "ays", "ays_xl"]


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise levels a network was trained on, what its output means, and the spacing that its makers advise.

    The defaults are Stable Diffusion's. `None` means: the chosen sampler's own default.

    Raises:
        ValueError: a value is not one of those allowed, or a zero terminal signal-to-noise ratio is combined with
            epsilon prediction (at the last training timestep the input is pure noise, so a network that answers
            with that noise says nothing about the picture: x0 = (x - noise) / 0).
    """

    class_name: str | None = None
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"

    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None  # ddim, pndm, lcm, tcd: the last step lands on x0, not on training timestep 0
    final_sigmas_type: FinalSigmas | None = None  # the same choice for samplers that count in sigmas
    sigma_schedule: SigmaSchedule | None = None  # the file's use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas
    sigma_min: float | None = None  # ends of those schedules, where they are not the training's
    sigma_max: float | None = None

    algorithm_type: str | None = None
    solver_order: int = 2
    solver_type: str | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool = False
    skip_prk_steps: bool | None = None
    disable_corrector: tuple[int, ...] = ()
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        for name, allowed in _ONE_OF.items():
            _require_one_of(name, getattr(self, name), allowed)
        _require_whole("num_train_timesteps", self.num_train_timesteps, least=1)
        _require_whole("original_inference_steps", self.original_inference_steps, least=1)
        _require_whole("steps_offset", self.steps_offset, least=0)
        for name in ("beta_start", "beta_end"):
            _require_between(name, getattr(self, name), 1.0)
        for name in ("sigma_min", "sigma_max", "timestep_scaling"):
            if getattr(self, name) is not None:
                _require_between(name, getattr(self, name), math.inf)
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas must have num_train_timesteps = {self.num_train_timesteps} values, "
                    f"not {len(self.trained_betas)}"
                )
            for beta in self.trained_betas:
                _require_between("trained_betas", beta, 1.0)
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type 'v_prediction' or 'sample', not 'epsilon': "
                "from pure noise, a prediction of the noise tells nothing about the picture"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Read the contents of a `scheduler_config.json` (or a diffusers scheduler's `.config`).

        Raises:
            ValueError: a key asks for something that would change the picture and that we don't do, such as
                `thresholding` or `clip_sample` (both bend x0, so a step would no longer be linear), or a key is
                unknown and not switched off; the message names it.
        """
        left_out = set(config.get("_use_default_values", ()))
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in left_out}
        class_name = config.get("_class_name")
        if class_name is not None and not isinstance(class_name, str):
            raise ValueError(f"_class_name must be a string, not {class_name!r}")

        values = {**_class_defaults(class_name, given), **given}
        for key, allowed in _ONLY.items():
            value = values.pop(key, allowed[0])
            if value not in allowed:
                default = "" if key in given else f", the default of {class_name}"
                raise ValueError(
                    f"the scheduler config's {key} is {value!r}{default}; only {_listed(allowed)} is supported"
                )
        for key in _IRRELEVANT:
            values.pop(key, None)

        chosen = [name for key, name in _USE_SIGMAS.items() if values.pop(key, None)]
        if len(chosen) > 1:
            raise ValueError(f"the scheduler config switches on more than one sigma schedule: {', '.join(chosen)}")
        values["sigma_schedule"] = chosen[0] if chosen else None

        known = {field.name for field in fields(cls)}
        for key in [key for key in values if key not in known]:
            if values.pop(key) not in (None, False):
                raise ValueError(f"the scheduler config's key {key!r} is unknown, so its effect on the picture is, too")
        for key in ("trained_betas", "disable_corrector"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return cls(class_name=class_name, **{key: value for key, value in values.items() if value is not None})


def alphas_cumprod(config: SchedulerConfig) -> Float64:
    """The share of the picture's variance left at each training timestep: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise.

    `a_t = cumprod(1 - betas)`. With `rescale_betas_zero_snr`, sqrt(a) is shifted and scaled so that the last one is
    exactly 0 and the first stays (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    algorithm 1, https://arxiv.org/abs/2305.08891).

    Returns:
        (num_train_timesteps,) float64, decreasing, within [0, 1).
    """
    a = np.cumprod(1 - _betas(config))
    if config.rescale_betas_zero_snr:
        root = np.sqrt(a)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        a = root**2
    return a


def _betas(config: SchedulerConfig) -> Float64:
    """Variance added at each training timestep: (num_train_timesteps,)."""
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        return np.square(np.linspace(config.beta_start**0.5, config.beta_end**0.5, count))
    # Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 17, betas capped at 0.999
    a = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: Float64 = np.minimum(1 - a[1:] / a[:-1], 0.999)
    return betas


# beta_start, beta_end and beta_schedule that a class assumes; values from diffusers 0.42
_BETAS = MappingProxyType(
    {
        "HeunDiscreteScheduler": (0.00085, 0.012, "linear"),
        "KDPM2DiscreteScheduler": (0.00085, 0.012, "linear"),
        "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012, "linear"),
        "DPMSolverSDEScheduler": (0.00085, 0.012, "linear"),
        "LCMScheduler": (0.00085, 0.012, "scaled_linear"),
        "TCDScheduler": (0.00085, 0.012, "scaled_linear"),
        **dict.fromkeys(
            (
                "DDIMScheduler",
                "DDPMScheduler",
                "PNDMScheduler",
                "EulerDiscreteScheduler",
                "EulerAncestralDiscreteScheduler",
                "LMSDiscreteScheduler",
                "DPMSolverMultistepScheduler",
                "DPMSolverSinglestepScheduler",
                "UniPCMultistepScheduler",
                "DEISMultistepScheduler",
            ),
            (0.0001, 0.02, "linear"),
        ),
    }
)

_ONE_OF: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "beta_schedule": get_args(BetaSchedule),
        "rescale_betas_zero_snr": (False, True),
        "prediction_type": get_args(PredictionType),
        "timestep_spacing": (*get_args(TimestepSpacing), None),
        "set_alpha_to_one": (False, True, None),
        "final_sigmas_type": (*get_args(FinalSigmas), None),
        "sigma_schedule": (*get_args(SigmaSchedule), None),
        "solver_order": (1, 2, 3),
        "lower_order_final": (False, True, None),
        "euler_at_final": (False, True),
        "skip_prk_steps": (False, True, None),
        "variance_type": ("fixed_small", "fixed_large"),
    }
)

# Keys of which we do one value only (the first is also what leaving the key out means).
_ONLY: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "thresholding": (False, None),
        "clip_sample": (False, None),
        "use_flow_sigmas": (False, None),
        "use_lu_lambdas": (False, None),
        "use_dynamic_shifting": (False, None),
        "interpolation_type": ("linear", None),
        "timestep_type": ("discrete", None),
        "lambda_min_clipped": (-math.inf, None),
        "predict_x0": (True, None),
        "solver_p": (None,),
        "shift_terminal": (None,),
    }
)

# Keys that only steer what `_ONLY` keeps switched off, or how diffusers draws its noise.
_IRRELEVANT = (
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "flow_shift",
    "noise_sampler_seed",
    "sample_max_value",
    "time_shift_type",
)

_USE_SIGMAS: Mapping[str, SigmaSchedule] = MappingProxyType(
    {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
)


def _class_defaults(class_name: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of this diffusers class means by saying nothing."""
    if class_name is None:
        return {}
    defaults: dict[str, Any] = {}
    if class_name in ("DDIMScheduler", "DDPMScheduler"):
        defaults["clip_sample"] = True
    if class_name == "PNDMScheduler":
        defaults["skip_prk_steps"] = False
    betas = ("beta_start", "beta_end", "beta_schedule")
    if class_name in _BETAS:
        return defaults | dict(zip(betas, _BETAS[class_name], strict=True))
    missing = [key for key in betas if key not in given]
    if missing and given.get("trained_betas") is None:
        raise ValueError(
            f"the scheduler config leaves out {', '.join(missing)}, and the defaults of {class_name} are not known"
        )
    return defaults


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # True equals 1, but is no solver order
    if value not in allowed or type(value) not in {type(one) for one in allowed}:
        raise ValueError(f"{name} must be {_listed(allowed)}, not {value!r}")


def _require_whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _require_between(name: str, value: object, bound: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < bound:
        raise ValueError(f"{name} must lie between 0 and {bound}, not {value!r}")


def _listed(allowed: tuple[object, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)
