"""What brackets mean, and that no text is an error."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.prompts import MAX_WEIGHT, parse

EMPHASIS = [
    ("(a)", [("a", 1.1)]),
    ("((a))", [("a", 1.21)]),
    ("[a]", [("a", 1 / 1.1)]),
    ("[[a]]", [("a", 1 / 1.21)]),
    ("(a:1.5)", [("a", 1.5)]),
    ("(a: 1.5 )", [("a", 1.5)]),
    ("(a:0)", [("a", 0.0)]),
    ("(a:-.5)", [("a", -0.5)]),
    ("(a:+2.)", [("a", 2.0)]),
    ("((a:1.5) b:2)", [("a", 3.0), (" b", 2.0)]),
    ("x (a), [b] y", [("x ", 1), ("a", 1.1), (", ", 1), ("b", 1 / 1.1), (" y", 1)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("(a:b:1.5)", [("a:b", 1.5)]),
    ("(a (b:c):1.2)", [("a (b:c)", 1.2)]),
    ("pre(fix:1.3)ed", [("pre", 1), ("fix", 1.3), ("ed", 1)]),
    ("name (series (x))", [("name ", 1), ("series ", 1.1), ("x", 1.21)]),
    ("((((a:9):9):9):9)", [("a", MAX_WEIGHT)]),
]
TEXT = [
    "",
    "a red circle, 50% of it: blue!",
    "((a",
    "a))",
    ")(",
    "][",
    "()",
    "[ ]",
    "(:1.2)",
    "(a:)",
    "(a:b)",
    "(a:nan)",
    "(a:inf)",
    "(a:-inf)",
    "(a:1e9)",
    "(a:99)",
    "(a:1.5",
    "(a:1.2.3)",
    "at (10:30)",
    "[cat:dog:0.5]",
    "[cat|dog]",
    "[a:1.2]",
    "name_(series)",
    "f(x) = a[0]",
    "smile :) and :(",
    "C:\\folder\\\\file",
    "<lora:x:0.5>",
]


def rounded(sections):
    return [[(text, round(weight, 9)) for text, weight in section] for section in sections]


@pytest.mark.parametrize(("prompt", "spans"), EMPHASIS)
def test_brackets_weigh_words(prompt, spans):
    assert rounded(parse(prompt)) == rounded([spans])


@pytest.mark.parametrize("prompt", TEXT)
def test_what_is_no_weight_is_text_to_the_letter(prompt):
    assert parse(prompt) == (((prompt, 1.0),) if prompt else (),)


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        (r"\(a\)", [("(a)", 1)]),
        (r"\[a\]", [("[a]", 1)]),
        (r"name \(series \(x\)\)", [("name (series (x))", 1)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
        (r"\\\(a)", [("\\(a)", 1)]),
        (r"(a\)", [("(a)", 1)]),
    ],
)
def test_a_backslash_makes_a_bracket_text(prompt, spans):
    assert rounded(parse(prompt)) == rounded([spans])


def test_a_closing_bracket_takes_the_nearest_of_its_kind():
    assert rounded(parse("(a [b) c]")) == [[("a [b", 1.1), (" c]", 1)]]
    assert rounded(parse("((a)")) == [[("(", 1), ("a", 1.1)]]


def test_an_unbalanced_bracket_leaves_the_weights_around_it():
    assert rounded(parse("((house:1.3) (on")) == [[("(", 1), ("house", 1.3), (" (on", 1)]]


@pytest.mark.parametrize(
    ("prompt", "sections"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("a, BREAK, b", [[("a, ", 1)], [(", b", 1)]]),
        ("(a BREAK b:1.5) c", [[("a ", 1.5)], [(" b", 1.5), (" c", 1)]]),
        ("BREAK a BREAK  BREAK b BREAK", [[(" a ", 1)], [(" b ", 1)]]),
        ("BREAK", [[]]),
        ("take a break", [[("take a break", 1)]]),
        ("BREAKING BREAK-dance _BREAK", [[("BREAKING BREAK-dance _BREAK", 1)]]),
    ],
)
def test_break_begins_a_chunk(prompt, sections):
    assert rounded(parse(prompt)) == rounded(sections)


@given(st.text("()[]\\:,.0-9a |BREAK", max_size=80))
def test_no_text_is_an_error_and_no_weight_is_out_of_bounds(prompt):
    for section in parse(prompt):
        for text, weight in section:
            assert text in prompt.replace("\\", "") or text
            assert math.isfinite(weight)
            assert abs(weight) <= MAX_WEIGHT


@given(st.text(st.characters(exclude_characters="()[]"), min_size=1).filter(lambda text: text.strip()))
def test_text_without_brackets_stays_what_it_is(prompt):
    if "BREAK" not in prompt:
        assert parse(prompt) == (((prompt, 1.0),),)


@pytest.mark.parametrize("prompt", ["(" * 10_000, "[(:" * 3_000 + ":)]" * 3_000, "(" * 2_000 + "a" + ":9)" * 2_000])
def test_thousands_of_brackets_are_read(prompt):
    assert all(abs(weight) <= MAX_WEIGHT for _, weight in parse(prompt)[0])
