"""Samplers for distilled models: LCM and TCD, whose networks jump to (nearly) clean latents in one call.

Song et al. 2023, "Consistency Models", https://arxiv.org/abs/2303.01469
Luo et al. 2023, "Latent Consistency Models", https://arxiv.org/abs/2310.04378
Zheng et al. 2024, "Trajectory Consistency Distillation", https://arxiv.org/abs/2402.19159
"""

from __future__ import annotations

import math

import numpy as np

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule, alphas_cumprod
from sdjax.schedulers.rows import NOISE, Row, Schedule, X, implied_noise, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_timesteps

SIGMA_DATA = 0.5


def lcm(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Multistep consistency sampling: jump to clean latents, add the next level's noise, and again.

    No noise is added after the last jump. The boundary condition c_skip, c_out makes the jump from
    timestep 0 the identity.
    """
    path = path_by_timesteps(config, distilled_timesteps(config, steps), schedule, clean=True)
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        s = path.timesteps[i] * config.timestep_scaling
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s / (s**2 + SIGMA_DATA**2) ** 0.5
        x0 = c_out * predicted_x0(config.prediction_type, level) + c_skip * X
        last = i == steps - 1
        x = x0 if last else landing.signal * x0 + landing.noise * NOISE
        rows.append(Row(i, path.timesteps[i], level, x, x0))
    return lay_out(rows, Level(1.0, 0.0))


def tcd(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0, *, eta: float = 0.3
) -> Schedule:
    """Strategic stochastic sampling: jump to timestep s = (1 - eta) t_next, add noise back to t_next.

    `eta` is the paper's gamma: 0 draws no noise, 1 jumps all the way, like LCM. The walk ends at training timestep 0.
    """
    path = path_by_timesteps(config, distilled_timesteps(config, steps), schedule, clean=False)
    a = alphas_cumprod(config)
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        if eta == 0 or i == steps - 1:
            jump = landing
        else:
            a_s = a[math.floor((1 - eta) * path.timesteps[i + 1])]
            jump = Level(a_s**0.5, (1 - a_s) ** 0.5)
        x0 = predicted_x0(config.prediction_type, level)
        x_s = jump.signal * x0 + jump.noise * implied_noise(x0, level)
        kept = landing.signal / jump.signal
        x = kept * x_s + (1 - kept**2) ** 0.5 * NOISE
        rows.append(Row(i, path.timesteps[i], level, x, x0))
    return lay_out(rows, path.level(steps))


def distilled_timesteps(config: SchedulerConfig, steps: int) -> Float64:
    """Timesteps spread over the `original_inference_steps` that the model was distilled on, noisiest first.

    Returns:
        (steps,) whole numbers.

    Raises:
        ValueError: more steps than the model was distilled on, or more of these than training timesteps.
    """
    original, count = config.original_inference_steps, config.num_train_timesteps
    if original > count:
        raise ValueError(f"original_inference_steps is {original}, more than num_train_timesteps, {count}")
    if steps > original:
        raise ValueError(
            f"steps must be from 1 to {original} for lcm and tcd, not {steps}: a model distilled on {original} steps "
            "(original_inference_steps) knows no others"
        )
    skipped = np.arange(steps) * original // steps
    return (original - skipped) * float(count // original) - 1
