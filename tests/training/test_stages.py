"""Stages of the training: they go on after a kill, and hand on to the next stage what it expects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import VAE, bind, initialise
from training import autoencoder, diffusion, latents, text
from training.drawings import draw, sample_group, sample_scene
from training.loop import train


class KillError(Exception):
    pass


def test_a_killed_run_goes_on_to_the_very_result_it_would_have_had(tmp_path):
    @jax.jit
    def step(state, batch):
        return state * 0.9 + batch.sum(), {"loss": jnp.square(state).mean()}

    def batch(i):
        return np.random.default_rng(i).normal(size=3)

    def killed(i):
        if i == 7:
            raise KillError
        return batch(i)

    whole = train(tmp_path / "whole", jnp.ones(2), step, batch, steps=10, save_every=3)
    with pytest.raises(KillError):
        train(tmp_path / "cut", jnp.ones(2), step, killed, steps=10, save_every=3)
    resumed = train(tmp_path / "cut", jnp.ones(2), step, batch, steps=10, save_every=3)
    assert np.array_equal(resumed, whole)
    assert np.array_equal(train(tmp_path / "cut", jnp.ones(2), step, killed, steps=10, save_every=3), whole)


def test_standardised_latents_have_unit_channels_and_give_the_same_pictures():
    rng = np.random.default_rng(0)
    params = initialise(VAE, autoencoder.CONFIG, dtype="float32", seed=0)
    pictures = np.stack([draw(sample_scene(rng), 64) for _ in range(6)]).astype(np.float32) / 127.5 - 1
    plain = bind(autoencoder.DEFINITION, params)
    seen = plain.encode(pictures)
    mean = np.asarray(seen.mean)
    moments = latents.Moments(mean.mean((0, 1, 2)), mean.std((0, 1, 2)))
    changed = bind(autoencoder.DEFINITION, latents.standardised(params, moments))
    again = changed.encode(pictures)
    np.testing.assert_allclose(np.mean(again.mean, (0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(again.mean, (0, 1, 2)), 1, atol=1e-3)
    np.testing.assert_allclose(np.exp(again.log_variance / 2), np.exp(seen.log_variance / 2) / moments.deviation, 1e-3)
    np.testing.assert_allclose(changed.decode(again.mean), plain.decode(seen.mean), atol=1e-4)


def test_the_loss_counts_every_latent_alike():
    """Where a weight depended on the picture, the average of two pictures would no longer be the best answer."""
    params = diffusion.initial_state(1).params  # the output is zero, so the loss is the mean square of the target
    rng = np.random.default_rng(1)
    x0 = np.zeros((8, *(16, 16, diffusion.CONFIG.in_channels)), np.float32)
    x0[:, 4:8, 4:8] = 3
    last = np.full(8, 999, np.int32)  # no signal is left there: the target is the picture itself
    ids = text.token_ids([""] * 8)
    context = rng.normal(size=(8, ids.shape[1], diffusion.CONFIG.context_channels)).astype(np.float32)
    loss = diffusion.velocity_loss(params, diffusion.Batch(x0, ids, last), context, jax.random.key(0))
    assert float(loss) == pytest.approx(float(np.square(x0).mean()), rel=1e-5)


def test_the_probe_asks_for_the_number_and_the_arrangement_of_a_group():
    rng = np.random.default_rng(2)
    for _ in range(50):
        two, three = sample_group(rng, 2), sample_group(rng, 3)
        layouts = [text.attributes(scene)[1] for scene in (two, three, sample_scene(rng))]
        assert layouts[1] == text.LAYOUTS - 1
        assert layouts[0] == text.LAYOUTS - (3 if two.relation in ("left of", "right of") else 2)
        assert layouts[2] < text.LAYOUTS - 3
        assert text.attributes(three)[2:] == [*text.attributes(three)[2:5], *[text.UNKNOWN] * 3]
