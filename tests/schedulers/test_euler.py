import diffusers
import numpy as np
import pytest
from scheduler_walks import STABLE_DIFFUSION, diffusers_scheduler, noises, run_diffusers, run_table

from sdjax.schedulers import table

SPACINGS = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True, "timestep_spacing": "trailing"},
)
SIGMA_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def compare(name, cls, steps, *, atol=1e-5, **options):
    options = {**STABLE_DIFFUSION, **options}
    theirs = diffusers_scheduler(cls, steps, **options)
    ours = table(name, {"_class_name": cls.__name__, **options}, steps)
    start, fresh = noises(1)[0], noises(len(theirs.timesteps), seed=2)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps, atol=2e-2)
    np.testing.assert_allclose(ours.init_noise, theirs.init_noise_sigma, rtol=1e-6)
    ours_walk, _ = run_table(ours, ours.init_noise * start, fresh)
    theirs_walk = run_diffusers(theirs, ours.init_noise * start, fresh)
    # relative to the level: the first states are of order 15, or 4096 with zero terminal SNR
    size = np.hypot(ours.signal, ours.noise)[:, None, None, None, None]
    np.testing.assert_allclose(ours_walk / size, theirs_walk / size, atol=atol)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [4, 13])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_euler_walks_as_in_diffusers(prediction_type, spacing, steps, final_sigmas_type):
    compare(
        "euler",
        diffusers.EulerDiscreteScheduler,
        steps,
        prediction_type=prediction_type,
        final_sigmas_type=final_sigmas_type,
        **spacing,
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS[:3])
@pytest.mark.parametrize("steps", [4, 13])
def test_euler_ancestral_walks_as_in_diffusers(prediction_type, spacing, steps):
    compare("euler_a", diffusers.EulerAncestralDiscreteScheduler, steps, prediction_type=prediction_type, **spacing)


@pytest.mark.parametrize(
    ("name", "cls"),
    [("euler", diffusers.EulerDiscreteScheduler), ("euler_a", diffusers.EulerAncestralDiscreteScheduler)],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_one_step_of_turbo_walks_as_in_diffusers(name, cls, steps):
    compare(name, cls, steps, timestep_spacing="trailing")


@pytest.mark.parametrize(
    ("name", "cls"),
    [("euler", diffusers.EulerDiscreteScheduler), ("euler_a", diffusers.EulerAncestralDiscreteScheduler)],
)
def test_zero_terminal_snr_walks_as_in_diffusers(name, cls):
    # from sigma 4096 the float32 of diffusers carries four digits fewer
    compare(
        name,
        cls,
        10,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        atol=1e-3,
    )
