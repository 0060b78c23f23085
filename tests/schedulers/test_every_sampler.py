"""What holds for every sampler, spacing and step count."""

import math
import types

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from scheduler_walks import noises, run_table

from sdjax.schedulers import HISTORY, SAMPLERS, SIGMA_SCHEDULES, SchedulerConfig, begin_step, ddim_step, table
from sdjax.schedulers.rows import DENOISED, NOISE, OUTPUT, X

DISTILLED = ("lcm", "tcd")
STOCHASTIC = ("ddpm", "euler_a", "kdpm2_a", "dpmpp_2m_sde", "dpmpp_sde", "lcm", "tcd")
TWO_CALLS = ("heun", "kdpm2", "kdpm2_a", "dpmpp_sde")
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def is_finite(schedule):
    return all(np.isfinite(field).all() for field in schedule)


def calls(name, steps):
    if name in TWO_CALLS:
        return 2 * steps - 1
    return steps + 1 if name == "pndm" and steps > 1 else steps


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [None, *SIGMA_SCHEDULES])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 100, 1000])
def test_step_counts_give_as_many_calls_as_the_method_needs(name, schedule, steps):
    if name in DISTILLED and steps > 50:
        with pytest.raises(ValueError, match="from 1 to 50"):
            table(name, SD15, steps, schedule=schedule)
        return
    got = table(name, SD15, steps, schedule=schedule)
    assert len(got.timesteps) == calls(name, steps) <= 2 * 1000
    assert is_finite(got)
    assert sorted(set(got.step)) == list(range(steps))
    assert got.A.shape == (len(got.step), 1 + HISTORY, 1 + HISTORY)
    assert got.B.shape == got.C.shape == (len(got.step), 1 + HISTORY)
    assert len(got.signal) == len(got.noise) == len(got.step) + 1


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, math.nan, "10", None])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "pndm"])
def test_other_step_counts_are_refused(name, steps):
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 1000, not"):
        table(name, SD15, steps)


def test_numpy_integers_are_step_counts():
    assert len(table("ddim", SD15, np.int32(5)).step) == 5


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [None, "karras"])
def test_every_start_within_a_few_steps_is_finite_and_begins_without_memory(name, schedule):
    """Black pictures for some step counts: log(0) in a multistep formula that runs into sigma 0."""
    for steps in range(1, 26):
        for begin in range(steps):
            got = table(name, SD15, steps, schedule=schedule, begin=begin)
            assert is_finite(got), (steps, begin)
            first = got.first_row(begin)
            assert got.step[first] == begin
            assert first == 0 or got.step[first - 1] == begin - 1
            # what was remembered before `begin` never reaches the latents or the estimate of the picture
            influence = np.eye(1 + HISTORY)
            for A in got.A[first:]:
                influence = A @ influence
                assert not influence[[0, HISTORY], 1:].any(), (steps, begin)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25])
@pytest.mark.parametrize("schedule", [None, "karras", "exponential"])
def test_the_last_row_lands_on_the_predicted_picture(name, steps, schedule):
    config = SchedulerConfig(set_alpha_to_one=True, final_sigmas_type="zero")
    got = table(name, config, steps, schedule=schedule)
    if name == "tcd" and schedule is None:
        assert got.noise[-1] / got.signal[-1] == pytest.approx(0.0292, abs=1e-4)  # it ends at training timestep 0
        return
    assert (got.signal[-1], got.noise[-1]) == (1, 0)
    np.testing.assert_array_equal(got.A[-1, 0], got.A[-1, HISTORY])
    np.testing.assert_array_equal(got.B[-1, 0], got.B[-1, HISTORY])
    assert not got.C[-1].any()
    if name not in ("lms", "pndm", "lcm"):  # these end with more than the last prediction
        signal, noise = got.signal[-2], got.noise[-2]
        np.testing.assert_allclose(got.B[-1, 0], -noise / signal, rtol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_row_leaves_the_picture_that_the_network_predicts_for_a_preview(name, prediction_type):
    config = SchedulerConfig(prediction_type=prediction_type)
    got = table(name, config, 6)
    said = noises(len(got.step), seed=3)
    walk, denoised = run_table(got, got.init_noise * noises(1)[0], noises(len(got.step)), function=lambda _, i: said[i])
    for i in range(len(got.step) - 1):
        size = np.hypot(got.signal[i], got.noise[i])
        _, x0 = ddim_step(walk[i] / size, said[i], (got.signal[i] / size) ** 2, 1.0, prediction_type=prediction_type)
        # LCM's boundary condition mixes in a millionth of x
        np.testing.assert_allclose(denoised[i], x0, atol=1e-5 if name == "lcm" else 1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_samplers_with_fresh_noise_draw_it_and_none_into_the_finished_picture(name):
    got = table(name, SD15, 10)
    assert got.C.any() == (name in STOCHASTIC)
    assert not got.C[-1].any()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("schedule", [None, "karras"])
def test_zero_terminal_snr_is_finite_and_changes_the_table(name, spacing, schedule):
    def build(*, rescale):
        config = SchedulerConfig(
            prediction_type="v_prediction", timestep_spacing=spacing, rescale_betas_zero_snr=rescale
        )
        return [table(name, config, steps, schedule=schedule) for steps in (1, 4, 25)]

    for with_it, without in zip(build(rescale=True), build(rescale=False), strict=True):
        assert is_finite(with_it)
        assert not np.array_equal(with_it.noise / with_it.signal.clip(1e-9), without.noise / without.signal)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "lcm", "tcd"])
