"""An engine in the tests' process, with the bundled model and a store of its own."""

import hashlib
import io
import time

import pytest

import sdjax
from sdjax.serve.buckets import bucket
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import FINAL
from tests.serve.engine.jobs import REQUEST


@pytest.fixture(scope="module")
def pipe():
    return sdjax.Pipeline.from_pretrained()


@pytest.fixture
def store(tmp_path):
    store = SqliteStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def start(pipe, store):
    """Start engines that end with the test. What one compiles serves the next."""
    engines = []

    def start_one(pipe=pipe, **options):
        engine = GenerationEngine(pipe, store, **{"batch_sizes": (1, 2), "slots": 4, **options})
        engines.append(engine)
        engine.start()
        engine.wait_until_ready()
        return engine

    yield start_one
    for engine in engines:
        engine.drain(0.0)


@pytest.fixture
def submit(store):
    def submit_one(pictures=None, **options):
        request = {**REQUEST, **options}
        blobs = {}
        for name, picture in (pictures or {}).items():
            file = io.BytesIO()
            picture.save(file, "PNG")
            digest = hashlib.sha256(file.getvalue()).hexdigest()
            request[name], blobs[digest] = {"blob": digest}, file.getvalue()
        return store.submit(request, bucket=bucket(request), blobs=blobs)

    return submit_one


@pytest.fixture
def ended(store):
    """Wait for jobs, and give their last events."""

    def wait_for(jobs, seconds=120):
        deadline = time.monotonic() + seconds
        while any(store.job(job.id).state not in FINAL for job in jobs):
            assert time.monotonic() < deadline, [store.job(job.id) for job in jobs]
            time.sleep(0.01)
        return [store.events(job.id)[-1] for job in jobs]

    return wait_for
