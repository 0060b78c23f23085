"""The API's description as one page of plain HTML: no script, and nothing from another host."""

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

TRY = """curl SERVER/v1/jobs -d '{"operation": "image_generation", "prompt": "a red circle"}'
curl -N SERVER/v1/jobs/JOB_ID/stream        # queued, progress, complete"""


def docs_page(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document."""
    return "\n".join(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}: the API"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield '<link rel="icon" href="favicon.svg" type="image/svg+xml">'
    yield '<link rel="stylesheet" href="page.css"><link rel="stylesheet" href="docs.css"></head><body>'
    yield '<header class="bar">'
    yield '<a class="brand" href="./"><img src="favicon.svg" alt="" width="28" height="28"> sdjax</a>'
    yield '<nav aria-label="More"><a href="./">Back to the pictures</a></nav></header>'
    yield f'<main class="docs"><h1>{title}</h1>'
    yield from (f"<p>{_text(part)}</p>" for part in info["description"].split("\n\n"))
    yield f"<pre>{escape(TRY)}</pre>"
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a></p><h2>Routes</h2>'
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield from _operation(path, method, operation, item.get("parameters", []))
    yield "<h2>Schemas</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<div class="box"><h3 id="{escape(name)}">{escape(name)}</h3>'
        yield f"<p>{_text(schema.get('description', ''))}</p>"
        yield from _fields(schema)
        yield "</div>"
    yield "</main></body></html>"


def _operation(path: str, method: str, operation: Mapping[str, Any], shared: list[Any]) -> Iterator[str]:
    head = f'<span class="method {escape(method)}">{escape(method)}</span><span class="path">{escape(path)}</span>'
    yield f'<details class="box"><summary>{head}<span class="what">{escape(operation["summary"])}</span></summary>'
    if "description" in operation:
        yield f"<p>{_text(operation['description'])}</p>"
    parameters = [*shared, *operation.get("parameters", [])]
    if parameters:
        rows = (
            (
                f"<code>{escape(each['name'])}</code>",
                escape(each["in"]),
                _kind(each["schema"]),
                _text(each["description"]),
            )
            for each in parameters
        )
        yield from _table(("parameter", "in", "type", ""), rows)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body, <code>{escape(kind)}</code>: {_kind(content['schema'])}</p>"
        yield from _fields(content["schema"])
    answers = (
        (
            escape(status),
            ", ".join(_kind(content["schema"]) for content in response.get("content", {}).values()),
            _text(response["description"]),
        )
        for status, response in operation["responses"].items()
    )
    yield from _table(("status", "body", ""), answers)
    yield "</details>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table of HTML cells, which scrolls where it is wider than the screen."""
    yield f'<div class="table"><table><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
    for row in rows:
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>"
    yield "</table></div>"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    if "properties" not in schema:
        return
    required = schema.get("required", [])
    rows = (
        (
            f"<code>{escape(name)}</code>" + (' <span class="required">required</span>' if name in required else ""),
            _kind(field),
            _text(field.get("description", "")),
        )
        for name, field in schema["properties"].items()
    )
    yield from _table(("field", "type", ""), rows)


def _kind(schema: Mapping[str, Any]) -> str:
    """A type in a few words, with its limits."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return " or ".join(_kind(option) for option in schema[choice])
    if "enum" in schema:
        return ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if schema.get("const") == "":
        return '<code>""</code>'
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    kind = schema.get("type", "any")
    words = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if "items" in schema:
        words += " of " + _kind(schema["items"])
    limits = [f"{sign} {schema[name]}" for name, sign in _LIMITS.items() if name in schema]
    return ", ".join([words if "<" in words else escape(words), *map(escape, limits)])


def _text(text: str) -> str:
    """Escaped, with `code` set as such."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


_LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "multipleOf": "multiple of",
    "minLength": "length at least",
    "maxLength": "length at most",
    "maxItems": "items at most",
}
