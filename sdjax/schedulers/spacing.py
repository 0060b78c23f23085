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
        sigmas: Float64 = self.noise / np.where(self.signal > 0, self.signal, LEAST_ALPHA_CUMPROD**0.5)
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
    trailing is cut to `steps` entries, where counting down by a fraction ends one too late (61, 103, 121 ... steps);
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
        return np.round(np.arange(count, 0, -count / steps)[:steps]) - 1
    points = min(points or steps, count)  # at steps = num_train_timesteps there is no room for one more
    if spacing == "linspace":
        return np.linspace(0, count - 1, points)[::-1][:steps]
    stride = count // points
    offset = min(config.steps_offset, count - 1 - (points - 1) * stride)
    return (np.arange(points) * stride)[::-1][:steps] + float(offset)


def whole_timesteps(config: SchedulerConfig, steps: int) -> Float64:
    """The timesteps of DDIM and its kin: those of `timesteps`, rounded; the default spacing is "leading"."""
    return np.round(timesteps(config.timestep_spacing or "leading", steps, config))


def path_by_timesteps(
    config: SchedulerConfig, timesteps: Float64, schedule: SigmaSchedule | None, *, clean: bool
) -> Path:
    """For samplers that count in training timesteps: levels exactly as trained (zero terminal SNR stays zero).

    Args:
        config: the model's.
        timesteps: (steps,) whole numbers.
        schedule: a sigma schedule, or None for the config's own. It replaces `timesteps`, all but their number, and
            spans all trained levels.
        clean: whether the last step lands on the clean picture, or on training timestep 0. With a sigma schedule it
            does the latter only if the config's `final_sigmas_type` is "sigma_min", too.
    """
    schedule = schedule or config.sigma_schedule
    if schedule is not None:
        return _scheduled_path(config, len(timesteps), schedule, training_sigmas(config), clean=clean)
    trained = alphas_cumprod(config)
    a = np.append(trained[timesteps.astype(int)], 1 if clean else trained[0])
    return Path(timesteps, np.sqrt(a), np.sqrt(1 - a))


def path_by_sigmas(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, *, clean: bool) -> Path:
    """For samplers that count in sigmas (Euler and its kin): timesteps may be fractional, sigmas are interpolated.

    The default spacing is "linspace". A sigma schedule spans the levels of the first and the last step, as in
    diffusers. Arguments as in `path_by_timesteps`.
    """
    trained = training_sigmas(config)
    t = timesteps(config.timestep_spacing or "linspace", steps, config)
    sigmas = np.interp(t, np.arange(len(trained)), trained)
    schedule = schedule or config.sigma_schedule
    if schedule is not None:
        return _scheduled_path(config, steps, schedule, sigmas if clean else np.append(sigmas, trained[0]), clean=clean)
    return _path(t, np.append(sigmas, 0 if clean else trained[0]))


def path_by_log_snr(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, *, clean: bool) -> Path:
    """For solvers that count in log(signal / noise) (DPM-Solver, UniPC, DEIS): whole timesteps, never down to 0.

    The default spacing is "linspace". With it and with leading, steps + 1 points are laid out and the last, timestep 0,
    is left out. A sigma schedule spans all trained levels; for it, too, the network is told whole timesteps, rounded
    for karras and cut off for exponential and beta, as in diffusers. Arguments as in `path_by_timesteps`.
    """
    trained = training_sigmas(config)
    schedule = schedule or config.sigma_schedule
    if schedule is not None:
        path = _scheduled_path(config, steps, schedule, trained, clean=clean)
        whole = np.floor if schedule in ("exponential", "beta") else np.round
        return path._replace(timesteps=whole(path.timesteps))
    t = np.round(timesteps(config.timestep_spacing or "linspace", steps, config, points=steps + 1))
    return _path(t, np.append(trained[t.astype(int)], 0 if clean else trained[0]))


def _path(timesteps: Float64, sigmas: Float64) -> Path:
    size = np.hypot(1, sigmas)
    return Path(timesteps, 1 / size, sigmas / size)


def _scheduled_path(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule, trained: Float64, *, clean: bool
) -> Path:
    """A named schedule between the ends of `trained` sigmas (in either order), or those that the config sets.

    It lands on the clean picture; on noise only for a sampler that can, and if the config says so in sigmas
    (`set_alpha_to_one` doesn't count: it speaks of training timestep 0, which is where these schedules start their
    last step).
    """
    largest = config.sigma_max or float(trained.max())
    smallest = config.sigma_min or float(trained.min())
    clean = clean or config.final_sigmas_type != "sigma_min"
    sigmas = scheduled_sigmas(schedule, steps, largest, smallest, clean=clean)
    return _path(timesteps_of_sigmas(config, sigmas[:-1]), sigmas)


def training_sigmas(config: SchedulerConfig) -> Float64:
    """Noise over signal at each training timestep: (num_train_timesteps,), increasing, finite."""
    a = alphas_cumprod(config)
    if config.rescale_betas_zero_snr:
        a = np.maximum(a, LEAST_ALPHA_CUMPROD)
    return np.sqrt((1 - a) / a)


def timesteps_of_sigmas(config: SchedulerConfig, sigmas: Float64) -> Float64:
    """The (fractional) timestep whose noise level a sigma is, linear in log sigma; beyond the training's: its end."""
    trained = np.log(training_sigmas(config))
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), trained, np.arange(len(trained)))


def scheduled_sigmas(
    schedule: SigmaSchedule, steps: int, largest: float, smallest: float, *, clean: bool = True
) -> Float64:
    """Sigmas of a named schedule, and where it lands.

    - karras: evenly in sigma**(1/7) (Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 5)
    - exponential: evenly in log sigma
    - beta: quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024, https://arxiv.org/abs/2407.12173)
    - ays, ays_xl: Align Your Steps (Sabour et al. 2024, https://arxiv.org/abs/2404.14507), the published ten steps for
      Stable Diffusion 1.5 and XL, whatever `largest` and `smallest` are; other step counts interpolate log sigma.

    Args:
        schedule: one of these.
        steps: how many.
        largest: where the first step starts.
        smallest: where the last step starts, or, unless `clean`, where it lands. (diffusers lets it start and land
            there, a step that does nothing.)
        clean: whether to land on sigma 0.

    Returns:
        (steps + 1,) float64, strictly decreasing.
    """
    points = steps if clean else steps + 1
    if schedule == "karras":
        sigmas: Float64 = np.linspace(largest ** (1 / 7), smallest ** (1 / 7), points) ** 7.0
    elif schedule == "exponential":
        sigmas = np.geomspace(largest, smallest, points)
    elif schedule == "beta":
        sigmas = smallest + _beta_quantiles(np.linspace(1, 0, points)) * (largest - smallest)
    else:
        published = np.log(np.array(_ALIGN_YOUR_STEPS[schedule]))
        position = np.linspace(0, len(published) - 1, steps + 1)[:points]
        sigmas = np.exp(np.interp(position, np.arange(len(published)), published))
    return np.append(sigmas, 0.0) if clean else sigmas


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
