from functools import cache

import pytest
from originals import both_layouts

from sdjax.loading import load


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Tiny checkpoints in both layouts by family, each made once."""
    return cache(lambda name: both_layouts(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def loaded(layouts):
    """Checkpoints that were loaded from the original layout in float32, by family, each once."""
    return cache(lambda name: load(layouts(name).file, dtype="float32"))
