"""Every store, opened as often as a test likes."""

import pytest

from tests.serve.store.stores import STORES


@pytest.fixture(params=sorted(STORES))
def open_store(request, tmp_path):
    opened = []

    def open_one(folder="store"):
        opened.append(STORES[request.param](tmp_path / folder))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()
