"""Captions for the drawings, in the words that people type.

The wording is data: tables of phrases with gaps to fill. `caption` may leave things unsaid, as people do;
`full_caption` states all that an evaluation checks; `WORDINGS` are the fixed forms that the evaluation counts one by
one. Captions are lower case (the tokenizer makes any text so), their only punctuation is the comma and a last full
stop, and every word that can occur is in `vocabulary()`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from training.checker import Statement
from training.drawings import OPPOSITE, Color, Kind, Place, Relation, Scene, Shape, Size

COLOR_WORDS: Mapping[Color, tuple[str, ...]] = MappingProxyType(
    {
        "red": ("red", "crimson", "scarlet"),
        "green": ("green", "emerald"),
        "blue": ("blue", "navy", "cobalt"),
        "yellow": ("yellow", "golden", "gold"),
        "orange": ("orange", "amber"),
        "purple": ("purple", "violet"),
        "black": ("black", "ebony"),
        "white": ("white", "ivory"),
    }
)
"""The palette's names, and other words for the same colours."""
KIND_WORDS: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "circle": ("circle", "disc", "disk", "dot", "ball"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "ring": ("ring", "hoop", "donut"),
    }
)
_OTHER_WORD = 0.2
"""How often a colour or kind is called by another word than its own."""
_PLURALS = {"box": "boxes"}
_COUNTS = {2: ("two", "two", "two", "2", "a pair of"), 3: ("three", "three", "three", "3")}
_ONE = ("one", "1", "a single")

_SIZE_WORDS: dict[Size, tuple[str, ...]] = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_RELATION_WORDS: dict[Relation, tuple[str, ...]] = {
    "above": ("above", "above", "over", "on top of"),
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
_BESIDE = ("next to", "beside")
_ROW = ("side by side", "next to each other")
_COLUMN = ("one above the other",)

_RELATED_TERSELY = ("{a} {relation} {b}", "{b} and {a} {to_it}")
_RELATED = (
    *("{a} {relation} {b}",) * 4,
    *("{b} with {a} {to_it}", "{b} and {a} {to_it}"),
    *("{a} that is {relation} {b}", "{a} that sits {relation} {b}"),
    "two shapes, {a} {relation} {b}",
)
_UNRELATED = ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a}, {b}")

_OPENED = ("a picture of {what}", "a drawing of {what}", "an image of {what}", "picture of {what}", "draw {what}")
_BARE = (*("{what}",) * 12, *_OPENED)
_TRAILING_GROUNDS = (
    *("{what} on {a_ground} background",) * 3,
    *("{what} on {ground} background", "{what} on {ground}", "{what} with {a_ground} background"),
    *("{what}, {ground} background", "{what} {ground} background"),
)
_LEADING_GROUNDS = ("on {a_ground} background, {what}", "{ground} background, {what}", "{ground} background {what}")
_GROUNDED = (
    *_TRAILING_GROUNDS * 3,
    *_LEADING_GROUNDS * 2,
    *(
        trailing.format(what=opened, a_ground="{a_ground}", ground="{ground}")
        for opened in _OPENED
        for trailing in _TRAILING_GROUNDS[2:5]
    ),
)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true caption that may leave out what `training.checker.STATEMENTS` names, and sizes; at most 24 words."""
    with_article = rng.random() < 0.7
    grounds = _GROUNDED if rng.random() < 0.7 else _BARE
    if scene.is_group:
        return _finished(scene, rng, _group(scene, rng, named=rng.random() < 0.85, placed=rng.random() < 0.3), grounds)
    if len(scene.shapes) == 1:
        noun = _noun(scene.shapes[0], rng, with_article, named=rng.random() < 0.92)
        what = f"{noun} {_place_words(scene, rng)}" if rng.random() < 0.45 else noun
        return _finished(scene, rng, what, grounds)
    if rng.random() < 0.75:
        return _finished(scene, rng, _related(scene, rng, with_article), grounds)
    first, second = (_noun(scene.shapes[i], rng, with_article) for i in rng.permutation(2))
    if scene.relation in ("left of", "right of") and rng.random() < 0.3:
        return _finished(scene, rng, f"{first} {_pick(rng, _BESIDE)} {second}", grounds)
    return _finished(scene, rng, _pick(rng, _UNRELATED).format(a=first, b=second), grounds)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that states background, colours, kinds, number, and the relation or place; at most 24 words."""
    with_article = rng.random() < 0.7
    if scene.is_group:
        what = _group(scene, rng, named=True, placed=True, counted=True)
    elif len(scene.shapes) == 1:
        what = f"{_noun(scene.shapes[0], rng, with_article)} {_place_words(scene, rng)}"
    else:
        what = _related(scene, rng, with_article)
    return _finished(scene, rng, what, _GROUNDED)


