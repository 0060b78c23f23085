"""One file in the original layout is the folder that it was made from: the same arrays, the same pictures."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from originals import FAMILIES, WORDS, tokenizer
from safetensors.torch import save_file

import sdjax
from sdjax import CheckpointError
from sdjax.loading import load
from sdjax.loading.folder import read_folder
from sdjax.loading.saving import tensors_of
from sdjax.loading.single_file import read_file
from sdjax.loading.tokenizer import published_tokenizer
from sdjax.schedulers import SchedulerConfig, table

NAMES = tuple(FAMILIES)


def same(left, right):
    """Whether two trees of parameters hold the same names and, bit for bit, the same numbers."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def saved(tensors, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def scheduler(parts):
    """What a checkpoint's parts say about its noise."""
    return SchedulerConfig.from_dict(parts.configs["scheduler"])


def changed_table(folder, **changes):
    """Ten DDIM steps of the folder's scheduler with some keys of its config changed."""
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    return table("ddim", SchedulerConfig.from_dict({**config, **changes}), 10)


@pytest.mark.parametrize("name", NAMES)
def test_file_and_folder_hold_the_same_model(name, layouts, loaded):
    both = layouts(name)
    folder, file = load(both.folder, dtype="float32"), loaded(name)
    assert file.definition == folder.definition
    assert same(file.params, folder.params)
    for sampler in ("ddim", "euler", "dpmpp_2m"):
        mine, theirs = (table(sampler, checkpoint.scheduler, 7) for checkpoint in (file, folder))
        assert same(mine, theirs)
    assert file.scheduler.class_name == folder.scheduler.class_name
    for mine, theirs in zip(file.tokenizers, folder.tokenizers, strict=True):
        assert (mine.start, mine.end, mine.pad, mine.length) == (theirs.start, theirs.end, theirs.pad, theirs.length)
        assert mine.words("a Photo, of: 3 cats!") == theirs.words("a Photo, of: 3 cats!")


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_file_and_folder_draw_the_same_latents(name, layouts):
    both = layouts(name)
    drawn = [
        sdjax.Pipeline.from_pretrained(path)(
            "a red fox", steps=2, width=64, height=64, seed=1, guidance_scale=3.0, output="latents"
        ).images
        for path in (both.folder, both.file)
    ]
    assert np.array_equal(*drawn)
    assert np.isfinite(drawn[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_same_weights_from_the_file(name, layouts, loaded):
    both, family = layouts(name), FAMILIES[name]
    pipe = diffusers.DiffusionPipeline.from_pretrained(both.folder)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(both.tensors), config=dict(pipe.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(both.tensors), config=dict(pipe.vae.config))
    checkpoint = loaded(name)
    for part, theirs in (("unet", unet), ("vae", vae)):
        mine = tensors_of(checkpoint.params[part])
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(mine[key].reshape(theirs[key].shape), theirs[key]) for key in mine)
    if family.open_clip and family.is_xl:
        theirs = single_file_utils.convert_open_clip_checkpoint(pipe.text_encoder_2, both.tensors, family.open_clip)
        mine = tensors_of(checkpoint.params["text_encoder_2"])
        assert {key.removeprefix("text_model.") for key in mine} <= {key.removeprefix("text_model.") for key in theirs}
        projection = next(tensor for key, tensor in theirs.items() if key.endswith("text_projection.weight"))
        assert not np.allclose(projection, projection.T, atol=0.1)
        assert np.array_equal(mine["text_projection.weight"], projection)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_diffusers_own_single_file_loader_agrees_about_the_text(name, layouts):
    """Text embeddings of diffusers' `from_single_file`, which is given the folder's configs."""
    both = layouts(name)
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    reference = kind.from_single_file(str(both.file), config=str(both.folder), local_files_only=True)
    pipe = sdjax.Pipeline.from_pretrained(both.file)
    prompts = ["a red fox, sitting!", ""]
    ids = [sdjax.prompts.tokenize(words, prompts) for words in pipe.checkpoint.tokenizers]
    text = sdjax.pipeline.encode_prompt(pipe.definition, pipe.params, ids)
    with torch.no_grad():
        if name == "sdxl":
            context, _, pooled, _ = reference.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
            np.testing.assert_allclose(text.pooled, pooled, atol=1e-4, rtol=0)
        else:
            context = reference.encode_prompt(prompts, "cpu", 1, False)[0]
    np.testing.assert_allclose(text.context, context, atol=1e-4, rtol=0)


# What the network predicts


@pytest.mark.parametrize(
    ("markers", "metadata", "changes"),
    [
        (("v_pred",), None, {"prediction_type": "v_prediction"}),
        (("v_pred", "ztsnr"), None, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ((), {"prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.predict_key": "epsilon"}, {"prediction_type": "epsilon"}),
        (("v_pred",), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
    ],
)
def test_a_file_may_say_what_it_predicts(markers, metadata, changes, layouts, tmp_path):
    both = layouts("sdxl")
    tensors = both.tensors | {marker: torch.zeros(0) for marker in markers}
    parts = read_file(saved(tensors, tmp_path / "v.safetensors", metadata), prediction_type=None)
    expected = changed_table(both.folder, **changes)
    assert same(table("ddim", scheduler(parts), 10), expected)


def test_a_marked_file_draws_what_the_folder_with_that_scheduler_draws(layouts, tmp_path):
    both = layouts("sdxl")
    file = saved(both.tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    folder = shutil.copytree(both.folder, tmp_path / "folder")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    arguments = {"steps": 2, "width": 64, "height": 64, "seed": 3, "sampler": "ddim", "output": "latents"}
    drawn = [sdjax.Pipeline.from_pretrained(path)("a fox", **arguments).images for path in (file, folder)]
    assert np.array_equal(*drawn)
    plain = sdjax.Pipeline.from_pretrained(both.file)("a fox", **arguments).images
    assert np.abs(plain - drawn[0]).max() > 0.1


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("wanted", ["epsilon", "v_prediction", "sample"])
def test_the_caller_has_the_last_word(name, wanted, layouts, tmp_path):
    both = layouts(name)
    marked = saved(both.tensors | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors", {"prediction_type": "v"})
    assert scheduler(read_folder(both.folder, variant=None, prediction_type=wanted)).prediction_type == wanted
    for path in (both.file, marked):
        assert scheduler(read_file(path, prediction_type=wanted)).prediction_type == wanted


def test_the_callers_word_beats_a_key_that_the_config_lists_as_default(layouts, tmp_path):
    folder = shutil.copytree(layouts("sd1").folder, tmp_path / "folder")
    file = folder / "scheduler/scheduler_config.json"
    listed = {"_use_default_values": ["prediction_type", "timestep_spacing"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | listed))
    parts = read_folder(folder, variant=None, prediction_type="v_prediction")
    assert scheduler(parts).prediction_type == "v_prediction"


def test_an_unknown_prediction_type_is_refused(layouts):
    with pytest.raises(sdjax.RequestError, match=r"'epsilon', 'v_prediction', 'sample' or None, not 'v'"):
        sdjax.Pipeline.from_pretrained(layouts("sd1").file, prediction_type="v")


def test_sd2_is_a_v_model_of_768_pixels_unless_told_otherwise(layouts, tmp_path, loaded):
    both = layouts("sd2")
    assert loaded("sd2").scheduler.prediction_type == "v_prediction"
    base = saved(both.tensors, tmp_path / "base.safetensors", {"modelspec.prediction_type": "epsilon"})
    for path, override in ((base, None), (both.file, "epsilon")):
        parts = read_file(path, prediction_type=override)
        assert scheduler(parts).prediction_type == "epsilon"
        assert parts.configs["unet"]["sample_size"] == 64
    assert loaded("sd2-inpaint").scheduler.prediction_type == "epsilon"


def test_a_file_that_contradicts_itself_is_refused_unless_the_caller_decides(layouts, tmp_path):
    tensors = layouts("sd1").tensors | {"v_pred": torch.zeros(0)}
    file = saved(tensors, tmp_path / "both.safetensors", {"prediction_type": "epsilon"})
    with pytest.raises(CheckpointError, match=r"contradicts itself: .*'v_pred' says v_prediction.*says epsilon"):
        load(file, dtype="float32")
    assert scheduler(read_file(file, prediction_type="epsilon")).prediction_type == "epsilon"


def test_zero_snr_without_v_prediction_is_refused(layouts, tmp_path):
    file = saved(layouts("sd1").tensors | {"ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match="rescale_betas_zero_snr needs prediction_type 'v_prediction'"):
        load(file, dtype="float32")


def test_metadata_that_means_nothing_is_refused(layouts, tmp_path):
    file = saved(layouts("sd1").tensors, tmp_path / "x.safetensors", {"prediction_type": "flow"})
    with pytest.raises(CheckpointError, match=r"prediction_type = 'flow'.*say what it predicts"):
        load(file, dtype="float32")


@pytest.mark.parametrize(("name", "scale"), [("sd1", 0.18215), ("sd2", 0.18215), ("sdxl", 0.13025)])
def test_latents_are_scaled_as_their_family_was_trained(name, scale, loaded):
    assert loaded(name).definition.vae_config.scaling_factor == scale


# Names

OLD_VAE = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
NEW_VAE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def respelled(tensors, spelling):
    """The attention of the autoencoder under other names, as matrices."""
    found = {}
    for name, tensor in tensors.items():
        prefix, attention, rest = name.partition("mid.attn_1.")
        if attention:
            layer, _, leaf = rest.rpartition(".")
            name = f"{prefix}{attention}{spelling.get(layer, layer)}.{leaf}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        found[name] = tensor
    return found


@pytest.mark.parametrize("spelling", [OLD_VAE, NEW_VAE], ids=["old", "new"])
def test_both_generations_of_attention_names_load(spelling, layouts, tmp_path, loaded):
    both = layouts("sd1")
    tensors = respelled(both.tensors, spelling)
    assert tensors.keys() != both.tensors.keys()
    file = saved(tensors, tmp_path / "names.safetensors")
    assert same(load(file, dtype="float32").params, loaded(both.name).params)


def test_an_attention_name_with_a_doubled_prefix_is_an_error_that_names_it(layouts, tmp_path):
    file = saved(respelled(layouts("sd1").tensors, {"q": "to_to_q"}), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"first_stage_model\.\w+\.mid\.attn_1\.to_to_q"):
        load(file, dtype="float32")


def test_two_names_for_one_tensor_are_refused(layouts, tmp_path):
    tensors = layouts("sd1").tensors
    name = "first_stage_model.encoder.mid.attn_1."
    file = saved(tensors | {f"{name}to_q.bias": tensors[f"{name}q.bias"].clone()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="two names for one tensor"):
        load(file, dtype="float32")


def test_what_training_left_in_the_file_is_ignored(layouts, tmp_path, loaded):
    both = layouts("sdxl")
    left = {
        "model_ema.decay": torch.tensor(0.999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.randn(4),
        "betas": torch.rand(1000),
        "alphas_cumprod": torch.rand(1000),
        "sqrt_recipm1_alphas_cumprod": torch.rand(1000),
        "denoiser.sigmas": torch.rand(1000),
        "first_stage_model.loss.discriminator.main.0.weight": torch.rand(8),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.transformer.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.0.transformer.text_projection.weight": torch.rand(64, 64),
        "conditioner.embedders.1.model.attn_mask": torch.rand(77, 77),
        "conditioner.embedders.0.transformer.vision_model.embeddings.class_embedding": torch.rand(8),
        "conditioner.embedders.0.transformer.visual_projection.weight": torch.rand(8, 8),
        "conditioner.embedders.1.model.visual.proj": torch.rand(8, 8),
        "first_stage_model.model_ema.decay": torch.tensor(0.999),
        "global_step": torch.tensor(470000),
        "epoch": torch.tensor(7),
        "lvlb_weights": torch.rand(1000),
        "scale_factor": torch.tensor(0.13025),
        "loss.logvar": torch.rand(1000),
    }
    file = saved(both.tensors | left, tmp_path / "trained.safetensors")
    assert same(load(file, dtype="float32").params, loaded(both.name).params)


def test_words_that_a_file_has_no_names_for_are_a_warning(layouts, tmp_path):
    tensors = dict(layouts("sd1").tensors)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones(2, tensors[name].shape[1])])
    with pytest.warns(UserWarning, match="text_encoder has 49410 words, and only the 49408 of CLIP's vocabulary"):
        checkpoint = load(saved(tensors, tmp_path / "learned.safetensors"), dtype="float32")
    assert checkpoint.params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["weight"].shape[0] == 49410


def test_another_scale_of_latents_in_the_file_is_a_warning_and_not_used_as_in_diffusers(layouts, tmp_path, loaded):
    file = saved(layouts("sd1").tensors | {"scale_factor": torch.tensor(0.2)}, tmp_path / "trained.safetensors")
    with pytest.warns(UserWarning, match=r"\(SD 1\) holds scale_factor = 0\.2, which is not used: .* 0\.18215"):
        checkpoint = load(file, dtype="float32")
    assert checkpoint.definition.vae_config.scaling_factor == 0.18215
    assert same(checkpoint.params, loaded("sd1").params)
    file = saved(layouts("sd1").tensors | {"scale_factor": torch.rand(3)}, tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError, match=r"scale_factor is F32 of shape \(3,\)"):
        load(file, dtype="float32")


@pytest.mark.parametrize(
    "name",
    [
        "control_model.input_blocks.0.0.weight",
        "edm_vpred.sigma_max",
        "model.diffusion_model.input_blocks.1.0.in_layers.1.weight",
        "model.diffusion_model.input_blocks.1.2.weight",
        "model.diffusion_model.label_emb.weight",
        "first_stage_model.encoder.down.0.attn.0.q.weight",
        "conditioner.embedders.0.transformer.vision_models.weight",
        "conditioner.embedders.1.model.visuals.proj",
        "global_steps",
        "loss",
        "conditioner.embedders.2.model.weight",
    ],
)
def test_an_unknown_tensor_is_an_error_that_names_it(name, layouts, tmp_path):
    file = saved(layouts("sdxl").tensors | {name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(file, dtype="float32")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.diffusion_model.out.2.bias", r"conv_out\.bias"),
        ("model.diffusion_model.middle_block.0.in_layers.0.weight", r"mid_block\.resnets\.0\.norm1\.weight"),
        ("model.diffusion_model.input_blocks.0.0.weight", r"input_blocks\.0\.0\.weight"),
        ("first_stage_model.decoder.mid.attn_1.v.weight", r"decoder\.mid_block\.attentions\.0\.to_v\.weight"),
        ("conditioner.embedders.1.model.text_projection", "text_projection"),
        ("conditioner.embedders.1.model.ln_final.bias", r"final_layer_norm\.bias"),
        ("conditioner.embedders.1.model.positional_embedding", r"position_embedding\.weight"),
        (
            "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias",
            r"layers\.1\.self_attn\.q_proj\.bias",
        ),
    ],
)
def test_a_missing_tensor_is_an_error_that_names_it(name, said, layouts, tmp_path):
    tensors = dict(layouts("sdxl").tensors)
    del tensors[name]
    with pytest.raises(CheckpointError, match=said):
        load(saved(tensors, tmp_path / "x.safetensors"), dtype="float32")


def test_the_projection_may_be_spelled_as_a_linear_layer(layouts, tmp_path, loaded):
    both = layouts("sdxl")
    tensors = dict(both.tensors)
    bare = tensors.pop("conditioner.embedders.1.model.text_projection")
    tensors["conditioner.embedders.1.model.text_projection.weight"] = bare.T.contiguous()
    file = saved(tensors, tmp_path / "linear.safetensors")
    assert same(load(file, dtype="float32").params, loaded(both.name).params)


def test_sd2_that_was_converted_from_a_folder_has_no_spare_layer_to_drop(layouts, tmp_path, loaded):
    both = layouts("sd2")
    spare = "cond_stage_model.model.transformer.resblocks.3."
    unread = (spare, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale")
    tensors = {name: tensor for name, tensor in both.tensors.items() if not name.startswith(unread)}
    file = saved(tensors, tmp_path / "converted.safetensors")
    assert same(load(file, dtype="float32").params, loaded(both.name).params)


def test_text_names_without_their_middle_part_load(layouts, tmp_path, loaded):
    both = layouts("sd1")
    tensors = {name.replace(".text_model.", "."): tensor for name, tensor in both.tensors.items()}
    file = saved(tensors, tmp_path / "short.safetensors")
    assert same(load(file, dtype="float32").params, loaded(both.name).params)


def test_half_precision_file_gives_its_own_numbers_in_float32(layouts, tmp_path, loaded):
    both = layouts("sd1")
    file = saved({name: tensor.half() for name, tensor in both.tensors.items()}, tmp_path / "half.safetensors")
    full, half = loaded("sd1").params, load(file, dtype="float32").params
    expected = jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), full)
    assert same(half, expected)


# Files that are something else


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "looks like a LoRA"),
        (["conv_in.weight", "conv_out.weight"], "one part of a folder in diffusers layout"),
        (["model.diffusion_model.out.2.weight"], "it has no autoencoder"),
        ([], "it has no UNet"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_looks_like(names, said, tmp_path):
    file = saved({name: torch.zeros(2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load(file, dtype="float32")


def test_a_file_without_text_encoder_says_so(layouts, tmp_path):
    tensors = {name: t for name, t in layouts("sd1").tensors.items() if not name.startswith("cond_stage_model.")}
    with pytest.raises(CheckpointError, match="of text encoders it has none"):
        load(saved(tensors, tmp_path / "x.safetensors"), dtype="float32")


@pytest.mark.parametrize("channels", [5, 7, 8])
def test_other_inputs_than_text_to_image_and_inpainting_are_refused(channels, layouts, tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    file = saved(layouts("sd2").tensors | {name: torch.zeros(64, channels, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"reads {channels} channels, and only 4 .* and 9"):
        load(file, dtype="float32")


def test_widths_whose_heads_cannot_be_known_are_refused(layouts, tmp_path):
    tensors = layouts("sd1").tensors | {
        name: tensor for name, tensor in layouts("sd2").tensors.items() if name.startswith("cond_stage_model.model.")
    }
    tensors = {name: t for name, t in tensors.items() if not name.startswith("cond_stage_model.transformer.")}
    with pytest.raises(CheckpointError, match="32 channels has no whole number of heads of 64"):
        load(saved(tensors, tmp_path / "x.safetensors"), dtype="float32")


def test_a_truncated_file_is_refused(layouts, tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(layouts("sd1").file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(file, dtype="float32")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickle_is_refused_unread(suffix, tmp_path):
    (tmp_path / f"model{suffix}").write_bytes(b"")
    with pytest.raises(CheckpointError, match="reading a pickle runs whatever code it holds"):
        load(tmp_path / f"model{suffix}", dtype="float32")


def test_a_variant_of_one_file_is_refused(layouts):
    with pytest.raises(CheckpointError, match="variant='fp16' picks among those of a folder"):
        load(layouts("sd1").file, dtype="float32", variant="fp16")


# Tokens


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a",
        "! !! !!!",
        "wow!",
        "A photo of an astronaut riding a horse on mars.",
        "naïve café — 北京 テスト🌸\u00a0e\u0301",
        "don't, we've\n\ttabs  and 12345",
        "<|endoftext|> inside",
        "supercalifragilisticexpialidocious " * 40,
    ],
)
def test_the_shipped_vocabulary_gives_the_ids_of_transformers(pad, prompt):
    expected = tokenizer(pad)(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    mine = published_tokenizer(pad)
    room = mine.words(prompt)[:75]
    assert [mine.start, *room, mine.end] + [mine.pad] * (75 - len(room)) == expected


def test_the_shipped_vocabulary_is_clips():
    words = published_tokenizer("<|endoftext|>")
    assert words.text.get_vocab_size(with_added_tokens=True) == WORDS
    assert (words.start, words.end, words.pad, published_tokenizer("!").pad) == (49406, 49407, 49407, 0)
    # Ids that OpenAI's CLIP documents: "hello world!", and the prompt of its notebook.
    assert words.words("hello world!") == [3306, 1002, 256]
    assert words.words("a photo of a cat") == [320, 1125, 539, 320, 2368]
