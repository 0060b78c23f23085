"""Euler, Heun, KDPM2 and ancestral forms, LMS and DPM++ SDE, which count in sigmas, against diffusers."""

import numpy as np
import pytest
from scheduler_walks import CLASSES as CLASSES_OF_ALL
from scheduler_walks import walks

from sdjax.schedulers import table

SPACINGS = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
SIGMA_SCHEDULES = (
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True, "timestep_spacing": "trailing"},
)
CLASSES = {name: CLASSES_OF_ALL[name] for name in ("euler", "euler_a", "heun", "kdpm2", "kdpm2_a", "lms", "dpmpp_sde")}
IN_DIFFUSERS = [
    (name, spacing, prediction_type)
    for name in CLASSES
    for spacing in SPACINGS + (() if name == "euler_a" else SIGMA_SCHEDULES)
    for prediction_type in ("epsilon", "v_prediction", "sample")
    if prediction_type != "sample" or name not in ("euler_a", "dpmpp_sde", "kdpm2", "kdpm2_a")
]
# diffusers keeps its latents and sigmas in float32
TOLERANCE = 2e-5
# and takes the lower level of kdpm2_a's steps from a difference of two nearly equal squares
TOLERANCES = {"kdpm2_a": 1e-4}


@pytest.mark.parametrize("steps", [4, 13])
@pytest.mark.parametrize(("name", "spacing", "prediction_type"), IN_DIFFUSERS, ids=str)
def test_walks_as_in_diffusers(name, spacing, prediction_type, steps):
    ours, theirs = walks(name, CLASSES[name], steps, prediction_type=prediction_type, **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCES.get(name, TOLERANCE))


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_euler_landing_on_the_least_trained_noise_walks_as_in_diffusers(spacing):
    ours, theirs = walks("euler", CLASSES["euler"], 7, final_sigmas_type="sigma_min", **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_euler_between_other_sigmas_walks_as_in_diffusers():
    ours, theirs = walks("euler", CLASSES["euler"], 7, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", CLASSES)
def test_few_steps_of_turbo_walk_as_in_diffusers(name, steps):
    ours, theirs = walks(name, CLASSES[name], steps, timestep_spacing="trailing")
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCES.get(name, TOLERANCE))


@pytest.mark.parametrize("name", ["euler", "euler_a"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_zero_terminal_snr_walks_as_in_diffusers(name, spacing):
    ours, theirs = walks(
        name, CLASSES[name], 10, prediction_type="v_prediction", rescale_betas_zero_snr=True, **spacing
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["euler", "euler_a", "lms"])
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_cosine_betas_walk_as_in_diffusers(name, spacing):
    """Their last sigma is 20,291, and is not cut to 4,096 as the infinite one of zero terminal SNR is."""
    ours, theirs = walks(name, CLASSES[name], 10, beta_schedule="squaredcos_cap_v2", **spacing)
    # this made-up network leaves values of ten thousand
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=1e-5)


def test_heun_leaves_pure_noise_by_eulers_method():
    """Unlike diffusers, whose average of two directions is multiplied there by a step of thousands."""
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    heun, euler = (table(name, config, 10) for name in ("heun", "euler"))
    assert len(heun.step) == 2 * 10 - 2
    np.testing.assert_allclose(heun.A[0, 0], euler.A[0, 0])
    np.testing.assert_allclose(heun.B[0, 0], euler.B[0, 0])


@pytest.mark.parametrize(
    ("name", "first_row"), [("euler", 4), ("euler_a", 4), ("heun", 8), ("kdpm2", 8), ("kdpm2_a", 8), ("dpmpp_sde", 8)]
)
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_from_an_image_walks_as_in_diffusers(name, first_row, spacing):
    """LMS is left out: in diffusers it takes the weights of four directions for the one that it has there."""
    ours, theirs = walks(name, CLASSES[name], 10, first_row=first_row, table_options={"begin": 4}, **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCES.get(name, TOLERANCE))
