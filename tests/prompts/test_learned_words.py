"""Textual inversion: files of every form, against diffusers' own loader."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sdjax
from sdjax.loading import load_embedding
from sdjax.prompts import reading
from tests.parity.reference import TEXT_WIDTH
from tests.prompts.conftest import make
from tests.prompts.test_encoding import assert_same, by_diffusers, encode

PROMPT = "the <x>, cat <x>"


def vectors(count, width=TEXT_WIDTH, seed=1):
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def read(pipe, *embeddings):
    return reading(pipe.checkpoint, clip_skip=None, embeddings=embeddings, long_prompts="truncate")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("key", ["<x>", "emb_params"])
def test_a_word_of_one_or_more_vectors_is_encoded_as_in_diffusers(sd1, tmp_path, count, key):
    save_file({key: vectors(count)}, tmp_path / "word.safetensors")
    reference = copy.deepcopy(sd1.reference)
    reference.load_textual_inversion(str(tmp_path), weight_name="word.safetensors", token="<x>")
    text = encode(sd1.pipe, [PROMPT, "a cat"], read(sd1.pipe, (tmp_path / "word.safetensors", "<x>")))
    assert_same(text, *by_diffusers(reference, [PROMPT, "a cat"]))


def test_a_flat_vector_in_a_folder_is_read_under_its_own_name(sd1, tmp_path):
    save_file({"<x>": vectors(1)[0]}, tmp_path / "learned_embeds.safetensors")
    reference = copy.deepcopy(sd1.reference)
    reference.load_textual_inversion(str(tmp_path))
    how = read(sd1.pipe, tmp_path)
    assert how.embeddings[0].name == "<x>"
    assert_same(encode(sd1.pipe, [PROMPT], how), *by_diffusers(reference, [PROMPT]))


@pytest.mark.parametrize("eos_token_id", [None, 2])
def test_both_encoders_of_sdxl_learn_the_word_and_the_end_token_is_pooled(tmp_path, eos_token_id):
    both = make(tmp_path / "sdxl", is_xl=True, eos_token_id=eos_token_id)
    parts = {"clip_l": vectors(2), "clip_g": vectors(2, seed=2)}
    save_file(parts, tmp_path / "<x>.safetensors")
    how = read(both.pipe, tmp_path / "<x>.safetensors")
    assert how.embeddings[0].name == "<x>"
    text = encode(both.pipe, [PROMPT], how)
    reference = both.reference
    for key, tokenizer, encoder in [
        ("clip_l", reference.tokenizer, reference.text_encoder),
        ("clip_g", reference.tokenizer_2, reference.text_encoder_2),
    ]:
        reference.load_textual_inversion({"<x>": parts[key]}, token="<x>", text_encoder=encoder, tokenizer=tokenizer)
    context, pooled = by_diffusers(reference, [PROMPT])
    end = int(np.argmax(encode_ids(both.pipe, how) == both.pipe.checkpoint.tokenizers[1].end))
    second = reference.text_encoder_2
    with torch.no_grad():
        prompt = reference.maybe_convert_prompt(PROMPT, reference.tokenizer_2)
        ids = reference.tokenizer_2(prompt, padding="max_length", return_tensors="pt").input_ids
        states = second(ids, output_hidden_states=True).hidden_states[-1]
        by_hand = second.text_projection(second.text_model.final_layer_norm(states[:, end])).numpy()
    assert_same(text, context, by_hand)
    # Where a config says 2, diffusers pools at the largest id, which is the learned word's: not followed.
    assert np.allclose(pooled, by_hand, atol=1e-4) == (eos_token_id is None)


def encode_ids(pipe, how):
    return sdjax.prompts.text_inputs(pipe.checkpoint, [PROMPT], how).tokens[1].ids[0, 0]


def test_a_word_is_gone_when_it_is_not_asked_for(tiny, tmp_path):
    save_file({"<x>": vectors(2, 128)}, tmp_path / "x.safetensors")
    arguments = {"seed": 1, "steps": 1, "output": "latents"}
    before = tiny("a <x> circle", **arguments).images
    first = tiny("a <x> circle", embeddings=[tmp_path / "x.safetensors"], **arguments)
    without = tiny("a <x> circle", **arguments).images
    again = tiny("a <x> circle", embeddings=[tmp_path / "x.safetensors"], **arguments)
    np.testing.assert_array_equal(before, without)
    np.testing.assert_array_equal(first.images, again.images)
    assert np.abs(first.images - before).max() > 1e-3
    assert first.settings["embeddings"] == ["<x>"]


def test_a_file_that_is_replaced_is_read_anew(tiny, tmp_path):
    arguments = {"seed": 1, "steps": 1, "output": "latents", "embeddings": [(tmp_path / "x.safetensors", "x")]}
    save_file({"<x>": vectors(1, 128)}, tmp_path / "x.safetensors")
    first = tiny("a x circle", **arguments).images
    save_file({"<x>": vectors(1, 128, seed=2)}, tmp_path / "x.safetensors")
    assert np.abs(tiny("a x circle", **arguments).images - first).max() > 1e-3


def test_a_second_word_compiles_nothing(tiny, tmp_path, compilations):
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for i, file in enumerate(files):
        save_file({file.stem: vectors(3, 128, seed=i)}, file)
    arguments = {"seed": 1, "steps": 1, "output": "latents"}
    tiny("a one circle", embeddings=files[:1], **arguments)
    compilations.clear()
    tiny("a one two circle", embeddings=files, **arguments)
    assert compilations == []


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"<x>": torch.ones(2, 48)}, r"'<x>' has shape \(2, 48\), and the model's text encoder has width 32"),
        ({"<x>": torch.ones(1, 2, 32)}, r"shape \(1, 2, 32\)"),
        ({"<x>": torch.ones(0, 32)}, r"shape \(0, 32\)"),
        ({"<x>": torch.full((1, 32), torch.nan)}, "holds NaN or infinity"),
        ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 32)}, "learned for SDXL"),
        ({"<x>": torch.ones(1, 32), "<y>": torch.ones(1, 32)}, "holds '<x>', '<y>'"),
        ({}, "holds nothing"),
        ({" ": torch.ones(1, 32)}, "must not be blank"),
    ],
)
def test_a_file_for_another_model_is_refused_by_name(sd1, tmp_path, tensors, said):
    save_file(tensors, tmp_path / "word.safetensors")
    with pytest.raises(sdjax.CheckpointError, match=said):
        sd1.pipe("a", embeddings=[tmp_path / "word.safetensors"])


def test_sdxl_refuses_a_file_for_one_encoder_or_with_unequal_counts(sdxl, tmp_path):
    save_file({"<x>": vectors(1)}, tmp_path / "one.safetensors")
    save_file({"clip_l": vectors(1), "clip_g": vectors(2)}, tmp_path / "unequal.safetensors")
    with pytest.raises(sdjax.CheckpointError, match="learned for SD 1 or 2"):
        sdxl.pipe("a", embeddings=[tmp_path / "one.safetensors"])
    with pytest.raises(sdjax.CheckpointError, match="1 and 2 vectors"):
        sdxl.pipe("a", embeddings=[tmp_path / "unequal.safetensors"])


def test_pickles_and_missing_files_are_refused(sd1, tmp_path):
    (tmp_path / "word.pt").write_bytes(b"")
    with pytest.raises(sdjax.CheckpointError, match="reading a pickle runs"):
        sd1.pipe("a", embeddings=[tmp_path / "word.pt"])
    with pytest.raises(sdjax.CheckpointError, match=r"word\.safetensors is missing"):
        sd1.pipe("a", embeddings=[tmp_path / "word.safetensors"])
    with pytest.raises(sdjax.CheckpointError, match=r"learned_embeds\.safetensors is missing"):
        sd1.pipe("a", embeddings=[tmp_path])


def test_two_words_of_one_name_and_a_word_longer_than_a_prompt_are_refused(sd1, tmp_path):
    save_file({"<x>": vectors(1)}, tmp_path / "x.safetensors")
    save_file({"<y>": vectors(76)}, tmp_path / "y.safetensors")
    with pytest.raises(sdjax.RequestError, match="two embeddings are named '<x>'"):
        sd1.pipe("a", embeddings=[tmp_path / "x.safetensors", (tmp_path / "y.safetensors", "<X>")])
    with pytest.raises(sdjax.RequestError, match="'<y>' has 76 vectors, and a prompt has room for 75"):
        sd1.pipe("a", embeddings=[tmp_path / "y.safetensors"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_any_precision_are_read(tmp_path, dtype):
    save_file({"<x>": vectors(2).to(dtype)}, tmp_path / "x.safetensors")
    embedding = load_embedding(tmp_path / "x.safetensors", widths={"text_encoder": TEXT_WIDTH})
    assert embedding.vectors[0].dtype == np.float32
    np.testing.assert_array_equal(embedding.vectors[0], vectors(2).to(dtype).float().numpy())


def test_the_refiner_takes_the_second_encoder_s_part(tmp_path):
    save_file({"clip_l": vectors(1), "clip_g": vectors(1, 48)}, tmp_path / "x.safetensors")
    embedding = load_embedding(tmp_path / "x.safetensors", widths={"text_encoder_2": 48})
    assert [rows.shape for rows in embedding.vectors] == [(1, 48)]


NAMELESS = ["clip_l", "*", "string_to_param.*", "string_to_param", "emb_params", "text_encoders_0", "weight"]


@pytest.mark.parametrize("key", NAMELESS)
def test_a_file_whose_key_names_no_word_is_the_word_of_its_file_name(sd1, tmp_path, key):
    save_file({key: vectors(2)}, tmp_path / "my.toy.safetensors")
    how = read(sd1.pipe, tmp_path / "my.toy.safetensors")
    assert how.embeddings[0].name == "my.toy"
    reference = copy.deepcopy(sd1.reference)
    reference.load_textual_inversion(str(tmp_path), weight_name="my.toy.safetensors", token="my.toy")
    assert_same(encode(sd1.pipe, ["the my.toy, cat"], how), *by_diffusers(reference, ["the my.toy, cat"]))


def test_a_folder_whose_file_names_no_word_is_the_word_of_the_folder_s_name(sd1, sdxl, tmp_path):
    (tmp_path / "toy").mkdir()
    save_file({"emb_params": vectors(1)}, tmp_path / "toy" / "learned_embeds.safetensors")
    assert read(sd1.pipe, tmp_path / "toy").embeddings[0].name == "toy"
    save_file({"clip_l": vectors(1), "clip_g": vectors(1)}, tmp_path / "toy" / "learned_embeds.safetensors")
    assert read(sdxl.pipe, tmp_path / "toy").embeddings[0].name == "toy"


def test_what_other_tools_keep_beside_the_vectors_is_left_out(sd1, tmp_path):
    beside = {"string_to_token.*": torch.tensor(265), "step": torch.tensor(100)}
    save_file({"string_to_param.*": vectors(2), **beside}, tmp_path / "toy.safetensors")
    assert [rows.shape for rows in read(sd1.pipe, tmp_path / "toy.safetensors").embeddings[0].vectors] == [(2, 32)]


def test_sdxl_files_of_pivotal_tuning_are_read(sdxl, tmp_path):
    parts = {"text_encoders_0": vectors(2), "text_encoders_1": vectors(2, seed=2)}
    save_file(parts, tmp_path / "toy.safetensors")
    embedding = read(sdxl.pipe, tmp_path / "toy.safetensors").embeddings[0]
    for rows, part in zip(embedding.vectors, parts.values(), strict=True):
        np.testing.assert_array_equal(rows, part.numpy())


def test_a_word_that_occurs_in_no_prompt_is_a_warning(sd1, tmp_path):
    save_file({"clip_l": vectors(1)}, tmp_path / "toy.safetensors")
    given = {"embeddings": [tmp_path / "toy.safetensors"]}
    assert ["'toy' is in no prompt" in line for line in sd1.pipe.resolve("a cat", **given).warnings] == [True]
    assert sd1.pipe.resolve("a Toy, cat", **given).warnings == ()
    assert sd1.pipe.resolve("a cat", "(toy:1.2)", **given).warnings == ()


def test_words_that_come_with_an_adapter_are_known_while_it_has_a_weight(sd1, tmp_path):
    tensors = {
        f"bundle_emb.{word}.string_to_param.*": vectors(2, seed=seed) for seed, word in enumerate(("toy", "v1.5"))
    }
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors |= {f"{layer}.lora_A.weight": torch.zeros(1, 32), f"{layer}.lora_B.weight": torch.zeros(32, 1)}
    save_file(tensors, tmp_path / "style.safetensors")
    loras = [(tmp_path / "style.safetensors", 0.5), (tmp_path / "style.safetensors", 0.25)]
    for seed, word in enumerate(("toy", "v1.5")):
        save_file({word: vectors(2, seed=seed)}, tmp_path / f"{seed}.safetensors")
    prompt = "a toy, v1.5 cat"
    settings = {"seed": 1, "steps": 1, "output": "latents"}
    bundled = sd1.pipe(prompt, loras=loras, **settings).images
    alone = sd1.pipe(prompt, embeddings=[tmp_path / "0.safetensors", tmp_path / "1.safetensors"], **settings).images
    np.testing.assert_allclose(bundled, alone, atol=1e-5)
    assert np.abs(bundled - sd1.pipe(prompt, **settings).images).max() > 1e-3
    assert sd1.pipe.resolve("a cat", loras=loras).warnings == ()
    assert sd1.pipe.resolve(prompt, loras=[(loras[0][0], 0.0)]).reading.embeddings == ()


def test_words_of_adapters_give_way_to_embeddings_and_do_not_share_a_name(sd1, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        save_file({"bundle_emb.toy.emb_params": vectors(1, seed=seed)}, tmp_path / f"{name}.safetensors")
    save_file({"toy": vectors(3)}, tmp_path / "own.safetensors")
    one, two = ((tmp_path / f"{name}.safetensors", 1.0) for name in ("one", "two"))
    with pytest.raises(sdjax.RequestError, match="two adapters bring a learned word 'toy'"):
        sd1.pipe.resolve("a toy", loras=[one, two])
    (word,) = sd1.pipe.resolve("a toy", loras=[one], embeddings=[tmp_path / "own.safetensors"]).reading.embeddings
    assert len(word.vectors[0]) == 3
    save_file({"bundle_emb.toy.clip_l": vectors(1, 48)}, tmp_path / "one.safetensors")
    with pytest.raises(sdjax.CheckpointError, match=r"one.safetensors: 'clip_l' has shape \(1, 48\)"):
        sd1.pipe.resolve("a toy", loras=[one])
