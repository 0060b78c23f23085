"""Folders in diffusers layout: every way in which their files are named, and what is wrong with one is said."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax import CheckpointError
from sdjax.loading import load
from sdjax.pipeline import BUNDLED_FOLDER

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(BUNDLED_FOLDER, tmp_path / "model"))


@pytest.fixture(scope="module")
def bundled():
    return load(BUNDLED_FOLDER, dtype="float32").params


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def rewrite(file, change):
    """Change a JSON file's object."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def rename_tensors(file, rename):
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


# Names of tensors


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(name):
    for new, old in OLD.items():
        if "attentions" in name:
            name = name.replace(f".{new}.", f".{old}.")
    return name


def test_old_and_new_names_of_the_autoencoders_attention_load_alike(folder, bundled):
    file = folder / "vae" / f"{STEM}.safetensors"
    rename_tensors(file, old_name)
    assert any(".proj_attn." in name for name in load_file(file))
    assert same(load(folder, dtype="float32").params, bundled)


def test_a_name_with_a_doubled_prefix_is_an_error_that_names_it(folder):
    rename_tensors(folder / "vae" / f"{STEM}.safetensors", lambda name: name.replace(".to_q.", ".to_to_q."))
    with pytest.raises(CheckpointError, match=r"to_to_q|to_q\.weight"):
        load(folder, dtype="float32")


@pytest.mark.parametrize("missing", ["decoder.conv_in.bias", "encoder.mid_block.attentions.0.to_q.weight"])
def test_a_missing_tensor_is_an_error_that_names_it(missing, folder):
    file = folder / "vae" / f"{STEM}.safetensors"
    tensors = load_file(file)
    del tensors[missing]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        load(folder, dtype="float32")