def plain_caption(scene: Scene) -> str:
    """The full caption of a lone shape or of two in the plainest words, the same every time."""
    first, last = (_a(f"{shape.color} {shape.kind}") for shape in (scene.shapes[0], scene.shapes[-1]))
    what = f"{first} {_place_of(scene)}" if scene.relation is None else f"{first} {_relation_of(scene)} {last}"
    return f"{what} on {_a(scene.background)} background"


@dataclass(frozen=True, slots=True)
class Wording:
    """A form of prompt that the evaluation counts by itself.

    write: the prompt for a scene.
    shapes: of the scenes that it is for: 1, 2 that differ; -2, -3 for groups.
    said: what it states, as `training.checker.check` takes it.
    """

    write: Callable[[Scene], str]
    shapes: int
    said: tuple[Statement, ...]


def _form(text: str, shapes: int = 1, *, upper: bool = False) -> Wording:
    """A wording from a template.

    Gaps: {a} and {b} are shapes with their articles, {A} and {B} without, {K} a kind alone, {n} a group, {N} a group
    without its colour, {s} and {the} the size and where the shape is, {r} the relation, {g} and {ag} the background.
    """

    def write(scene: Scene) -> str:
        first, last = scene.shapes[0], scene.shapes[-1]
        written = text.format(
            a=_a(f"{first.color} {first.kind}"),
            b=_a(f"{last.color} {last.kind}"),
            A=f"{first.color} {first.kind}",
            B=f"{last.color} {last.kind}",
            K=first.kind,
            n=f"{_COUNTS[len(scene.shapes)][0]} {first.color} {first.kind}s" if scene.is_group else "",
            N=f"{_COUNTS[len(scene.shapes)][0]} {first.kind}s" if scene.is_group else "",
            s="small" if first.size == "small" else "big",
            the=_place_of(scene) if scene.place else "",
            r=_relation_of(scene) if scene.relation else "",
            x=_synonym(first),
            g=scene.background,
            ag=_a(scene.background),
        )
        return written.upper() if upper else written

    gaps = {
        "background": ("{g}", "{ag}"),
        "color": ("{a}", "{A}", "{n}", "{x}"),
        "relation": ("{r}",),
        "place": ("{the}",),
    }
    said: tuple[Statement, ...] = tuple(name for name, found in gaps.items() if any(gap in text for gap in found))  # type: ignore[misc]
    return Wording(write, shapes, said)


def _place_of(scene: Scene) -> str:
    assert scene.place is not None, "a scene of one shape has a place"
    return _PLACE_WORDS[scene.place][0]


def _relation_of(scene: Scene) -> str:
    assert scene.relation is not None, "a scene of two shapes has a relation"
    return _RELATION_WORDS[scene.relation][0 if scene.relation in ("above", "below") else 1]


def _synonym(shape: Shape) -> str:
    return f"{COLOR_WORDS[shape.color][-1]} {KIND_WORDS[shape.kind][-1]}"


