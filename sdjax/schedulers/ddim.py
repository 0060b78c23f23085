"""DDIM, and DDPM, of which DDIM is the generalisation: walk the training timesteps down, re-using the noise found.

Song et al. 2020, "Denoising Diffusion Implicit Models", https://arxiv.org/abs/2010.02502
Ho et al. 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239

Legend: a = alphas_cumprod at the present level, a_prev at the level that the step lands on, x0 the predicted picture.
A step lands on the *next timestep of the list*. diffusers' DDIM lands on `t - num_train_timesteps // steps` instead,
which is another level with linspace spacing, and with trailing where steps doesn't divide num_train_timesteps.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sdjax.schedulers.config import PredictionType, SchedulerConfig, SigmaSchedule
from sdjax.schedulers.rows import NOISE, Row, Schedule, X, implied_noise, lay_out, predicted_x0
from sdjax.schedulers.spacing import Level, path_by_timesteps, whole_timesteps

Array = TypeVar("Array", bound=Any)


def ddim(
    config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0, *, eta: float = 0.0
) -> Schedule:
    """DDIM; `eta` goes from 0 (the same picture every time) to 1 (as much fresh noise as DDPM adds)."""
    path = path_by_timesteps(
        config, whole_timesteps(config, steps), schedule, clean=config.set_alpha_to_one is not False
    )
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        x0 = predicted_x0(config.prediction_type, level)
        direction, deviation = _split_noise(level, landing, eta)
        x = landing.signal * x0 + direction * implied_noise(x0, level) + deviation * NOISE
        rows.append(Row(i, path.timesteps[i], level, x, x0))
    return lay_out(rows, path.level(steps))


def ddpm(config: SchedulerConfig, steps: int, schedule: SigmaSchedule | None = None, begin: int = 0) -> Schedule:
    """DDPM's ancestral sampling (equation 7), with the posterior's variance or, `fixed_large`, the step's own."""
    path = path_by_timesteps(config, whole_timesteps(config, steps), schedule, clean=True)
    rows = []
    for i in range(steps):
        level, landing = path.level(i), path.level(i + 1)
        a, a_prev = level.signal**2, landing.signal**2
        alpha = a / a_prev
        beta = 1 - alpha
        x0 = predicted_x0(config.prediction_type, level)
        mean = (a_prev**0.5 * beta * x0 + alpha**0.5 * landing.noise**2 * X) / level.noise**2
        last = i == steps - 1
        large = config.variance_type == "fixed_large" and not last  # no noise is added to the finished picture
        variance = beta if large else landing.noise**2 / level.noise**2 * beta
        rows.append(Row(i, path.timesteps[i], level, mean + variance**0.5 * NOISE, x0))
    return lay_out(rows, path.level(steps))


def ddim_step(
    sample: Array,
    output: Array,
    alpha_cumprod: float,
    alpha_cumprod_prev: float,
    *,
    prediction_type: PredictionType = "epsilon",
    eta: float = 0.0,
    noise: Array | None = None,
) -> tuple[Array, Array]:
    """One DDIM step as in the paper's equation 12, a pure function of arrays (NumPy's, JAX's, or plain numbers).

    Args:
        sample: x_t, any shape.
        output: the network's answer for it, same shape.
        alpha_cumprod: a at x_t.
        alpha_cumprod_prev: a at the level to land on.
        prediction_type: what the output means.
        eta: share of fresh noise, 0 to 1.
        noise: the fresh noise, same shape; needed if eta > 0.

    Returns:
        The sample one step on, and the clean sample predicted.

    Raises:
        ValueError: eta > 0 without noise, or an unknown prediction type.
    """
    a, a_prev = alpha_cumprod, alpha_cumprod_prev
    if prediction_type == "epsilon":
        x0 = (sample - (1 - a) ** 0.5 * output) / a**0.5
        eps = output
    elif prediction_type == "v_prediction":
        x0 = a**0.5 * sample - (1 - a) ** 0.5 * output
        eps = a**0.5 * output + (1 - a) ** 0.5 * sample
    elif prediction_type == "sample":
        x0 = output
        eps = (sample - a**0.5 * output) / (1 - a) ** 0.5
    else:
        raise ValueError(f"prediction_type must be 'epsilon', 'v_prediction' or 'sample', not {prediction_type!r}")
    deviation = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
    prev = a_prev**0.5 * x0 + (1 - a_prev - deviation**2) ** 0.5 * eps
    if noise is None:
        if eta:
            raise ValueError(f"eta is {eta}: a step with fresh noise needs `noise`")
        return prev, x0
    return prev + deviation * noise, x0


def _split_noise(level: Level, landing: Level, eta: float) -> tuple[float, float]:
    """How much of the landing level's noise is the noise found in x, and how much is fresh (equation 16)."""
    kept_signal = level.signal / landing.signal
    deviation = eta * landing.noise / level.noise * (1 - kept_signal**2) ** 0.5
    return (landing.noise**2 - deviation**2) ** 0.5, deviation
