"""The convention of AUTOMATIC1111's web UI, which sdjax writes too.

A text holds the prompt, a line `Negative prompt: ...` where there is one, and a last line
`Steps: 20, Sampler: ddim, CFG scale: 3.0, Seed: 1, Size: 64x64, Model: tiny`. The last line is where a reader starts,
so a prompt may hold anything, lines that look like the others included.
"""

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdjax.metadata.fields import fields, layers_left_out

NEGATIVE = "Negative prompt: "
LABELS: Mapping[str, str] = MappingProxyType(
    {
        "Steps": "steps",
        "Sampler": "sampler",
        "Schedule type": "schedule",
        "CFG scale": "guidance_scale",
        "Seed": "seed",
        "Size": "size",
        "Denoising strength": "strength",
        "Loras": "loras",
        "Clip skip": "clip_skip",
        "Long prompts": "long_prompts",
        "Embeddings": "embeddings",
        "Model": "model",
    }
)
# A label's length has a bound, or looking for one in a long text would take quadratic time.
_ENTRY = re.compile(r'(\w[\w /-]{0,60}): *("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
ENOUGH = 3
"""Known labels that make a line one of parameters, where it does not begin with the steps."""


def to_text(prompt: str, negative_prompt: str | None, settings: Mapping[str, Any]) -> str:
    """Write parameters as one text.

    Args:
        prompt: as it was given.
        negative_prompt: as it was given; None writes no line.
        settings: by the values of `LABELS`; what is None is left out.
    """
    written = _as_others_count(settings)
    entries = [(label, written.get(name)) for label, name in LABELS.items()]
    line = ", ".join(f"{label}: {_quoted(value)}" for label, value in entries if value is not None)
    # A negative prompt of several lines, or a prompt with a line like a negative prompt's, would not read back.
    negative = [] if negative_prompt is None else [NEGATIVE + _escaped(negative_prompt)]
    return "\n".join([_escaped(prompt), *negative, *([line] if line else [])])


def from_infotext(text: str) -> dict[str, Any]:
    """Read what `to_text` wrote, or what another tool did; without a line of parameters all is the prompt."""
    body, last = _parts(text)
    lines = body.split("\n")
    found = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), None)
    prompt, negative = (
        (lines, None) if found is None else (lines[:found], "\n".join(lines[found:]).removeprefix(NEGATIVE))
    )
    entries = {label: _unquoted(value) for label, value in _ENTRY.findall(last)}
    known: dict[str, object] = {LABELS[label]: value for label, value in entries.items() if label in LABELS}
    if "clip_skip" in known:
        known["clip_skip"] = layers_left_out(known["clip_skip"])
    return fields(
        _unescaped("\n".join(prompt)),
        None if negative is None else _unescaped(negative),
        known,
        {label: value for label, value in entries.items() if label not in LABELS},
    )


def has_parameters(text: str) -> bool:
    """Whether a text has a line of parameters at its end."""
    return bool(_parts(text)[1])


def _parts(text: str) -> tuple[str, str]:
    """What stands before the line of parameters, and that line; empty where there is none."""
    body, _, last = text.rstrip("\r\n\t \0").rpartition("\n")
    return (body, last) if _is_parameters(last) else (text, "")


def _is_parameters(line: str) -> bool:
    return line.startswith("Steps: ") or len({label for label, _ in _ENTRY.findall(line)} & LABELS.keys()) >= ENOUGH


def _as_others_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as tools with this convention have them: a `clip_skip` of ours is one more there, 1 being none."""
    skip = settings.get("clip_skip")
    return {
        **settings,
        "clip_skip": None if skip is None else skip + 1,
        "long_prompts": None if settings.get("long_prompts") == "truncate" else settings.get("long_prompts"),
        "loras": ", ".join(settings.get("loras") or []) or None,
        "embeddings": ", ".join(settings.get("embeddings") or []) or None,
    }


def _escaped(text: str) -> str:
    """Mark the lines of a prompt that would be taken for something else, and those that already carry the mark."""
    return "\n".join(f"\\{line}" if _is_marked(line) else line for line in text.split("\n"))


def _unescaped(text: str) -> str:
    """Remove the marks; a prompt of another tool may begin with a backslash of its own."""
    return "\n".join(line[1:] if line.startswith("\\") and _is_marked(line[1:]) else line for line in text.split("\n"))


def _is_marked(line: str) -> bool:
    return line.startswith(("\\", NEGATIVE)) or _is_parameters(line)


def _quoted(value: object) -> str:
    text = str(value)
    is_plain = text == text.strip() and not any(mark in text for mark in ',:"\n')
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    """A value in quotes without them; any other as it stands, quotes in its middle included."""
    text = text.strip()
    if not text.startswith('"'):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
