"""Text embeddings: diffusers' for plain prompts, chunks and skipped layers, an independent sum for weights."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdjax
from sdjax import metadata
from sdjax.generation.text import MOST_RESCALED
from sdjax.models import CLIPTextConfig
from sdjax.prompts import PLAIN, Reading, reading, text_inputs
from tests.prompts.conftest import LAYERS

TOLERANCE = 2e-5
PROMPTS = ["the cat sat, on the mat!", "A cat"]

encode_prompt = jax.jit(sdjax.pipeline.encode_prompt, static_argnums=0)


@pytest.fixture(params=["sd1", "sdxl"])
def both(request):
    return request.getfixturevalue(request.param)


def encode(pipe, prompts, how=PLAIN):
    inputs = text_inputs(pipe.checkpoint, prompts, how)
    return encode_prompt(pipe.definition, pipe.params, inputs.tokens, inputs.vectors, how.clip_skip or 0)


def by_diffusers(reference, prompts, clip_skip=None):
    """Context, and SDXL's pooled vectors or None."""
    with torch.no_grad():
        if hasattr(reference, "text_encoder_2"):
            context, _, pooled, _ = reference.encode_prompt(
                prompts, do_classifier_free_guidance=False, device="cpu", clip_skip=clip_skip
            )
            return context.numpy(), pooled.numpy()
        return reference.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip)[0].numpy(), None


def assert_same(text, context, pooled):
    np.testing.assert_allclose(text.context, context, atol=TOLERANCE, rtol=TOLERANCE)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        np.testing.assert_allclose(text.pooled, pooled, atol=TOLERANCE, rtol=TOLERANCE)


def test_plain_prompts_are_what_diffusers_encodes(both):
    prompts = [*PROMPTS, "", "smile :)", "name_(series", "cat " * 75]
    assert_same(encode(both.pipe, prompts), *by_diffusers(both.reference, prompts))


def test_what_is_cut_by_default_is_what_diffusers_cuts(both):
    with pytest.warns(UserWarning, match="cut off: 'cat cat the'"):
        text = encode(both.pipe, ["cat " * 77 + "the"])
    assert_same(text, *by_diffusers(both.reference, ["cat " * 77 + "the"]))


@pytest.mark.parametrize("clip_skip", range(1, LAYERS))
def test_clip_skip_counts_as_in_diffusers_and_leaves_the_pooled_vector(both, clip_skip):
    how = reading(both.pipe.checkpoint, clip_skip=clip_skip, embeddings=(), long_prompts="truncate")
    text = encode(both.pipe, PROMPTS, how)
    assert_same(text, *by_diffusers(both.reference, PROMPTS, clip_skip))
    plain = encode(both.pipe, PROMPTS)
    assert not np.allclose(text.context, plain.context, atol=1e-2)
    if plain.pooled is not None:
        np.testing.assert_array_equal(text.pooled, plain.pooled)


@pytest.mark.parametrize("clip_skip", [0, -1, LAYERS, LAYERS + 1, 1.0, True, "2"])
def test_clip_skip_out_of_range_is_refused_with_the_range(both, clip_skip):
    with pytest.raises(sdjax.RequestError, match=f"clip_skip must be None or a whole number from 1 to {LAYERS - 1}"):
        both.pipe("a", clip_skip=clip_skip)