WORDINGS: Mapping[str, Wording] = MappingProxyType(
    {
        "a {colour} {kind}": _form("{a}"),
        "{colour} {kind}": _form("{A}"),
        "A {COLOUR} {KIND}": _form("{a}", upper=True),
        "a {kind}": _form("a {K}"),
        "a {kind} on a {b} background": _form("a {K} on {ag} background"),
        "a picture of a {c} {k}": _form("a picture of {a}"),
        "a {c} {k} on a {b} background": _form("{a} on {ag} background"),
        "{c} {k} on {b}": _form("{A} on {g}"),
        "{c} {k}, {b} background": _form("{A}, {g} background"),
        "{c} {k} {b} background": _form("{A} {g} background"),
        "a small {c} {k} on a {b} background": _form("a {s} {A} on {ag} background"),
        "a big {c} {k} on {b}": _form("a {s} {A} on {g}"),
        "a {c} {k} in the middle on a {b} background": _form("{a} {the} on {ag} background"),
        "a {c2} {k2} on a {b} background": _form("a {x} on {ag} background"),
        "a {c} {k} and a {c} {k}": _form("{a} and {b}", 2),
        "{c} {k} and {c} {k}": _form("{A} and {B}", 2),
        "a {c} {k} above a {c} {k}": _form("{a} {r} {b}", 2),
        "a {c} {k} to the left of a {c} {k} on a {b} background": _form("{a} {r} {b} on {ag} background", 2),
        "two {c} {k}s": _form("{n}", -2),
        "two {c} {k}s on a {b} background": _form("{n} on {ag} background", -2),
        "three {c} {k}s": _form("{n}", -3),
        "three {c} {k}s, {b} background": _form("{n}, {g} background", -3),
        "three {k}s": _form("{N}", -3),
    }
)
"""What people type, by what it looks like in a table."""


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted, with the comma and the full stop."""
    tables = (_SIZE_WORDS, _RELATION_WORDS, _RELATION_TO_IT, _PLACE_WORDS, COLOR_WORDS, KIND_WORDS)
    phrases = [phrase for table in tables for variants in table.values() for phrase in variants]
    phrases += [*_RELATED_TERSELY, *_RELATED, *_UNRELATED, *_BARE, *_GROUNDED, *_BESIDE, *_ROW, *_COLUMN, *_ONE]
    phrases += [_plural(word) for words in KIND_WORDS.values() for word in words]
    phrases += [phrase for counts in _COUNTS.values() for phrase in counts]
    words = {word for phrase in phrases for word in phrase.replace(",", " , ").split()} | {"a", "an", "."}
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


def _group(scene: Scene, rng: np.random.Generator, *, named: bool, placed: bool, counted: bool = False) -> str:
    """Such as "two small red circles side by side"; without a number, any group fits."""
    shape, count = scene.shapes[0], len(scene.shapes)
    words = [_pick(rng, _COUNTS[count])] if counted or rng.random() < 0.9 else []
    if rng.random() < 0.2:
        words.append(_pick(rng, _SIZE_WORDS[shape.size]))
    if named:
        words.append(_called(rng, COLOR_WORDS[shape.color]))
    words.append(_plural(_called(rng, KIND_WORDS[shape.kind])))
    if placed and scene.relation is not None:
        words.append(_pick(rng, _ROW if scene.relation in ("left of", "right of") else _COLUMN))
    return " ".join(words)


def _place_words(scene: Scene, rng: np.random.Generator) -> str:
    assert scene.place is not None, "a scene of one shape has a place"
    return _pick(rng, _PLACE_WORDS[scene.place])


def _finished(scene: Scene, rng: np.random.Generator, what: str, sentences: Sequence[str]) -> str:
    ground = _called(rng, COLOR_WORDS[scene.background])
    text = _pick(rng, sentences).format(what=what, ground=ground, a_ground=_a(ground))
    return f"{text}." if rng.random() < 0.05 else text


def _noun(shape: Shape, rng: np.random.Generator, with_article: bool, *, named: bool = True) -> str:
    noun = _called(rng, KIND_WORDS[shape.kind])
    if named:
        noun = f"{_called(rng, COLOR_WORDS[shape.color])} {noun}"
    if rng.random() < 0.25:
        noun = f"{_pick(rng, _SIZE_WORDS[shape.size])} {noun}"
    if not with_article:
        return noun
    return f"{_pick(rng, _ONE)} {noun}" if rng.random() < 0.05 else _a(noun)


def _called(rng: np.random.Generator, words: Sequence[str]) -> str:
    """The first word mostly, or another one."""
    return _pick(rng, words[1:]) if len(words) > 1 and rng.random() < _OTHER_WORD else words[0]


def _plural(word: str) -> str:
    return _PLURALS.get(word, f"{word}s")


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
