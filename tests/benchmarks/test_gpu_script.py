"""The script for a GPU: its order, its clock, and that it runs whole, on a CPU."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.attention import SMALL, measure
from benchmarks.gpu import Part, parts, run
from benchmarks.memory import decoding, load
from sdjax import inputs
from sdjax.pipeline import BUNDLED_FOLDER

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads a peak that other systems don't tell")


def test_pictures_beside_the_peer_come_before_the_parts():
    names = [part.name for part in parts("gpu", list(gpu.PICTURES), ["diffusers-compile"], None, 5)]
    assert names[:5] == ["attention", "picture sd-v1-5", "picture sd-xl", "picture sdxl-turbo", "unet sd-xl, batch 8"]
    assert len(names) == len(set(names))


def test_the_published_step_counts_are_asked_for_in_bfloat16():
    asked = {part.name: part.arguments for part in parts("gpu", list(gpu.PICTURES), ["diffusers-compile"], None, 5)}
    expected = ("picture", "--model", "sd-xl", "--steps", "30", "--peers", "diffusers-compile", "--device", "gpu")
    assert asked["picture sd-xl"] == (*expected, "--dtype", "bfloat16", "--repeats", "5")


def test_a_part_that_takes_too_long_is_ended_and_said_to_be(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(3600)\n", encoding="utf-8")
    told = run(Part("sleep", "sleeper", (), {"PYTHONPATH": str(tmp_path)}), 1.0, tmp_path)
    assert told == {"skipped": "it took longer than the 1 s that were left"}
    assert run(Part("late", "timeit", ()), 0.0, tmp_path) == {"skipped": "no time left"}


def test_a_part_that_fails_leaves_the_others_alone(tmp_path):
    told = run(Part("fails", "benchmarks", ("unet", "--model", "nothing")), 30, tmp_path)
    assert told["skipped"] == "it ended with 2"


def test_what_was_found_is_written_after_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "parts", lambda *_: iter([Part("attention", "benchmarks.attention", ("--device", "cpu"))]))
    file = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--model", "bundled", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text(encoding="utf-8"))["parts"]["attention"]["results"]
    assert result["kernels"]["xla"]["seconds"] > 0
    assert "skipped" in result["kernels"]["cudnn"]


def test_kernels_that_a_device_lacks_are_skipped():
    measured = measure((1, 16, 16, 2, 8), "float32", 1)
    assert set(measured) == {"the models'", "xla", "cudnn"}
    assert SMALL


@ON_LINUX
def test_the_memory_of_loading_is_told_beside_that_of_the_weights():
    plain, stored = (load(BUNDLED_FOLDER, "float32", weights) for weights in (None, "int8"))
    assert plain["parameter_bytes"] > 1.5 * stored["parameter_bytes"]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 256 x 256 instead of 1024 x 1024: the bundled model's attention over those takes minutes on a CPU."""
    monkeypatch.setattr(inputs, "PIXELS_AT_ONCE", 256**2)


def test_tiles_bound_what_a_large_picture_takes_to_decode(small_tiles):
    small, large = (decoding("bundled", size, "float32") for size in (384, 768))
    assert large["whole"]["temporary_bytes"] > 3 * small["whole"]["temporary_bytes"]
    assert large["in tiles"]["temporary_bytes"] < 0.6 * large["whole"]["temporary_bytes"]


@ON_LINUX
def test_a_picture_in_tiles_takes_less_memory_than_a_whole_one(small_tiles):
    found = decoding("bundled", 768, "float32")
    assert 0 < found["in tiles"]["peak_bytes"] < found["whole"]["peak_bytes"]
