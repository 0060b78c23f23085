"""One side in a process of its own, so that its memory is its own: told on standard input when to run.

Every answer is one line of JSON on standard output. The peak of host memory is counted from what the side's imports
left, so that it is the model's and not the framework's.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Skipped
from benchmarks.sides import SIDES


def main(side: str, case: Case) -> None:
    """Prepare a case, then answer `run` and `matmul` with seconds until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        module = importlib.import_module(SIDES[side])
        imported = _status("VmRSS")
        began = time.perf_counter()
        prepared = module.prepare(case)
    except (ImportError, Skipped) as reason:
        answer(skipped=str(reason))
        return
    prepared_seconds = time.perf_counter() - began
    began = time.perf_counter()
    prepared.run()
    answer(
        prepare_seconds=prepared_seconds,
        first_seconds=time.perf_counter() - began,
        flops=prepared.flops,
        notes=dict(prepared.notes),
    )
    for line in sys.stdin:
        work = prepared.matmul if line.strip() == "matmul" else prepared.run
        began, computed = time.perf_counter(), time.process_time()
        work()
        answer(
            seconds=time.perf_counter() - began,
            cpu_seconds=time.process_time() - computed,
            peak_host_bytes=_status("VmHWM") - imported,
            peak_device_bytes=_device_peak(side),
        )


def _status(field: str) -> int:
    """A size from Linux's account of this process, in bytes; elsewhere the largest resident set so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_peak(side: str) -> int | None:
    """Peak bytes on the accelerator, where there is one."""
    if side == "sdjax":
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        return None if not statistics else statistics.get("peak_bytes_in_use")
    if side.startswith("diffusers") and "torch" in sys.modules:
        import torch

        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
    return None


if __name__ == "__main__":
    main(sys.argv[1], Case(**json.loads(sys.argv[2])))
