"""`<lora:name:0.8>` in prompts."""

import shutil

import numpy as np
import pytest

import sdjax
from sdjax.pipeline import BUNDLED_FOLDER
from sdjax.prompts import take_tags

LORAS = BUNDLED_FOLDER / "loras"
SETTINGS = {"seed": 1, "steps": 2, "output": "latents"}


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a star", "a star", []),
        ("a <lora:x:0.8>star", "a star", [("x", 0.8)]),
        ("<lora:x>", "", [("x", 1.0)]),
        ("<LORA: x : -1 >a<lyco:sub/y.v1:.5>", "a", [("x", -1.0), ("sub/y.v1", 0.5)]),
        ("<lora:x:0.5:0.5>", "", [("x", 0.5)]),
        ("<lora:x", "<lora:x", []),
        ("a < b, lora:x >", "a < b, lora:x >", []),
    ],
)
def test_tags_are_taken_out(prompt, text, tags):
    warned = []
    rest, found = take_tags(prompt, warn=warned.append)
    assert (rest, [(tag.name, tag.weight) for tag in found], warned) == (text, tags, [])


@pytest.mark.parametrize("tag", ["<lora:>", "<lora:x:y>", "<lora:x:0.5:0.7>", "<lora:x:nan>", "<lora:x:0@0.2,1@0.8>"])
def test_a_tag_that_cannot_be_honoured_is_taken_out_with_a_warning(tag):
    warned = []
    assert take_tags(f"a {tag}star", warn=warned.append) == ("a star", ())
    (line,) = warned
    assert line.startswith(f"{tag} is left out: ")


def test_a_tag_is_the_adapter_of_the_folder(tiny):
    tagged = tiny("a star <lora:outline:0.8>", lora_dir=LORAS, **SETTINGS)
    given = tiny("a star ", loras=[(LORAS / "outline.safetensors", 0.8)], **SETTINGS)
    np.testing.assert_array_equal(tagged.images, given.images)
    assert tagged.settings["loras"] == given.settings["loras"] == ["outline:0.8"]
    both = tiny.resolve("a star <lora:outline:0.3>", loras=[(LORAS / "outline.safetensors", 0.5)], lora_dir=str(LORAS))
    assert both.settings["loras"] == ["outline:0.5", "outline:0.3"]
    assert both.warnings == ()


def test_prompts_of_one_call_have_the_same_adapters(tiny, tmp_path):
    shutil.copy(LORAS / "outline.safetensors", tmp_path / "other.safetensors")
    shutil.copy(LORAS / "outline.safetensors", tmp_path)
    prompts = ["a star <lora:outline><lora:other:2>", "a ring <lora:other:2><lora:outline>"]
    assert len(tiny.resolve(prompts, lora_dir=tmp_path).loras) == 2
    with pytest.raises(sdjax.RequestError, match="the same <lora:"):
        tiny.resolve(["a star <lora:outline>", "a ring"], lora_dir=tmp_path)


def test_an_adapter_that_the_folder_lacks_and_one_of_a_negative_prompt_are_left_out(tiny):
    request = tiny.resolve("a star <lora:absent:0.8>", "a ring <lora:outline>", lora_dir=LORAS)
    assert request.loras == ()
    assert request.warnings == (
        "<lora:absent:0.8> is left out: there is no adapter 'absent'",
        "<lora:outline> is left out: an adapter belongs in the prompt, not in the negative prompt",
    )


def test_a_folder_that_is_no_path_is_refused(tiny):
    with pytest.raises(sdjax.RequestError, match="lora_dir must be the folder of adapters, not 3"):
        tiny.resolve("a star", lora_dir=3)
