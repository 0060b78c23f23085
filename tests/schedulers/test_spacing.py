"""Timesteps and sigmas: how many, where, in which order."""

import diffusers
import numpy as np
import pytest
import scipy.stats
from diffusers.schedulers import AysSchedules
from scheduler_walks import STABLE_DIFFUSION, DPMSolverSDEScheduler

from sdjax.schedulers import SAMPLERS, SIGMA_SCHEDULES, SchedulerConfig, table
from sdjax.schedulers.spacing import scheduled_sigmas, timesteps, timesteps_of_sigmas, training_sigmas

# NumPy's, about how PyTorch turns its tensors into arrays inside diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array")

SPACINGS = ("leading", "trailing", "linspace")
LANDS_CLEAN = ("ddpm", "euler_a", "heun", "kdpm2", "kdpm2_a", "lms", "dpmpp_sde", "lcm")
"""Samplers that land on the clean picture whatever the config."""
# One sampler for each way in which timesteps are laid out.
LAYOUTS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


def config_of(spacing, **options):
    return SchedulerConfig(timestep_spacing=spacing, steps_offset=1, **options)


def test_trailing_has_as_many_steps_as_asked_for_each_within_training():
    """diffusers has one more, timestep -1, at 61, 103, 121 ... steps."""
    for steps in range(1, 1001):
        t = timesteps("trailing", steps, SchedulerConfig())
        assert len(t) == steps
        assert t[0] == 999
        assert t.min() >= 0
        assert (np.diff(t) < 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(name, spacing):
    theirs = LAYOUTS[name](timestep_spacing=spacing, steps_offset=1, **STABLE_DIFFUSION)
    for steps in [*range(2, 61), 100, 123, 250, 333, 499, 500, 998]:
        theirs.set_timesteps(steps)
        t = table(name, config_of(spacing), steps).timesteps
        np.testing.assert_allclose(t, theirs.timesteps[:steps], atol=1e-4, err_msg=f"{steps} steps")


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm", "tcd"}))
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100, 999, 1000])
def test_all_steps_are_distinct_and_within_training(name, spacing, offset, steps):
    """At 1000 steps, leading spacing with offset 1 has no room left: diffusers asks for timestep 1000 of 0 ... 999."""
    schedule = table(name, SchedulerConfig(timestep_spacing=spacing, steps_offset=offset), steps)
    t = schedule.timesteps[np.flatnonzero(np.diff(schedule.step, prepend=-1))]
    assert len(t) == steps
    assert (np.diff(t) < 0).all()
    assert t.min() >= 0
    assert t.max() <= 999


@pytest.mark.parametrize(("steps", "expected"), [(1, [999, 999, 999]), (2, [501, 999, 999]), (4, [751, 999, 999])])
def test_a_single_step_starts_at_the_noisy_end_in_every_spacing(steps, expected):
    """diffusers' one-step leading and linspace start at timestep 1 and 0: a picture full of noise."""
    assert [table("euler", config_of(spacing), steps).timesteps[0] for spacing in SPACINGS] == expected


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", SIGMA_SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("landing", ["zero", "sigma_min"])
def test_sigma_schedules_fall_strictly_to_where_they_land(name, schedule, steps, landing):
    """Karras in diffusers once repeated its last sigma and once dropped steps; DEIS and sigma_min still repeat it."""
    config = SchedulerConfig(final_sigmas_type=landing, set_alpha_to_one=False)
    got = table(name, config, steps, schedule=schedule)
    starts = np.append(np.flatnonzero(np.diff(got.step, prepend=-1)), len(got.step))
    assert len(starts) == steps + 1
    sigmas = got.noise[starts] / got.signal[starts]
    assert (np.diff(sigmas) < 0).all()
    lands_on_noise = landing == "sigma_min" and name not in LANDS_CLEAN
    assert (sigmas[-1] > 0) == lands_on_noise
    assert got.timesteps.min() >= 0
    assert got.timesteps.max() <= 999


def test_karras_is_the_formula_of_the_paper():
    sigmas = scheduled_sigmas("karras", 5, 80.0, 0.002)
    i = np.arange(5)
    np.testing.assert_allclose(
        sigmas[:-1], (80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rtol=1e-12
    )


def test_beta_schedule_takes_the_quantiles_of_the_beta_distribution():
    sigmas = scheduled_sigmas("beta", 101, 15.0, 0.03)[:-1]
    quantiles = scipy.stats.beta.ppf(np.linspace(1, 0, 101), 0.6, 0.6)
    np.testing.assert_allclose(sigmas, 0.03 + quantiles * (15 - 0.03), rtol=1e-10)


@pytest.mark.parametrize(("schedule", "key"), [("ays", "StableDiffusion"), ("ays_xl", "StableDiffusionXL")])
def test_align_your_steps_at_ten_steps_is_the_published_table(schedule, key):
    np.testing.assert_allclose(scheduled_sigmas(schedule, 10, 14.6, 0.03), AysSchedules[f"{key}Sigmas"])
    if schedule == "ays":  # the published timesteps of XL belong to other sigmas than the published sigmas
        t = table("euler", SchedulerConfig(), 10, schedule=schedule).timesteps
        np.testing.assert_allclose(t, AysSchedules[f"{key}Timesteps"], atol=2)


def test_align_your_steps_interpolates_log_sigma():
    sigmas = scheduled_sigmas("ays", 20, 14.6, 0.03)
    np.testing.assert_allclose(sigmas[1], np.sqrt(14.615 * 6.475))
    np.testing.assert_allclose(sigmas[19], np.sqrt(0.152 * 0.029))


def test_every_trained_sigma_leads_back_to_its_timestep():
    config = SchedulerConfig()
    np.testing.assert_allclose(timesteps_of_sigmas(config, training_sigmas(config)), np.arange(1000), atol=1e-9)


def test_half_way_steps_of_dpmpp_sde_are_those_of_diffusers():
    theirs = DPMSolverSDEScheduler(use_karras_sigmas=True, **STABLE_DIFFUSION)
    theirs.set_timesteps(9)
    got = table("dpmpp_sde", SchedulerConfig(), 9, schedule="karras")
    np.testing.assert_allclose(got.timesteps, theirs.timesteps, atol=0.01)
