"""What tests of several folders use."""

import jax
import pytest

from sdjax.devices.programs import COMPILED
from sdjax.devices.xla_flags import set_flags
from sdjax.terminal import keep_compiled_programs
from tests import peers, seeds


def pytest_ignore_collect(collection_path):
    """Without PyTorch the tests that compare with it are left out; `None` leaves all others to pytest."""
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    return True if not peers.ARE_HERE and file.suffix == ".py" and peers.needs_peers(file) else None


def pytest_configure():
    """What one test compiles, or a process that it starts, serves all the others, in every worker.

    Flags differ in the last bit of what is computed, so they are those of the command and the server here too.
    """
    set_flags()
    keep_compiled_programs()
    seeds.load_profiles()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Each fixture draws the same after any other one."""
    seeds.begin(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Each test draws the same after any other one."""
    seeds.begin(pyfuncitem.nodeid)


@pytest.fixture
def compilations():
    """The names of the programs that XLA compiles while the test runs."""
    names = []

    def listen(event, duration, fun_name=None, **_):
        if event == COMPILED:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
