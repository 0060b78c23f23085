"""DPM-Solver++: multistep, its stochastic form, and the two-call stochastic form of k-diffusion.

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
https://arxiv.org/abs/2211.01095

Legend: lambda = log(signal / noise); h the step in lambda; m0, m1, m2 the x0 predicted now, one and two steps ago;
D1, D2 divided differences of m, in units of the step. exp(-h) is the ratio of sigmas, which stays finite (0) in a step
onto the clean picture, where h does not: that step is first order.
"""

from __future__ import annotations

import math

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule
from sdjax.schedulers.euler import ancestral, start_noise
from sdjax.schedulers.rows import DENOISED, MEMORY, NOISE, Quantity, Row, Schedule, X, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_log_snr, path_by_sigmas, timesteps_of_sigmas


def dpmpp_2m(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """DPM-Solver++(2M), algorithm 2; of the config's `solver_order` if that is 1 or 3.

    The third-order step is the published one. It gives the second difference half the weight that an exact integral
    would, so its walk is of second order, too, with a smaller error.
    """
    return _multistep(config, steps, schedule, begin, stochastic=False)


def dpmpp_2m_sde(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0
) -> Schedule:
    """SDE-DPM-Solver++(2M): the same solver for the reverse diffusion, with fresh noise in every step.

    Of third order it is k-diffusion's 3M SDE; diffusers has the second difference with the wrong sign.
    """
    return _multistep(config, steps, schedule, begin, stochastic=True)


def dpmpp_sde(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """DPM-Solver++ (2S) with ancestral noise, "DPM++ SDE": two calls a step, the second half-way in log sigma.

    The noise of the half step and of the whole step belong to one Brownian path, so the half step's noise is
    remembered and is part of the whole step's.
    """
    path = path_by_sigmas(config, steps, schedule, clean=True)
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        level = Level(1.0, sigma)
        x0 = predicted_x0(config.prediction_type, level)
        if sigma_next == 0:
            rows.append(Row(i, path.timesteps[i], level, x0, x0))
            break
        middle = (sigma * sigma_next) ** 0.5
        down, up = ancestral(sigma, middle)
        x = X + (X - x0) / sigma * (down - sigma) + up * NOISE
        rows.append(Row(i, path.timesteps[i], level, x, x0, remember=(X, NOISE)))

        start, first_noise = MEMORY[:2]
        halfway = Level(1.0, middle)
        t = float(timesteps_of_sigmas(config, middle))
        x0 = predicted_x0(config.prediction_type, halfway)
        down, up = ancestral(sigma, sigma_next)
        done = (sigma - middle) / (sigma - sigma_next)
        noise = done**0.5 * first_noise + (1 - done) ** 0.5 * NOISE
        rows.append(Row(i, t, halfway, start + (start - x0) / sigma * (down - sigma) + up * noise, x0))
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


def _multistep(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None, begin: int, *, stochastic: bool
) -> Schedule:
    path = path_by_log_snr(config, steps, schedule, clean=config.final_sigmas_type != "sigma_min")
    sigmas = path.sigmas
    few = config.lower_order_final is not False and steps < 15
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        m0, m1, m2 = predicted_x0(config.prediction_type, level), DENOISED, MEMORY[0]
        order = min(config.solver_order, max(i - begin, 0) + 1)
        if i == steps - 1 and (config.euler_at_final or few or sigmas[steps] in (0, sigmas[i])):
            order = 1
        elif i == steps - 2 and few:
            order = min(order, 2)

        kept = sigmas[i + 1] / sigmas[i]  # exp(-h)
        rate = 2 if stochastic else 1
        decay = kept**rate  # the diffusion forgets twice as fast as the flow
        x = landing.noise / level.noise * kept ** (rate - 1) * X + landing.signal * (1 - decay) * m0
        if order > 1:
            h = -math.log(kept)
            D1, D2 = _differences(sigmas, i, order, h, m0, m1, m2)
            H = rate * h
            if order == 2 and config.solver_type != "heun":
                x = x + landing.signal * (1 - decay) / 2 * D1
            else:
                x = x + landing.signal * ((decay - 1) / H + 1) * D1
                x = x + landing.signal * ((1 - decay - H) / H**2 + 1 / 2) * D2
        if stochastic:
            x = x + landing.noise * (1 - kept**2) ** 0.5 * NOISE
        rows.append(Row(i, path.timesteps[i], level, x, m0, remember=(m1,)))
    return lay_out(rows, path.level(steps))


def _differences(
    sigmas: Float64, i: int, order: int, h: float, m0: Quantity, m1: Quantity, m2: Quantity
) -> tuple[Quantity, Quantity]:
    """h times the first derivative of x0 in lambda at step i, and h**2 / 2 times the second (0 for order 2)."""
    r0 = math.log(sigmas[i - 1] / sigmas[i]) / h
    D1_0 = (m0 - m1) / r0
    if order == 2:
        return D1_0, 0 * m0
    r1 = math.log(sigmas[i - 2] / sigmas[i - 1]) / h
    D1_1 = (m1 - m2) / r1
    D2 = (D1_0 - D1_1) / (r0 + r1)
    return D1_0 + r0 * D2, D2
