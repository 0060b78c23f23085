"""Parameters travel inside a picture's file and come back as they were, in the convention of the web UI."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax import metadata
from tests.metadata.tool_texts import WEB_UI

SETTINGS = {"steps": 20, "sampler": "ddim", "guidance_scale": 3.0, "seed": 2**63, "size": "2x2", "model": "tiny"}


def test_the_text_is_what_other_tools_write():
    text = metadata.to_text(
        "a cat", "blurry", {**SETTINGS, "clip_skip": None, "schedule": "karras", "loras": ["x:0.5"]}
    )
    assert text == (
        "a cat\nNegative prompt: blurry\n"
        f"Steps: 20, Sampler: ddim, Schedule type: karras, CFG scale: 3.0, Seed: {2**63}, Size: 2x2, "
        'Loras: "x:0.5", Model: tiny'
    )


def test_a_text_of_the_web_ui_is_read():
    assert metadata.from_text(WEB_UI) == {
        "prompt": "masterpiece, (best quality:1.2)\n\\(series\\)",
        "negative_prompt": "lowres,\nbad hands",
        "steps": 28,
        "sampler": "DPM++ 2M",
        "schedule": "Karras",
        "guidance_scale": 7.0,
        "seed": 1234,
        "size": "512x768",
        "model": "v1-5",
        "clip_skip": 1,
        "Model hash": "61e4567890",  # no number: as one it would be infinite
        "Lora hashes": "style: abc, other: def",
        "Version": "1.10",
    }


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('Steps: 1, Template: "a b" c, Seed: 1', {"steps": 1, "Template": '"a b" c', "seed": 1}),
        ('Steps: 1, Template: "a, b, Seed: 1', {"steps": 1, "Template": '"a', "seed": 1}),
        ('Steps: 1, Template: "\\x", Seed: 1', {"steps": 1, "Template": '"\\x"', "seed": 1}),
        ('Steps: 1, Template: "\\ud800", Seed: 1', {"steps": 1, "Template": "?", "seed": 1}),
        ("Steps: 1e400, CFG scale: 1e400, Seed: nan", {"steps": "1e400", "guidance_scale": "1e400", "seed": "nan"}),
        ("Steps: 20.0, CFG scale: inf, Seed: -1", {"steps": 20, "guidance_scale": "inf", "seed": -1}),
        (f"Steps: {'9' * 5000}, Seed: 1", {"steps": "9" * 5000, "seed": 1}),
        ("Steps: 1, prompt: x, negative_prompt: y, seed: 9, Seed: 1", {"steps": 1, "seed": 1}),
        ("Steps: 1, Hires steps: 3, Size: big, Seed: 1", {"steps": 1, "Hires steps": "3", "size": "big", "seed": 1}),
        ("Sampler: Euler, Seed: 1, Size: 8x8", {"sampler": "Euler", "seed": 1, "size": "8x8"}),
        ("Steps: 1, Seed: 1\r\n\n", {"steps": 1, "seed": 1}),
    ],
)
def test_a_value_is_text_unless_its_field_is_a_known_number(line, wanted):
    read = metadata.from_text(f"a cat\n{line}")
    assert read == {"prompt": "a cat", "negative_prompt": None, **wanted}
    json.dumps(read, allow_nan=False)
    str(read).encode()


KINDS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def through_a_file(folder, prompt, negative, kind):
    file = folder / f"p.{kind}"
    with file.open("wb") as opened:
        metadata.save(Image.new("RGB", (2, 2)), opened, kind, prompt, negative, SETTINGS)
    with Image.open(file) as picture:
        assert picture.format == KINDS[kind]
    return metadata.read(file)


PROMPTS = [
    "テスト🌸\nSteps: 9, Seed: 1",
    "café",
    "テスト",
    "Negative prompt: no",
    "\\",
    "",
    'say "hi", twice',
    "a\n\n\nb",
]
PROMPTS += ["\\\\Steps: 3", "\\(a\\)", "Sampler: x, Seed: 1, Size: 2"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", [None, "", "Steps: 4\nNegative prompt: x"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_prompt_comes_back_as_it_was_from_every_kind_of_file(tmp_path, prompt, negative, kind):
    read = through_a_file(tmp_path, prompt, negative, kind)
    assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)
    assert {name: read[name] for name in SETTINGS} == SETTINGS


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=60)


@settings(deadline=None)
@given(words, st.none() | words, st.sampled_from(sorted(KINDS)))
def test_random_prompts_come_back(tmp_path_factory, prompt, negative, kind):
    read = through_a_file(tmp_path_factory.getbasetemp(), prompt, negative, kind)
    assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)


def test_parameters_that_a_jpeg_cannot_hold_are_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="too long for a JPEG"), (tmp_path / "p.jpeg").open("wb") as file:
        metadata.save(Image.new("RGB", (2, 2)), file, "jpeg", "a" * 40_000, None, SETTINGS)
    with pytest.raises(metadata.MetadataError, match="holds no generation parameters"):
        metadata.read(tmp_path / "p.jpeg")


@given(words)
def test_any_text_can_be_read(text):
    assert "prompt" in metadata.from_text(text)


def test_a_text_of_a_megabyte_is_read_in_linear_time():
    for unit in ("a", " ", "a:", 'a:"', '\\"', "a: b,", "{", "Steps: "):
        text = unit * (2**20 // len(unit))
        assert "prompt" in metadata.from_text("Steps: 1, " + text)
