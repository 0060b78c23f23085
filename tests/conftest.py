"""What tests of several folders use."""

import jax
import pytest


@pytest.fixture
def compilations():
    """Count the programs that XLA compiles while the test runs."""
    names = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.clear_event_listeners()
