"""UniPC: a predictor and a corrector of one form, at one network call a step.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
https://arxiv.org/abs/2302.04867

Legend: lambda = log(signal / noise); h the step in lambda; m the x0 predicted at some point of the walk, m0 at the
step's start; r the distance of such a point from the start, in steps; D = (m - m0) / r; B(h) the paper's free function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import DENOISED, MEMORY, Quantity, Row, Schedule, X, combine, lay_out, predicted_x0
from sdjax.schedulers.spacing import Path, path_by_log_snr


def unipc(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """UniPC of the config's `solver_order` (in its x0 form), lower in the first and the last steps.

    A call serves twice: it corrects the step that led to it, then predicts the next.
    """
    path = path_by_log_snr(config, steps, schedule, clean=config.final_sigmas_type != "sigma_min")
    variant = "bh1" if config.solver_type == "bh1" else "bh2"
    rows = []
    order = 1
    for i in range(steps):
        m = predicted_x0(config.prediction_type, path.level(i))
        m1, m2, m3, start = DENOISED, *MEMORY
        x = X
        if i > begin and i - 1 not in config.disable_corrector:
            x = _step(path, i - 1, start, (m1, m2, m3)[:order], variant, arrival=m)

        order = min(config.solver_order, max(i - begin, 0) + 1)
        if config.lower_order_final is not False:
            order = min(order, steps - i)
        if path.sigmas[i + 1] in (0, path.sigmas[i]):
            order = 1
        x_next = _step(path, i, x, (m, m1, m2)[:order], variant)
        rows.append(Row(i, path.timesteps[i], path.level(i), x_next, m, remember=(m1, m2, x)))
    return lay_out(rows, path.level(steps))


def _step(
    path: Path, i: int, x: Quantity, models: Sequence[Quantity], variant: str, arrival: Quantity | None = None
) -> Quantity:
    """Step i of the walk from x, by the x0's predicted at its start and before, latest first.

    Without `arrival` this is the predictor (UniP), with the x0 predicted where the step arrives the
    corrector (UniC).
    """
    sigmas, level, landing = path.sigmas, path.level(i), path.level(i + 1)
    m0 = models[0]
    kept = sigmas[i + 1] / sigmas[i]  # exp(-h)
    x = landing.noise / level.noise * x + landing.signal * (1 - kept) * m0
    if len(models) == 1 and arrival is None:
        return x
    h = -math.log(kept)
    r = [math.log(sigmas[i] / sigmas[i - k]) / h for k in range(1, len(models))]
    D = [(m - m0) / r_k for m, r_k in zip(models[1:], r, strict=True)]
    if arrival is not None:
        r.append(1.0)
        D.append(arrival - m0)
    B = -h if variant == "bh1" else kept - 1
    return x - landing.signal * B * combine(_weights(np.array(r), h, B), D)


def _weights(r: Float64, h: float, B: float) -> Float64:
    """Weights of the differences: those that match the exact step, or 1/2 for a single one (of the same order)."""
    if len(r) == 1:
        return np.array([0.5])
    b = []
    phi = (math.exp(-h) - 1) / -h - 1
    for n in range(1, len(r) + 1):
        b.append(phi * math.factorial(n) / B)
        phi = phi / -h - 1 / math.factorial(n + 1)
    return np.linalg.solve(np.vander(r, increasing=True).T, b)
