"""Code blocks of Markdown pages, and the comments that say how they run.

A block runs where it stands, after the ones before it. An HTML comment on the line before a block changes that:

    <!-- files: toy.safetensors -->     files that a reader has: stand-ins of `tests.docs.standins` are put there first
    <!-- server -->                     its last command is a server, which answers `/ready` before the next block runs
                                        and ends with the page; the port 8600 of the page is a free one
    <!-- needs: gpu -->                 runs where JAX has such a device
    <!-- not run: REASON -->            for what nothing can stand in for; the reason must be good
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md")
LANGUAGES = ("sh", "python")
"""Blocks that run; others show files and answers."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A block of code.

    Attributes:
        line: of the page, where the code begins.
        language: as the page has it.
        code: what runs.
        mark: of the comment before it, such as "files"; empty where there is none.
        value: behind the mark's colon.
    """

    line: int
    language: str
    code: str
    mark: str
    value: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        mark, _, value = (match["mark"] or "").partition(": ")
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(line, match["language"], match["code"], mark, value))
    return found
