"""Whole walks through a sampler, in NumPy by our tables and in PyTorch by diffusers, with one made-up network."""

import warnings
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from sdjax.schedulers import HISTORY, SchedulerConfig, alphas_cumprod

torch.set_num_threads(1)

SHAPE = (2, 8, 8, 4)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(latents, timestep):
    """A fixed, smooth, non-linear function of both arguments, of order one."""
    channel = np.arange(1, 5)
    return 0.6 * np.tanh(latents * channel / 3 + np.sin(timestep / 170 + channel)) + 0.2 * latents


def noises(count, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE))


def run_table(schedule, start, fresh, *, first_row=0, function=network):
    """Every state[0] after `first_row`, the first being `start` itself, and the last estimate of x0."""
    state = np.zeros((1 + HISTORY, *np.shape(start)))
    state[0] = start
    walk = [state[0]]
    for i in range(first_row, len(schedule.timesteps)):
        output = function(schedule.input_scale[i] * state[0], schedule.timesteps[i])
        state = np.tensordot(schedule.A[i], state, 1)
        state = state + np.multiply.outer(schedule.B[i], output) + np.multiply.outer(schedule.C[i], fresh[i])
        walk.append(state[0])
    return np.array(walk), state[HISTORY]


def diffusers_scheduler(cls, steps, **options):
    """One of diffusers' schedulers, ready to walk, with its float32 levels replaced by float64 ones.

    So what is compared are formulas, not roundings. The levels themselves are compared in test_config.py.
    """
    scheduler = cls(**options)
    a = torch.from_numpy(alphas_cumprod(SchedulerConfig.from_dict({"_class_name": cls.__name__, **options})))
    if scheduler.alphas_cumprod[-1] > 0:
        a[-1] = a[-1].clip(min=2**-24)  # the floor that all but DDIM and its kin put under a zero terminal SNR
    scheduler.alphas_cumprod = a
    scheduler.alpha_t, scheduler.sigma_t = a**0.5, (1 - a) ** 0.5
    scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    if hasattr(scheduler, "final_alpha_cumprod") and not options.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = a[0]
    scheduler.set_timesteps(steps)
    return scheduler


def run_diffusers(scheduler, start, fresh, *, first=0, **step_options):
    """The same by a diffusers scheduler whose timesteps are set: (calls + 1, *shape)."""
    sample = torch.from_numpy(start)
    walk = [start]
    drawn = iter(fresh[first:])
    with feeding(drawn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in scheduler.timesteps[first:]:
            scaled = scheduler.scale_model_input(sample, t)
            output = torch.from_numpy(network(scaled.double().numpy(), float(t)))
            sample = scheduler.step(output, t, sample, return_dict=False, **step_options)[0].double()
            walk.append(sample.numpy())
    return np.array(walk)


@contextmanager
def feeding(drawn):
    """Make diffusers' schedulers take their noise from an iterator instead of a generator."""

    def randn_tensor(shape, **_):
        return torch.from_numpy(np.array(next(drawn)))

    modules = ("ddim", "ddpm", "euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep", "lcm", "tcd")
    patches = [mock.patch(f"diffusers.schedulers.scheduling_{name}.randn_tensor", randn_tensor) for name in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
