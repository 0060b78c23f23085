"""Pages run from top to bottom in a fresh clone, and the names that they mention are there."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import sdjax
from tests.docs import standins
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, blocks
from tests.docs.session import Session

MARKS = ("", "draw", "files", "server", "needs", "not run", "tests")


def ids(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    standins.fill_hub_cache(folder)
    return folder


@pytest.fixture
def session(request, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(hub))
    import huggingface_hub.constants as hub_constants

    # The library reads both when it is imported, which may be long ago in this process.
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    made = Session(tmp_path, hub, request.param)
    yield made
    made.close()


WITH_BLOCKS = [page for page in PAGES if any(block.language in LANGUAGES for block in blocks(page))]


@pytest.mark.parametrize("session", WITH_BLOCKS, indirect=True, ids=ids(WITH_BLOCKS))
def test_every_block_runs_after_the_ones_before_it(session):
    for block in blocks(session.page):
        has_device = block.mark != "needs" or block.value in {device.platform for device in jax.devices()}
        if block.language in LANGUAGES and block.mark not in ("not run", "tests") and has_device:
            session.run(block)


@pytest.mark.parametrize("session", [ROOT / "README.md"], indirect=True, ids=["README.md"])
def test_the_pure_functions_of_the_readme_draw_what_its_facade_draws(session):
    for block in blocks(session.page):
        if block.language == "python" and "pictures" not in session.names:
            session.run(block)
    assert len(session.names["out"].images) == len(session.names["out"].seeds) == 4
    same = sdjax.Pipeline.from_pretrained()("a red circle on a blue background", seed=1, sampler="unipc", steps=8)
    drawn = np.round(255 * np.asarray(session.names["pictures"])[0])
    assert np.abs(drawn - np.asarray(same.images[0], np.float32)).max() <= 1


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_block_says_what_it_is(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), "a block that is not seen"
    assert not re.search(r"\n\n    \S", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), (
        "an indented block does not run"
    )
    for block in found:
        assert block.language, f"line {block.line}: name the language"
        assert block.mark in MARKS, f"line {block.line}: there is no mark {block.mark!r}"
        assert block.mark != "not run" or len(block.value.split()) > 3, f"line {block.line}: say why it does not run"


def test_the_block_that_runs_the_tests_is_what_ci_runs():
    (block,) = [block for block in blocks(ROOT / "README.md") if block.mark == "tests"]
    assert block.code.rstrip().endswith("-m pytest")
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


DOTTED = re.compile(r"`sdjax((?:\.[A-Za-z_]\w*)+)")


def test_names_that_pages_mention_are_there_after_importing_the_package_alone():
    mentioned = {name for page in PAGES for name in DOTTED.findall(page.read_text(encoding="utf-8"))}
    for name in sorted({*mentioned, ".sharding.make_mesh", ".xla_flags.set_flags"}):
        script = f"import operator, sdjax; operator.attrgetter({name[1:]!r})(sdjax)"
        subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=300)


def test_importing_the_package_imports_nothing_that_is_slow():
    script = "import sys, sdjax; slow = {'jax', 'flax', 'numpy', 'PIL'} & sys.modules.keys(); assert not slow, slow"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=300)
