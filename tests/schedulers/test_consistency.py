"""LCM and TCD against diffusers, and their limits."""

import diffusers
import numpy as np
import pytest
from scheduler_walks import walks

from sdjax.schedulers import SchedulerConfig, begin_step, table

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TOLERANCE = 1e-6  # diffusers keeps the boundary condition's scalings in float32


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_lcm_walks_as_in_diffusers(steps, prediction_type):
    ours, theirs = walks("lcm", diffusers.LCMScheduler, steps, prediction_type=prediction_type)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_tcd_walks_as_in_diffusers(steps, prediction_type, eta):
    ours, theirs = walks(
        "tcd",
        diffusers.TCDScheduler,
        steps,
        prediction_type=prediction_type,
        table_options={"eta": eta},
        step_options={"eta": eta},
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "cls"), [("lcm", diffusers.LCMScheduler), ("tcd", diffusers.TCDScheduler)])
def test_from_an_image_walks_as_in_diffusers(name, cls):
    ours, theirs = walks(name, cls, 8, first_row=3, table_options={"begin": 3})
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "cls"), [("lcm", diffusers.LCMScheduler), ("tcd", diffusers.TCDScheduler)])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr_walks_as_in_diffusers(name, cls, prediction_type):
    ours, theirs = walks(name, cls, 4, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("original", [50, 25, 7])
def test_every_step_count_takes_the_timesteps_of_diffusers(original):
    config = SchedulerConfig(original_inference_steps=original)
    theirs = diffusers.LCMScheduler(original_inference_steps=original)
    for steps in range(1, original + 1):
        theirs.set_timesteps(steps)
        np.testing.assert_array_equal(table("lcm", config, steps).timesteps, theirs.timesteps)


def test_a_single_step_adds_no_noise():
    schedule = table("lcm", SchedulerConfig(), 1)
    assert schedule.timesteps.tolist() == [999]
    assert not schedule.C.any()


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_more_steps_than_were_distilled_are_refused(name):
    with pytest.raises(ValueError, match=r"from 1 to 50 .* not 51"):
        table(name, SchedulerConfig(), 51)


@pytest.mark.parametrize(("steps", "strength", "lowest"), [(8, 0.1, 0.125), (4, 0.05, 0.25)])
def test_a_strength_too_low_for_a_few_steps_is_refused_with_the_lowest_that_works(steps, strength, lowest):
    with pytest.raises(ValueError, match=f"at least {lowest}"):
        begin_step(steps, strength)
    assert begin_step(steps, lowest) == steps - 1
