"""The samplers by name, and the checks on what a caller asks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.consistency import lcm, tcd
from sdjax.schedulers.ddim import ddim, ddpm
from sdjax.schedulers.deis import deis
from sdjax.schedulers.dpm import dpmpp_2m, dpmpp_2m_sde, dpmpp_sde
from sdjax.schedulers.euler import euler, euler_a, heun
from sdjax.schedulers.kdpm import kdpm2, kdpm2_a
from sdjax.schedulers.lms import lms
from sdjax.schedulers.pndm import pndm
from sdjax.schedulers.rows import Schedule
from sdjax.schedulers.singlestep import dpmpp_2s
from sdjax.schedulers.spacing import SIGMA_SCHEDULES
from sdjax.schedulers.unipc import unipc

SAMPLERS: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "ddim": ddim,
        "ddpm": ddpm,
        "euler": euler,
        "euler_a": euler_a,
        "heun": heun,
        "kdpm2": kdpm2,
        "kdpm2_a": kdpm2_a,
        "lms": lms,
        "dpmpp_2s": dpmpp_2s,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "dpmpp_sde": dpmpp_sde,
        "unipc": unipc,
        "pndm": pndm,
        "deis": deis,
        "lcm": lcm,
        "tcd": tcd,
    }
)
"""Each takes (config, steps, schedule, begin), and `eta` where it is in `WITH_ETA`. Those that remember nothing from
step to step have no use for `begin`."""

WITH_ETA = frozenset({"ddim", "tcd"})

WITHOUT_CONFIGURED_SIGMAS = frozenset({"ddim", "ddpm", "pndm", "euler_a", "lcm", "tcd"})
"""Samplers that leave a config's `use_karras_sigmas` and its like alone, as their classes in diffusers do; a `schedule`
that the caller asks for is for all of them."""

_SAMPLER_OF_CLASS: Mapping[str, str] = MappingProxyType(
    {
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddpm",
        "EulerDiscreteScheduler": "euler",
        "EulerAncestralDiscreteScheduler": "euler_a",
        "HeunDiscreteScheduler": "heun",
        "KDPM2DiscreteScheduler": "kdpm2",
        "KDPM2AncestralDiscreteScheduler": "kdpm2_a",
        "LMSDiscreteScheduler": "lms",
        "DPMSolverSDEScheduler": "dpmpp_sde",
        "UniPCMultistepScheduler": "unipc",
        "PNDMScheduler": "pndm",
        "DEISMultistepScheduler": "deis",
        "LCMScheduler": "lcm",
        "TCDScheduler": "tcd",
    }
)

_SAMPLER_OF_ALGORITHM: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "DPMSolverMultistepScheduler": {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"},
        "DPMSolverSinglestepScheduler": {"dpmsolver++": "dpmpp_2s"},
    }
)


def table(
    name: str,
    scheduler_config: SchedulerConfig | Mapping[str, Any],
    steps: int,
    *,
    schedule: SigmaSchedule | None = None,
    begin: int = 0,
    eta: float | None = None,
) -> Schedule:
    """The table of a sampler for a model, ready for the loop.

    Args:
        name: one of `SAMPLERS`.
        scheduler_config: the model's, or the contents of its `scheduler_config.json`.
        steps: 1 to num_train_timesteps.
        schedule: "karras", "exponential", "beta", "ays", "ays_xl", or None for the model's own, which those of
            `WITHOUT_CONFIGURED_SIGMAS` do without.
        begin: the step where sampling starts (image-to-image). Rows before it stay in the table; samplers that learn
            from earlier steps start afresh there.
        eta: share of fresh noise, 0 to 1, for "ddim" (default 0) and "tcd" (default 0.3).

    Raises:
        ValueError: something is not as above; the message says which, its value, and what is allowed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {name!r}")
    config = (
        scheduler_config
        if isinstance(scheduler_config, SchedulerConfig)
        else SchedulerConfig.from_dict(scheduler_config)
    )
    steps = _whole("steps", steps, 1, config.num_train_timesteps)
    begin = _whole("begin", begin, 0, steps - 1)
    if schedule is not None and schedule not in SIGMA_SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SIGMA_SCHEDULES)} or None, not {schedule!r}")
    if name in WITHOUT_CONFIGURED_SIGMAS:
        config = replace(config, sigma_schedule=None)
    if eta is None:
        return SAMPLERS[name](config, steps, schedule, begin)
    if name not in WITH_ETA:
        raise ValueError(f"eta is for {' and '.join(sorted(WITH_ETA))}; sampler {name!r} has none")
    return SAMPLERS[name](config, steps, schedule, begin, eta=_fraction("eta", eta))


def default_sampler(config: SchedulerConfig) -> str:
    """The sampler that the model's config names, where we have it, else "ddim"; `replaced_sampler` is which that is."""
    return _named_sampler(config)[0]


def replaced_sampler(config: SchedulerConfig) -> str | None:
    """What the model's config names and `default_sampler` replaces; None where nothing is replaced."""
    return _named_sampler(config)[1]


def _named_sampler(config: SchedulerConfig) -> tuple[str, str | None]:
    """A config's sampler, and what it stands in for: a class, or a form of one, that we don't have."""
    name = config.class_name
    if name == "PNDMScheduler" and config.skip_prk_steps is False:
        return "ddim", f"{name} with a Runge-Kutta start (skip_prk_steps false)"
    if name is None:
        return "ddim", None
    if name in _SAMPLER_OF_ALGORITHM:
        algorithm = config.algorithm_type or "dpmsolver++"
        found = _SAMPLER_OF_ALGORITHM[name].get(algorithm)
        return (found, None) if found else ("ddim", f"{name} with algorithm_type {algorithm!r}")
    found = _SAMPLER_OF_CLASS.get(name)
    return (found, None) if found else ("ddim", name)


def begin_step(steps: int, strength: float) -> int:
    """The step where image-to-image starts: the last `int(steps * strength)` steps are run, as in diffusers.

    At least one step is run. A strength too low for that is refused with the lowest one that works, instead of handing
    the picture back as if it had been painted over. So is 0, which has no first step: `Pipeline` gives the picture back
    for it, and does not call this function.

    Args:
        steps: how many for strength 1.
        strength: above 0, to 1: how much of the picture is painted anew.

    Returns:
        0 (strength 1: start from noise) to steps - 1.

    Raises:
        ValueError: steps is not a whole number of at least 1, or strength not within the above or too low.
    """
    steps = _whole("steps", steps, 1, None)
    run = int(steps * _fraction("strength", strength))
    if run < 1:
        lowest = math.ceil(1e4 / steps) / 1e4
        raise ValueError(f"strength {strength} of {steps} steps leaves no step to run; it must be at least {lowest}")
    return steps - run


def _fraction(name: str, value: object) -> float:
    """Accept numbers from 0 to 1, no booleans."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")
    return float(value)


def _whole(name: str, value: object, least: int, most: int | None) -> int:
    """Accept Python's and NumPy's integers, no booleans, within bounds."""
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    try:
        number = math.nan if isinstance(value, bool) else value.__index__()  # type: ignore[attr-defined]
    except AttributeError:
        number = math.nan
    if not number >= least or (most is not None and number > most):
        raise ValueError(f"{name} must be a whole number {allowed}, not {value!r}")
    return int(number)
