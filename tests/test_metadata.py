"""Parameters travel inside a PNG and come back as they were, in the convention that other tools read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax import metadata

SETTINGS = {"steps": 20, "sampler": "ddim", "guidance_scale": 3.0, "seed": 2**63, "size": "64x64", "model": "tiny"}


def test_the_text_is_what_other_tools_write():
    text = metadata.to_text("a cat", "blurry", {**SETTINGS, "clip_skip": None, "schedule": "karras"})
    assert text == (
        "a cat\nNegative prompt: blurry\n"
        f"Steps: 20, Sampler: ddim, Schedule type: karras, CFG scale: 3.0, Seed: {2**63}, Size: 64x64, Model: tiny"
    )


def test_what_another_tool_wrote_is_read():
    text = (
        "masterpiece, (best quality:1.2)\nNegative prompt: lowres,\nbad hands\n"
        "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "style: abc, other: def", Version: v1.9.4'
    )
    read = metadata.from_text(text)
    assert read["prompt"] == "masterpiece, (best quality:1.2)"
    assert read["negative_prompt"] == "lowres,\nbad hands"
    assert (read["steps"], read["sampler"], read["guidance_scale"], read["seed"]) == (28, "DPM++ 2M", 7, 1234)
    assert read["Lora hashes"] == "style: abc, other: def"


def through_a_file(folder, prompt, negative):
    file = folder / "p.png"
    text = metadata.to_text(prompt, negative, SETTINGS)
    Image.new("RGB", (2, 2)).save(file, pnginfo=metadata.chunks(text))
    return metadata.read(file)


@pytest.mark.parametrize(
    "prompt",
    [
        "テスト🌸\nSteps: 9, Seed: 1",
        "café",
        "Negative prompt: no",
        "\\",
        "",
        'say "hi", twice',
        "a\n\n\nb",
        "\\\\Steps: 3",
    ],
)
@pytest.mark.parametrize("negative", [None, "", "Steps: 4\nNegative prompt: x"])
def test_any_prompt_comes_back_as_it_was(tmp_path, prompt, negative):
    read = through_a_file(tmp_path, prompt, negative)
    assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)
    assert {name: read[name] for name in SETTINGS} == SETTINGS


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=60)


@settings(deadline=None)
@given(words, st.none() | words)
def test_random_prompts_come_back(tmp_path_factory, prompt, negative):
    read = through_a_file(tmp_path_factory.getbasetemp(), prompt, negative)
    assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)


@given(words)
def test_any_text_can_be_read(text):
    assert "prompt" in metadata.from_text(text)
