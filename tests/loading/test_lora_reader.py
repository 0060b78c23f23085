"""Reading LoRA files and folders: what is refused, by which words, and what is never silent."""

import json
import os
import pickle
import warnings
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading import apply_lora, lora_merger, read_lora
from tests.loading.lora_files import (
    ATTENTION,
    TEXT,
    kohya,
    new_diffusers,
    old_diffusers,
    random_layers,
    weights_of,
    write,
)
from tests.loading.tiny_params import tiny_params

PARAMS, XL_PARAMS = tiny_params("sd"), tiny_params("xl")
UNET, ENCODER = {"unet": ATTENTION}, {"text_encoder": TEXT}
NORM = "unet.mid_block.attentions.0.transformer_blocks.0.norm1"
WORDS = "text_encoder.text_model.embeddings.token_embedding"
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def pair(rank=2, channels=32, dtype=np.float32):
    return {
        f"{TO_Q}.lora_A.weight": np.full((rank, channels), 0.5, dtype),
        f"{TO_Q}.lora_B.weight": np.full((channels, rank), 0.5, dtype),
    }


def read(tensors, folder, params=PARAMS, metadata=None):
    return read_lora(write(tensors, folder / "style.safetensors", metadata), params)


@pytest.mark.parametrize("endings", [UNET, ENCODER], ids=["unet", "text encoder"])
@pytest.mark.parametrize("spell", [kohya, old_diffusers, new_diffusers])
def test_files_of_one_component_alone_are_read_without_a_warning(spell, endings, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = read(spell(random_layers(PARAMS, endings)), tmp_path)
    assert {path[0] for path in adapter.changes} == endings.keys()


@pytest.mark.parametrize("name", ["style.v1.5.safetensors", "my style.safetensors", "画風 ü.safetensors", "no_ending"])
def test_any_file_name_is_fine(name, tmp_path):
    assert read_lora(write(pair(), tmp_path / name), PARAMS).changes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_floating_dtype_is_read(dtype, tmp_path):
    adapter = read(pair(dtype=dtype), tmp_path)
    merged = weights_of(apply_lora(PARAMS, [(adapter, 1.0)]))
    np.testing.assert_allclose(merged[TO_Q], weights_of(PARAMS)[TO_Q] + 0.5, atol=1e-5)


@pytest.mark.parametrize("made_for", ["sd", "xl"])
@pytest.mark.parametrize("spell", [lambda x, p: kohya(x, p), lambda x, p: kohya(x), lambda x, p: new_diffusers(x)])
def test_a_file_for_another_base_model_is_refused_with_the_first_misfit_and_its_shapes(made_for, spell, tmp_path):
    own, other = (PARAMS, XL_PARAMS) if made_for == "sd" else (XL_PARAMS, PARAMS)
    layers = random_layers(own, {"unet": ("attn2.to_k", "attn2.to_v")})
    file = write(spell(layers, own if made_for == "xl" else None), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_lora(file, other)
    assert "attn2" in str(error.value)
    assert "other.safetensors" in str(error.value)
    if "no layer" not in str(error.value):
        width = 32 if other is PARAMS else 64
        assert f"{width})" in str(error.value)
        assert "another base model" in str(error.value)


def test_layers_that_the_model_lacks_are_named_in_one_warning(tmp_path):
    extra = {
        "unet.down_blocks.9.conv.lora_A.weight": np.ones((2, 4), np.float32),
        "another.x": np.ones(3, np.float32),
    }
    with pytest.warns(UserWarning, match="no layer for 'another.x', 'unet.down_blocks.9") as caught:
        adapter = read(pair() | extra, tmp_path)
    assert len(caught) == 1
    assert set(adapter.unused) == extra.keys()
    assert len(adapter.changes) == 1


REFUSED = {
    "nothing": ({}, "changes no layer of this model: it is empty"),
    "nothing of this model": ({"foo.lora_A.weight": np.ones((2, 4), np.float32)}, "no layer of this model: .*'foo"),
    "no up": ({k: v for k, v in pair().items() if "lora_A" in k}, "to_q has the parts down, which do not make a LoRA"),
    "alpha alone": ({f"{TO_Q}.alpha": np.float32(1)}, "to_q has the parts alpha alone"),
    "ranks that differ": (pair() | {f"{TO_Q}.lora_A.weight": np.ones((3, 32), np.float32)}, r"\(32, 2\) x \(3, 32\)"),
    "another width": (pair(channels=48), r"factors .* \(48, 2\) x \(2, 48\), and this model's layer is \(32, 32\)"),
    "rank 0": (pair(rank=0), "has no rank"),
    "NaN": (pair() | {f"{TO_Q}.lora_A.weight": np.full((2, 32), np.nan, np.float32)}, "lora_A.weight holds NaN"),
    "infinity": (pair() | {f"{TO_Q}.alpha": np.float32(np.inf)}, "alpha holds NaN or infinity"),
    "integers": (pair() | {f"{TO_Q}.lora_A.weight": np.ones((2, 32), np.int32)}, "dtype int32"),
    "two alphas": (pair() | {f"{TO_Q}.alpha": np.ones(2, np.float32)}, r"alpha of shape \(2,\)"),
    "an unknown part": ({f"{TO_Q}.lambda_layer": np.ones(4, np.float32)}, "lambda_layer is a part of .*not supported"),
    "a bias for a layer without": (
        pair() | {f"{TO_Q}.lora_B.bias": np.ones(32, np.float32)},
        r"to_q has a lora_B\.bias in the file, and no bias in this model",
    ),
    "a difference of a bias for a layer without": (
        {f"{TO_Q}.diff": np.ones((32, 32), np.float32), f"{TO_Q}.diff_b": np.ones(32, np.float32)},
        r"to_q has a diff_b \(or b_norm\) in the file, and no bias in this model",
    ),
    "a difference of another shape": ({f"{TO_Q}.diff": np.ones((32, 16), np.float32)}, r"are \(32, 16\), and this"),
    "a norm of another width": (
        {f"{NORM}.w_norm": np.ones(31, np.float32)},
        r"are \(31,\), and this model's .*\(32,\)",
    ),
    "a LoRA on a norm": (
        {f"{NORM}.lora_A.weight": np.ones((2, 32), np.float32), f"{NORM}.lora_B.weight": np.ones((32, 2), np.float32)},
        "norm1 .*is of another shape",
    ),
    "OFT of another width": ({f"{TO_Q}.oft_blocks": np.ones((2, 4, 4), np.float32)}, r"another shape: .*\(2, 4, 4\)"),
    "OFT that is not square": ({f"{TO_Q}.oft_blocks": np.ones((8, 4, 3), np.float32)}, r"shape \(8, 4, 3\)"),
    "a whole weight": (
        {f"{TO_Q}.weight": np.ones((32, 32), np.float32)},
        "whole weight in the file, and no modules_to",
    ),
    "(IA)^3 of peft without settings": ({f"{TO_Q}.ia3_l": np.ones((32, 1), np.float32)}, "no adapter_config.json"),
    "tokens without settings": (
        {f"{WORDS}.token_adapter.trainable_tokens_delta": np.ones((2, 32), np.float32)},
        "no settings that say which tokens",
    ),
    "DoRA of another width": (
        pair() | {f"{TO_Q}.lora_magnitude_vector": np.ones(31, np.float32)},
        r"magnitudes of shape \(31,\)",
    ),
    "one part twice": (
        pair() | {"lora_unet_" + TO_Q[5:].replace(".", "_") + ".lora_up.weight": np.ones((32, 2), np.float32)},
        "the same part of that layer under another name",
    ),
    "half of LoHa": (
        {f"{TO_Q}.hada_{name}": np.ones((32, 32), np.float32) for name in ("w1_a", "w1_b")},
        "hada_w1_a, hada_w1_b, which do not make",
    ),
    "LoKr of another size": (
        {f"{TO_Q}.lokr_w1": np.ones((4, 4), np.float32), f"{TO_Q}.lokr_w2": np.ones((4, 4), np.float32)},
        r"another shape: .* \(4, 4\) and \(4, 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_fit_is_refused_by_name(case, tmp_path):
    tensors, words = REFUSED[case]
    with pytest.raises(CheckpointError, match=words):
        read(tensors, tmp_path)


def test_files_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "style.pt").write_bytes(pickle.dumps({"weights": 1}))
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    for name, words in (
        ("style.pt", "pickle"),
        ("broken.safetensors", "not a readable"),
        ("absent.safetensors", "no LoRA file or folder"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_lora(tmp_path / name, PARAMS)


def test_folders_are_refused_with_what_they_hold(tmp_path):
    with pytest.raises(CheckpointError, match="has nothing"):
        read_lora(tmp_path, PARAMS)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        read_lora(tmp_path, PARAMS)
    for name in ("a.safetensors", "b.safetensors"):
        write(pair(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors"):
        read_lora(tmp_path, PARAMS)
    write(pair(), tmp_path / "pytorch_lora_weights.safetensors")
    assert read_lora(tmp_path, PARAMS).changes


def peft_folder(folder, config, tensors):
    write(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_a_peft_folder_of_a_text_encoder_is_told_apart_by_its_name(tmp_path):
    layers = random_layers(XL_PARAMS, {"text_encoder_2": TEXT})
    tensors = {
        name.removeprefix("text_encoder_2.text_model."): tensor for name, tensor in new_diffusers(layers).items()
    }
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 4}
    folder = peft_folder(tmp_path / "style" / "text_encoder_2", config, tensors)
    for source in (folder, folder.parent):
        assert {path[0] for path in read_lora(source, XL_PARAMS).changes} == {"text_encoder_2"}
    with pytest.raises(CheckpointError, match="no layer of this model"):
        read_lora(peft_folder(tmp_path / "unknown", config, tensors), XL_PARAMS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "VERA"}, "is a VERA adapter"),
        ({"peft_type": "LORA", "layer_replication": [[0, 4]]}, r"asks for layer_replication \(\[\[0, 4\]\]\)"),
        ({"peft_type": "LORA", "kasa_config": {"beta": 1}}, "asks for kasa_config"),
        ({"peft_type": "LORA", "a_field_of_tomorrow": 3}, r"asks for a_field_of_tomorrow \(3\)"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "next_year"}, "init_lora_weights is 'next_year'"),
        ({"use_dora": True}, "use_dora = True in its settings, and no magnitudes"),
        ({"target_modules": ["to_v"]}, "changes no layer of this model: it holds .*to_q"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x', which should be one layer or a list"),
        ({"use_dora": "yes"}, "use_dora is 'yes', which should be true or false"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
        ({"target_modules": 3}, "target_modules must be a name or a list"),
        ({"target_modules": "("}, "target_modules is no regular expression"),
        ({"lora_alpha": "much"}, "do not give an alpha"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 1}}, "do not give an alpha"),
        ({"lora_alpha": 1, "alpha_pattern": [1]}, "do not give an alpha"),
        ("{", "not JSON"),
        ("[]", "not an object"),
    ],
)
def test_peft_settings_that_are_not_understood_are_refused(config, words, tmp_path):
    tensors = {name.removeprefix("unet."): tensor for name, tensor in pair().items()}
    with pytest.raises(CheckpointError, match=words):
        read_lora(peft_folder(tmp_path, config, tensors), PARAMS)


def test_metadata_that_is_not_understood_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON"):
        read(pair(), tmp_path, metadata={"lora_adapter_metadata": "{"})


PARTS = ("lora_A.weight", "lora_B.weight", "lora_mid.weight", "alpha", "dora_scale", "lora_magnitude_vector", "x", "")
PARTS += (
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "oft_blocks",
    "rescale",
    "weight",
    "bias",
    "on_input",
    "ia3_l",
    "scalar",
)
PARTS += ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "lora_B.bias", "oft_R.weight", "boft_R")
PARTS += ("boft_s", "token_adapter.trainable_tokens_delta", "lora_A.style.weight", "lora_embedding_A")
PARTS += ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
KEYS = st.builds(
    "{}.{}".format,
    st.sampled_from([TO_Q, "unet.mid_block.resnets.0.conv1", NORM, WORDS, "foo"]),
    st.sampled_from(PARTS),
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 20, 32]), max_size=5).map(tuple)
DTYPES = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "U64", "F8_E4M3", "F4", "?"])
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "U64": 8}
METADATA = st.sampled_from(
    [None, {}, {"lora_adapter_metadata": '{"unet.lora_alpha": 3}'}, {"lora_adapter_metadata": "1"}]
)
FEWER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def safetensors_bytes(tensors, metadata):
    """A file as its header says it is, with the same byte throughout."""
    header, end = ({} if metadata is None else {"__metadata__": metadata}), 0
    for name, (dtype, shape, _) in tensors.items():
        size = int(np.prod(shape)) * BYTES.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    packed = json.dumps(header).encode()
    body = b"".join(
        bytes([value]) * (header[name]["data_offsets"][1] - header[name]["data_offsets"][0])
        for name, (_, _, value) in tensors.items()
    )
    return len(packed).to_bytes(8, "little") + packed + body


