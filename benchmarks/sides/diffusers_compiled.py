"""diffusers with `torch.compile` over the model that is timed."""

import torch

from benchmarks import peer_process
from benchmarks.cases import Case, Prepared
from benchmarks.sides import diffusers_eager


def prepare(case: Case) -> Prepared:
    """Make a case ready; the first run compiles."""
    if case.what.startswith("first-"):
        diffusers_eager.check_device(case)
        return peer_process.prepare(case, "compile")
    return diffusers_eager.prepare_with(case, lambda model: torch.compile(model))
