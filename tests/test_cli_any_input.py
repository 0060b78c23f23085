"""No file and no words give a traceback at the command line: one clear line, or a picture."""

import io
import sys
import unittest.mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load, save

import sdjax
from sdjax import cli

OUTLINE = sdjax.pipeline.BUNDLED_FOLDER / "loras" / "outline.safetensors"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
bounded = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """A function that runs `sdjax generate` and checks how it ends."""
    monkeypatch.setenv("SDJAX_CACHE_DIR", str(tmp_path / "cache"))
    picture = tmp_path / "out.png"

    def run(*arguments):
        picture.unlink(missing_ok=True)
        command = ["sdjax", "generate", "--steps", "1", "--seed", "0", "-q", "-o", str(picture), *arguments]
        with unittest.mock.patch.object(sys, "argv", command), pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        if stop.value.code == 0:
            with Image.open(picture) as drawn:
                drawn.load()
        else:
            assert stop.value.code in (cli.FAILURE, cli.USAGE)
            assert said.err.splitlines()[-1].startswith("sdjax: ")
            assert not picture.exists()
        return stop.value.code, said.err

    return run


@st.composite
def picture_files(draw):
    """A picture file: any mode and size, perhaps cut short or with bytes overwritten, or no picture at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64))
    mode = draw(st.sampled_from(MODES))
    size = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    file = io.BytesIO()
    noise = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, size[::-1], np.uint8)
    made = Image.fromarray(noise)
    made = made.convert("I").convert("I;16") if mode == "I;16" else made.convert(mode)
    kinds = [
        kind
        for kind, modes in {"PNG": "1 L LA P RGB RGBA I;16", "TIFF": " ".join(MODES)}.items()
        if mode in modes.split()
    ]
    made.save(file, draw(st.sampled_from(kinds)))
    data = bytearray(file.getvalue())
    damage = draw(st.sampled_from(["none", "none", "cut", "overwrite"]))
    if damage == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if damage == "overwrite":
        for _ in range(draw(st.integers(1, 8))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@bounded
@given(prompt=st.text(max_size=200).filter(lambda text: not text.startswith("-") and "\0" not in text))
def test_any_words(draw, prompt):
    code, said = draw(prompt)
    assert code == 0, said


@bounded
@given(image=picture_files(), mask=st.none() | picture_files())
def test_any_picture_and_any_mask(draw, tmp_path, image, mask):
    (tmp_path / "image").write_bytes(image)
    given = ["--image", str(tmp_path / "image"), "--size", "64", "--strength", "1"]
    if mask is not None:
        (tmp_path / "mask").write_bytes(mask)
        given += ["--mask", str(tmp_path / "mask")]
    draw("a red circle", *given)


@bounded
@given(data=st.data())
def test_any_adapter(draw, tmp_path, data):
    tensors = load(OUTLINE.read_bytes())
    names = data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=4, unique=True))
    for name in names:
        what = data.draw(st.sampled_from(["dropped", "renamed", "reshaped", "not a number"]))
        tensor = tensors.pop(name)
        match what:
            case "renamed":
                tensors[data.draw(st.text(min_size=1, max_size=40))] = tensor
            case "reshaped":
                tensors[name] = np.zeros(data.draw(st.lists(st.integers(0, 9), max_size=5)), tensor.dtype)
            case "not a number":
                tensors[name] = np.full_like(tensor, data.draw(st.sampled_from([np.nan, np.inf])))
    written = save(tensors)
    if data.draw(st.booleans()):
        written = written[: data.draw(st.integers(0, len(written)))]
    (tmp_path / "adapter.safetensors").write_bytes(written)
    draw("a red circle", "--lora", f"{tmp_path / 'adapter.safetensors'}:{data.draw(st.floats())}")
