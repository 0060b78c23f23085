"""What a worker says of its model, by the names that the original worker has for published checkpoints."""

from dataclasses import replace

import pytest

import sdjax
from sdjax.serve.problems import ProblemError
from sdjax.serve.queue import resolved
from sdjax.serve.schemas import ImageGeneration
from sdjax.serve.served import SD_VERSIONS, served_model
from sdjax.variants import VARIANTS
from tests.native import SIDE


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


def test_the_bundled_model_has_its_own_defaults(pipe):
    served = served_model(pipe, None)
    assert (served.name, served.steps, served.guidance_scale) == ("tiny", 20, 3.0)
    assert (served.size, served.least_side, served.sampler) == (SIDE, SIDE, "ddim")
    assert not served.needs_mask


@pytest.mark.parametrize("version", SD_VERSIONS)
def test_a_version_has_its_defaults_and_answers_to_all_its_names(pipe, version):
    served = served_model(pipe, version)
    variant = VARIANTS[SD_VERSIONS[version]]
    assert served.name == version
    assert {version, SD_VERSIONS[version], variant.source} <= served.aliases
    expected = (4, 0.0) if version == "turbo" else (20, 7.5)
    assert (served.steps, served.guidance_scale) == expected


def test_turbo_is_sdxl_turbo_as_in_the_original_worker(pipe):
    served = served_model(pipe, "turbo")
    assert {"turbo", "sdxl-turbo", "stabilityai/sdxl-turbo"} <= served.aliases
    assert "sd-turbo" not in served.aliases


def test_an_adapter_whose_words_can_t_be_read_is_named_as_the_client_named_it(pipe, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"not a header")
    asked = {"operation": "image_generation", "prompt": "a star", "loras": [{"path": "style.safetensors"}]}
    with pytest.raises(ProblemError) as refused:
        resolved(ImageGeneration(**asked), served_model(pipe, None), {}, tmp_path)
    assert (refused.value.status, refused.value.field) == (422, "loras")
    assert "style.safetensors is not a readable safetensors file" in refused.value.message
    assert str(tmp_path) not in str(vars(refused.value))


def test_a_sampler_that_takes_the_place_of_the_models_own_is_in_the_jobs_warnings(pipe):
    scheduler = replace(pipe.checkpoint.scheduler, class_name="IPNDMScheduler")
    served = served_model(sdjax.Pipeline(replace(pipe.checkpoint, scheduler=scheduler), name="other"), None)
    wanted = ImageGeneration(operation="image_generation", prompt="a star")
    request, _ = resolved(wanted, served, {}, None)
    assert request["sampler"] == "ddim"
    assert "IPNDMScheduler" in request["warnings"][0]
    request, _ = resolved(wanted.model_copy(update={"sampler": "euler"}), served, {}, None)
    assert request["warnings"] == []
