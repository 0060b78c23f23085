"""The API's description: OpenAPI 3.1, its schemas taken from the models that check the requests."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import sdjax
from sdjax.serve.openai_schemas import Edit, Generation
from sdjax.serve.schemas import (
    EVENTS,
    Accepted,
    ErrorAnswer,
    Health,
    ImageGeneration,
    ImageInpaint,
    ImageTransform,
    JobList,
    JobView,
    Readiness,
)

REFERENCE = "#/components/schemas/"
OPERATIONS: Mapping[str, type[BaseModel]] = {
    "image_generation": ImageGeneration,
    "image_transform": ImageTransform,
    "image_inpaint": ImageInpaint,
}
INPUTS = ["input_image", "init_image", "mask_image"]
SUMMARY = """Submit a job, listen to its stream, fetch its pictures; or use the routes that OpenAI's image clients call.

A field that an operation doesn't have is an error. Fields with a default take null for it. Errors of the job routes are
`{"error": {"code", "message", "field"}}`, those of /v1/images and /v1/models `{"error": {"message", "type", "param",
"code"}}`. Where the server has keys, send `Authorization: Bearer <key>`; a key sees its own jobs only."""
ERRORS: Mapping[int, str] = {
    400: "The body is not a JSON object.",
    401: "No key, or a wrong one.",
    403: "A page of another origin, or another host's name.",
    404: "There is no such thing.",
    405: "The path has no such method.",
    408: "The body did not arrive in time.",
    409: "It does not fit: another model is served, or the job has already ended, or not yet.",
    410: "The job was cancelled while its client waited, or its picture is not on the server's disk any more.",
    413: "The body is too large.",
    422: "A field is wrong; `field` names it.",
    429: "The queue is full, or this key has enough unfinished jobs: see Retry-After.",
    500: "The server's fault.",
    503: "The model is being loaded, the server is about to stop, or its disk fails: see Retry-After.",
    507: "The server's disk is full: see Retry-After.",
}
EVENT_TEXT = """Server-sent events: `queued`, `progress`, `preview`, then `complete`, `error` or `cancelled`, after
which the stream ends. Each has an `id`; `Last-Event-ID` goes on after it, and an id that is none of the job's tells the
story from its beginning. Any number may listen, at any time. Comments keep the connection alive. `closing`, without an
id, says that the server stops before the job is done."""
OPENAI_STREAM = """With `stream`, server-sent events without ids: `{prefix}.partial_image` at most `partial_images`
times, then `{prefix}.completed` for each picture."""


@cache
def document() -> dict[str, Any]:
    """The whole description."""
    answers = (*EVENTS, Accepted, JobView, JobList, ErrorAnswer, Health, Readiness)
    models: list[type[BaseModel]] = [*OPERATIONS.values(), *answers, Generation, Edit]
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=REFERENCE + "{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdjax", "version": sdjax.__version__, "description": SUMMARY},
        "paths": {**_job_paths(), **_openai_paths(), **_operation_paths()},
        "components": {
            "schemas": {
                **schemas["$defs"],
                "OpenAIError": OPENAI_ERROR,
                "Images": IMAGES,
                "Model": MODEL,
                "Models": MODELS,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _job_paths() -> dict[str, Any]:
    job_id = _parameter("job_id", "path", {"type": "string"}, "Of a job.")
    limit = _parameter(
        "limit", "query", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}, "Jobs a page."
    )
    before = _parameter(
        "before", "query", {"type": "string", "pattern": "^[0-9a-f]{32}$"}, "`next` of the page before."
    )
    last = _parameter("Last-Event-ID", "header", {"type": "string"}, "Of the last event that was heard.")
    number = _parameter("n", "path", {"type": "integer", "minimum": 0}, "From 0 on.")
    key = _parameter(
        "Idempotency-Key",
        "header",
        {"type": "string", "minLength": 1, "maxLength": 255},
        "A request with a key that was used before is answered with the first one's job.",
    )
    request = {
        "oneOf": [{"$ref": REFERENCE + model.__name__} for model in OPERATIONS.values()],
        "discriminator": {
            "propertyName": "operation",
            "mapping": {name: REFERENCE + model.__name__ for name, model in OPERATIONS.items()},
        },
    }
    pictures = {
        kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp")
    }
    return {
        "/v1/jobs": {
            "post": {
                "summary": "Submit a job",
                "operationId": "submit",
                "description": "The body is read as JSON whatever its content type.",
                "parameters": [key],
                "requestBody": _body("application/json", request),
                "responses": _responses(
                    _json("Accepted", "It waits."), 400, 401, 403, 408, 409, 413, 422, 429, 503, 507
                ),
            },
            "get": {
                "summary": "List jobs, newest first",
                "operationId": "list",
                "parameters": [limit, before],
                "responses": _responses(_json("JobList", "A page."), 401, 403, 404, 422, 503),
            },
        },
        "/v1/jobs/{job_id}": {
            "parameters": [job_id],
            "get": {
                "summary": "Read a job",
                "operationId": "read",
                "responses": _responses(_json("JobView", "The job."), 401, 403, 404, 503),
            },
            "delete": {
                "summary": "Cancel a job",
                "operationId": "cancel",
                "description": "Cancelling twice is fine. A job that ended otherwise stays as it is: 409.",
                "responses": _responses(_json("JobView", "It is cancelled."), 401, 403, 404, 409, 503, 507),
            },
        },
        "/v1/jobs/{job_id}/stream": {
            "parameters": [job_id],
            "get": {
                "summary": "Listen to a job",
                "operationId": "listen",
                "description": EVENT_TEXT,
                "parameters": [last],
                "responses": {
                    "200": {"description": "Events.", "content": {"text/event-stream": {"schema": _events(*EVENTS)}}},
                    "204": {"description": "The end was heard already: don't come back."},
                    **_errors("ErrorAnswer", 401, 403, 404, 503),
                },
            },
        },
        "/v1/jobs/{job_id}/images/{n}": {
            "parameters": [job_id, number],
            "get": {
                "summary": "Fetch a picture",
                "operationId": "image",
                "responses": {
                    "200": {"description": "In the job's format.", "content": pictures},
                    **_errors("ErrorAnswer", 401, 403, 404, 410, 503),
                },
            },
        },
        "/v1/jobs/{job_id}/inputs/{name}": {
            "parameters": [job_id, _parameter("name", "path", {"enum": INPUTS}, "The request's field.")],
            "get": {
                "summary": "Fetch a picture that the request brought",
                "operationId": "input",
                "responses": {
                    "200": {"description": "As it came.", "content": pictures},
                    **_errors("ErrorAnswer", 401, 403, 404, 410, 503),
                },
            },
        },
        "/v1/jobs/{job_id}/record": {
            "parameters": [job_id],
            "delete": {
                "summary": "Forget a job that has ended, and its pictures",
                "operationId": "delete",
                "responses": {
                    "204": {"description": "It is gone."},
                    **_errors("ErrorAnswer", 401, 403, 404, 409, 503, 507),
                },
            },
        },
    }


def _openai_paths() -> dict[str, Any]:
    files = {
        "image": {"type": "string", "format": "binary", "description": "`image[]` is the same."},
        "mask": {"type": "string", "format": "binary", "description": "What is fully transparent is repainted."},
    }
    edit = Edit.model_json_schema(ref_template=REFERENCE + "{model}")
    edit = {**edit, "properties": {**edit["properties"], **files}, "required": [*edit["required"], "image"]}
    paths: dict[str, Any] = {}
    for path, kind, schema, prefix in (
        ("generations", "application/json", {"$ref": REFERENCE + "Generation"}, "image_generation"),
        ("edits", "multipart/form-data", edit, "image_edit"),
    ):
        answer = {
            "description": "The pictures.",
            "content": {
                "application/json": {"schema": {"$ref": REFERENCE + "Images"}},
                "text/event-stream": {"schema": _events()},
            },
        }
        paths[f"/v1/images/{path}"] = {
            "post": {
                "summary": f"OpenAI's images/{path}",
                "operationId": f"images_{path}",
                "description": OPENAI_STREAM.format(prefix=prefix),
                "requestBody": _body(kind, schema),
                "responses": {
                    "200": answer,
                    **_errors("OpenAIError", 400, 401, 403, 408, 410, 413, 429, 500, 503, 507),
                },
            }
        }
    paths["/v1/models"] = {
        "get": {
            "summary": "OpenAI's list of models",
            "operationId": "models",
            "responses": {"200": _json("Models", "All."), **_errors("OpenAIError", 401, 403)},
        }
    }
    paths["/v1/models/{name}"] = {
        "parameters": [_parameter("name", "path", {"type": "string"}, "Of the model.")],
        "get": {
            "summary": "One of them",
            "operationId": "model",
            "responses": {
                "200": _content({"$ref": REFERENCE + "Model"}, "The model."),
                **_errors("OpenAIError", 401, 403, 404),
            },
        },
    }
    return paths


def _operation_paths() -> dict[str, Any]:
    texts = {"/metrics": "text/plain", "/docs": "text/html"}
    paths: dict[str, Any] = {
        "/health": {
            "get": {
                "summary": "Whether the process lives",
                "operationId": "health",
                "responses": _responses(_json("Health", "The process is up."), 403),
            }
        },
        "/ready": {
            "get": {
                "summary": "Whether jobs are drawn",
                "operationId": "ready",
                "responses": {
                    "200": _json("Readiness", "The model is loaded and compiled."),
                    "503": _json("Readiness", "Not yet, or not any more."),
                    **_errors("ErrorAnswer", 403),
                },
            }
        },
        "/openapi.json": {
            "get": {
                "summary": "This document",
                "operationId": "openapi",
                "responses": {"200": _content({"type": "object"}, "OpenAPI 3.1."), **_errors("ErrorAnswer", 403)},
            }
        },
    }
    for path, kind in texts.items():
        paths[path] = {
            "get": {
                "summary": "Numbers for Prometheus" if path == "/metrics" else "This document for people",
                "operationId": path[1:],
                "responses": {
                    "200": {"description": "Text.", "content": {kind: {"schema": {"type": "string"}}}},
                    **_errors("ErrorAnswer", *((401, 403) if path == "/metrics" else (403,))),
                },
            }
        }
    return paths


def _events(*kinds: type[BaseModel]) -> dict[str, Any]:
    """The schema of one event of a stream, as OpenAPI 3.2 describes them: strings, and JSON in `data`."""
    data = {"oneOf": [{"$ref": REFERENCE + kind.__name__} for kind in kinds]} if kinds else {"type": "object"}
    said = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"id": _TEXT, "event": _TEXT, "data": said}, "required": ["event", "data"]}


def _parameter(name: str, place: str, schema: Mapping[str, Any], what: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": dict(schema), "description": what}


def _body(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": dict(schema)}}}


def _content(schema: Mapping[str, Any], what: str) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": dict(schema)}}}


def _json(name: str, what: str) -> dict[str, Any]:
    return _content({"$ref": REFERENCE + name}, what)


def _responses(success: Mapping[str, Any], *statuses: int) -> dict[str, Any]:
    return {"200": dict(success), **_errors("ErrorAnswer", *statuses)}


def _errors(shape: str, *statuses: int) -> dict[str, Any]:
    return {str(status): _json(shape, ERRORS[status]) for status in statuses}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: Mapping[str, Any] = {"type": "string"}
_TEXT_OR_NULL: Mapping[str, Any] = {"type": ["string", "null"]}
_NAMES: Sequence[str] = ("b64_json", "url")
OPENAI_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL))
IMAGES = _object(
    created={"type": "integer"},
    data={"type": "array", "items": {"type": "object", "properties": dict.fromkeys(_NAMES, _TEXT)}},
    size=_TEXT,
    quality=_TEXT,
    background=_TEXT,
    output_format=_TEXT,
    usage={"type": "object"},
    seed={"type": "integer"},
)
IMAGES["properties"]["warnings"] = {"type": "array", "items": _TEXT}
MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created={"type": "integer"},
    owned_by=_TEXT,
    sdjax=_object(
        steps={"type": "integer"},
        guidance_scale={"type": "number"},
        sampler=_TEXT,
        size={"type": "integer"},
        least_side={"type": "integer"},
        needs_mask={"type": "boolean"},
    ),
)
MODELS = _object(object={"const": "list"}, data={"type": "array", "items": {"$ref": REFERENCE + "Model"}})
