"""The API's description as one page of plain HTML: no script, and nothing from another host."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
code, .path { font-family: ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8883; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 700; text-transform: uppercase; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def docs_page(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document."""
    return "\n".join(_lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>'
    yield from (f"<p>{_text(part)}</p>" for part in info["description"].split("\n\n"))
    yield '<p>The same for programs: <a href="openapi.json">openapi.json</a></p><h2>Routes</h2>'
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield from _operation(path, method, operation, item.get("parameters", []))
    yield "<h2>Schemas</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}</p>'
        yield from _fields(schema)
    yield "</body></html>"


def _operation(path: str, method: str, operation: Mapping[str, Any], shared: list[Any]) -> Iterator[str]:
    head = f'<span class="method">{escape(method)}</span> <span class="path">{escape(path)}</span>'
    yield f"<details><summary>{head} {escape(operation['summary'])}</summary>"
    yield f"<p>{_text(operation.get('description', ''))}</p>"
    parameters = [*shared, *operation.get("parameters", [])]
    if parameters:
        yield "<table><tr><th>parameter</th><th>in</th><th>type</th><th></th></tr>"
        for each in parameters:
            cells = (f"<code>{escape(each['name'])}</code>", escape(each["in"]), _kind(each["schema"]))
            yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{_text(each['description'])}</td></tr>"
        yield "</table>"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"<p>Body, <code>{escape(kind)}</code>: {_kind(content['schema'])}</p>"
        yield from _fields(content["schema"])
    yield "<table><tr><th>status</th><th>body</th><th></th></tr>"
    for status, response in operation["responses"].items():
        bodies = ", ".join(_kind(content["schema"]) for content in response.get("content", {}).values())
        yield f"<tr><td>{escape(status)}</td><td>{bodies}</td><td>{_text(response['description'])}</td></tr>"
    yield "</table></details>"


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    if "properties" not in schema:
        return
    required = schema.get("required", [])
    yield "<table><tr><th>field</th><th>type</th><th></th></tr>"
    for name, field in schema["properties"].items():
        star = " (required)" if name in required else ""
        yield (
            f"<tr><td><code>{escape(name)}</code>{star}</td><td>{_kind(field)}</td>"
            f"<td>{_text(field.get('description', ''))}</td></tr>"
        )
    yield "</table>"


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
