"""On a Gaussian target everything is known: the best network, the flow's exact end, the distribution at every level."""

import math

import numpy as np
import pytest
import scipy.integrate
from scheduler_walks import run_table

from sdjax.schedulers import SchedulerConfig, table

MEAN, STD = 0.7, 0.5


def variance_preserving(schedule, i):
    size = math.hypot(schedule.signal[i], schedule.noise[i])
    return schedule.signal[i] / size, schedule.noise[i] / size


def posterior_gain(schedule, i):
    """The best estimate of x0 is MEAN + gain * (x - signal * MEAN), x in the variance-preserving scale."""
    signal, noise = variance_preserving(schedule, i)
    return signal * STD**2 / (signal**2 * STD**2 + noise**2)


def best_network(schedule, prediction_type):
    def answer(x, i):
        signal, noise = variance_preserving(schedule, i)
        x0 = MEAN + posterior_gain(schedule, i) * (x - signal * MEAN)
        eps = (x - signal * x0) / noise
        return {"sample": x0, "epsilon": eps, "v_prediction": signal * eps - noise * x0}[prediction_type]

    return answer


def error_of_flow(name, config, steps):
    """Largest error at the level before the last row: the flow keeps each quantile of the distribution."""
    schedule = table(name, config, steps, schedule=config.sigma_schedule)
    quantile = np.array([-1.0, 0.3, 2.0])

    def exact(i):
        return schedule.signal[i] * MEAN + math.hypot(schedule.signal[i] * STD, schedule.noise[i]) * quantile

    no_noise = np.zeros((len(schedule.timesteps), 1))
    walk, _ = run_table(schedule, exact(0), no_noise, function=best_network(schedule, config.prediction_type))
    last = len(schedule.timesteps) - 1
    return np.abs(walk[last] - exact(last)).max()


# The order of the whole walk. A multistep method starts with lower-order steps, so beyond 2 the start may hold it back;
# UniPC's corrector adds one; PLMS averages what the network says, and a v is not what stays nearly constant.
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("kdpm2", {}, 2),
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_2s", {"solver_order": 3}, 3),
    ("lms", {}, 3),
    ("dpmpp_2m", {"solver_order": 1}, 1),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_2m", {"solver_order": 3}, 2),
    ("unipc", {"solver_order": 1}, 2),
    ("unipc", {}, 3),
    ("unipc", {"solver_type": "bh1"}, 3),
    ("unipc", {"solver_order": 3}, 2),
    ("deis", {"solver_order": 1}, 1),
    ("deis", {}, 2),
    ("deis", {"solver_order": 3}, 2),
    ("pndm", {}, 2),
    ("pndm", {"prediction_type": "sample"}, 2),
    ("pndm", {"prediction_type": "v_prediction"}, 1),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=str)
def test_doubling_the_steps_divides_the_error_by_two_to_the_order(name, options, order):
    config = SchedulerConfig(sigma_schedule="karras", **options)
    coarse, fine = (error_of_flow(name, config, steps) for steps in (40, 160))
    assert math.log2(coarse / fine) / 2 > order - 0.15


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "kdpm2", "lms", "dpmpp_2s", "dpmpp_2m", "unipc", "deis"])
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_what_the_network_predicts_makes_no_difference(name, schedule):
    errors = [
        error_of_flow(name, SchedulerConfig(sigma_schedule=schedule, prediction_type=prediction_type), 20)
        for prediction_type in ("epsilon", "v_prediction", "sample")
    ]
    np.testing.assert_allclose(errors, errors[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "deis", "lms", "pndm"])
def test_ten_steps_of_a_multistep_method_beat_twenty_of_ddim(name):
    config = SchedulerConfig(sigma_schedule="karras")
    assert error_of_flow(name, config, 10) < error_of_flow("ddim", config, 20)


def moments(schedule):
    """Exact mean and deviation of the latents before the last row, everything being linear in them."""
    n = schedule.A.shape[1]
    mean, covariance = np.zeros(n), np.zeros((n, n))
    mean[0] = schedule.signal[0] * MEAN
    covariance[0, 0] = (schedule.signal[0] * STD) ** 2 + schedule.noise[0] ** 2
    for i in range(len(schedule.timesteps) - 1):
        gain = posterior_gain(schedule, i)
        step = schedule.A[i].copy()
        step[:, 0] += schedule.B[i] * gain * schedule.input_scale[i]
        mean = step @ mean + schedule.B[i] * MEAN * (1 - gain * variance_preserving(schedule, i)[0])
        covariance = step @ covariance @ step.T + np.outer(schedule.C[i], schedule.C[i])
    return mean[0], math.sqrt(covariance[0, 0])


