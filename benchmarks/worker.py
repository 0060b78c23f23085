"""One side in a process of its own, so that its memory is its own: told on standard input when to run.

Every answer is one line of JSON on standard output. The peak of host memory is counted from what the side's imports
left, so that it is the model's and not the framework's.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.cases import Case, Prepared, Skipped
from benchmarks.sides import SIDES
from sdjax.measuring import peak_bytes, resident_bytes, timed


def main(side: str, case: Case) -> None:
    """Prepare a case, then answer `run` and `matmul` with seconds until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    prepared: Prepared | None = None

    def prepare() -> None:
        nonlocal prepared
        prepared = module.prepare(case)

    try:
        module = importlib.import_module(SIDES[side])
        imported = resident_bytes()
        preparing = timed(prepare)
    except (ImportError, Skipped) as reason:
        answer(skipped=str(reason))
        return
    assert prepared is not None
    try:
        elsewhere = prepared.peak_bytes

        def measured(work: Callable[[], object]) -> dict[str, Any]:
            run = timed(work)
            return {
                "seconds": run.seconds,
                "cpu_seconds": run.cpu_seconds if elsewhere is None else None,
                "peak_host_bytes": peak_bytes() - imported if elsewhere is None else elsewhere(),
                "peak_device_bytes": _device_peak(side) if elsewhere is None else None,
            }

        answer(
            prepare_seconds=preparing.seconds,
            first=measured(prepared.run),
            flops=prepared.flops,
            has_matmul=prepared.matmul is not None,
            notes=dict(prepared.notes),
        )
        for line in sys.stdin:
            answer(**measured(prepared.matmul if line.strip() == "matmul" and prepared.matmul else prepared.run))
    finally:
        prepared.close()


def _device_peak(side: str) -> int | None:
    """Peak bytes on the accelerator, where there is one."""
    if side in ("sdjax", "diffusers-flax"):
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        return None if not statistics else statistics.get("peak_bytes_in_use")
    if side.startswith("diffusers") and "torch" in sys.modules:
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
    return None


if __name__ == "__main__":
    main(sys.argv[1], Case(**json.loads(sys.argv[2])))
