"""Runs the sides of a case in turns (A, B, A, B, …), each in its worker, so that both meet the same weather.

A worker stays for all turns, but for cases of which a process's first run is what counts: those have one for each.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases import MATMUL_SIZE, ONCE_A_PROCESS, Case
from sdjax.measuring import summary

REPOSITORY = Path(__file__).parent.parent


class Worker:
    """A side's process; `setup` is its first answer."""

    def __init__(self, side: str, case: Case, python: str) -> None:
        self.side = side
        # A file: nobody reads a pipe while the worker works, and one that is full would hold it up.
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`close` ends it)
        command = [python, "-m", "benchmarks.worker", side, json.dumps({**case.as_dict(), "folder": case.folder})]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self.setup = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        """Have it do something once."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            return {"skipped": f"its process ended: {said[-1] if said else code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def measure(
    case: Case, sides: Sequence[str], *, repeats: int, pythons: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Time a case.

    Args:
        case: what to time.
        sides: names of contenders, sdjax first.
        repeats: timed runs of each, after one that isn't counted.
        pythons: the interpreter of a side, where it isn't this one.

    Returns:
        {"case", "sides": {name: result}}; a result is {"skipped": why}, or seconds (median, least, spread, all),
        memory, FLOP/s, the fraction of what the same process reaches in a matrix product, and, of a peer, `ratio` and
        `memory_ratio`: its median time over sdjax's, and sdjax's peak memory over its own.
    """
    results: dict[str, dict[str, Any]] = {}
    of_first_runs = case.what in ONCE_A_PROCESS
    with ExitStack() as stack:

        def start(side: str) -> Worker:
            worker = Worker(side, case, (pythons or {}).get(side, sys.executable))
            stack.callback(worker.close)
            return worker

        workers: dict[str, Worker] = {}
        for side in sides:
            worker = start(side)
            if "skipped" in worker.setup:
                results[side] = worker.setup
            else:
                workers[side] = worker
            if of_first_runs:
                worker.close()
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        matmuls: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(repeats):
            for side in list(workers):
                worker = start(side) if of_first_runs else workers[side]
                run = worker.setup.get("first", worker.setup) if of_first_runs else worker.ask("run")
                runs[side].append(run)
                if "skipped" in run:
                    results[side] = run
                    del workers[side]
                elif worker.setup["has_matmul"]:
                    matmuls[side].append(worker.ask("matmul").get("seconds", math.inf))
                if of_first_runs:
                    worker.close()
        flops = next((worker.setup["flops"] for worker in workers.values() if worker.setup["flops"]), None)
        for side, worker in workers.items():
            results[side] = _summary(worker.setup, runs[side], matmuls[side], flops)
    ours = results.get("sdjax", {})
    for side, result in results.items():
        if side != "sdjax" and "skipped" not in result and "skipped" not in ours and ours:
            result["ratio"] = result["seconds"] / ours["seconds"]
            # neighbours in time met the same weather: the median of their ratios is steadier than that of medians
            if result["cpu_seconds"] and ours["cpu_seconds"]:
                result["cpu_ratio"] = result["cpu_seconds"] / ours["cpu_seconds"]
            pairs = [theirs / own for theirs, own in zip(result["all_seconds"], ours["all_seconds"], strict=True)]
            result["paired_ratio"] = statistics.median(pairs)
            if result["peak_host_bytes"] > 0:
                result["memory_ratio"] = ours["peak_host_bytes"] / result["peak_host_bytes"]
    return {"case": case.as_dict(), "name": str(case), "sides": {side: results[side] for side in sides}}


def _summary(
    setup: dict[str, Any], runs: Sequence[dict[str, Any]], matmuls: Sequence[float], flops: float | None
) -> dict[str, Any]:
    seconds = [run["seconds"] for run in runs]
    spread = summary(seconds)
    computed = [run["cpu_seconds"] for run in runs if run["cpu_seconds"] is not None]
    speed = None if flops is None else flops / spread.seconds
    peak = 2 * MATMUL_SIZE**3 / min(matmuls) if matmuls else None
    return {
        **spread._asdict(),
        "all_seconds": seconds,
        "prepare_seconds": setup["prepare_seconds"],
        "first_seconds": setup["first"]["seconds"],
        # On a machine that others use too, processor time tells more than the clock; threads that wait count, though.
        "cpu_seconds": statistics.median(computed) if computed else None,
        "peak_host_bytes": runs[-1]["peak_host_bytes"],
        "peak_device_bytes": runs[-1]["peak_device_bytes"],
        "flops": flops,
        "flops_per_second": speed,
        "matmul_flops_per_second": peak,
        "fraction_of_peak": speed / peak if speed and peak else None,
        **setup["notes"],
    }
