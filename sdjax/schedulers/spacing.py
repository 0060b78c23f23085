"""Where the steps stand: timesteps, sigmas, and the levels of noise that belong to them.

A `Path` is a walk down the noise levels, one more point than steps. A network was trained on whole timesteps
0 ... num_train_timesteps - 1; a schedule that counts in sigmas asks for timesteps between them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple, get_args

import numpy as np

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule, TimestepSpacing, alphas_cumprod

# Zero terminal SNR makes the last sigma infinite; what counts in sigmas stops here instead (as diffusers does: the
# smallest positive float16). Samplers that count in signal and noise need no such floor.
LEAST_ALPHA_CUMPROD = 2.0**-24


class Level(NamedTuple):
    """How much of a sample is picture and how much is noise: x = signal * x0 + noise * eps, eps of unit variance."""

    signal: float
    noise: float


class Path(NamedTuple):
    """Noise levels from the first step's to where the last step lands, as the variance-preserving pair.

    Shapes: timesteps (steps,), signal and noise (steps + 1,), with signal**2 + noise**2 == 1.
    """

    timesteps: Float64
    signal: Float64
    noise: Float64

    @property
    def sigmas(self) -> Float64:
        """(steps + 1,): noise over signal, the variance-exploding level: x / signal = x0 + sigma * eps."""
        sigmas: Float64 = self.noise / np.maximum(self.signal, LEAST_ALPHA_CUMPROD**0.5)
        return sigmas

    def level(self, i: int) -> Level:
        """The level before step i, or, for i = steps, after the last."""
        return Level(float(self.signal[i]), float(self.noise[i]))


def timesteps(spacing: TimestepSpacing, steps: int, config: SchedulerConfig, *, points: int | None = None) -> Float64:
    """Timesteps from noisy to clean, as Lin et al. 2023 name them (https://arxiv.org/abs/2305.08891, table 2).

    - leading: multiples of num_train_timesteps // steps, plus `steps_offset`
    - trailing: every num_train_timesteps / steps, counted from the noisy end
    - linspace: evenly from num_train_timesteps - 1 to 0 (may be fractional)

    Three departures from diffusers, each where following it makes a wrong picture:
    a `steps_offset` that would lead beyond the last training timestep is cut back (leading, steps = 1000);
    trailing is built by index, never one entry too long (61, 103, 121 ... steps);
    and a single step starts from the noisiest timestep in every spacing, because a single step from timestep 0 or 1,
    where diffusers' leading and linspace start, returns the start noise.

    Args:
        spacing: one of the three.
        steps: how many, from 1 to num_train_timesteps.
        config: for num_train_timesteps and steps_offset.
        points: lay out this many points instead and drop those after the first `steps`. The DPM family lays out
            steps + 1 and takes the last, timestep 0, for the end of the walk.

    Returns:
        (steps,) float64, strictly decreasing, within [0, num_train_timesteps - 1].
    """
    count = config.num_train_timesteps
    if steps == 1:
        return np.array([count - 1.0])
    if spacing == "trailing":
        return np.round(count - np.arange(steps) * count / steps) - 1
    points = min(points or steps, count)  # at steps = num_train_timesteps there is no room for one more
    if spacing == "linspace":
        return np.linspace(0, count - 1, points)[::-1][:steps]
    stride = count // points
    offset = min(config.steps_offset, count - 1 - (points - 1) * stride)
    return (np.arange(points) * stride)[::-1][:steps] + float(offset)


def path_by_timesteps(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, spacing: TimestepSpacing, *, clean: bool
) -> Path:
    """For samplers that count in training timesteps (DDIM and its kin): whole timesteps, levels exactly as trained.

    Zero terminal SNR stays zero. A sigma schedule spans all trained levels.

    Args:
        config: the model's; its own `timestep_spacing` goes before `spacing`.
        steps: how many.
        schedule: a sigma schedule, or None for the config's own.
        spacing: the sampler's default.
        clean: whether the last step lands on the clean picture, or on training timestep 0.
    """
    end = _last_level(config, clean=clean)
    schedule = schedule or config.sigma_schedule
    if schedule is not None:
        trained = training_sigmas(config)
        return _path(config, _scheduled(config, schedule, steps, trained[-1], trained[0]), end)
    t = np.round(timesteps(config.timestep_spacing or spacing, steps, config))
    a = alphas_cumprod(config)[t.astype(int)]
    return Path(t, np.append(np.sqrt(a), end.signal), np.append(np.sqrt(1 - a), end.noise))


def path_by_sigmas(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, spacing: TimestepSpacing, *, clean: bool
) -> Path:
    """For samplers that count in sigmas (Euler and its kin): timesteps may be fractional, sigmas are interpolated.

    A sigma schedule spans the levels of the first and the last step, as in diffusers. Arguments as in
    `path_by_timesteps`.
    """
    end = _last_level(config, clean=clean)
    schedule = schedule or config.sigma_schedule
    t = timesteps(config.timestep_spacing or spacing, steps, config)
    sigmas = np.interp(t, np.arange(config.num_train_timesteps), training_sigmas(config))
    if schedule is not None:
        return _path(config, _scheduled(config, schedule, steps, sigmas[0], sigmas[-1]), end)
    return _path(config, sigmas, end)._replace(timesteps=t)


def _path(config: SchedulerConfig, sigmas: Float64, end: Level) -> Path:
    """Levels at the sigmas given, which need not be trained ones, and the `end` after the last."""
    size = np.hypot(1, sigmas)
    t = timesteps_of_sigmas(config, sigmas)
    return Path(t, np.append(1 / size, end.signal), np.append(sigmas / size, end.noise))


def _last_level(config: SchedulerConfig, *, clean: bool) -> Level:
    """Where the last step lands: the clean picture, or the least noise that the network was trained on."""
    a = 1.0 if clean else float(alphas_cumprod(config)[0])
    return Level(a**0.5, (1 - a) ** 0.5)


def _scheduled(
    config: SchedulerConfig, schedule: SigmaSchedule, steps: int, largest: float, smallest: float
) -> Float64:
    """A named schedule between two sigmas, where the config doesn't set others."""
    largest = largest if config.sigma_max is None else config.sigma_max
    smallest = smallest if config.sigma_min is None else config.sigma_min
    return scheduled_sigmas(schedule, steps, largest, smallest)


def training_sigmas(config: SchedulerConfig) -> Float64:
    """Noise over signal at each training timestep: (num_train_timesteps,), increasing, finite."""
    a = np.maximum(alphas_cumprod(config), LEAST_ALPHA_CUMPROD)
    return np.sqrt((1 - a) / a)


def timesteps_of_sigmas(config: SchedulerConfig, sigmas: Float64) -> Float64:
    """The (fractional) timestep whose noise level a sigma is, linear in log sigma; beyond the training's: its end."""
    trained = np.log(training_sigmas(config))
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), trained, np.arange(len(trained)))


