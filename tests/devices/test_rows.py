"""Rows of a batch on a CPU: each is a call of its own, and as many run beside each other as have cores and memory."""

import threading
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.devices.rows import jit_rows
from sdjax.devices.sharding import SHARED
from sdjax.devices.target import CPU, Target, cores

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere rows are computed together")
PARAMS = {"weight": jnp.float32(2)}


@dataclass(frozen=True)
class Definition:
    target: Target


DEFINITION = Definition(CPU)


class Meeting:
    """Rows wait in it for each other, and it counts how many were inside at one time."""

    def __init__(self, party, patience=300.0):
        self.barrier, self.patience = threading.Barrier(party), patience
        self.guard, self.inside, self.most = threading.Lock(), 0, 0

    def __call__(self, x):
        with self.guard:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.barrier.wait(self.patience)
        time.sleep(0.01)
        with self.guard:
            self.inside -= 1
        return np.asarray(x)


def meeting_rows(meeting, at_once=None):
    def function(definition, params, x, shared):
        met = jax.pure_callback(meeting, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return {"sum": (met * params["weight"] + shared).sum(-1)}

    return jit_rows(function, lambda *_: (0, SHARED), reads=lambda _: PARAMS, at_once=at_once)


@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_rows_run_beside_each_other():
    meeting = Meeting(1)
    x, shared = jnp.arange(12.0).reshape(4, 3), jnp.float32(1)
    function = meeting_rows(meeting, lambda *_: 2)
    function(DEFINITION, PARAMS, x, shared)  # whoever comes while it is compiled waits for the end of the first call
    meeting.barrier = threading.Barrier(2)
    result = function(DEFINITION, PARAMS, x, shared)
    np.testing.assert_array_equal(result["sum"], (2 * x + 1).sum(-1))
    assert meeting.most == 2


def test_no_more_rows_hold_memory_than_are_allowed():
    meeting = Meeting(1)
    meeting_rows(meeting, lambda *_: 1)(DEFINITION, PARAMS, jnp.ones((4, 3)), jnp.float32(1))
    assert meeting.most == 1


def test_a_row_that_fails_is_an_error_and_the_rest_is_not_begun():
    seen = []

    def failing(x):
        seen.append(x)
        raise ValueError("this row is cursed")

    with pytest.raises(Exception, match="this row is cursed"):
        meeting_rows(failing, lambda *_: 1)(DEFINITION, PARAMS, jnp.ones((50, 3)), jnp.float32(1))
    assert len(seen) < 50


def test_another_number_of_pictures_compiles_nothing_large(compilations):
    large = {"jit(encode_prompt)", "jit(denoise)", "jit(decode)"}
    jax.clear_caches()  # of what tests before this one have compiled
    pipe = sdjax.Pipeline.from_pretrained()
    pipe("a red circle", seed=1, steps=2)
    assert large <= set(compilations)
    compilations.clear()
    pipe(["a red circle", "a blue star", "a green ring"], seed=1, steps=2)
    assert not large & set(compilations)
