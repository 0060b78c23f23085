"""Token ids and chunks, against transformers' tokenizer."""

import warnings

import numpy as np
import pytest

import sdjax
from sdjax.loading.tokenizer import load_tokenizer
from sdjax.prompts import tokenize
from tests.parity.reference import END, tokenizer

ROOM = 75


@pytest.fixture(scope="module", params=[END, "!"], ids=["pads-with-end", "pads-with-!"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    reference = tokenizer(folder / "made", request.param)
    reference.save_pretrained(folder / "saved")
    return reference, load_tokenizer(folder / "saved")


def reference_ids(reference, prompt):
    return reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids


@pytest.mark.parametrize(
    "prompt", ["", "a", "   ", "! !! !!!", "wow!", "The CAT, the cat's 42 cats", "name_(series) :)", "Ⅸ café\n\ttea"]
)
def test_plain_prompts_get_the_ids_that_transformers_gives(both, prompt):
    reference, ours = both
    tokens = tokenize(ours, [prompt])
    assert tokens.ids.tolist() == [[reference_ids(reference, prompt)]]
    assert (tokens.weights == 1).all()


def test_a_weight_of_one_and_a_split_word_change_no_id(both):
    reference, ours = both
    for written, plain in [("(a:1) cat", "a cat"), ("th(e:1.0) cat", "the cat"), (r"\(cat\)", "(cat)")]:
        tokens = tokenize(ours, [written])
        assert tokens.ids[0].tolist() == [reference_ids(reference, plain)]
        assert (tokens.weights == 1).all()


def test_every_token_of_a_weighted_word_has_its_weight(both):
    reference, ours = both
    tokens = tokenize(ours, ["the (dog:1.5), [cat]"])
    assert tokens.ids[0, 0].tolist() == reference_ids(reference, "the dog, cat")
    expected = [1, 1, *[1.5] * 3, 1, 1 / 1.1, *[1] * 70]
    np.testing.assert_allclose(tokens.weights[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("words", [74, 75, 76, 77, 78, 150, 151])
@pytest.mark.parametrize("negative", [0, 200])
def test_long_prompts_and_negatives_get_the_same_chunks(both, words, negative):
    reference, ours = both
    prompts = [" ".join(["the", *["cat"] * (words - 1)]), " ".join(["cat"] * negative)]
    tokens = tokenize(ours, prompts, long_prompts="chunk")
    chunks = -(-max(words, negative) // ROOM)
    assert tokens.ids.shape == tokens.weights.shape == (2, chunks, 77)
    for row, prompt in zip(tokens.ids, prompts, strict=True):
        pieces = prompt.split()
        for i, chunk in enumerate(row):
            assert chunk.tolist() == reference_ids(reference, " ".join(pieces[ROOM * i : ROOM * (i + 1)]))


@pytest.mark.parametrize("words", [75, 76, 200])
def test_by_default_what_does_not_fit_is_cut_and_shown(both, words):
    reference, ours = both
    prompt = " ".join(["cat"] * (words - 1) + ["the"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokens = tokenize(ours, [prompt, prompt])
    assert tokens.ids[0].tolist() == [reference_ids(reference, prompt)]
    assert tokens.ids[0, 0, 76] == ours.end
    cut = " ".join(prompt.split()[ROOM:])
    shown = cut if len(cut) <= 60 else cut[:60].rstrip() + " ..."
    assert [f"cut off: {shown!r}" in str(warning.message) for warning in said] == ([True] if cut else [])


def test_break_starts_a_chunk_and_each_chunk_is_cut_by_itself(both):
    reference, ours = both
    with pytest.warns(UserWarning, match="cut off: 'the'"):
        tokens = tokenize(ours, ["cat BREAK " + "cat " * 75 + "the"])
    assert tokens.ids[0].tolist() == [reference_ids(reference, "cat"), reference_ids(reference, "cat " * 75)]


def test_ten_thousand_characters_are_read(both):
    _, ours = both
    prompt = "cat " * 2500
    assert tokenize(ours, [prompt], long_prompts="chunk").ids.shape == (1, 34, 77)
    with pytest.warns(UserWarning, match="2500 tokens"):
        assert tokenize(ours, [prompt]).ids.shape == (1, 1, 77)


def test_an_unknown_way_with_long_prompts_is_refused(both):
    with pytest.raises(sdjax.RequestError, match="'truncate' or 'chunk', not 'wrap'"):
        tokenize(both[1], ["a"], long_prompts="wrap")


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a <x>, cat", True),
        ("a<x>cat", True),
        ("<X>", True),
        ("(<x>:1.2)", True),
        ("<x", False),
        ("sks cat", True),
        ("(SKS),", True),
        ("sks-cat", True),
        ("asks", False),
        ("sks2", False),
        ("sks_2", False),
    ],
)
def test_a_learned_word_is_found_beside_punctuation_but_not_inside_another_word(both, prompt, found):
    tokens = tokenize(both[1], [prompt], triggers={"<x>": [1000, 1001], "sks": [1002]})
    assert ((tokens.ids >= 1000).any()) == found


def test_a_learned_word_takes_as_many_places_as_it_has_vectors(both):
    reference, ours = both
    tokens = tokenize(ours, ["the (<x>:1.5) cat"], triggers={"<x>": [1000, 1001, 1002]})
    plain = reference_ids(reference, "the cat")
    assert tokens.ids[0, 0].tolist() == [*plain[:2], 1000, 1001, 1002, *plain[2:-3]]
    assert tokens.weights[0, 0, :7].tolist() == [1, 1, 1.5, 1.5, 1.5, 1, 1]


def test_the_longer_of_two_learned_words_wins(both):
    tokens = tokenize(both[1], ["toy-2 toy"], triggers={"toy": [1000], "toy-2": [1001]})
    assert tokens.ids[0, 0, 1:3].tolist() == [1001, 1000]


def test_a_chunk_does_not_part_the_vectors_of_a_learned_word(both):
    tokens = tokenize(both[1], ["cat " * 74 + "<x>"], triggers={"<x>": [1000, 1001]}, long_prompts="chunk")
    assert tokens.ids.shape[1] == 2
    assert tokens.ids[0, 0, 75] == both[1].end
    assert tokens.ids[0, 1, 1:3].tolist() == [1000, 1001]


def test_what_is_cut_is_shown_with_the_names_of_learned_words(both):
    with pytest.warns(UserWarning, match="cut off: 'cat <x> the'"):
        tokenize(both[1], ["cat " * 76 + "<x> the"], triggers={"<x>": [1000, 1001]})
