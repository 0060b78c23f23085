"""A model's defaults and vocabulary are on the card in its folder, and travel with it."""

import json
from dataclasses import replace

import numpy as np
import pytest

import sdjax
from sdjax.loading import Card, load, read_card, save_folder
from sdjax.loading.source import needed_files
from sdjax.pipeline import BUNDLED_FOLDER, GUIDANCE_SCALE, STEPS
from sdjax.variants import VARIANTS, Variant
from training.captions import vocabulary
from training.drawings import COLORS, KINDS
from training.export import card


def folder_with(card, folder):
    save_folder(replace(load(BUNDLED_FOLDER, dtype="float32"), card=card), folder)
    return folder


def drawn(pipe):
    inputs = {}
    if pipe.definition.denoiser_config.in_channels == 9:
        inputs = {"image": np.full((16, 16, 3), 99, np.uint8), "mask": np.ones((16, 16))}
    return pipe("a red circle", "a star", seed=1, steps=2, width=16, height=16, output="latents", **inputs).images


def test_the_bundled_model_keeps_its_defaults_and_words_when_it_is_saved(tmp_path):
    pipe = sdjax.Pipeline.from_pretrained()
    pipe.save_pretrained(tmp_path / "saved")
    again = sdjax.Pipeline.from_pretrained(tmp_path / "saved")
    assert (again.steps, again.guidance_scale) == (pipe.steps, pipe.guidance_scale) == (20, 3.0)
    assert again.checkpoint.card == pipe.checkpoint.card
    np.testing.assert_array_equal(*(each("a red circle", seed=1, output="latents").images for each in (pipe, again)))
    assert "does not know: dog" in again.resolve("a dog").warnings[0]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sd2-inpaint", "sdxl", "refiner"])
def test_a_model_from_one_file_draws_the_same_after_it_is_saved(name, layouts, tmp_path):
    pipe = sdjax.Pipeline.from_pretrained(layouts(name).file)
    pipe.save_pretrained(tmp_path / "saved")
    again = sdjax.Pipeline.from_pretrained(tmp_path / "saved")
    assert (again.steps, again.guidance_scale) == (pipe.steps, pipe.guidance_scale)
    assert again.resolve("a", **_canvas(pipe)).settings == pipe.resolve("a", seed=1, **_canvas(pipe)).settings
    np.testing.assert_array_equal(drawn(again), drawn(pipe))


def _canvas(pipe):
    inpaints = pipe.definition.denoiser_config.in_channels == 9
    return {"image": np.zeros((16, 16, 3), np.uint8), "mask": np.ones((16, 16))} if inpaints else {}


@pytest.mark.parametrize("by", ["name", "hub id"])
def test_a_named_model_keeps_its_defaults_when_it_is_saved(by, tmp_path, monkeypatch):
    turbo = Variant(str(folder_with(Card(), tmp_path / "made")), 64, 4, 0.0, "distilled")
    monkeypatch.setattr("sdjax.pipeline.VARIANTS", {**VARIANTS, "quick": turbo})
    pipe = sdjax.Pipeline.from_pretrained("quick" if by == "name" else turbo.source)
    pipe.save_pretrained(tmp_path / "saved")
    again = sdjax.Pipeline.from_pretrained(tmp_path / "saved")
    assert (again.steps, again.guidance_scale) == (pipe.steps, pipe.guidance_scale) == (4, 0.0)
    assert read_card(tmp_path / "saved").description == "distilled"


def test_what_a_call_asks_for_comes_before_the_card_and_the_card_before_a_name(tmp_path, monkeypatch):
    folder = folder_with(Card(steps=7), tmp_path / "made")
    plain = sdjax.Pipeline.from_pretrained(folder_with(Card(), tmp_path / "plain"))
    assert (plain.steps, plain.guidance_scale) == (STEPS, GUIDANCE_SCALE)
    monkeypatch.setattr("sdjax.pipeline.VARIANTS", {**VARIANTS, "quick": Variant(str(folder), 64, 4, 2.0, "")})
    pipe = sdjax.Pipeline.from_pretrained("quick")
    assert (pipe.steps, pipe.guidance_scale) == (7, 2.0)
    assert pipe.resolve("a star", steps=3, guidance_scale=1.5).steps == 3


def test_a_card_of_a_repository_is_fetched():
    files = ["model_index.json", "card.json", "unet/diffusion_pytorch_model.safetensors"]
    assert "card.json" in needed_files("a/b", files, None)


def test_the_bundled_card_lists_words_of_the_captions_it_learned_from():
    known = read_card(BUNDLED_FOLDER).vocabulary
    assert {*KINDS, *COLORS} < set(known) <= set(vocabulary())


def test_an_exported_card_lists_all_words_of_the_captions_and_no_punctuation():
    words = card().vocabulary
    assert sorted(words) == [word for word in vocabulary() if word not in ",."]
    assert words[: len(KINDS)][0] == "circle"


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("[]", "a JSON list, not an object"),
        ("{", "card.json: "),
        ('{"steps": 0}', "steps must be a whole number of at least 1, not 0"),
        ('{"steps": true}', "not True"),
        ('{"guidance_scale": "3"}', "guidance_scale must be a finite number, not '3'"),
        ('{"guidance_scale": Infinity}', "not inf"),
        ('{"vocabulary": "red"}', "vocabulary must be a list of words"),
        ('{"description": 3}', "description must be a text, not 3"),
    ],
)
def test_a_card_that_states_something_else_is_refused_by_name(contents, said, tmp_path):
    (tmp_path / "card.json").write_text(contents)
    with pytest.raises(sdjax.CheckpointError, match=r"card\.json") as error:
        read_card(tmp_path)
    assert said in str(error.value)


def test_entries_of_others_are_left_alone(tmp_path):
    (tmp_path / "card.json").write_text(json.dumps({"license": "mit", "steps": 3, "vocabulary": [" red ", "red", ""]}))
    assert read_card(tmp_path) == Card(steps=3, vocabulary=("red",))
