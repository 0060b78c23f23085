"""One queue, three ways to serve it: `python -m benchmarks.serving`.

The same jobs arrive at the same random times (Poisson), and are drawn one by one, in batches that begin and end
together, and by the engine, which lets them join and leave between slices. Each way uses the same store, model and
loop. Latency is from a job's submission to its stored picture. On a CPU, where rows are computed one after another, a
batch can't win throughput, and the engine shows what it costs to be in reach for cancels and previews all the time.
"""

import argparse
import json
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import Pipeline
from sdjax.serve import drawing
from sdjax.serve.buckets import bucket
from sdjax.serve.encoding import encode
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.programs import default_batch_sizes
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import Lease, Store

STEPS = (8, 12, 20, 40)
"""Jobs ask for one of these, at random: that they differ is what a queue of people looks like."""
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve every load in every way and print the table."""
    options = _parser().parse_args(arguments)
    pipe = Pipeline.from_pretrained(options.model)
    sizes = tuple(options.batch_sizes or default_batch_sizes())
    together = options.together or max(*sizes, 4)
    seconds = warm_up(pipe, (*sizes, together))
    capacity = 1 / (seconds[1] * sum(STEPS) / len(STEPS))
    print(f"{pipe.name} on {jax.devices()[0].device_kind}: a step takes {1000 * seconds[1]:.1f} ms alone,", end=" ")
    print(f"{1000 * seconds[together]:.1f} ms in a batch of {together}; one by one {capacity:.2f} pictures/s at most")
    ways = {
        "one by one": lambda store: in_batches(pipe, store, 1),
        f"batches of {together}": lambda store: in_batches(pipe, store, together),
        **{
            f"engine, {slots} slots": lambda store, slots=slots: with_engine(pipe, store, sizes, slots)
            for slots in options.slots
        },
    }
    results = []
    for load in options.load:
        jobs = arrivals(options.jobs, load * capacity, options.seed)
        for name, serve in ways.items():
            results.append({"load": load, "way": name, **measured(jobs, serve)})
            print(line(results[-1]), flush=True)
    if options.json:
        about = {"model": pipe.name, "device": jax.devices()[0].device_kind, "system": platform.platform()}
        options.json.write_text(json.dumps({**about, "results": results}, indent=1), encoding="utf-8")


def arrivals(count: int, rate: float, seed: int) -> list[tuple[float, dict[str, Any]]]:
    """Jobs, and the seconds after which each is submitted: exponential gaps, `rate` a second."""
    rng = random.Random(seed)
    at, jobs = 0.0, []
    for i in range(count):
        request = {
            "operation": "image_generation",
            "prompt": "a red circle above a blue square",
            "negative_prompt": None,
            "steps": rng.choice(STEPS),
            "guidance_scale": 3.0,
            "sampler": rng.choice(SAMPLERS),
            "seed": i,
            "num_images": 1,
            "response": "png",
            "loras": [],
        }
        jobs.append((at, request))
        at += rng.expovariate(rate)
    return jobs


def measured(jobs: Sequence[tuple[float, Mapping[str, Any]]], serve: Any) -> dict[str, float]:
    """Submit jobs at their times while `serve` draws, and say how long they took."""
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(folder)
        with serve(store):
            began = time.monotonic()
            for at, request in jobs:
                time.sleep(max(0.0, began + at - time.monotonic()))
                full = {"width": 0, "height": 0, **request}
                store.submit(request, bucket=bucket(full))
            while store.counts()["complete"] < len(jobs):
                if store.counts()["error"]:
                    raise RuntimeError("a job failed: " + str(store.jobs()[0]))
                time.sleep(0.02)
        done = store.jobs(limit=len(jobs))
        store.close()
    latencies = np.array([(job.finished or 0.0) - job.created for job in done])
    lasted = max(job.finished or 0.0 for job in done) - min(job.created for job in done)
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    return {
        "pictures_per_second": len(jobs) / lasted,
        "mean": float(latencies.mean()),
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
    }


@contextmanager
def in_batches(pipe: Pipeline, store: Store, size: int) -> Iterator[None]:
    """Draw whoever waits, up to `size` at once, from their first step to the last one's last; then look again."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            leases = store.lease(None, size, owner="batches", seconds=3600)
            if not leases:
                time.sleep(0.005)
                continue
            asked = [drawing.requests(pipe, store, lease.job.request)[0] for lease in leases]
            rows = [drawing.prepare(pipe, lease.job.id, 0, each) for lease, each in zip(leases, asked, strict=True)]
            rows, _ = drawing.walk(pipe, rows, size, max(row.left for row in rows))
            for lease, row in zip(leases, rows, strict=True):
                store_picture(pipe, store, lease, row)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@contextmanager
def with_engine(pipe: Pipeline, store: Store, sizes: Sequence[int], slots: int) -> Iterator[None]:
    """Draw with the engine."""
    engine = GenerationEngine(pipe, store, batch_sizes=sizes, slots=slots)
    engine.start()
    engine.wait_until_ready()
    try:
        yield
    finally:
        engine.drain(0.0)


def store_picture(pipe: Pipeline, store: Store, lease: Lease, row: drawing.Row) -> None:
    """End a job with its picture."""
    (picture,) = pipe.finish(row.request, drawing.latents(row))
    file = encode(picture, "png", lease.job.request["prompt"], None, row.request.settings)
    store.finish(lease.job.id, lease.fence, [("png", file)], data={"format": "png"})


def warm_up(pipe: Pipeline, sizes: Sequence[int]) -> dict[int, float]:
    """Compile batches of these sizes, for all ways alike; seconds of a step in each."""
    request = pipe.resolve("", guidance_scale=3.0, steps=40, seed=0)
    row = drawing.prepare(pipe, "", 0, request)
    pipe.finish(request, drawing.latents(row))
    seconds = {}
    for size in sorted({1, *sizes}):
        rows = [row] * size
        drawing.walk(pipe, rows, size, 1)
        rounds = []
        for _ in range(5):
            began = time.perf_counter()
            drawing.walk(pipe, rows, size, 4)
            rounds.append((time.perf_counter() - began) / 4)
        seconds[size] = float(np.median(rounds))
    return seconds


def line(result: Mapping[str, Any]) -> str:
    """A row of the table."""
    times = "  ".join(f"{name} {result[name]:7.3f} s" for name in ("mean", "p50", "p95", "p99"))
    return f"load {result['load']:4.2f}  {result['way']:18}  {result['pictures_per_second']:7.3f} pictures/s  {times}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="whatever Pipeline.from_pretrained takes; default: the bundled model")
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument(
        "--load", type=float, nargs="+", default=[0.5, 0.9, 1.3], help="arrivals, as a share of what one by one can do"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="that the engine compiles; default: the backend's")
    parser.add_argument("--together", type=int, help="size of the batches that begin and end together")
    parser.add_argument("--slots", type=int, nargs="+", default=[8], help="of the engine; several are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


if __name__ == "__main__":
    main()
