"""The description is true: schemathesis sends what it allows and what it doesn't, and reads the answers by it."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from sdjax.serve.openapi import document
from sdjax.serve.routes import jobs, openai, operations

OPERATIONS = [
    (path, method)
    for path, item in document()["paths"].items()
    for method in item
    if method in ("get", "post", "delete")
]
WITH_LIMITS = [
    *(("/v1/jobs", "post"), ("/v1/jobs", "get"), ("/v1/jobs/{job_id}/images/{n}", "get")),
    *(("/v1/images/generations", "post"), ("/v1/images/edits", "post")),
]
"""What is not for a schema to say: that a string is a picture, or that one parameter needs another."""
BEYOND_SCHEMAS = [positive_data_acceptance]


@pytest.fixture(scope="module")
def described(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(operation, mode, excluded=()):
    @settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers_are_as_described(case):
        case.call_and_validate(excluded_checks=list(excluded))

    answers_are_as_described()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_what_is_allowed_is_answered_as_described(described, path, method):
    check(described[path][method], GenerationMode.POSITIVE, BEYOND_SCHEMAS if method == "post" else ())


@pytest.mark.parametrize(("path", "method"), WITH_LIMITS)
def test_what_is_not_allowed_is_refused_as_described(described, path, method):
    check(described[path][method], GenerationMode.NEGATIVE)


def test_every_route_is_described():
    routes = {}
    for module in (jobs, openai, operations):
        routes |= {route.path.replace(":path", ""): route.methods - {"HEAD"} for route in module.ROUTES}
    paths = document()["paths"].items()
    assert {path: {name.upper() for name in item if name != "parameters"} for path, item in paths} == routes
