"""Reading scheduler_config.json, and the noise levels that it stands for."""

import inspect
import warnings

import diffusers
import numpy as np
import pytest
from scheduler_walks import CLASSES, STABLE_DIFFUSION

from sdjax.schedulers import SAMPLERS, SchedulerConfig, alphas_cumprod, default_sampler, replaced_sampler, table

# The published files, as on the hub.
COMMON = {
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PUBLISHED = {
    "sd-v1-5": ({"_class_name": "PNDMScheduler", **COMMON}, "pndm"),
    "sd-v2-1": ({"_class_name": "DDIMScheduler", **COMMON, "prediction_type": "v_prediction"}, "ddim"),
    "sd-xl": (
        {
            "_class_name": "EulerDiscreteScheduler",
            **COMMON,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        "euler",
    ),
    "sdxl-turbo": (
        {
            "_class_name": "EulerAncestralDiscreteScheduler",
            **COMMON,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "trailing",
            "use_karras_sigmas": False,
        },
        "euler_a",
    ),
    "lcm": (
        {
            "_class_name": "LCMScheduler",
            **COMMON,
            "clip_sample_range": 1.0,
            "dynamic_thresholding_ratio": 0.995,
            "original_inference_steps": 50,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "sample_max_value": 1.0,
            "thresholding": False,
            "timestep_scaling": 10.0,
            "timestep_spacing": "leading",
        },
        "lcm",
    ),
}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_levels_are_those_of_diffusers(beta_schedule, zero_snr):
    options = {
        **STABLE_DIFFUSION,
        "beta_schedule": beta_schedule,
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": "v_prediction",
        "clip_sample": False,
    }
    ours = alphas_cumprod(SchedulerConfig.from_dict({"_class_name": "DDIMScheduler", **options}))
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.numpy()
    assert ours.shape == (1000,)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


def test_trained_betas_go_before_any_schedule():
    betas = [0.1, 0.2, 0.4]
    config = SchedulerConfig.from_dict({"trained_betas": betas, "num_train_timesteps": 3})
    np.testing.assert_allclose(alphas_cumprod(config), [0.9, 0.72, 0.432])


def test_zero_terminal_snr_keeps_the_first_level_and_ends_at_exactly_zero():
    plain = alphas_cumprod(SchedulerConfig())
    rescaled = alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert rescaled[0] == pytest.approx(plain[0], rel=1e-12)
    assert rescaled[-1] == 0
    assert (np.diff(rescaled) < 0).all()


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_configs_are_read_and_name_their_sampler(model):
    config, sampler = PUBLISHED[model]
    read = SchedulerConfig.from_dict(config)
    assert default_sampler(read) == sampler
    for name in SAMPLERS:
        assert len(set(table(name, read, 4).step)) == 4


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_file_leaves_out_is_the_default_of_its_class(name):
    """Compare a file with nothing but the class with the full one that diffusers writes for it."""
    needed = {
        "ddim": {"clip_sample": False},
        "ddpm": {"clip_sample": False},
        "pndm": {"skip_prk_steps": True},
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    }
    options = needed.get(name, {})
    full = CLASSES[name](**options).config
    short = {"_class_name": CLASSES[name].__name__, **options}
    written = {key: value for key, value in full.items() if key != "_use_default_values"}
    assert default_sampler(SchedulerConfig.from_dict(short)) == name
    for left, right in zip(table(name, short, 7), table(name, written, 7), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.filterwarnings("ignore:__array")
def test_another_sampler_takes_its_own_default_where_the_file_is_silent():
    """As `EulerDiscreteScheduler.from_config(pipe.scheduler.config)` does: PNDM is leading, Euler linspace."""
    config = PUBLISHED["sd-v1-5"][0]
    theirs = diffusers.EulerDiscreteScheduler.from_config(diffusers.PNDMScheduler.from_config(config).config)
    theirs.set_timesteps(6)
    np.testing.assert_allclose(table("euler", config, 6).timesteps, theirs.timesteps, rtol=1e-6)
    in_memory = diffusers.PNDMScheduler.from_config(config).config
    np.testing.assert_allclose(table("euler", in_memory, 6).timesteps, theirs.timesteps, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thresholding", True),
        ("clip_sample", True),
        ("use_flow_sigmas", True),
        ("use_lu_lambdas", True),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("lambda_min_clipped", -5.1),
        ("predict_x0", False),
        ("shift", 3.0),
        ("sigma_data", 0.5),
    ],
)
def test_a_setting_that_we_do_not_follow_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        SchedulerConfig.from_dict({**COMMON, key: value})


def test_clipping_that_is_only_a_default_is_refused_and_the_class_is_named():
    with pytest.raises(ValueError, match="clip_sample is True, the default of DDIMScheduler"):
        SchedulerConfig.from_dict({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize("value", [None, False])
def test_an_unknown_setting_that_is_off_is_no_matter(value):
    assert SchedulerConfig.from_dict({**COMMON, "from_the_future": value}) == SchedulerConfig.from_dict(COMMON)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("timestep_spacing", "Trailing"),
        ("final_sigmas_type", "one"),
        ("variance_type", "learned_range"),
        ("solver_order", 4),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 1000.0),
        ("steps_offset", -1),
        ("beta_start", 0.0),
        ("beta_end", float("nan")),
        ("beta_end", "0.012"),
        ("sigma_min", 0.0),
        ("sigma_max", float("inf")),
        ("timestep_scaling", -1.0),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [0.1] * 999 + [1.5]),
        ("set_alpha_to_one", "yes"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        SchedulerConfig.from_dict({**COMMON, key: value})


def test_two_sigma_schedules_at_once_are_refused():
    with pytest.raises(ValueError, match="karras, beta"):
        SchedulerConfig.from_dict({**COMMON, "use_karras_sigmas": True, "use_beta_sigmas": True})


def test_unknown_classes_need_their_betas_and_fall_back_to_ddim_by_name():
    config = SchedulerConfig.from_dict({**COMMON, "_class_name": "IPNDMScheduler"})
    assert (default_sampler(config), replaced_sampler(config)) == ("ddim", "IPNDMScheduler")
    with pytest.raises(ValueError, match="beta_start, beta_end, beta_schedule"):
        SchedulerConfig.from_dict({"_class_name": "IPNDMScheduler"})


@pytest.mark.parametrize(
    ("config", "replaced"),
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "PNDMScheduler with a Runge-Kutta start"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver'"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"}, "'sde-dpmsolver++'"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler"),
    ],
)
def test_what_ddim_replaces_is_named(config, replaced):
    config = SchedulerConfig.from_dict({**COMMON, **config})
    assert default_sampler(config) == "ddim"
    assert replaced in replaced_sampler(config)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("KDPM2DiscreteScheduler", "kdpm2"),
        ("KDPM2AncestralDiscreteScheduler", "kdpm2_a"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        (None, "ddim"),
    ],
)
def test_a_class_that_we_have_is_replaced_by_nothing(name, sampler):
    config = SchedulerConfig.from_dict({**COMMON, "_class_name": name})
    assert (default_sampler(config), replaced_sampler(config)) == (sampler, None)


@pytest.mark.parametrize(
    ("algorithm", "sampler"), [("dpmsolver++", "dpmpp_2m"), ("sde-dpmsolver++", "dpmpp_2m_sde"), ("dpmsolver", "ddim")]
)
def test_dpm_solver_is_named_by_its_algorithm(algorithm, sampler):
    config = {**COMMON, "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": algorithm}
    assert default_sampler(SchedulerConfig.from_dict(config)) == sampler


def test_a_pndm_file_that_does_not_skip_the_runge_kutta_start_is_drawn_with_ddim():
    assert default_sampler(SchedulerConfig.from_dict({"_class_name": "PNDMScheduler"})) == "ddim"


def test_a_config_is_a_hashable_value():
    assert hash(SchedulerConfig()) == hash(SchedulerConfig())
    with pytest.raises(AttributeError):
        SchedulerConfig().beta_start = 0.1


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_configs_sigmas_are_for_the_samplers_whose_class_has_them(name, key):
    """diffusers' `from_config` drops what another class does not have; a schedule that is asked for is for all."""
    plain, switched = (table(name, {**COMMON, **config}, 8) for config in ({}, {key: True}))
    asked = table(name, COMMON, 8, schedule=key.split("_")[1])
    has_it = key in inspect.signature(CLASSES[name].__init__).parameters
    same, other = (asked, plain) if has_it else (plain, asked)
    np.testing.assert_array_equal(switched.noise, same.noise)
    np.testing.assert_array_equal(switched.timesteps, same.timesteps)
    assert not np.array_equal(same.noise, other.noise)


@pytest.mark.parametrize("schedule", ["exponential", "beta"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s", "unipc", "deis"])
def test_exponential_and_beta_sigmas_start_at_the_last_trained_timestep(name, schedule):
    """diffusers starts at 998: it cuts 998.9999, a rounding of 999, down to a whole number."""
    ours = table(name, COMMON, 10, schedule=schedule)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        theirs = CLASSES[name](**STABLE_DIFFUSION, **{f"use_{schedule}_sigmas": True})
        theirs.set_timesteps(10)
    assert (ours.timesteps[0], int(theirs.timesteps[0])) == (999, 998)
    np.testing.assert_array_equal(ours.timesteps[1:-1], theirs.timesteps[1:-1])
