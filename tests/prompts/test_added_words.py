"""Words that were added to a pipeline's own tokenizer and saved with it, in every form of file, against diffusers."""

import copy
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AddedToken

import sdjax
from sdjax.errors import CheckpointError
from sdjax.loading.tokenizer import load_tokenizer
from sdjax.prompts import tokenize
from tests.parity.reference import END, START, tokenizer
from tests.prompts.conftest import make
from tests.prompts.test_encoding import assert_same, by_diffusers, encode

PROMPTS = [
    "a <toy> cat",
    "a <TOY>x sks skss xsks, the sks.",
    "Mixed Case mixed case MIXED CASE",
    "wrd words wrd. swrd",
    "<spc>the <spc> <SPC>",
    " <toy>,<toy>  <toy>",
    "<many> and <many>, <many>_1 <MANY>",
    f"a {END} b {START} c",
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tokenizer(folder, END)
    settings = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END, "model_max_length": 77}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **settings})
    return folder


def write(file, contents):
    file.write_text(json.dumps(contents), encoding="utf-8")


def words_of(folder):
    return len(json.loads((folder / "vocab.json").read_text()))


def by_transformers_5(folder):
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    words.add_tokens(["<toy>", "sks", AddedToken("Mixed Case", normalized=False), AddedToken("wrd", single_word=True)])
    words.add_special_tokens({"additional_special_tokens": ["<spc>"]})
    for file in folder.iterdir():
        file.unlink()
    words.save_pretrained(folder)


def by_added_tokens(folder):
    first = words_of(folder)
    write(folder / "added_tokens.json", {"sks": first + 1, "<toy>": first, "<spc>": first + 2})
    special = {"bos_token": START, "additional_special_tokens": ["<spc>"], "pad_token": {"content": "!", **FLAGS}}
    write(folder / "special_tokens_map.json", special)


def by_added_tokens_decoder(folder):
    first = words_of(folder)
    contents = [
        ("<toy>", {}),
        ("Mixed Case", {"normalized": False}),
        ("wrd", {"single_word": True}),
        ("sks", {"lstrip": True}),
    ]
    decoder = {str(first + i): {"content": word, **FLAGS, **flags} for i, (word, flags) in enumerate(contents)}
    decoder[str(first - 1)] = {"content": END, **FLAGS, "special": True}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**settings, "added_tokens_decoder": decoder})
    write(folder / "added_tokens.json", {"<toy>": first + 7})  # not read where there is a decoder
    write(folder / "special_tokens_map.json", {"pad_token": "!"})  # likewise


def by_added_tokens_that_are_in_the_vocabulary(folder):
    first = words_of(folder)
    write(folder / "added_tokens.json", {"<toy>": first, END: first - 1, START: first - 2})


def by_special_tokens_alone(folder):
    write(folder / "special_tokens_map.json", {"additional_special_tokens": ["<spc>", "<toy>"], "pad_token": "!"})


def by_the_config_alone(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", {**settings, "additional_special_tokens": ["<toy>"]})


def by_tokenizer_json_beside_another_vocabulary(folder):
    words = transformers.CLIPTokenizer.from_pretrained(folder)
    words.add_tokens(["<toy>"])
    words.save_pretrained(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    write(folder / "vocab.json", {**vocab, "a</w>": vocab["b</w>"], "b</w>": vocab["a</w>"]})


FORMS = [
    by_transformers_5,
    by_added_tokens,
    by_added_tokens_decoder,
    by_added_tokens_that_are_in_the_vocabulary,
    by_special_tokens_alone,
    by_the_config_alone,
    by_tokenizer_json_beside_another_vocabulary,
]


@pytest.mark.parametrize("form", FORMS, ids=[form.__name__.removeprefix("by_") for form in FORMS])
def test_added_words_of_every_form_get_the_ids_that_transformers_gives(plain, tmp_path, form):
    folder = tmp_path / "tokenizer"
    shutil.copytree(plain, folder)
    form(folder)
    reference, ours = transformers.CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert len(reference) > words_of(plain)
    for prompt in PROMPTS:
        expected = reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        assert tokenize(ours, [prompt]).ids.tolist() == [[expected]], prompt


def test_an_added_word_with_an_id_that_it_can_t_have_is_refused(plain, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(plain, folder)
    write(folder / "added_tokens.json", {"<toy>": words_of(plain) + 5})
    with pytest.raises(CheckpointError, match=r"'<toy>' has id \d+, and the words before it leave it \d+"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<toy>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"196": {}}}),
        ("added_tokens.json", {"<toy>": "196"}),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}),
    ],
)
def test_files_that_are_not_understood_are_refused_with_their_folder(plain, tmp_path, file, contents):
    folder = tmp_path / "tokenizer"
    shutil.copytree(plain, folder)
    write(folder / file, contents)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_tokenizer(folder)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A pipeline that learned two words, one of three vectors, and was saved by diffusers."""
    folder = tmp_path_factory.mktemp("learned")
    reference = make(folder / "made", is_xl=False).reference
    generator = torch.Generator().manual_seed(5)
    for word, count in (("<toy>", 1), ("<many>", 3)):
        save_file({word: 3 * torch.randn(count, 32, generator=generator)}, folder / "word.safetensors")
        reference.load_textual_inversion(str(folder), weight_name="word.safetensors")
    reference.save_pretrained(folder / "model")
    return reference, folder / "model"


def test_a_saved_pipeline_encodes_its_learned_words_as_diffusers_does(learned):
    reference, folder = learned
    pipe = sdjax.Pipeline.from_pretrained(folder)
    # diffusers replaces the name where it stands in just these letters, so that <MANY> is one vector to it. Here it is
    # the whole word whatever its case.
    prompts = [PROMPTS[0], PROMPTS[5], "<many> and <many>, the cat"]
    assert_same(encode(pipe, prompts), *by_diffusers(copy.deepcopy(reference), prompts))
    small, large = (tokenize(pipe.checkpoint.tokenizers[0], [word]).ids for word in ("<many>", "<MANY>"))
    np.testing.assert_array_equal(small, large)


def test_a_chunk_s_end_does_not_part_a_learned_word(learned):
    tokens = sdjax.Pipeline.from_pretrained(learned[1]).checkpoint.tokenizers[0]
    ids = tokenize(tokens, ["the " * 74 + "<many>"], long_prompts="chunk").ids
    assert ids.shape[1] == 2
    assert ids[0, 1, 1:5].tolist() == [*tokens.units("<many>")[0], tokens.end]


def test_learned_words_survive_a_save_and_diffusers_reads_them(learned, tmp_path):
    _, folder = learned
    pipe = sdjax.Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    again = sdjax.Pipeline.from_pretrained(tmp_path / "again")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "again" / "tokenizer")
    for prompt in PROMPTS:
        ids = pipe.checkpoint.tokenizers[0].words(prompt)
        assert again.checkpoint.tokenizers[0].words(prompt) == ids
        if "<many>" not in prompt.lower():
            assert theirs(prompt).input_ids[1:-1] == ids
    stored = load_file(tmp_path / "again" / "text_encoder" / "model.safetensors")
    assert len(stored["text_model.embeddings.token_embedding.weight"]) == len(theirs)


def test_a_word_without_a_row_in_the_text_encoder_is_refused(learned, tmp_path):
    _, folder = learned
    shutil.copytree(folder, tmp_path / "model")
    words = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    words.add_tokens(["<later>"])
    words.save_pretrained(tmp_path / "model" / "tokenizer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointError, match=r"embeddings for \d+ tokens, its tokenizer has \d+"):
            sdjax.Pipeline.from_pretrained(tmp_path / "model")
