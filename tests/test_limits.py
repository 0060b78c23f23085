"""Limits stand in one place, from which the library, the command line, the server and the README have them."""

import re
from pathlib import Path

import pytest

import sdjax
from sdjax import limits
from sdjax.serve.schemas import ImageGeneration
from sdjax.variants import VARIANTS

README = Path(__file__).parent.parent / "README.md"
FIELDS = ImageGeneration.model_json_schema()["properties"]


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


def job(name):
    return FIELDS[name]["anyOf"][0]


def test_a_job_has_the_limits_that_stand_in_one_place():
    assert (job("steps")["minimum"], job("steps")["maximum"]) == (1, limits.JOB_STEPS)
    assert job("preview_every")["maximum"] == limits.JOB_STEPS
    assert job("seed")["maximum"] == limits.LAST_SEED
    for side in ("width", "height"):
        assert (job(side)["multipleOf"], job(side)["maximum"]) == (limits.JOB_MULTIPLE, limits.MAX_SIDE)
    assert job("guidance_scale")["maximum"] == limits.JOB_GUIDANCE
    assert job("num_images")["maximum"] == limits.JOB_IMAGES
    assert job("loras")["maxItems"] == limits.JOB_LORAS


def test_the_library_takes_every_job_and_goes_as_far_as_its_model(pipe):
    most = pipe.checkpoint.scheduler.num_train_timesteps
    assert most > limits.JOB_STEPS
    assert pipe.resolve("a", steps=most).steps == most
    with pytest.raises(sdjax.RequestError, match=f"from 1 to {most}, not {most + 1}"):
        pipe.resolve("a", steps=most + 1)
    assert limits.JOB_MULTIPLE % pipe.definition.vae_config.factor == 0
    assert pipe.resolve("a", width=limits.MAX_SIDE, tiling=True).settings["width"] == limits.MAX_SIDE
    with pytest.raises(sdjax.RequestError, match=f"to {limits.MAX_SIDE}, not {limits.MAX_SIDE + 8}"):
        pipe.resolve("a", width=limits.MAX_SIDE + 8)


def test_the_readme_has_these_limits(pipe):
    rows = dict(
        re.findall(r"^\| ([^|]+) \| ([^\n]+) \|$", README.read_text(encoding="utf-8").replace(",", ""), re.MULTILINE)
    )
    found = {name: [int(number) for number in re.findall(r"-?\d+", cells)] for name, cells in rows.items()}
    most, factor = pipe.checkpoint.scheduler.num_train_timesteps, pipe.definition.vae_config.factor
    assert found["steps"] == [most, limits.JOB_STEPS]
    side = limits.MAX_SIDE
    assert found["width height"] == [8, factor, side, limits.JOB_MULTIPLE, limits.JOB_LEAST_SIDE, side]
    assert found["guidance scale"] == [0, limits.JOB_GUIDANCE]
    assert found["pictures of a prompt LoRAs"] == [limits.JOB_IMAGES] == [limits.JOB_LORAS]
    assert found["weight of a LoRA"] == [-limits.JOB_LORA_WEIGHT, limits.JOB_LORA_WEIGHT]


def test_a_name_means_the_published_checkpoint_of_that_name():
    assert VARIANTS["sd-turbo"].source == "stabilityai/sd-turbo"
    assert VARIANTS["sdxl-turbo"].source == "stabilityai/sdxl-turbo"
