import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_walks import SHAPE, network, noises, run_table, walks

from sdjax.schedulers import SchedulerConfig, alphas_cumprod, ddim_step, table

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# where diffusers' fixed stride is the distance to the next timestep of its list
STRAIGHT = (
    {"timestep_spacing": "leading", "steps": 1000},
    {"timestep_spacing": "leading", "steps": 7, "steps_offset": 1},
    {"timestep_spacing": "trailing", "steps": 10},
    {"timestep_spacing": "trailing", "steps": 1},
)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", STRAIGHT)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_walks_as_in_diffusers(prediction_type, eta, spacing, set_alpha_to_one):
    ours, theirs = walks(
        "ddim",
        diffusers.DDIMScheduler,
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
        clip_sample=False,
        table_options={"eta": eta},
        step_options={"eta": eta},
        **spacing,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", STRAIGHT[1:])
def test_ddim_with_zero_terminal_snr_walks_as_in_diffusers(prediction_type, spacing):
    ours, theirs = walks(
        "ddim",
        diffusers.DDIMScheduler,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
        clip_sample=False,
        **spacing,
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_ddim_from_an_image_walks_as_in_diffusers():
    class WithoutStepIndex(diffusers.DDIMScheduler):
        def set_begin_index(self, _):
            pass

    WithoutStepIndex.__name__ = "DDIMScheduler"
    ours, theirs = walks("ddim", WithoutStepIndex, 10, first_row=4, clip_sample=False, steps_offset=1)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    ("spacing", "steps", "variance_type"),
    [
        ("leading", 10, "fixed_small"),
        ("trailing", 7, "fixed_small"),
        ("linspace", 13, "fixed_small"),
        ("leading", 10, "fixed_large"),
        ("linspace", 10, "fixed_large"),
    ],
)
def test_ddpm_walks_as_in_diffusers(prediction_type, spacing, steps, variance_type):
    ours, theirs = walks(
        "ddpm",
        diffusers.DDPMScheduler,
        steps,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_sample=False,
    )
    # diffusers keeps 1e-10 of noise in the finished picture, by its floor under the logarithm of a variance
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_ddpm_leaves_no_noise_in_the_finished_picture():
    """diffusers adds the whole last step's with fixed_large, unless the last timestep is 0."""
    schedule = table("ddpm", SchedulerConfig(variance_type="fixed_large", timestep_spacing="trailing"), 10)
    assert not schedule.C[-1].any()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_table_and_the_textbook_step_agree(array, prediction_type, eta, spacing):
    steps = 7
    config = SchedulerConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    schedule = table("ddim", config, steps, eta=eta)
    start, fresh = noises(1)[0], noises(steps, seed=2)
    walk, denoised = run_table(schedule, start, fresh)

    a = np.append(alphas_cumprod(config)[schedule.timesteps.astype(int)], 1.0)
    tolerance = 1e-12 if array is np.asarray else 1e-4
    sample = array(start)
    for i in range(steps):
        output = array(network(np.asarray(sample), schedule.timesteps[i]))
        noise = array(fresh[i]) if eta else None
        sample, x0 = ddim_step(sample, output, a[i], a[i + 1], prediction_type=prediction_type, eta=eta, noise=noise)
        np.testing.assert_allclose(walk[i + 1], sample, atol=tolerance)
        np.testing.assert_allclose(denoised[i], x0, atol=tolerance)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 13, 30])
def test_ddim_steps_to_the_next_timestep_of_the_list(spacing, steps):
    """diffusers' DDIM lands on t - 1000 // steps, another level; its DDPM was mended, and shares our levels."""
    schedule = table("ddim", SchedulerConfig(timestep_spacing=spacing), steps)
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(schedule.timesteps, theirs.timesteps)
    a = alphas_cumprod(SchedulerConfig())
    landed = [int(theirs.previous_timestep(t)) for t in theirs.timesteps]
    np.testing.assert_allclose(schedule.signal[1:] ** 2, [a[t] if t >= 0 else 1 for t in landed], rtol=1e-12)


def test_a_fresh_noise_step_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"eta is 0\.5"):
        ddim_step(np.zeros(SHAPE), np.zeros(SHAPE), 0.5, 0.9, eta=0.5)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="not 'velocity'"):
        ddim_step(np.zeros(SHAPE), np.zeros(SHAPE), 0.5, 0.9, prediction_type="velocity")
