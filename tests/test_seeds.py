"""No test draws what another run would not draw, and none starts a process by a fork beside JAX's threads."""

import ast
import random

import numpy as np
import pytest
from hypothesis import settings

from tests.peers import ROOT

UNSEEDED = ("effect_noise", "urandom", "uuid4", "token_hex", "token_bytes", "randbits", "SystemRandom", "fork")
SEEDED_BY_AN_ARGUMENT = ("default_rng", "Random", "RandomState", "Generator")
FILES = sorted(file for folder in ("tests", "benchmarks", "training") for file in (ROOT / folder).rglob("*.py"))


def findings(source):
    """Lines that draw from a generator without a seed, or that fork."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_bare = name in SEEDED_BY_AN_ARGUMENT and not node.args and not node.keywords
        forks = any(keyword.arg == "preexec_fn" for keyword in node.keywords)
        if name in UNSEEDED or (is_bare and ast.unparse(node.func) != "torch.Generator") or forks:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_every_generator_has_a_seed_and_no_process_is_forked():
    found = [
        f"{file.relative_to(ROOT)}, {each}" for file in FILES for each in findings(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source", ["np.random.default_rng()", "Image.effect_noise((2, 2), 9)", "run(c, preexec_fn=f)", "random.Random()"]
)
def test_what_has_no_seed_is_found(source):
    assert list(findings(source))


@pytest.mark.parametrize("turn", [1, 2])
def test_shared_generators_begin_anew_with_each_test(turn, request):
    drawn = random.random(), np.random.random()
    other = request.node.nodeid.replace(f"[{turn}]", f"[{3 - turn}]")
    from tests.seeds import begin

    begin(request.node.nodeid)
    assert drawn == (random.random(), np.random.random())
    begin(other)
    assert drawn != (random.random(), np.random.random())


def test_examples_are_the_same_each_time_and_not_judged_by_their_time():
    assert settings.default.derandomize
    assert settings.default.deadline is None
