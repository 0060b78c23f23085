import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_walks import SHAPE, STABLE_DIFFUSION, diffusers_scheduler, network, noises, run_diffusers, run_table

from sdjax.schedulers import SchedulerConfig, alphas_cumprod, ddim_step, table

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def walks(name, cls, steps, *, eta=None, **options):
    """Our walk and diffusers', from one config, with the same noise."""
    options = {**STABLE_DIFFUSION, "clip_sample": False, **options}
    theirs = diffusers_scheduler(cls, steps, **options)
    ours = table(name, {"_class_name": cls.__name__, **options}, steps, eta=eta)
    start, fresh = noises(1)[0], noises(steps, seed=2)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
    assert ours.init_noise == theirs.init_noise_sigma
    step_options = {} if eta is None else {"eta": eta}
    return run_table(ours, start, fresh)[0], run_diffusers(theirs, start, fresh, **step_options)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("leading", 1000), ("leading", 7), ("trailing", 10), ("trailing", 1), ("trailing", 4)]
)
@pytest.mark.parametrize("end", [{}, {"set_alpha_to_one": False, "steps_offset": 1}])
def test_ddim_walks_as_in_diffusers(prediction_type, eta, spacing, steps, end):
    if (spacing, steps) == ("leading", 1000) and end:
        pytest.skip("diffusers asks for timestep 1000 of 0 ... 999")
    ours, theirs = walks(
        "ddim",
        diffusers.DDIMScheduler,
        steps,
        eta=eta,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        **end,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 10), ("trailing", 1), ("leading", 9)])
def test_ddim_with_zero_terminal_snr_walks_as_in_diffusers(prediction_type, spacing, steps):
    ours, theirs = walks(
        "ddim",
        diffusers.DDIMScheduler,
        steps,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=True,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), ("trailing", 7), ("linspace", 10)])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_walks_as_in_diffusers(prediction_type, spacing, steps, variance_type):
    ours, theirs = walks(
        "ddpm",
        diffusers.DDPMScheduler,
        steps,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        variance_type=variance_type,
    )
    if variance_type == "fixed_large" and spacing != "leading" and spacing != "linspace":
        # diffusers leaves noise in the finished picture unless the last timestep is 0
        ours, theirs = ours[:-1], theirs[:-1]
    # diffusers floors the last variance at 1e-20, which leaves 1e-10 of noise
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_table_and_the_textbook_step_agree(array, prediction_type, eta, spacing):
    steps = 7
    config = SchedulerConfig(prediction_type=prediction_type, timestep_spacing=spacing)
    schedule = table("ddim", config, steps, eta=eta)
    start, fresh = noises(1)[0], noises(steps, seed=2)
    a = np.append(alphas_cumprod(config)[schedule.timesteps.astype(int)], 1.0)
    sample = array(start)
    for i in range(steps):
        output = array(network(np.asarray(sample), schedule.timesteps[i]))
        sample, x0 = ddim_step(
            sample,
            output,
            a[i],
            a[i + 1],
            prediction_type=prediction_type,
            eta=eta,
            noise=array(fresh[i]) if eta else None,
        )
    walk, denoised = run_table(schedule, start, fresh)
    tolerance = 1e-10 if array is np.asarray else 1e-4
    np.testing.assert_allclose(walk[-1], sample, atol=tolerance)
    np.testing.assert_allclose(denoised, x0, atol=tolerance)


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