def test_an_unknown_tensor_is_an_error_that_names_it(folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    save_file(load_file(file) | {"down_blocks.0.gate.weight": np.zeros(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"down_blocks\.0\.gate\.weight"):
        load(folder, dtype="float32")


PASSENGERS = {
    "text_encoder": [
        "text_projection.weight",
        "logit_scale",
        "vision_model.embeddings.class_embedding",
        "vision_model.post_layernorm.weight",
        "visual_projection.weight",
    ],
    "vae": ["loss.logvar", "loss.discriminator.main.0.weight", "model_ema.decay", "global_step"],
    "unet": ["model_ema.num_updates", "global_step", "epoch"],
}


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("component", PASSENGERS)
def test_tensors_that_are_known_to_be_no_part_of_a_model_are_left_out(component, prefixed, folder, bundled):
    stem = "model" if component == "text_encoder" else STEM
    file = folder / component / f"{stem}.safetensors"
    tensors = {name if prefixed else name.removeprefix("text_model."): part for name, part in load_file(file).items()}
    save_file(tensors | {name: np.zeros((2, 3), np.int64) for name in PASSENGERS[component]}, file)
    assert same(load(folder, dtype="float32").params, bundled)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "vision_model.weight"),
        ("unet", "loss"),
        ("vae", "text_projection.weight"),
        ("vae", "losses.weight"),
        ("text_encoder", "text_projection.bias"),
        ("text_encoder", "vision_model"),
    ],
)
def test_a_name_like_theirs_elsewhere_is_an_error_that_names_it(component, name, folder):
    stem = "model" if component == "text_encoder" else STEM
    file = folder / component / f"{stem}.safetensors"
    save_file(load_file(file) | {name: np.zeros(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(folder, dtype="float32")


def test_a_whole_clip_in_the_text_encoder_s_folder_gives_its_text_model(folder, bundled):
    component = folder / "text_encoder"
    config = json.loads((component / "config.json").read_text())
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": config, "vision_config": {}}
    (component / "config.json").write_text(json.dumps(whole))
    beside = {name: np.zeros(3, np.float32) for name in PASSENGERS["text_encoder"]}
    save_file(load_file(component / "model.safetensors") | beside, component / "model.safetensors")
    assert same(load(folder, dtype="float32").params, bundled)


def test_the_index_decides_whether_a_text_encoder_projects_as_in_diffusers(folder, bundled):
    rewrite(
        folder / "text_encoder" / "config.json",
        lambda config: {**config, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 8},
    )
    assert same(load(folder, dtype="float32").params, bundled)


@pytest.mark.parametrize("prefixed", [True, False])
def test_text_encoders_of_old_and_new_transformers_load_alike(prefixed, folder, bundled):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {
        ("text_model." if prefixed else "") + n.removeprefix("text_model."): t for n, t in load_file(file).items()
    }
    position_ids = ("text_model." if prefixed else "") + "embeddings.position_ids"
    save_file(tensors | {position_ids: np.arange(77)[None]}, file)
    assert same(load(folder, dtype="float32").params, bundled)


# Shards, variants and stale duplicates


INDEXES = {
    None: [f"{STEM}.safetensors.index.json"],
    "fp16": [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16.safetensors.index.json"],
}
SHARDS = {
    None: [f"{STEM}-0000{{}}-of-00002.safetensors"],
    "fp16": [f"{STEM}.fp16-0000{{}}-of-00002.safetensors", f"{STEM}-0000{{}}-of-00002.fp16.safetensors"],
}


def shard(folder, *, index, shards, keep_single=False):
    """Split a UNet in two, as accelerate does."""
    single = folder / "unet" / f"{STEM}.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    halves = {shards.format(1): names[::2], shards.format(2): names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / "unet" / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not keep_single:
        single.unlink()
    return halves


def rename_to_variant(folder, variant):
    """Give the other weight files a variant's name."""
    for name in ("vae", "text_encoder"):
        (file,) = (folder / name).glob("*.safetensors")
        file.rename(file.with_suffix(f".{variant}.safetensors"))


@pytest.mark.parametrize(
    ("variant", "index", "shards"),
    [(variant, index, shards) for variant in INDEXES for index in INDEXES[variant] for shards in SHARDS[variant]],
)
def test_shards_load_as_the_whole(variant, index, shards, folder, bundled):
    shard(folder, index=index, shards=shards)
    if variant:
        rename_to_variant(folder, variant)
    assert same(load(folder, dtype="float32", variant=variant).params, bundled)


def test_an_index_wins_over_a_stale_whole_file(folder, bundled):
    shard(folder, index=INDEXES[None][0], shards=SHARDS[None][0], keep_single=True)
    single = folder / "unet" / f"{STEM}.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(single).items()}, single)
    assert same(load(folder, dtype="float32").params, bundled)


def test_a_deleted_shard_is_an_error_that_names_it(folder):
    halves = shard(folder, index=INDEXES[None][0], shards=SHARDS[None][0])
    _, second = halves
    (folder / "unet" / second).unlink()
    with pytest.raises(CheckpointError, match=second):
        load(folder, dtype="float32")


def test_a_tensor_that_the_index_names_and_no_shard_has_is_an_error(folder):
    shard(folder, index=INDEXES[None][0], shards=SHARDS[None][0])
    second = folder / "unet" / SHARDS[None][0].format(2)
    tensors = load_file(second)
    del tensors[gone := sorted(tensors)[0]]
    save_file(tensors, second)
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        load(folder, dtype="float32")


@pytest.mark.parametrize("contents", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_an_error(contents, folder):
    (folder / "unet" / f"{STEM}.safetensors.index.json").write_text(contents)
    with pytest.raises(CheckpointError, match="is not an index of shards"):
        load(folder, dtype="float32")


def test_of_two_sets_the_one_that_was_asked_for_is_read(folder, bundled):
    for name in ("unet", "vae", "text_encoder"):
        (file,) = (folder / name).glob("*.safetensors")
        half = {key: (tensor / 2).astype(np.float16) for key, tensor in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"))
    assert same(load(folder, dtype="float32").params, bundled)
    halved = jax.tree.map(lambda x: (np.asarray(x) / 2).astype(np.float16).astype(np.float32), bundled)
    assert same(load(folder, dtype="float32", variant="fp16").params, halved)


def test_a_folder_with_a_variant_only_says_how_to_ask_for_it(folder):
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match='variant="fp16"'):
        load(folder, dtype="float32")


def test_a_variant_that_is_not_there_is_an_error(folder):
    with pytest.raises(CheckpointError, match=r"lacks \S+\.fp16\.safetensors.*variant=None"):
        load(folder, dtype="float32", variant="fp16")


def test_a_folder_with_pickles_only_says_so(folder):
    (file,) = (folder / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"in diffusion_pytorch_model\.bin only: reading a pickle runs"):
        load(folder, dtype="float32")


def test_a_pickle_beside_the_weights_is_not_looked_at(folder, bundled):
    (folder / "unet" / f"{STEM}.bin").write_bytes(b"not a pickle")
    assert same(load(folder, dtype="float32").params, bundled)


# Absent components


def test_a_refiner_has_its_second_text_encoder_alone(layouts):
    both = layouts("refiner")
    checkpoint = load(both.folder, dtype="float32")
    assert [name for name, _ in checkpoint.definition.text_encoders] == ["text_encoder_2"]
    ids = [sdjax.prompts.tokenize(words, ["a fox"]) for words in checkpoint.tokenizers]
    text = sdjax.pipeline.encode_prompt(checkpoint.definition, checkpoint.params, ids)
    assert text.context.shape == (1, 77, 128)
    assert text.pooled.shape == (1, 128)


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("listed", [[None, None], None])
def test_a_folder_without_denoiser_or_autoencoder_is_refused_in_a_sentence(name, listed, folder):
    rewrite(folder / "model_index.json", lambda index: index | {name: listed})
    with pytest.raises(CheckpointError, match=f"has no {name}: its model_index.json lists"):
        load(folder, dtype="float32")


def test_a_folder_without_any_text_encoder_is_refused_in_a_sentence(folder):
    rewrite(folder / "model_index.json", lambda index: index | {"text_encoder": [None, None]})
    with pytest.raises(CheckpointError, match="has no text encoder"):
        load(folder, dtype="float32")


def test_a_safety_checker_is_neither_needed_nor_loaded(folder, bundled):
    rewrite(folder / "model_index.json", lambda index: index | {"safety_checker": [None, None]})
    assert same(load(folder, dtype="float32").params, bundled)
    rewrite(folder / "model_index.json", lambda index: index | {"safety_checker": ["stable_diffusion", "X"]})
    assert same(load(folder, dtype="float32").params, bundled)


@pytest.mark.parametrize("gone", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_a_missing_file_is_an_error_that_names_it(gone, folder):
    (folder / gone).unlink()
    with pytest.raises(CheckpointError, match=Path(gone).name.replace(".", r"\.")):
        load(folder, dtype="float32")


def test_a_folder_of_something_else_says_what_is_missing(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        load(folder / "unet", dtype="float32")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "v1-5.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"give its own path, such as .*v1-5\.safetensors"):
        load(tmp_path / "downloads", dtype="float32")


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize("contents", ["{", "[]", "null"])
def test_broken_json_is_an_error_that_names_the_file(file, contents, folder):
    (folder / file).write_text(contents)
    with pytest.raises(CheckpointError, match=Path(file).name.replace(".", r"\.")):
        load(folder, dtype="float32")


# Configs that do not fit


@pytest.mark.parametrize("key", ["attention_head_dim", "num_attention_heads", "transformer_layers_per_block"])
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_list_of_another_length_than_the_blocks_is_refused(key, extra, folder):
    def change(config):
        return config | {key: [1] * (len(config["block_out_channels"]) + extra)}

    rewrite(folder / "unet/config.json", change)
    with pytest.raises(CheckpointError, match=f"{key} has .* entries"):
        load(folder, dtype="float32")


def test_layers_per_block_of_another_length_than_the_blocks_is_refused(folder):
    rewrite(folder / "unet/config.json", lambda config: config | {"layers_per_block": [1] * 7})
    with pytest.raises(CheckpointError, match=r"layers_per_block has 7 entries"):
        load(folder, dtype="float32")


def test_a_projection_of_another_width_names_both_numbers(layouts, tmp_path):
    folder = shutil.copytree(layouts("sdxl").folder, tmp_path / "xl")
    rewrite(folder / "text_encoder_2/config.json", lambda config: config | {"projection_dim": 96})
    with pytest.raises(CheckpointError, match=r"projection_dim is 96 in its config, and 128 in model\.safetensors"):
        load(folder, dtype="float32")


def test_a_text_encoder_of_another_width_names_both_numbers(folder):
    rewrite(folder / "unet/config.json", lambda config: config | {"cross_attention_dim": 999})
    width = json.loads((folder / "text_encoder/config.json").read_text())["hidden_size"]
    with pytest.raises(CheckpointError, match=rf"cross_attention_dim is 999, and the text encoders give {width}"):
        load(folder, dtype="float32")


def test_an_unet_with_other_inputs_is_refused_with_the_number(folder):
    rewrite(folder / "unet/config.json", lambda config: config | {"in_channels": 8})
    with pytest.raises(CheckpointError, match="in_channels is 8, and only 4"):
        load(folder, dtype="float32")


def test_a_tensor_of_another_shape_names_both_shapes(folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"] = np.zeros(5, np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias has shape \(5,\), and its config asks for \(4,\)"):
        load(folder, dtype="float32")


def test_a_tokenizer_with_more_words_than_the_encoder_has_rows_is_refused(folder):
    rewrite(folder / "tokenizer/vocab.json", lambda vocab: vocab | {"zzzz</w>": len(vocab)})
    with pytest.raises(CheckpointError, match=r"has embeddings for \d+ tokens, its tokenizer has \d+"):
        load(folder, dtype="float32")


# Dtypes


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_parameters_are_the_files_tensors_under_their_own_names(component, folder):
    stored = load_file(folder / component / f"{STEM}.safetensors")
    params = load(folder, dtype="float32").params[component]
    loaded = {".".join(map(str, path)): leaf for path, leaf in flatten_dict(params).items()}
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(loaded[name], tensor)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_to_the_dtype_that_was_asked_for(stored, asked, folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    tensors = {name: tensor.astype(stored) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    params = load(folder, dtype=asked).params["unet"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {asked}
    assert np.array_equal(params["conv_in"]["bias"], tensors["conv_in.bias"].astype(asked))
    assert np.array_equal(params["conv_in"]["weight"], tensors["conv_in.weight"].astype(asked))


@pytest.mark.parametrize("stored", [np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_numbers_beyond_float16_are_refused_rather_than_made_infinite(stored, folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = np.full(tensors["conv_in.bias"].shape, 1e5, stored)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias holds numbers that are too large for float16"):
        load(folder, dtype="float16")
    assert float(load(folder, dtype="bfloat16").params["unet"]["conv_in"]["bias"][0]) == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("stored", [np.int8, ml_dtypes.float8_e4m3fn], ids=["I8", "F8_E4M3"])
def test_quantized_weights_are_refused_by_name(stored, folder):
    file = folder / "unet" / f"{STEM}.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] = np.zeros(tensors["conv_in.bias"].shape, stored)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias is stored as (I8|F8_E4M3)"):
        load(folder, dtype="float32")


def test_parameters_can_not_be_assigned(bundled):
    with pytest.raises((TypeError, ValueError)):
        bundled["unet"]["conv_in"]["bias"] = 0