def test_zero_terminal_snr_starts_without_any_signal_where_the_method_allows(name):
    config = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    got = table(name, config, 10)
    assert (got.signal[0], got.noise[0]) == (0, 1)


def test_zero_terminal_snr_with_epsilon_prediction_is_refused():
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs prediction_type"):
        table("ddim", {**SD15, "rescale_betas_zero_snr": True}, 10)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "config",
    [
        SchedulerConfig(),
        SchedulerConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
    ids=["epsilon", "zero terminal SNR"],
)
def test_single_precision_is_enough_for_the_loop(name, config):
    got = table(name, config, 25)
    start, fresh = got.init_noise * noises(1)[0], noises(len(got.step), seed=2)
    exact, _ = run_table(got, start, fresh)
    single, _ = run_table(got, start, fresh, dtype=np.float32)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single[-1], exact[-1], atol=1e-4)


def test_the_basis_of_the_row_algebra_cannot_be_written_to():
    for quantity in (X, OUTPUT, NOISE, DENOISED):
        with pytest.raises(ValueError, match="read-only"):
            quantity[0] = 1


@pytest.mark.parametrize("field", ["timesteps", "input_scale", "A", "B", "C", "signal", "noise", "step"])
def test_a_table_cannot_be_written_to(field):
    array = getattr(table("unipc", SD15, 4), field)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_the_list_of_samplers_cannot_be_changed():
    assert isinstance(SAMPLERS, types.MappingProxyType)
    with pytest.raises(TypeError):
        SAMPLERS["mine"] = None


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"ddim, ddpm, .* not 'plms'"):
        table("plms", SD15, 10)


def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"karras, exponential, .* not 'Karras'"):
        table("euler", SD15, 10, schedule="Karras")


@pytest.mark.parametrize("begin", [-1, 10, 2.5, True, None])
def test_a_begin_outside_the_steps_is_refused(begin):
    with pytest.raises(ValueError, match="begin must be a whole number from 0 to 9, not"):
        table("euler", SD15, 10, begin=begin)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, "1", True])
def test_an_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1, not"):
        table("ddim", SD15, 10, eta=eta)


def test_an_eta_for_a_sampler_without_one_is_refused():
    with pytest.raises(ValueError, match="'euler' has none"):
        table("euler", SD15, 10, eta=0.5)


@given(steps=st.integers(1, 1000), strength=st.floats(0, 1))
def test_image_to_image_runs_the_last_steps_as_in_diffusers_or_is_refused(steps, strength):
    # StableDiffusionImg2ImgPipeline.get_timesteps
    t_start = max(steps - min(int(steps * strength), steps), 0)
    if t_start == steps:
        with pytest.raises(ValueError, match="leaves no step to run"):
            begin_step(steps, strength)
    else:
        assert begin_step(steps, strength) == t_start


@given(steps=st.integers(1, 1000))
def test_the_lowest_strength_that_a_refusal_names_works(steps):
    with pytest.raises(ValueError, match="at least ") as refusal:
        begin_step(steps, 0.0)
    lowest = float(str(refusal.value).rsplit(" ", 1)[1])
    assert begin_step(steps, lowest) == steps - 1


@pytest.mark.parametrize("strength", [math.nan, -0.1, 1.0001, "0.5", True, None])
def test_a_strength_outside_its_range_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be a number from 0 to 1, not"):
        begin_step(20, strength)