def right_or_refused(file):
    """Read a file: it is refused in words, or applied to give finite parameters of the same shapes."""
    adapter = None
    with warnings.catch_warnings(), suppress(CheckpointError):
        warnings.simplefilter("ignore", UserWarning)
        adapter = read_lora(file, PARAMS)
    if adapter is None:
        return None
    merged = weights_of(apply_lora(PARAMS, [(adapter, 1.0)]))
    for name, before in weights_of(PARAMS).items():
        assert merged[name].shape == before.shape
    return adapter


@FEWER
@given(st.dictionaries(KEYS, st.tuples(DTYPES, SHAPES, st.sampled_from([0, 60, 127, 255])), max_size=6), METADATA)
def test_random_files_are_right_or_refused(tmp_path, tensors, metadata):
    file = tmp_path / "random.safetensors"
    file.write_bytes(safetensors_bytes(tensors, metadata))
    right_or_refused(file)


@FEWER
@given(st.data())
def test_damaged_files_are_right_or_refused(tmp_path, data):
    intact = write(pair() | {f"{TO_Q}.alpha": np.float32(1)}, tmp_path / "intact.safetensors").read_bytes()
    damaged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 420))] = data.draw(st.integers(0, 255))
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) - 1, 400, 8, 7, 0]))])
    right_or_refused(file)


