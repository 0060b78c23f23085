"""Learned words: the files in use, and what is refused."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sdjax.errors import CheckpointError
from sdjax.loading import read_embedding

SD, XL = (768,), (768, 1280)


def file_of(folder, tensors, name="style.v2 ü.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def vectors(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(768,), (1, 768), (3, 768)])
@pytest.mark.parametrize(("key", "name"), [("emb_params", "style.v2 ü"), ("<cat-toy>", "<cat-toy>")])
def test_a_word_of_one_encoder_has_its_own_name_or_the_files(tmp_path, key, name, shape, dtype):
    learned = vectors(*shape, dtype=dtype)
    word = read_embedding(file_of(tmp_path, {key: learned}), SD)
    assert word.name == name
    assert word.vectors.keys() == {0}
    assert word.vectors[0].dtype == np.float32
    assert np.array_equal(word.vectors[0], learned.reshape(-1, 768).astype(np.float32))


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_word_of_sdxl_has_vectors_for_both_encoders(tmp_path, keys):
    learned = [vectors(2, width) for width in XL]
    word = read_embedding(file_of(tmp_path, dict(zip(keys, learned, strict=True))), XL)
    assert word.name == "style.v2 ü"
    for i, expected in enumerate(learned):
        assert np.array_equal(word.vectors[i], expected)


REFUSED = {
    "a word for SD 1 in SD 2": ({"emb_params": vectors(1, 768)}, (1024,), "width 768, .* width 1024"),
    "a word for SD 1 in SDXL": (
        {"emb_params": vectors(1, 768)},
        XL,
        r"for one text encoder .*\(1, 768\).* has 2 text encoders, of width 768 and 1280",
    ),
    "a word for SDXL in SD 1": (
        {"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)},
        SD,
        r"for 2 text encoders .*\(1, 768\).*\(1, 1280\).* has one text encoder, of width 768",
    ),
    "half of SDXL": ({"clip_g": vectors(1, 1280)}, XL, "should hold .* and has 'clip_g'"),
    "encoders exchanged": (
        {"clip_l": vectors(1, 1280), "clip_g": vectors(1, 768)},
        XL,
        "clip_l has width 1280, .* 768",
    ),
    "counts that differ": ({"clip_l": vectors(1, 768), "clip_g": vectors(2, 1280)}, XL, "1 and 2 vectors"),
    "a LoRA": ({"a.lora_A.weight": vectors(1, 768), "a.lora_B.weight": vectors(768, 1)}, SD, "no textual inversion"),
    "nothing": ({}, SD, "has nothing"),
    "NaN": ({"emb_params": np.full((1, 768), np.nan, np.float32)}, SD, "holds NaN"),
    "integers": ({"emb_params": np.ones((1, 768), np.int32)}, SD, "dtype int32"),
    "a picture": ({"emb_params": vectors(1, 2, 768)}, SD, r"shape \(1, 2, 768\)"),
    "no vectors": ({"emb_params": vectors(0, 768)}, SD, r"shape \(0, 768\)"),
    "a blank name": ({" ": vectors(1, 768)}, SD, "names its word ' '"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_word_that_does_not_fit_is_refused_with_both_sides(tmp_path, case):
    tensors, widths, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        read_embedding(file_of(tmp_path, tensors), widths)


def test_pickles_and_absent_files_are_refused(tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        read_embedding(tmp_path / "learned_embeds.bin", SD)
    with pytest.raises(CheckpointError, match="not a readable"):
        read_embedding(tmp_path / "absent.safetensors", SD)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["emb_params", "clip_l", "clip_g", "text_encoders_0", "x", ""]),
        st.tuples(
            st.lists(st.sampled_from([0, 1, 2, 768, 1280]), max_size=3).filter(lambda s: np.prod(s) < 1e5),
            st.sampled_from([np.float32, np.float16, np.int8, np.bool_]),
        ),
        max_size=3,
    ),
    st.sampled_from([SD, XL, ()]),
)
def test_random_files_are_right_or_refused(tmp_path, tensors, widths):
    made = {name: np.ones(shape, dtype) for name, (shape, dtype) in tensors.items()}
    try:
        word = read_embedding(file_of(tmp_path, made), widths)
    except CheckpointError:
        return
    assert [rows.shape[1] for rows in word.vectors.values()] == list(widths)
