"""Samplers as tables: `table(name, config, steps)` is all that a sampling loop needs to know.

NumPy on the host, float64; knows nothing of networks, pictures or JAX.
"""

from sdjax.schedulers.config import SchedulerConfig, alphas_cumprod
from sdjax.schedulers.ddim import ddim_step
from sdjax.schedulers.rows import HISTORY, Schedule
from sdjax.schedulers.samplers import SAMPLERS, begin_step, default_sampler, replaced_sampler, table
from sdjax.schedulers.spacing import SIGMA_SCHEDULES

__all__ = [
    "HISTORY",
    "SAMPLERS",
    "SIGMA_SCHEDULES",
    "Schedule",
    "SchedulerConfig",
    "alphas_cumprod",
    "begin_step",
    "ddim_step",
    "default_sampler",
    "replaced_sampler",
    "table",
]
