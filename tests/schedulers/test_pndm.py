import diffusers
import numpy as np
import pytest
from scheduler_walks import walks

from sdjax.schedulers import SchedulerConfig, table

PNDM = diffusers.PNDMScheduler
# where diffusers' fixed stride is the distance to the next timestep of its list
STRAIGHT = (
    {"timestep_spacing": "leading", "steps_offset": 1, "steps": 30},
    {"timestep_spacing": "leading", "steps": 7},
    {"timestep_spacing": "trailing", "steps": 10},
)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", STRAIGHT, ids=str)
def test_plms_walks_as_in_diffusers(prediction_type, set_alpha_to_one, spacing):
    ours, theirs = walks(
        "pndm",
        PNDM,
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
        skip_prk_steps=True,
        **spacing,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_few_steps_of_plms_walk_as_in_diffusers(steps):
    ours, theirs = walks("pndm", PNDM, steps, skip_prk_steps=True, steps_offset=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_plms_calls_the_network_once_more_than_there_are_steps():
    schedule = table("pndm", SchedulerConfig(steps_offset=1), 4)
    assert schedule.timesteps.tolist() == [751, 501, 501, 251, 1]
    assert schedule.step.tolist() == [0, 0, 1, 2, 3]


def test_plms_from_an_image_starts_with_its_two_calls_at_the_image():
    schedule = table("pndm", SchedulerConfig(steps_offset=1), 4, begin=1)
    assert schedule.timesteps.tolist() == [751, 501, 251, 251, 1]
    assert schedule.step.tolist() == [0, 1, 1, 2, 3]
    assert schedule.first_row(1) == 1


def test_the_runge_kutta_start_is_refused():
    with pytest.raises(ValueError, match="skip_prk_steps is False"):
        table("pndm", {"_class_name": "PNDMScheduler", "skip_prk_steps": False}, 10)
