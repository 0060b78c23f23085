import re

import numpy as np
import pytest

from training.captions import caption, full_caption, vocabulary
from training.drawings import COLORS, KINDS, OPPOSITE, Relation, Scene, sample_scene

SIZE_WORDS = {"small": "small", "little": "small", "large": "large", "big": "large"}
RELATION_WORDS: dict[str, Relation] = {
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
    "left": "left of",
    "right": "right of",
}
PLACE_WORDS = {w: w for w in ("center", "left", "right", "top", "bottom")} | {"middle": "center"}
SHAPE = re.compile(rf"(?:({'|'.join(SIZE_WORDS)}) )?({'|'.join(COLORS)}) ({'|'.join(KINDS)})")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(3000)]


def understood(text: str) -> tuple[list[tuple[str | None, str, str]], str | None, str | None]:
    """What a reader of the caption understands: shapes as (size, color, kind), where they stand, the background."""
    found = list(SHAPE.finditer(text))
    shapes = [(SIZE_WORDS.get(m[1] or ""), m[2], m[3]) for m in found]
    rest = SHAPE.sub("SHAPE", text)
    ground = re.search(rf"\b({'|'.join(COLORS)}) background|\bon ({'|'.join(COLORS)})\b", rest)
    words = RELATION_WORDS if len(shapes) == 2 else PLACE_WORDS
    where = [words[w] for w in re.findall(r"\w+", rest) if w in words]
    assert len(where) <= 1
    if len(shapes) == 2 and where and re.search(r"\bits?\b", rest):  # "b with a above it"
        shapes.reverse()
    return shapes, where[0] if where else None, (ground[1] or ground[2]) if ground else None


def assert_true(text: str, scene: Scene, complete: bool) -> None:
    shapes, where, ground = understood(text)
    assert len(shapes) == len(scene.shapes), text
    by_color = {s.color: s for s in scene.shapes}
    for size, color, kind in shapes:
        assert by_color[color].kind == kind, text
        assert size in (None, by_color[color].size), text
    truth = scene.place
    if scene.relation is not None:
        in_order = shapes[0][1] == scene.shapes[0].color
        truth = scene.relation if in_order else OPPOSITE[scene.relation]
    assert where == truth or (where is None and not complete), text
    assert ground == scene.background or (ground is None and not complete), text


def test_a_caption_is_true_of_its_scene(scenes):
    rng = np.random.default_rng(1)
    for scene in scenes:
        assert_true(caption(scene, rng), scene, complete=False)


def test_a_full_caption_says_all_that_is_evaluated(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes:
        assert_true(full_caption(scene, rng), scene, complete=True)


def test_captions_vary_and_some_leave_things_out(scenes):
    rng = np.random.default_rng(3)
    texts = [caption(scene, rng) for scene in scenes]
    assert len({SHAPE.sub("S", t) for t in texts}) > 300
    assert 0.1 < np.mean([understood(t)[2] is None for t in texts]) < 0.2
    assert any(SHAPE.fullmatch(t) for t in texts), "the tersest form, such as 'red circle'"
    assert any(re.fullmatch(r"an? \w+ \w+", t) for t in texts), "such as 'a red circle'"


def test_articles_fit_the_word_that_follows(scenes):
    rng = np.random.default_rng(4)
    for scene in scenes:
        text = full_caption(scene, rng)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_are_short_lower_case_words_and_commas(scenes):
    rng = np.random.default_rng(5)
    for scene in scenes:
        for text in (caption(scene, rng), full_caption(scene, rng)):
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text), text
            assert len(text.split()) <= 22, text


def test_the_vocabulary_is_exactly_the_words_that_captions_use(scenes):
    rng = np.random.default_rng(6)
    used = {word for scene in scenes for word in re.findall(r"\w+|,", caption(scene, rng))}
    assert used == set(vocabulary())
    assert list(vocabulary()) == sorted(vocabulary())


def test_the_same_generator_state_gives_the_same_caption(scenes):
    first, second = (np.random.default_rng(7) for _ in range(2))
    assert [caption(s, first) for s in scenes[:50]] == [caption(s, second) for s in scenes[:50]]
