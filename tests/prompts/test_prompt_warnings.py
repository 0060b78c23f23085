"""What of a prompt the model will not see as it was written is in the request's warnings, and a call warns of it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

import sdjax
from sdjax.prompts.foreign import foreign_syntax
from sdjax.prompts.vocabulary import unknown_words, unknown_words_message

VOCABULARY = ("circle", "star", "red", "t-shirt", "a")


def test_a_call_warns_once_of_each_thing_and_a_request_lists_it(tiny):
    prompts = ["a red dog", "a dog <lora:x:0.8> AND a house"]
    request = tiny.resolve(prompts)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tiny(prompts, steps=1)
    assert [str(warning.message) for warning in said] == list(request.warnings)
    assert {warning.category for warning in said} == {sdjax.PromptWarning}
    assert issubclass(sdjax.PromptWarning, UserWarning)
    assert [warning.filename for warning in said] == [__file__] * len(said)
    dog, house, lora, composed = (
        [line for line in request.warnings if text in line]
        for text in ("dog", "house", "<lora:x:0.8> is left out", "'AND' is plain text")
    )
    assert dog == house == [line for line in request.warnings if "does not know: dog, house; it knows: circle" in line]
    assert len(dog) == len(lora) == len(composed) == 1


def test_a_prompt_of_known_words_has_no_warning(tiny):
    assert tiny.resolve("A Red (circle:1.3), on a [blue] background BREAK 2 stars"[:-1]).warnings == ()
    assert tiny.resolve("a white ring", "a black star").warnings == ()


def test_a_word_that_the_model_does_not_know_is_named_in_the_negative_prompt_too(tiny):
    assert "does not know: blurry;" in tiny.resolve("a star", "blurry").warnings[0]


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("A RED Circle, 3 (star)!", []),
        ("a circle's star", []),
        ("a dog's star", ["dog"]),
        ("circles", ["circles"]),
        ("a red-star", []),
        ("a t-shirt and a red-dog", ["and", "dog"]),
        ("a star 42x 1.5 :) \N{SNOWMAN}", ["x"]),
        ("une étoile", ["une", "étoile"]),
        ("", []),
    ],
)
def test_words_are_known_by_letters_alone(text, unknown):
    assert unknown_words([text], VOCABULARY) == unknown


def test_without_a_vocabulary_no_word_is_unknown():
    assert unknown_words(["a dog"], ()) == []


def test_the_warning_of_unknown_words_is_short_and_offers_what_is_spelled_alike():
    many = [f"word{'a' * i}" for i in range(50)]
    line = unknown_words_message(["circel", *many], VOCABULARY)
    assert line.startswith("this model does not know: circel (circle?), word, ")
    assert line.endswith(" and 43 more; it knows: circle, star, red, t-shirt, a")
    known = [f"known{i}" for i in range(100)]
    assert unknown_words_message(["dog"], known).endswith("known22, known23 and 76 more")
    assert len(unknown_words_message(["dog" * 1000], VOCABULARY)) < 120


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat AND a dog", "'AND'"),
        ("a cat ADDCOL a dog", "'ADDCOL'"),
        ("a [cat:dog:0.5]", "'[cat:dog:0.5]'"),
        ("a [cat::8]", "'[cat::8]'"),
        ("a [cat:.25]", "'[cat:.25]'"),
        ("a [cat|dog]", "'[cat|dog]'"),
        ("a {red|blue} cat", "'{red|blue}'"),
        ("a {{red}} cat", "'{red}'"),
        ("1.5::red::", "'1.5::'"),
        ("a cat::2 dog", "'::2'"),
        ("a __color__ cat", "'__color__'"),
        ("embedding:toy.pt", "'embedding:toy.pt'"),
        ("a red++ cat", "'red++'"),
        ("a red+", "'red+'"),
        ("a red--, cat", "'red--'"),
        ("a (red)- cat", "'(red)-'"),
        ("a (red cat)1.2", "'(red cat)1.2'"),
        ('("a cat", "a dog").blend(0.5, 0.5)', "').blend(0.5, 0.5)'"),
        ("a cat.swap(dog)", "'.swap(dog)'"),
        ("a cat --ar 16:9", "'--ar'"),
        ("a cat /* no */", "'/* no */'"),
        ("<random:red,blue> cat", "'<random:red,blue>'"),
        ("<fromto[0.5]:cat,dog>", "'<fromto[0.5]:cat,dog>'"),
        ("<hypernet:x:1>", "'<hypernet:x:1>'"),
        ("a <toy> on a table", "'<toy>'"),
    ],
)
def test_syntax_of_another_tool_is_named(prompt, found):
    (line,) = foreign_syntax([prompt, prompt])
    assert line.startswith(f"{found} is plain text here; elsewhere it is ")


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat and a dog",
        "A CAT AND A DOG IN A HOUSE",
        "a (red:1.3) cat, [blue] BREAK name_(series)",
        r"\[cat:dog:0.5\] \{a\}",
        "at [10 o'clock]",
        "I <3 you, 18+, a well-known cat - or two",
        "f(x), (a)-(b), a < b > c, snake_case, C:\\",
        "hand-drawn, 4k, f/1.8, 16:9, 50% off, a & b",
        "",
    ],
)
def test_plain_text_is_no_syntax(prompt):
    assert foreign_syntax([prompt]) == []


def test_a_learned_word_in_angle_brackets_is_no_syntax():
    assert foreign_syntax(["a <toy>"], ["<TOY>"]) == []


def test_a_learned_word_that_is_in_no_prompt_is_named(tiny, tmp_path):
    from safetensors.numpy import save_file

    width = tiny.checkpoint.configs["text_encoder"]["hidden_size"]
    save_file({"emb_params": np.ones((1, width), np.float32)}, tmp_path / "toy.safetensors")
    files = [tmp_path / "toy.safetensors"]
    assert tiny.resolve("a red circle", embeddings=files).warnings == (
        "the learned word 'toy' is in no prompt, so its embedding has no effect",
    )
    assert tiny.resolve("a red Toy", embeddings=files).warnings == ()
    assert tiny.resolve("a red star", "a toy", embeddings=files).warnings == ()


def test_a_long_prompt_is_reported_in_a_line(tiny):
    (line,) = tiny.resolve("a red circle " * 400).warnings
    assert "1200 tokens" in line
    assert len(line) < 200
    assert "\n" not in line


def test_words_of_a_negative_prompt_that_nobody_is_guided_by_are_not_checked(tiny):
    assert not any(
        "blurry" in line and "not know" in line for line in tiny.resolve("a star", "blurry", guidance_scale=1).warnings
    )


def test_the_tag_of_a_lora_never_reaches_the_text_encoder(tiny):
    request = tiny.resolve("a red <lora:x:0.8>circle <LYCO:y>", "a star <lora:z>")
    assert request.prompts == ("a red circle ",)
    assert request.negative_prompts == ("a star ",)
    ids = [
        tiny.prepare(tiny.resolve(text, seed=1)).batch.cond.context
        for text in ("a red <lora:x:0.8>circle", "a red circle")
    ]
    np.testing.assert_array_equal(*ids)


def test_a_sampler_that_takes_the_place_of_the_models_own_is_named(tiny):
    scheduler = replace(tiny.checkpoint.scheduler, class_name="IPNDMScheduler")
    other = sdjax.Pipeline(replace(tiny.checkpoint, scheduler=scheduler), name="other")
    assert other.resolve("a star").warnings == (
        "the model's scheduler config names IPNDMScheduler, which is not supported: ddim is used",
    )
    assert other.resolve("a star", sampler="euler").warnings == ()
