"""Solvers of the probability flow in sigmas: Euler's method, plain and ancestral, and Heun's.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
https://arxiv.org/abs/2206.00364; ancestral steps as in k-diffusion.

Legend: x = x0 + sigma * noise; d = (x - x0) / sigma is dx/dsigma, the direction of the flow.
"""

from __future__ import annotations

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import MEMORY, NOISE, Row, Schedule, X, lay_out, predicted_x0
from sdjax.schedulers.spacing import LEAST_ALPHA_CUMPROD, Level, path_by_sigmas


def euler(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Euler's method: one call a step, first order, no fresh noise."""
    path = path_by_sigmas(config, steps, schedule, clean=config.final_sigmas_type != "sigma_min")
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        level = Level(1.0, sigmas[i])
        x0 = predicted_x0(config.prediction_type, level)
        d = (X - x0) / sigmas[i]
        rows.append(Row(i, path.timesteps[i], level, X + d * (sigmas[i + 1] - sigmas[i]), x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


def euler_a(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Euler's method to below the next level, and fresh noise back up to it."""
    path = path_by_sigmas(config, steps, schedule, clean=True)
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        level = Level(1.0, sigmas[i])
        x0 = predicted_x0(config.prediction_type, level)
        d = (X - x0) / sigmas[i]
        down, up = ancestral(sigmas[i], sigmas[i + 1])
        rows.append(Row(i, path.timesteps[i], level, X + d * (down - sigmas[i]) + up * NOISE, x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


def heun(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Heun's method (algorithm 1 of the paper): two calls a step, second order; Euler's into sigma = 0.

    Euler's also out of pure noise (zero terminal SNR), unlike diffusers: there the length of the step is thousands, and
    multiplies the difference between two calls. The bundled model draws nothing with it.
    """
    path = path_by_sigmas(config, steps, schedule, clean=True)
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        level, landing = Level(1.0, sigmas[i]), Level(1.0, sigmas[i + 1])
        step = landing.noise - level.noise
        x0 = predicted_x0(config.prediction_type, level)
        d = (X - x0) / level.noise
        rows.append(Row(i, path.timesteps[i], level, X + d * step, x0, remember=(X, d)))
        if landing.noise > 0 and level.noise < PURE_NOISE:
            start, d_start = MEMORY[:2]
            x0 = predicted_x0(config.prediction_type, landing)
            d = (X - x0) / landing.noise
            rows.append(Row(i, path.timesteps[i + 1], landing, start + (d_start + d) / 2 * step, x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


PURE_NOISE = 0.9 / LEAST_ALPHA_CUMPROD**0.5
"""Sigmas from here on stand for a level without any signal."""


def ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Split a step from sigma to sigma_next: the level to denoise to, and the noise to add so that squares add up."""
    return sigma_next**2 / sigma, sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5


def start_noise(config: SchedulerConfig, sigma: float) -> float:
    """Scale of the start noise: diffusers' `init_noise_sigma`.

    Leading spacing starts well below the last training timestep, and counts the picture's own variance in.
    """
    return float(sigma if config.timestep_spacing in (None, "linspace", "trailing") else (sigma**2 + 1) ** 0.5)