@FEWER
@given(st.sampled_from([1, 2, 5]), st.sampled_from([None, 0.5, 4.0]), st.sampled_from([np.float16, np.float32]))
def test_right_files_are_what_numpy_makes_of_them(tmp_path, rank, alpha, dtype):
    extra = {} if alpha is None else {f"{TO_Q}.alpha": np.asarray(alpha, dtype)}
    file = write(pair(rank, dtype=dtype) | extra, tmp_path / "right.safetensors")
    merged = weights_of(apply_lora(PARAMS, [(right_or_refused(file), 1.0)]))
    expected = weights_of(PARAMS)[TO_Q] + 0.25 * rank * (1 if alpha is None else alpha / rank)
    np.testing.assert_allclose(merged[TO_Q], expected, atol=1e-5)


def test_a_file_that_is_replaced_in_place_is_read_again(tmp_path):
    merger = lora_merger(PARAMS)

    def merged(loras):
        return merger(loras).params

    file = write(pair(), tmp_path / "style.safetensors")
    first = merged([(file, 1.0)])
    assert merged([(str(file), 1)]) is first
    stat = file.stat()
    write(
        {name: -tensor for name, tensor in pair().items() if "lora_B" in name}
        | {name: tensor for name, tensor in pair().items() if "lora_A" in name},
        file,
    )
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    second = merged([(file, 1.0)])
    before = weights_of(PARAMS)[TO_Q]
    np.testing.assert_allclose(weights_of(first)[TO_Q], before + 0.5, atol=1e-5)
    np.testing.assert_allclose(weights_of(second)[TO_Q], before - 0.5, atol=1e-5)


def test_no_loras_are_the_same_parameters(tmp_path):
    merger = lora_merger(PARAMS)

    def merged(loras):
        return merger(loras).params

    file = write(pair(), tmp_path / "style.safetensors")
    assert merged([]) is PARAMS
    assert merged(()) is PARAMS
    assert merged([(file, 0.0)]) is PARAMS


@pytest.mark.parametrize("loras", [["a.safetensors"], [("a.safetensors",)], [(1, 1.0)], [("a", 1.0, 2)], [None]])
def test_loras_that_are_no_pairs_are_refused(loras):
    with pytest.raises(RequestError, match=r"loras\[0\] must be \(file or folder, weight\)"):
        lora_merger(PARAMS)(loras)


@pytest.mark.parametrize("loras", [None, 1, "a.safetensors", {"a.safetensors": 1.0}])
def test_loras_that_are_no_list_are_refused(loras):
    with pytest.raises(RequestError, match="loras must be a list"):
        lora_merger(PARAMS)(loras)


def test_an_absent_file_is_refused(tmp_path):
    for path in (tmp_path / "absent.safetensors", "bad\0name"):
        with pytest.raises(CheckpointError, match="there is no LoRA file or folder"):
            lora_merger(PARAMS)([(path, 1.0)])
