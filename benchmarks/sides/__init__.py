"""One module for each contender: `prepare(case)` makes it ready, or raises `Skipped` (an absent package skips too)."""

from collections.abc import Mapping

SIDES: Mapping[str, str] = {
    "sdjax": "benchmarks.sides.ours",
    "diffusers": "benchmarks.sides.diffusers_eager",
    "diffusers-compile": "benchmarks.sides.diffusers_compiled",
    "diffusers-flax": "benchmarks.sides.diffusers_flax",
    "openvino": "benchmarks.sides.openvino",
}
"""Name on the command line, and module, whose import is the worker's memory baseline."""
