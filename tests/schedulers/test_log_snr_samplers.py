"""DPM++ 2M, its SDE form, DPM++ 2S, UniPC and DEIS, which count in log signal-to-noise, against diffusers."""

import diffusers
import numpy as np
import pytest
from scheduler_walks import walks

from sdjax.schedulers import HISTORY, SchedulerConfig, table

SPACINGS = (
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
)
SIGMA_SCHEDULES = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
DPM = diffusers.DPMSolverMultistepScheduler
SOLVERS = (
    ("dpmpp_2m", DPM, {}),
    ("dpmpp_2m", DPM, {"solver_type": "heun"}),
    ("dpmpp_2m", DPM, {"solver_order": 1}),
    ("dpmpp_2m", DPM, {"solver_order": 3}),
    ("dpmpp_2m", DPM, {"lower_order_final": False, "euler_at_final": True}),
    ("dpmpp_2m_sde", DPM, {"algorithm_type": "sde-dpmsolver++"}),
    ("dpmpp_2m_sde", DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ("unipc", diffusers.UniPCMultistepScheduler, {}),
    ("unipc", diffusers.UniPCMultistepScheduler, {"solver_order": 1}),
    ("unipc", diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
    ("unipc", diffusers.UniPCMultistepScheduler, {"disable_corrector": [0, 1]}),
    ("deis", diffusers.DEISMultistepScheduler, {}),
    ("deis", diffusers.DEISMultistepScheduler, {"solver_order": 3}),
)
SINGLESTEP = (
    {},
    {"solver_type": "heun"},
    {"solver_order": 1},
    {"solver_order": 3},
    {"solver_order": 3, "solver_type": "heun"},
)
SOLVER_IDS = [f"{name} {options}" for name, _, options in SOLVERS]
# where diffusers casts its latents to float32
TOLERANCE = 2e-5


@pytest.mark.parametrize("steps", [5, 16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACINGS + SIGMA_SCHEDULES, ids=str)
@pytest.mark.parametrize(("name", "cls", "options"), SOLVERS, ids=SOLVER_IDS)
def test_walks_as_in_diffusers(name, cls, options, spacing, prediction_type, steps):
    ours, theirs = walks(name, cls, steps, prediction_type=prediction_type, **options, **spacing)
    if name == "deis" and spacing in SIGMA_SCHEDULES:
        ours, theirs = ours[:-1], theirs[:-1]  # the last step of diffusers goes from sigma_min to sigma_min
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(("name", "cls", "options"), SOLVERS[:-2], ids=SOLVER_IDS[:-2])
def test_landing_on_the_least_trained_noise_walks_as_in_diffusers(name, cls, options, spacing):
    ours, theirs = walks(name, cls, 16, final_sigmas_type="sigma_min", **options, **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("options", SINGLESTEP, ids=str)
@pytest.mark.parametrize("spacing", [{}, *SIGMA_SCHEDULES], ids=str)
def test_singlestep_walks_as_in_diffusers(spacing, options, steps, prediction_type):
    ours, theirs = walks(
        "dpmpp_2s", diffusers.DPMSolverSinglestepScheduler, steps, prediction_type=prediction_type, **options, **spacing
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [6, 8, 9])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize("options", SINGLESTEP, ids=str)
def test_singlestep_landing_on_the_least_trained_noise_walks_as_in_diffusers(options, lower_order_final, steps):
    ours, theirs = walks(
        "dpmpp_2s",
        diffusers.DPMSolverSinglestepScheduler,
        steps,
        final_sigmas_type="sigma_min",
        lower_order_final=lower_order_final,
        **options,
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("begin", [3, 4, 7, 9])
@pytest.mark.parametrize("options", SINGLESTEP, ids=str)
def test_singlestep_from_an_image_walks_as_in_diffusers(options, begin):
    ours, theirs = walks(
        "dpmpp_2s",
        diffusers.DPMSolverSinglestepScheduler,
        10,
        first_row=begin,
        table_options={"begin": begin},
        **options,
    )
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_singlestep_takes_timesteps_from_linspace_whatever_the_spacing():
    walks_of = [table("dpmpp_2s", {"timestep_spacing": spacing}, 7) for spacing in ("leading", "trailing", "linspace")]
    for walk in walks_of:
        np.testing.assert_array_equal(walk.timesteps, walks_of[0].timesteps)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(("name", "cls", "options"), SOLVERS, ids=SOLVER_IDS)
def test_cosine_betas_walk_as_in_diffusers(name, cls, options, spacing):
    ours, theirs = walks(name, cls, 10, beta_schedule="squaredcos_cap_v2", **options, **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS + SIGMA_SCHEDULES, ids=str)
def test_unipc_bh1_walks_as_in_diffusers(spacing):
    """But for the last step onto sigma 0, where diffusers multiplies 0 by the infinite B(h)."""
    ours, theirs = walks("unipc", diffusers.UniPCMultistepScheduler, 9, solver_type="bh1", **spacing)
    np.testing.assert_allclose(ours[:-1], theirs[:-1], atol=TOLERANCE)
    assert np.isfinite(ours).all()
    assert np.isnan(theirs[-1]).any()


@pytest.mark.parametrize("begin", [3, 7, 9])
@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(("name", "cls", "options"), SOLVERS, ids=SOLVER_IDS)
def test_from_an_image_walks_as_in_diffusers(name, cls, options, spacing, begin):
    ours, theirs = walks(name, cls, 10, first_row=begin, table_options={"begin": begin}, **options, **spacing)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize(("name", "cls", "options"), SOLVERS[:-2], ids=SOLVER_IDS[:-2])
def test_zero_terminal_snr_walks_as_in_diffusers(name, cls, options, spacing):
    ours, theirs = walks(
        name, cls, 10, prediction_type="v_prediction", rescale_betas_zero_snr=True, **options, **spacing
    )
    # from log signal-to-noise -8.3 on, the float32 of diffusers has lost some digits
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_third_order_sde_step_is_the_one_of_k_diffusion():
    """diffusers has a sign slip there: its weight of the second difference tends to 1 as steps get short, not to 0."""
    steps = 40
    config = SchedulerConfig(solver_order=3, sigma_schedule="exponential", prediction_type="sample")
    schedule = table("dpmpp_2m_sde", config, steps)
    i = steps // 2
    h = np.log(schedule.noise[i] / schedule.signal[i]) - np.log(schedule.noise[i + 1] / schedule.signal[i + 1])
    # k_diffusion.sampling.sample_dpmpp_3m_sde with eta = 1: x += phi_2 * d1 - phi_3 * d2; and for even steps
    # d1 = (m0 - m1) + (m0 - 2 m1 + m2) / 2, d2 = (m0 - 2 m1 + m2) / 2
    phi_2 = np.expm1(-2 * h) / (2 * h) + 1
    phi_3 = phi_2 / (2 * h) - 0.5
    m0 = -np.expm1(-2 * h) + (3 * phi_2 - phi_3) / 2
    m1 = -2 * phi_2 + phi_3
    m2 = (phi_2 - phi_3) / 2
    np.testing.assert_allclose(schedule.B[i, 0], schedule.signal[i + 1] * m0, rtol=1e-9)
    np.testing.assert_allclose(schedule.A[i, 0, [HISTORY, 1]], schedule.signal[i + 1] * np.array([m1, m2]), rtol=1e-9)
