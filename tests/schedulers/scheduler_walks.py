"""Whole walks through a sampler, in NumPy by our tables and in PyTorch by diffusers, with one made-up network."""

import sys
import types
import warnings
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import diffusers
import numpy as np
import torch

from sdjax.schedulers import HISTORY, SchedulerConfig, alphas_cumprod, table

torch.set_num_threads(1)
# diffusers wants torchsde for its DPMSolverSDEScheduler, to draw the noise that these tests bring along.
with mock.patch.dict(sys.modules, {"torchsde": types.ModuleType("torchsde")}):
    dpmsolver_sde = import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
DPMSolverSDEScheduler = dpmsolver_sde.DPMSolverSDEScheduler

CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpmpp_2s": diffusers.DPMSolverSinglestepScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_sde": DPMSolverSDEScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}
"""Of each sampler, its class in diffusers."""
SHAPE = (2, 8, 8, 4)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@contextmanager
def quietly():
    """NumPy warns of how PyTorch turns its tensors into arrays inside diffusers."""
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        yield


def network(latents, timestep):
    """A fixed, smooth, non-linear function of both arguments, of order one."""
    channel = np.arange(1, 5)
    return 0.6 * np.tanh(latents * channel / 3 + np.sin(timestep / 170 + channel)) + 0.2 * latents


def noises(count, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *SHAPE))


def run_table(schedule, start, fresh, *, first_row=0, function=None, dtype=np.float64):
    """Run the rows from `first_row` on: every state[0], the first being `start`, and every estimate of x0.

    `function(scaled latents, row)` stands for the network; `dtype` is what the loop computes in.
    """
    function = function or (lambda latents, i: network(latents, schedule.timesteps[i]))
    input_scale, A, B, C = (np.asarray(field, dtype) for field in schedule[1:5])
    # what was remembered before the first row must not matter
    state = np.full((1 + HISTORY, *np.shape(start)), 1e6, dtype)
    state[0] = start
    walk, denoised = [state[0]], []
    for i in range(first_row, len(schedule.timesteps)):
        output = np.asarray(function(input_scale[i] * state[0], i), dtype)
        noise = np.asarray(fresh[i], dtype)
        state = np.tensordot(A[i], state, 1) + np.multiply.outer(B[i], output) + np.multiply.outer(C[i], noise)
        walk.append(state[0])
        denoised.append(state[HISTORY])
    return np.array(walk), np.array(denoised)


@quietly()
def diffusers_scheduler(cls, steps, **options):
    """One of diffusers' schedulers, ready to walk, with its float32 levels replaced by float64 ones.

    So what is compared are formulas, not roundings. The levels themselves are compared in test_scheduler_config.py.
    """
    scheduler = cls(**options)
    a = alphas_cumprod(SchedulerConfig.from_dict({"_class_name": cls.__name__, **options}))
    if scheduler.alphas_cumprod[-1] > 0 == a[-1]:
        a = np.maximum(a, 2**-24)  # the floor that all but DDIM and its kin put under a zero terminal SNR
    scheduler.alphas_cumprod = a = torch.from_numpy(a)
    if hasattr(scheduler, "lambda_t"):
        scheduler.alpha_t, scheduler.sigma_t = a**0.5, (1 - a) ** 0.5
        scheduler.lambda_t = scheduler.alpha_t.log() - scheduler.sigma_t.log()
    if hasattr(scheduler, "final_alpha_cumprod") and scheduler.final_alpha_cumprod < 1:
        scheduler.final_alpha_cumprod = a[0]
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def run_diffusers(scheduler, start, fresh, *, first_row=0, **step_options):
    """The same by a diffusers scheduler whose timesteps are set; `fresh` are the noises that it will draw."""
    if first_row:
        scheduler.set_begin_index(first_row)
    sample = torch.from_numpy(start)
    walk = [start]
    with feeding(iter(fresh)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in scheduler.timesteps[first_row:]:
            scaled = scheduler.scale_model_input(sample, t)
            output = torch.from_numpy(network(scaled.double().numpy(), float(t)))
            sample = scheduler.step(output, t, sample, return_dict=False, **step_options)[0].double()
            walk.append(sample.numpy())
    return np.array(walk)


def walks(name, cls, steps, *, first_row=0, table_options=None, step_options=None, **options):
    """Our walk and diffusers', from one config and with the same noise, each in units of its noise level.

    Also checks that both tell the network the same timesteps and start alike: from pure noise, or, for
    `first_row` > 0, from clean latents and noise.
    """
    options = {**STABLE_DIFFUSION, **options}
    theirs = diffusers_scheduler(cls, steps, **options)
    ours = table(name, {"_class_name": cls.__name__, **options}, steps, **(table_options or {}))
    # a timestep sought among float32 sigmas is good to a hundredth
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), atol=0.02)
    np.testing.assert_allclose(ours.init_noise, float(theirs.init_noise_sigma), rtol=1e-6)

    clean, noise = noises(2)
    start = ours.init_noise * noise
    if first_row:
        start = ours.signal[first_row] * clean + ours.noise[first_row] * noise
        theirs.set_begin_index(first_row)
        t = theirs.timesteps[first_row : first_row + 1].repeat(len(clean))
        noised = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), t).numpy()
        np.testing.assert_allclose(start, noised, rtol=1e-4, atol=1e-5)
    fresh = noises(len(ours.timesteps), seed=2)
    ours_walk, _ = run_table(ours, start, fresh, first_row=first_row)
    # diffusers draws noise where it is used, or at every call
    used = [noise for noise, C in zip(fresh[first_row:], ours.C[first_row:], strict=True) if C.any()]
    theirs_walk = run_diffusers(theirs, start, [*used, *fresh], first_row=first_row, **(step_options or {}))
    size = np.hypot(ours.signal, ours.noise)[first_row:, None, None, None, None]
    return ours_walk / size, theirs_walk / size


@contextmanager
def feeding(drawn):
    """Make diffusers' schedulers take their noise from an iterator instead of a generator."""

    def randn_tensor(shape, **_):
        return torch.from_numpy(np.array(next(drawn)))

    class BrownianPath:
        """Two calls a step, the second over an interval that contains the first's."""

        def __init__(self, *_):
            self.first = None

        def __call__(self, sigma, sigma_next):
            fresh = torch.from_numpy(np.array(next(drawn)))
            if self.first is None:
                self.first = (fresh, sigma - sigma_next)
                return fresh
            (first, done), self.first = self.first, None
            whole = sigma - sigma_next
            return (first * done**0.5 + fresh * (whole - done) ** 0.5) / whole**0.5

    modules = (
        *("ddim", "ddpm", "euler_discrete", "euler_ancestral_discrete", "dpmsolver_multistep", "lcm", "tcd"),
        *("k_dpm_2_ancestral_discrete", "dpmsolver_singlestep"),
    )
    patches = [
        mock.patch.object(
            import_module(f"{diffusers.schedulers.__name__}.scheduling_{name}"), "randn_tensor", randn_tensor
        )
        for name in modules
    ]
    patches.append(mock.patch.object(dpmsolver_sde, "BrownianTreeNoiseSampler", BrownianPath))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
