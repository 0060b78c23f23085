"""DEIS: integrate the noise prediction exactly, as a polynomial in log sigma through the last few predictions.

Zhang and Chen 2022, "Fast Sampling of Diffusion Models with Exponential Integrator", https://arxiv.org/abs/2204.13902

Legend: rho = sigma = noise / signal, in which the flow is d(x / signal) / d rho = eps.
"""

from __future__ import annotations

import math

import numpy as np

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import MEMORY, Row, Schedule, X, combine, implied_noise, lay_out, predicted_x0
from sdjax.schedulers.spacing import path_by_log_snr


def deis(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Log-rho DEIS of the config's `solver_order`, lower in the first steps and, of few, the last.

    As in diffusers it lands on the least trained noise level, unless the config's `final_sigmas_type` is "zero"; with
    a sigma schedule it lands on the clean picture, where diffusers spends the last step on going nowhere.
    """
    path = path_by_log_snr(config, steps, schedule, clean=config.final_sigmas_type == "zero")
    rho = path.sigmas
    few = config.lower_order_final is not False and steps < 15
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        x0 = predicted_x0(config.prediction_type, level)
        noises = (implied_noise(x0, level), *MEMORY[:2])
        order = min(config.solver_order, max(i - begin, 0) + 1)
        if few:
            order = min(order, steps - i)
        if rho[i + 1] in (0, rho[i]):
            order = 1
        weights = _weights(rho[i - order + 1 : i + 1][::-1], rho[i + 1])
        x = landing.signal * (X / level.signal + combine(weights, noises))
        rows.append(Row(i, path.timesteps[i], level, x, x0, remember=noises[:2]))
    return lay_out(rows, path.level(steps))


def _weights(rho: Float64, end: float) -> Float64:
    """Weights w with sum(w * f(log rho)) = integral of f(log rho) d rho to `end`, for polynomials f below degree n.

    Args:
        rho: (n,) where predictions are known, the latest first; the integral starts at rho[0].
        end: where it ends.

    Returns:
        (n,) float64.
    """
    if len(rho) == 1:
        return end - rho
    u = math.log(end / rho[0])
    # integral of v**p exp(v) dv from 0 to u, by parts
    moments = [math.expm1(u)]
    for p in range(1, len(rho)):
        moments.append(u**p * math.exp(u) - p * moments[-1])
    scale = u ** np.arange(len(rho))
    powers = np.vander(np.log(rho / rho[0]) / u, increasing=True).T
    weights: Float64 = rho[0] * np.linalg.solve(powers, moments / scale)
    return weights
