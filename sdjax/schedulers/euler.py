"""Euler's method for the probability flow, counted in sigmas: plain and ancestral.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
https://arxiv.org/abs/2206.00364; ancestral steps as in k-diffusion.

Legend: x = x0 + sigma * noise; d = (x - x0) / sigma is dx/dsigma, the direction of the flow.
"""

from __future__ import annotations

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import NOISE, Row, Schedule, X, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_sigmas


def euler(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Euler's method (algorithm 1 of the paper, with first-order steps)."""
    path = path_by_sigmas(config, steps, schedule, "linspace", clean=config.final_sigmas_type == "zero")
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
    path = path_by_sigmas(config, steps, schedule, "linspace", clean=True)
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        level = Level(1.0, sigmas[i])
        x0 = predicted_x0(config.prediction_type, level)
        d = (X - x0) / sigmas[i]
        down, up = ancestral(sigmas[i], sigmas[i + 1])
        rows.append(Row(i, path.timesteps[i], level, X + d * (down - sigmas[i]) + up * NOISE, x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


def ancestral(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Split a step from sigma to sigma_next: the level to denoise to, and the noise to add so that squares add up."""
    return sigma_next**2 / sigma, sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5


def start_noise(config: SchedulerConfig, sigma: float) -> float:
    """Scale of the start noise: diffusers' `init_noise_sigma`.

    Leading spacing starts well below the last training timestep, and counts the picture's own variance in.
    """
    return float(sigma if config.timestep_spacing in (None, "linspace", "trailing") else (sigma**2 + 1) ** 0.5)