def test_clip_skip_changes_a_picture_as_it_does_in_diffusers(both):
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    expected = both.reference(
        PROMPTS[0],
        negative_prompt="the",
        clip_skip=2,
        num_inference_steps=2,
        guidance_scale=5.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="latent",
    ).images
    out = both.pipe(
        PROMPTS[0], "the", clip_skip=2, steps=2, guidance_scale=5.0, sampler="ddim", latents=noise, output="latents"
    )
    np.testing.assert_allclose(out.images, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_chunks_are_encoded_apart_and_the_first_is_pooled(both):
    pieces = ["cat " * 75, "the mat", ""]
    how = Reading(long_prompts="chunk")
    for prompt in ["cat " * 75 + "the mat", "cat " * 75 + "BREAK the mat"]:
        text = encode(both.pipe, [prompt, "a " * 200], how)
        contexts, pooled = by_diffusers(both.reference, pieces)
        np.testing.assert_allclose(text.context[0], contexts.reshape(-1, contexts.shape[-1]), atol=TOLERANCE, rtol=1e-4)
        if pooled is not None:
            np.testing.assert_allclose(text.pooled[0], pooled[0], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize(("words", "negative"), [(31, 0), (29, 80)])
def test_a_prompt_meets_a_negative_prompt_of_any_length(tiny, words, negative):
    out = tiny("red " * words, "blue " * negative, long_prompts="chunk", steps=1, seed=1, output="latents")
    assert np.isfinite(out.images).all()


def weighted_by_hand(context, weights):
    """AUTOMATIC1111's emphasis: multiply, then restore the mean."""
    weighted = np.asarray(context, np.float64) * np.asarray(weights)[:, None]
    return weighted * np.asarray(context, np.float64).mean() / weighted.mean()


def test_weights_multiply_hidden_states_and_keep_the_mean_of_each_encoder(both):
    plain, pooled = by_diffusers(both.reference, ["the dog, cat on"])
    weights = [1, 1, *[1.4] * 3, 1, 1 / 1.1, 0.0, 0.0, *[1] * 68]
    text = encode(both.pipe, ["the (dog:1.4), [cat] (on:0)"])
    encoders = len(both.pipe.checkpoint.tokenizers)
    expected = [weighted_by_hand(part, weights) for part in np.split(plain[0], encoders, axis=-1)]
    np.testing.assert_allclose(text.context[0], np.concatenate(expected, axis=-1), atol=TOLERANCE, rtol=1e-4)
    if pooled is not None:
        np.testing.assert_allclose(text.pooled, pooled, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_weight_of_one_gives_equal_bytes(both):
    written, plain = encode(both.pipe, ["(the:1) (cat:1.0)"]), encode(both.pipe, ["the cat"])
    np.testing.assert_array_equal(written.context, plain.context)


def test_states_of_plain_prompts_are_not_touched_by_the_arithmetic_of_weights():
    states = np.random.default_rng(0).normal(0.3, 1, (2, 7, 5)).astype(np.float32)
    weigh = jax.jit(sdjax.generation.text.weigh)
    np.testing.assert_array_equal(weigh(states, np.ones((2, 7), np.float32)), states)
    half = states.astype(jax.numpy.bfloat16)
    np.testing.assert_array_equal(weigh(half, np.ones((2, 7), np.float32)), half)


@pytest.mark.parametrize("prompt", ["(the cat:0)", "(the cat:-10)", "(the cat:10)", "(the:-1) (cat:1.1)"])
def test_extreme_weights_stay_finite_and_bounded(both, prompt):
    largest = np.abs(encode(both.pipe, ["the cat"]).context).max()
    assert np.abs(encode(both.pipe, [prompt]).context).max() <= 10 * MOST_RESCALED * largest


def test_states_without_a_mean_are_weighted_and_not_scaled_by_noise():
    states = np.random.default_rng(0).normal(size=(1, 77, 64)).astype(np.float32)
    states -= states.mean(-1, keepdims=True)
    weights = np.linspace(0.5, 1.5, 77, dtype=np.float32)[None]
    np.testing.assert_allclose(sdjax.generation.text.weigh(states, weights), states * weights[..., None], rtol=1e-6)


def test_a_prompt_is_weighted_alike_beside_any_other(both):
    alone = encode(both.pipe, ["the (cat:1.4)"]).context[0]
    together = encode(both.pipe, ["(a:0.1) mat", "the (cat:1.4)"]).context[1]
    np.testing.assert_allclose(together, alone, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(prompt=st.text("()[]\\:,.0-9a ", max_size=60))
def test_any_text_gives_finite_embeddings(tiny, prompt):
    inputs = text_inputs(tiny.checkpoint, [prompt], Reading(long_prompts="chunk"))
    assert np.isfinite(encode_prompt(tiny.definition, tiny.params, inputs.tokens).context).all()


def test_ten_thousand_characters_are_encoded(tiny):
    context = encode(tiny, ["red circle " * 910], Reading(long_prompts="chunk")).context
    assert context.shape == (1, 61 * 32, 128)
    assert np.isfinite(context).all()
    with pytest.warns(UserWarning, match="1820 tokens"):
        assert encode(tiny, ["red circle " * 910]).context.shape == (1, 32, 128)


def test_weights_and_break_reach_the_picture(tiny):
    prompts = ["a red circle", "a (red:1) circle", "a (red:1.6) circle", "a red BREAK circle"]
    plain, one, strong, broken = (tiny(prompt, seed=1, steps=2, output="latents").images for prompt in prompts)
    np.testing.assert_array_equal(plain, one)
    assert np.abs(plain - strong).max() > 1e-3
    assert np.abs(plain - broken).max() > 1e-3


def test_another_prompt_weight_or_skipped_layer_compiles_nothing(tiny, compilations):
    arguments = {"seed": 1, "steps": 2, "output": "latents"}
    tiny("a red circle", "blue", **arguments)
    tiny("a red BREAK circle", "blue", **arguments)
    compilations.clear()
    tiny("(a large:1.3) [white] star", "(green:0.5)", **arguments)
    tiny("a blue ring", "", clip_skip=1, **arguments)
    tiny("a red circle " * 15, "blue", long_prompts="chunk", **arguments)
    tiny("a ring", "a red circle " * 15, long_prompts="chunk", clip_skip=2, **arguments)
    assert compilations == []


def test_a_picture_names_clip_skip_as_other_tools_count_it(tiny):
    out = tiny("a red circle", seed=1, steps=1, clip_skip=1)
    text = metadata.to_text("a red circle", None, {**out.settings, "seed": 1})
    assert "Clip skip: 2" in text
    assert "Long prompts" not in text
    assert metadata.from_text(text)["clip_skip"] == 1
    assert "Clip skip" not in metadata.to_text("a", None, tiny("a", steps=1).settings)
    assert metadata.from_text("a\nSteps: 20, Clip skip: 1").get("clip_skip") is None


def test_an_encoder_that_wants_its_padding_masked_is_refused():
    CLIPTextConfig.from_dict({"use_attention_mask": False})
    with pytest.raises(ValueError, match="use_attention_mask is True"):
        CLIPTextConfig.from_dict({"use_attention_mask": True})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"long_prompts": "wrap"}, "long_prompts must be one of truncate, chunk, not 'wrap'"),
        ({"embeddings": "word.safetensors"}, "embeddings must be a list"),
        ({"embeddings": [3]}, r"embeddings\[0\] must be a file"),
        ({"embeddings": [("word.safetensors", 3)]}, r"embeddings\[0\] must be a file"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tiny, arguments, said):
    with pytest.raises(sdjax.RequestError, match=said):
        tiny("a", **arguments)
