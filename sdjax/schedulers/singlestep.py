"""DPM-Solver++, singlestep: a few calls make one jump of higher order, from where the first of them was made.

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
https://arxiv.org/abs/2211.01095, algorithm 1. As in diffusers every call counts as a step.

Legend: as in `dpm`; s the level that a jump starts from; h the jump in lambda, r the part of it at which x0 was
predicted; m0 the latest prediction, m_s the one at s.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import DENOISED, MEMORY, Quantity, Row, Schedule, X, lay_out, predicted_x0
from sdjax.schedulers.spacing import Path, path_by_log_snr


def dpmpp_2s(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """DPM-Solver++(2S); of the config's `solver_order` if that is 1 or 3. One call a step, two to a jump.

    Timesteps are linspace's, whatever the config's spacing, as in diffusers.
    """
    config = replace(config, timestep_spacing="linspace")
    clean = config.final_sigmas_type != "sigma_min"
    path = path_by_log_snr(config, steps, schedule, clean=clean)
    orders = _orders(config.solver_order, steps, lower_at_end=clean or config.lower_order_final is True)
    if clean or path.sigmas[steps] == path.sigmas[steps - 1]:
        orders[-1] = 1
    rows = []
    for i in range(steps):
        level = path.level(i)
        m0, m1, m2 = predicted_x0(config.prediction_type, level), DENOISED, MEMORY[1]
        order = min(orders[i], max(i - begin, 0) + 1)
        start = X if order == 1 else MEMORY[0]
        x = _jump(path, i, start, (m0, m1, m2)[:order], config.solver_type)
        rows.append(Row(i, path.timesteps[i], level, x, m0, remember=(start, m1)))
    return lay_out(rows, path.level(steps))


def _orders(order: int, steps: int, *, lower_at_end: bool) -> list[int]:
    """How many calls each step looks back on, itself included: 1, 2, 1, 2, ... or 1, 2, 3, 1, 2, 3, ...

    The last jumps are shorter where they would not end with the walk, and where `lower_at_end` the very last is 1.
    """
    jump = list(range(1, order + 1))
    rest = steps % order
    if not rest and not lower_at_end:
        return jump * (steps // order)
    if rest:
        return jump * (steps // order) + jump[:rest]
    return jump * (steps // order - 1) + jump[:-1] + [1]


def _jump(path: Path, i: int, start: Quantity, models: tuple[Quantity, ...], solver_type: str | None) -> Quantity:
    """The latents after step i, from those at the start of its jump; `models` are the jump's x0's, the latest first."""
    sigmas, first = path.sigmas, i - len(models) + 1
    level, landing = path.level(first), path.level(i + 1)
    kept = float(sigmas[i + 1] / sigmas[first])  # exp(-h)
    m0, m_s = models[0], models[-1]
    x: Quantity = landing.noise / level.noise * start + landing.signal * (1 - kept) * m_s
    if len(models) == 1:
        return x
    h = -math.log(kept)
    r0 = math.log(sigmas[first] / sigmas[i]) / h
    D1, D2 = (m0 - m_s) / r0, 0 * X
    if len(models) == 3 and solver_type == "heun":
        r1 = math.log(sigmas[first] / sigmas[i - 1]) / h
        D1_0, D1_1 = (models[1] - m_s) / r1, D1
        D1 = (r0 * D1_0 - r1 * D1_1) / (r0 - r1)
        D2 = 2 * (D1_1 - D1_0) / (r0 - r1)
    if len(models) == 2 and solver_type != "heun":
        x += landing.signal * (1 - kept) / 2 * D1
    else:
        x += landing.signal * ((kept - 1) / h + 1) * D1
        x -= landing.signal * ((kept - 1 + h) / h**2 - 1 / 2) * D2
    return x
