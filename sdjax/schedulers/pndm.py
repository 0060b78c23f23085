"""PLMS, the linear multistep half of PNDM, as Stable Diffusion uses it (`skip_prk_steps`).

Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", https://arxiv.org/abs/2202.09778

The idea: DDIM's step takes one prediction for the whole way; give it an average of the last four instead, weighted as
Adams and Bashforth weigh directions on even steps.
"""

from __future__ import annotations

from sdjax.schedulers.config import SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import (
    MEMORY,
    OUTPUT,
    Quantity,
    Row,
    Schedule,
    X,
    combine,
    implied_noise,
    lay_out,
    predicted_x0,
)
from sdjax.schedulers.spacing import Level, path_by_timesteps, whole_timesteps

# Adams-Bashforth of order 1 to 4, the latest prediction first.
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """PLMS: one call a step, but two in the step that starts it (`begin`), which Heun's method makes second order.

    What is averaged are the network's outputs as they are, whatever they predict, as in diffusers: second order for
    epsilon and sample, but only first for v_prediction, where another sampler serves better. Two departures from
    diffusers: steps land on the next timestep of the list (see `ddim`), and image-to-image starts with the
    two-call step, where diffusers drops one of the two calls and then steps from a level that x is not at.

    Raises:
        ValueError: the config asks for the Runge-Kutta start (`skip_prk_steps` false).
    """
    if config.skip_prk_steps is False:
        raise ValueError("skip_prk_steps is False: PNDM's Runge-Kutta start isn't supported; choose another sampler")
    path = path_by_timesteps(config, whole_timesteps(config, steps), schedule, clean=config.set_alpha_to_one is True)

    def transfer(i: int, x: Quantity, output: Quantity) -> Quantity:
        """Equation 9: DDIM's step i from x, for any output."""
        level, landing = path.level(i), path.level(i + 1)
        x0 = predicted_x0(config.prediction_type, level, x, output)
        return landing.signal * x0 + landing.noise * implied_noise(x0, level, x)

    def x0(level: Level) -> Quantity:
        return predicted_x0(config.prediction_type, level)

    rows = []
    for i in range(steps):
        t, level = path.timesteps[i], path.level(i)
        if i == begin and i + 1 < steps:
            rows.append(Row(i, t, level, transfer(i, X, OUTPUT), x0(level), remember=(X, OUTPUT)))
            start, first = MEMORY[:2]
            x = transfer(i, start, (first + OUTPUT) / 2)
            t, level = path.timesteps[i + 1], path.level(i + 1)
            rows.append(Row(i, t, level, x, x0(level), remember=(first,)))
        else:
            outputs = (OUTPUT, *MEMORY)
            weights = WEIGHTS[min(max(i - begin, 0), 3)]
            x = transfer(i, X, combine(weights, outputs))
            rows.append(Row(i, t, level, x, x0(level), remember=outputs[:3]))
    return lay_out(rows, path.level(steps))