def scheduled_sigmas(schedule: SigmaSchedule, steps: int, largest: float, smallest: float) -> Float64:
    """Sigmas of a named schedule.

    - karras: evenly in sigma**(1/7) (Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 5)
    - exponential: evenly in log sigma
    - beta: quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024, https://arxiv.org/abs/2407.12173)
    - ays, ays_xl: Align Your Steps (Sabour et al. 2024, https://arxiv.org/abs/2404.14507), the published tables for
      Stable Diffusion 1.5 and XL, whatever `largest` and `smallest` are; other step counts interpolate log sigma.

    Returns:
        (steps,) float64, strictly decreasing from `largest` to `smallest`.
    """
    if schedule == "karras":
        return np.linspace(largest ** (1 / 7), smallest ** (1 / 7), steps) ** 7.0
    if schedule == "exponential":
        return np.geomspace(largest, smallest, steps)
    if schedule == "beta":
        return smallest + _beta_quantiles(np.linspace(1, 0, steps)) * (largest - smallest)
    published = np.log(_ALIGN_YOUR_STEPS[schedule])
    # The published list ends with the level after its last step, so it is read at one point more than there are steps.
    return np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(published)), published))[:-1]


SIGMA_SCHEDULES: tuple[SigmaSchedule, ...] = get_args(SigmaSchedule)

_ALIGN_YOUR_STEPS = MappingProxyType(
    {
        "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        "ays_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    }
)


def _beta_quantiles(probabilities: Float64) -> Float64:
    """Inverse of the cumulative distribution of Beta(0.6, 0.6).

    In u = x**a the unnormalised distribution is the nearly linear series u * sum_n c_n x**n, with
    c_n = (1-a)_n / (n! (a + n)); it converges like 2**-n below the median, and the upper half is its mirror image.
    Newton's method then needs a handful of steps.
    """
    a = 0.6
    n = np.arange(60)
    c = np.cumprod(np.append(1, (n[1:] - a) / n[1:])) / (a + n)

    def cumulative(u: Float64) -> Float64:
        series: Float64 = u[..., None] ** (n / a) @ c
        return u * series

    whole = 2 * cumulative(np.array(0.5**a))
    target = np.minimum(probabilities, 1 - probabilities) * whole
    u = target * a
    for _ in range(8):
        u = u - (cumulative(u) - target) * a * (1 - u ** (1 / a)) ** (1 - a)
    x = u ** (1 / a)
    return np.where(probabilities <= 0.5, x, 1 - x)
