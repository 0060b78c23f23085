"""Randomness of tests: each test is a function of its own seed, in any order, and on a machine that others use too."""

import random
import sys
import zlib

import numpy as np
from hypothesis import HealthCheck, settings


def load_profiles() -> None:
    """Let hypothesis draw the same examples each time, and judge nothing by the time that it takes.

    `--hypothesis-profile=search` draws other examples in each run.
    """
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("search", **patient)
    settings.register_profile("same", derandomize=True, database=None, **patient)
    settings.load_profile("same")


def begin(name: str) -> None:
    """Seed the generators that libraries share: a fixture or test draws the same after any other one."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