def error_of_distribution(name, config, steps, **options):
    schedule = table(name, config, steps, schedule=config.sigma_schedule, **options)
    mean, deviation = moments(schedule)
    signal, noise = schedule.signal[-2], schedule.noise[-2]
    assert mean == pytest.approx(signal * MEAN, abs=1e-9)
    return abs(deviation - math.hypot(signal * STD, noise))


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("ddpm", {}, 1),
        ("ddim", {"eta": 1.0}, 1),
        ("ddim", {"eta": 0.5}, 1),
        ("euler_a", {}, 1),
        ("kdpm2_a", {}, 2),
        ("dpmpp_2m_sde", {}, 2),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
        ("dpmpp_2m_sde", {"solver_order": 3}, 2),
        ("dpmpp_sde", {}, 2),
    ],
    ids=str,
)
def test_fresh_noise_keeps_the_spread_of_the_target(name, options, order):
    eta = {"eta": options["eta"]} if "eta" in options else {}
    rest = {key: value for key, value in options.items() if key != "eta"}
    config = SchedulerConfig(sigma_schedule="karras", prediction_type="sample", **rest)
    coarse, fine = (error_of_distribution(name, config, steps, **eta) for steps in (80, 160))
    assert math.log2(coarse / fine) > order - 0.15
    assert fine < 0.02 / order**4


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_with_a_perfect_consistency_function_draws_from_the_target(steps):
    schedule = table("lcm", SchedulerConfig(prediction_type="sample", rescale_betas_zero_snr=True), steps)
    mean, variance = 0.0, 1.0
    for i in range(steps):
        signal, noise = schedule.signal[i], schedule.noise[i]
        gain = STD / math.hypot(signal * STD, noise)  # to the same quantile of the target
        slope = schedule.A[i, 0, 0] + schedule.B[i, 0] * gain
        mean = slope * mean + schedule.B[i, 0] * MEAN * (1 - gain * signal)
        variance = slope**2 * variance + schedule.C[i, 0] ** 2
    assert mean == pytest.approx(MEAN, abs=1e-4)
    assert math.sqrt(variance) == pytest.approx(STD, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "prediction_type", "degree"),
    [
        ("dpmpp_2m", {"solver_type": "heun"}, "sample", 1),
        ("deis", {}, "epsilon", 1),
        ("deis", {"solver_order": 3}, "epsilon", 2),
    ],
)
def test_a_step_integrates_a_polynomial_in_log_snr_exactly(name, options, prediction_type, degree):
    config = SchedulerConfig(sigma_schedule="karras", prediction_type=prediction_type, **options)
    schedule = table(name, config, 20)
    a, s = schedule.signal, schedule.noise
    with np.errstate(divide="ignore"):
        log_snr = np.log(a / s)

    def said(where):
        return 0.3 - 0.5 * where + (0.2 * where**2 if degree > 1 else 0)

    walk, _ = run_table(schedule, np.array([0.5]), np.zeros((20, 1)), function=lambda x, i: 0 * x + said(log_snr[i]))
    for i in range(3, 18):
        if prediction_type == "sample":
            inner = scipy.integrate.quad(lambda u: math.exp(u) * said(u), log_snr[i], log_snr[i + 1], epsrel=1e-12)[0]
            exact = s[i + 1] / s[i] * walk[i] + s[i + 1] * inner
        else:
            inner = scipy.integrate.quad(lambda u: math.exp(-u) * said(u), log_snr[i], log_snr[i + 1], epsrel=1e-12)[0]
            exact = a[i + 1] / a[i] * walk[i] - a[i + 1] * inner
        np.testing.assert_allclose(walk[i + 1], exact, rtol=1e-9)


def test_a_step_of_lms_integrates_a_cubic_in_sigma_exactly():
    schedule = table("lms", SchedulerConfig(sigma_schedule="karras"), 12)
    sigmas = schedule.noise
    cubic = np.polynomial.Polynomial([0.3, -0.2, 0.05, 0.01])
    # with epsilon prediction the network's answer is dx/dsigma
    walk, _ = run_table(schedule, np.array([1.0]), np.zeros((12, 1)), function=lambda x, i: 0 * x + cubic(sigmas[i]))
    rise = np.diff(cubic.integ()(sigmas))
    np.testing.assert_allclose(np.diff(walk[:, 0])[3:], rise[3:], rtol=1e-9)
