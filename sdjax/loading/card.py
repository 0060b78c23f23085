"""The card of a model folder, `card.json`: defaults of its pictures, and the words that the model was trained on.

    {"description": "coloured shapes", "steps": 20, "guidance_scale": 3.0, "vocabulary": ["circle", "red", "a", ...]}

Every entry may be left out, and other entries are not read. A vocabulary lists the most telling words first; words of
one that is there alone are known, so a plural counts only if it is listed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdjax.errors import CheckpointError

CARD = "card.json"


@dataclass(frozen=True)
class Card:
    """What a model folder states about itself.

    Attributes:
        description: what it draws, in a few words.
        steps: of a picture, where a caller names none.
        guidance_scale: likewise.
        vocabulary: the words that it knows, the most telling first; empty where that is not stated.
    """

    description: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    vocabulary: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "Card":
        """Read the contents of a `card.json`.

        Raises:
            ValueError: an entry has another type; the message names it.
        """
        description, steps, scale = (given.get(name) for name in ("description", "steps", "guidance_scale"))
        vocabulary = given.get("vocabulary") or ()
        if not isinstance(description, str | None):
            raise ValueError(f"description must be a text, not {description!r}")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
        if scale is not None and (not isinstance(scale, int | float) or isinstance(scale, bool) or not _finite(scale)):
            raise ValueError(f"guidance_scale must be a finite number, not {scale!r}")
        if not isinstance(vocabulary, list | tuple) or not all(isinstance(word, str) for word in vocabulary):
            raise ValueError("vocabulary must be a list of words")
        words = tuple(dict.fromkeys(word.strip() for word in vocabulary if word.strip()))
        return cls(description, steps, None if scale is None else float(scale), words)

    def over(self, other: "Card") -> "Card":
        """This card, with another's entries where it leaves them open."""
        return Card(
            self.description or other.description,
            other.steps if self.steps is None else self.steps,
            other.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            self.vocabulary or other.vocabulary,
        )


EMPTY = Card()


def read_card(folder: Path) -> Card:
    """Read the card of a model folder; an empty one where the folder has none.

    Raises:
        CheckpointError: it can't be read, or an entry has another type.
    """
    file = folder / CARD
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(contents, dict):
            raise ValueError(f"it holds a JSON {type(contents).__name__}, not an object")
        return Card.from_dict(contents)
    except FileNotFoundError:
        return EMPTY
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def write_card(card: Card, folder: Path) -> None:
    """Write a card into a folder that exists; what it leaves open is left out."""
    stated = {name: value for name, value in asdict(card).items() if value not in (None, ())}
    (folder / CARD).write_text(json.dumps(stated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
