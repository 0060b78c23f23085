import re

import numpy as np
import pytest

from training.captions import COLOR_WORDS, KIND_WORDS, WORDINGS, caption, full_caption, vocabulary
from training.checker import check
from training.drawings import (
    OPPOSITE,
    PLACES,
    Relation,
    Scene,
    draw,
    sample_group,
    sample_held_out_scene,
    sample_training_scene,
)

SIZE_WORDS = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
RELATION_WORDS: dict[str, Relation] = {
    "above": "above",
    "over": "above",
    "on top of": "above",
    "below": "below",
    "under": "below",
    "beneath": "below",
    "left": "left of",
    "right": "right of",
}
PLACE_WORDS = {w: w for w in PLACES} | {"middle": "center"}
AXES = {"side by side": "across", "next to each other": "across", "one above the other": "along"}
COUNT_WORDS = {"two": 2, "2": 2, "pair of": 2, "three": 3, "3": 3}
COLOR_NAMES = {word: color for color, words in COLOR_WORDS.items() for word in words}
KIND_NAMES = {word: kind for kind, words in KIND_WORDS.items() for word in words}
PLURALS = {("boxes" if word == "box" else f"{word}s"): kind for word, kind in KIND_NAMES.items()}


def either(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


SHAPE = re.compile(rf"(?:({either(SIZE_WORDS)}) )?(?:({either(COLOR_NAMES)}) )?\b({either(KIND_NAMES)})\b")
GROUP = re.compile(
    rf"(?:({either(COUNT_WORDS)}) )?(?:({either(SIZE_WORDS)}) )?(?:({either(COLOR_NAMES)}) )?\b({either(PLURALS)})\b"
)
GROUND = re.compile(rf"\b({either(COLOR_NAMES)}) background|\b(?:on|with) ({either(COLOR_NAMES)})\b")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_training_scene(rng) for _ in range(3000)]


def assert_true(text: str, scene: Scene, complete: bool) -> None:
    """Everything that a reader takes from the caption holds in the scene; a complete one leaves nothing out."""
    first = scene.shapes[0]
    if scene.is_group:
        (found,) = GROUP.finditer(text)
        count, size, color, kind = found.groups()
        assert COUNT_WORDS.get(count, len(scene.shapes)) == len(scene.shapes), text
        assert SIZE_WORDS.get(size, first.size) == first.size, text
        assert COLOR_NAMES.get(color, first.color) == first.color, text
        assert PLURALS[kind] == first.kind, text
        axis = [AXES[words] for words in AXES if words in text]
        truth = "across" if scene.relation in ("left of", "right of") else "along"
        assert axis in ([], [truth]) if scene.relation else axis == [], text
        assert not complete or (count and color and (axis or not scene.relation)), text
        rest = GROUP.sub("SHAPES", text)
    else:
        found_shapes = list(SHAPE.finditer(text))
        assert len(found_shapes) == len(scene.shapes), text
        by_color = {shape.color: shape for shape in scene.shapes}
        named = [(SIZE_WORDS.get(m[1] or ""), COLOR_NAMES.get(m[2] or ""), KIND_NAMES[m[3]]) for m in found_shapes]
        for size, color, kind in named:
            shape = by_color[color] if color else first
            assert color or (len(scene.shapes) == 1 and not complete), text
            assert shape.kind == kind, text
            assert size in (None, shape.size), text
        rest = SHAPE.sub("SHAPE", text)
        words = RELATION_WORDS if len(named) == 2 else PLACE_WORDS
        (where,) = [words[w] for w in re.findall(either(words), rest)] or [None]
        if "next to" in rest or "beside" in rest:
            assert scene.relation in ("left of", "right of"), text
        truth = scene.place
        if scene.relation is not None:
            if where and re.search(r"\bits?\b", rest):  # "b with a above it"
                named.reverse()
            truth = scene.relation if named[0][1] == scene.shapes[0].color else OPPOSITE[scene.relation]
        assert where == truth or (where is None and not complete), text
    ground = GROUND.search(rest)
    said = COLOR_NAMES[ground[1] or ground[2]] if ground else None
    assert said == scene.background or (said is None and not complete), text


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
    assert 0.2 < np.mean([GROUND.search(GROUP.sub("S", SHAPE.sub("S", t))) is None for t in texts]) < 0.4
    assert any(SHAPE.fullmatch(t) for t in texts), "the tersest form, such as 'red circle'"
    assert any(re.fullmatch(r"an? \w+ \w+", t) for t in texts), "such as 'a red circle'"
    assert any(re.fullmatch(r"an? \w+", t) for t in texts), "such as 'a circle'"
    assert any(re.fullmatch(r"\w+ \w+ \w+ background", t) for t in texts), "such as 'red circle blue background'"


def test_every_wording_of_the_evaluation_is_true_and_states_what_it_is_said_to():
    rng = np.random.default_rng(8)
    for name, wording in WORDINGS.items():
        for _ in range(50):
            count = wording.shapes
            scene = sample_group(rng, -count) if count < 0 else sample_held_out_scene(rng, count)
            text = wording.write(scene).lower()
            assert_true(text, scene, complete=False)
            said = {"background": GROUND.search(GROUP.sub("S", SHAPE.sub("S", text))) is not None}
            said["color"] = any(word in text for word in COLOR_WORDS[scene.shapes[0].color])
            for statement, stated in said.items():
                assert (statement in wording.said) == stated, (name, text)
            assert check(draw(scene, 128), scene, wording.said).everything, name


def test_articles_fit_the_word_that_follows(scenes):
    rng = np.random.default_rng(4)
    for scene in scenes:
        text = full_caption(scene, rng)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_are_short_lower_case_words_and_commas(scenes):
    rng = np.random.default_rng(5)
    for scene in scenes:
        for text in (caption(scene, rng), full_caption(scene, rng)):
            assert re.fullmatch(r"[a-z123]+(,? [a-z123]+)*\.?", text), text
            assert len(text.split()) <= 24, text


def test_the_vocabulary_is_exactly_the_words_that_captions_use(scenes):
    rng = np.random.default_rng(6)
    used = {word for scene in scenes for _ in range(4) for word in re.findall(r"\w+|[,.]", caption(scene, rng))}
    assert used == set(vocabulary())
    assert list(vocabulary()) == sorted(vocabulary())


def test_the_same_generator_state_gives_the_same_caption(scenes):
    first, second = (np.random.default_rng(7) for _ in range(2))
    assert [caption(s, first) for s in scenes[:50]] == [caption(s, second) for s in scenes[:50]]
