"""DPM-Solver-2 in sigmas, plain and ancestral: each step by the direction at its midpoint in log sigma.

Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
https://arxiv.org/abs/2206.00927, algorithm 1, in the form of Karras et al. 2022, https://arxiv.org/abs/2206.00364, as
k-diffusion has it.

Legend: x = x0 + sigma * noise; d = (x - x0) / sigma, the direction of the flow; down, up the level that a step denoises
to and the noise that it adds then.
"""

from __future__ import annotations

import numpy as np

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.euler import PURE_NOISE, ancestral, start_noise
from sdjax.schedulers.rows import MEMORY, NOISE, Row, Schedule, X, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_sigmas, timesteps_of_sigmas


def kdpm2(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """The midpoint method: two calls a step, second order; Euler's into sigma = 0, and out of pure noise (`heun`)."""
    return _midpoint(config, steps, schedule, is_ancestral=False)


def kdpm2_a(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """The midpoint method to below the next level, and fresh noise back up to it: two calls a step."""
    return _midpoint(config, steps, schedule, is_ancestral=True)


def _midpoint(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, *, is_ancestral: bool) -> Schedule:
    path = path_by_sigmas(config, steps, schedule, clean=True)
    sigmas, timesteps = path.sigmas, path.timesteps
    if (schedule or config.sigma_schedule) == "karras":
        timesteps = np.round(timesteps)  # as in diffusers; those of midpoints are not
    rows = []
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        level = Level(1.0, sigma)
        x0 = predicted_x0(config.prediction_type, level)
        d = (X - x0) / sigma
        down, up = ancestral(sigma, sigma_next) if is_ancestral else (sigma_next, 0.0)
        if sigma_next == 0 or sigma >= PURE_NOISE:
            rows.append(Row(i, timesteps[i], level, X + d * (down - sigma) + up * NOISE, x0))
            continue
        middle = (sigma * down) ** 0.5
        rows.append(Row(i, timesteps[i], level, X + d * (middle - sigma), x0, remember=(X,)))

        halfway = Level(1.0, middle)
        x0 = predicted_x0(config.prediction_type, halfway)
        d = (X - x0) / middle
        x = MEMORY[0] + d * (down - sigma) + up * NOISE
        rows.append(Row(i, float(timesteps_of_sigmas(config, middle)), halfway, x, x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))
