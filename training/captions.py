"""Captions for the drawings, in varied wording.

The wording is data: tables of phrases with gaps to fill. `caption` may leave things unsaid, as people do;
`full_caption` states all that an evaluation checks. Captions are lower case, their only punctuation is the comma, and
every word that can occur is in `vocabulary()`.
"""

from collections.abc import Sequence

import numpy as np

from training.drawings import COLORS, KINDS, OPPOSITE, Place, Relation, Scene, Shape, Size

_SIZE_WORDS: dict[Size, tuple[str, ...]] = {"small": ("small", "little"), "large": ("large", "big")}

_RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_RELATION_TO_IT: dict[Relation, tuple[str, ...]] = {
    "above": ("above it",),
    "below": ("below it", "under it"),
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
}
_PLACE_WORDS: dict[Place, tuple[str, ...]] = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}

_RELATED_TERSELY = ("{a} {relation} {b}", "{b} and {a} {to_it}")
_RELATED = (
    *("{a} {relation} {b}",) * 4,
    *("{b} with {a} {to_it}", "{b} and {a} {to_it}"),
    *("{a} that is {relation} {b}", "{a} that sits {relation} {b}"),
    "two shapes, {a} {relation} {b}",
)
_UNRELATED = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a}, {b}")

_OPENED = ("a picture of {what}", "a drawing of {what}", "an image of {what}")
_BARE = (*("{what}",) * 6, *_OPENED)
_TRAILING_GROUNDS = (
    *("{what} on {a_ground} background",) * 2,
    *("{what} on {ground}", "{what}, {ground} background"),
)
_LEADING_GROUNDS = ("on {a_ground} background, {what}", "{ground} background, {what}")
_GROUNDED = (
    *_TRAILING_GROUNDS * 2,
    *_LEADING_GROUNDS * 2,
    *(
        trailing.format(what=opened, a_ground="{a_ground}", ground="{ground}")
        for opened in _OPENED
        for trailing in _TRAILING_GROUNDS
    ),
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that may leave out the scene's background, relation, place or sizes; at most 22 words."""
    with_article = rng.random() < 0.75
    if len(scene.shapes) == 1:
        noun = _noun(scene.shapes[0], rng, with_article)
        what = f"{noun} {_place_words(scene, rng)}" if rng.random() < 0.5 else noun
    elif rng.random() < 0.9:
        what = _related(scene, rng, with_article)
    else:
        first, second = (_noun(scene.shapes[i], rng, with_article) for i in rng.permutation(2))
        what = _pick(rng, _UNRELATED).format(a=first, b=second)
    return _finished(scene, rng, what, _GROUNDED if rng.random() < 0.85 else _BARE)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states the background, all colours and kinds, and the relation or place; at most 22 words."""
    with_article = rng.random() < 0.75
    if len(scene.shapes) == 1:
        what = f"{_noun(scene.shapes[0], rng, with_article)} {_place_words(scene, rng)}"
    else:
        what = _related(scene, rng, with_article)
    return _finished(scene, rng, what, _GROUNDED)


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted, and the comma (which stands directly behind a word)."""
    phrases = [*COLORS, *KINDS, "a", "an", *_RELATED_TERSELY, *_RELATED, *_UNRELATED, *_BARE, *_GROUNDED]
    for table in (_SIZE_WORDS, _RELATION_WORDS, _RELATION_TO_IT, _PLACE_WORDS):
        phrases.extend(phrase for variants in table.values() for phrase in variants)
    words = {word for phrase in phrases for word in phrase.replace(",", " , ").split()}
    return tuple(sorted(word for word in words if not word.startswith("{")))


def _related(scene: Scene, rng: np.random.Generator, with_article: bool) -> str:
    assert scene.relation is not None, "a scene of two shapes has a relation"
    (first, second), relation = scene.shapes, scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    return _pick(rng, _RELATED if with_article else _RELATED_TERSELY).format(
        a=_noun(first, rng, with_article),
        b=_noun(second, rng, with_article),
        relation=_pick(rng, _RELATION_WORDS[relation]),
        to_it=_pick(rng, _RELATION_TO_IT[relation]),
    )


def _place_words(scene: Scene, rng: np.random.Generator) -> str:
    assert scene.place is not None, "a scene of one shape has a place"
    return _pick(rng, _PLACE_WORDS[scene.place])


def _finished(scene: Scene, rng: np.random.Generator, what: str, sentences: Sequence[str]) -> str:
    return _pick(rng, sentences).format(what=what, ground=scene.background, a_ground=_a(scene.background))


def _noun(shape: Shape, rng: np.random.Generator, with_article: bool) -> str:
    noun = f"{shape.color} {shape.kind}"
    if rng.random() < 0.25:
        noun = f"{_pick(rng, _SIZE_WORDS[shape.size])} {noun}"
    return _a(noun) if with_article else noun


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
