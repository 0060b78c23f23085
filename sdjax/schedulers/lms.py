"""Linear multistep: Adams-Bashforth for the probability flow in sigmas, on uneven steps.

As in k-diffusion; Karras et al. 2022, https://arxiv.org/abs/2206.00364 for the flow dx/dsigma = (x - x0) / sigma.
"""

from __future__ import annotations

import numpy as np

from sdjax.schedulers.config import Float64, SchedulerConfig, SigmaSchedule
from sdjax.schedulers.euler import start_noise
from sdjax.schedulers.rows import MEMORY, Row, Schedule, X, combine, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_sigmas

ORDER = 4


def lms(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """Integrate the polynomial through the last four directions; fewer in the first steps after `begin`.

    The last step, into sigma = 0, keeps the order: the polynomial is in sigma, not in its logarithm.
    """
    path = path_by_sigmas(config, steps, schedule, clean=True)
    sigmas = path.sigmas
    rows = []
    for i in range(steps):
        level = Level(1.0, sigmas[i])
        x0 = predicted_x0(config.prediction_type, level)
        directions = ((X - x0) / sigmas[i], *MEMORY)
        order = min(ORDER, max(i - begin, 0) + 1)
        weights = adams_bashforth(sigmas[i - order + 1 : i + 1][::-1], sigmas[i + 1])
        rows.append(
            Row(i, path.timesteps[i], level, X + combine(weights, directions), x0, remember=directions[: ORDER - 1])
        )
    return lay_out(rows, Level(1.0, sigmas[steps]), init_noise=start_noise(config, sigmas[0]))


def adams_bashforth(nodes: Float64, end: float) -> Float64:
    """Weights w with sum(w * f(nodes)) = integral of f from nodes[0] to end, for every polynomial f below degree n.

    Args:
        nodes: (n,) the latest first.
        end: where the integral goes.

    Returns:
        (n,) float64.
    """
    length = end - nodes[0]
    powers = np.vander((nodes - nodes[0]) / length, increasing=True).T
    weights: Float64 = length * np.linalg.solve(powers, 1 / np.arange(1, len(nodes) + 1))
    return weights
