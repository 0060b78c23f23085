"""One queue, three ways to serve it: `python -m benchmarks.serving`.

The same jobs arrive at the same random times (Poisson), or all at once, and are drawn one by one, in batches that begin
and end together, and by the engine, which lets them join and leave between slices. Each way uses the same store, model
and loop, and every picture of every way must equal what the library draws for that job alone. Latency is from a job's
submission to its stored picture; "short" are the jobs of the fewest steps, and "first" is until a job shows a sign of
life: its first progress, or where a way tells of none, its end.
"""

import argparse
import io
import json
import math
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.latency import percentiles
from sdjax import Pipeline
from sdjax.serve import drawing
from sdjax.serve.buckets import bucket
from sdjax.serve.encoding import encode
from sdjax.serve.engine import GenerationEngine
from sdjax.serve.programs import BATCH_SIZES
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.store import Lease, Store

STEPS = (8, 12, 20, 40)
"""Jobs ask for one of these, at random: that they differ is what a queue of people looks like."""
SAMPLERS = ("ddim", "euler_a", "dpmpp_2m")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve every load in every way and print the table."""
    options = _parser().parse_args(arguments)
    pipe = Pipeline.from_pretrained(options.model)
    together = options.together
    seconds = warm_up(pipe, {together, *(size for slots in options.slots for size in sizes_up_to(slots))})
    times = ", ".join(f"{1000 * each:.1f} ms for {size}" for size, each in seconds.items())
    capacity = 1 / (seconds[1] * sum(STEPS) / len(STEPS))
    print(f"{pipe.name} on {jax.devices()[0].device_kind}: a step takes {times}; load 1 is {capacity:.2f} jobs/s")
    ways = {
        "one by one": lambda store: in_batches(pipe, store, 1),
        f"batches of {together}": lambda store: in_batches(pipe, store, together),
        **{
            f"engine, {slots} slots": lambda store, slots=slots: with_engine(pipe, store, slots)
            for slots in options.slots
        },
    }
    alone = {request["seed"]: drawn_alone(pipe, request) for _, request in arrivals(options.jobs, 1.0, options.seed)}
    results = []
    for load in options.load:
        jobs = arrivals(options.jobs, load * capacity, options.seed)
        for name, serve in ways.items():
            results.append(
                {"load": "at once" if math.isinf(load) else load, "way": name, **measured(jobs, serve, alone)}
            )
            print(line(results[-1]), flush=True)
    print(f"all {len(results) * options.jobs} pictures equal those of the jobs alone")
    if options.json:
        about = {"model": pipe.name, "device": jax.devices()[0].device_kind, "system": platform.platform()}
        options.json.write_text(json.dumps({**about, "results": results}, indent=1), encoding="utf-8")


def arrivals(count: int, rate: float, seed: int) -> list[tuple[float, dict[str, Any]]]:
    """Jobs, and the seconds after which each is submitted: exponential gaps, `rate` a second, which may be infinite."""
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
        at += rng.expovariate(1.0) / rate
    return jobs


def drawn_alone(pipe: Pipeline, request: Mapping[str, Any]) -> NDArray[np.uint8]:
    """What the library draws for a job."""
    names = ("negative_prompt", "steps", "guidance_scale", "sampler", "seed")
    return np.asarray(pipe(request["prompt"], **{name: request[name] for name in names}).images[0])


def measured(
    jobs: Sequence[tuple[float, Mapping[str, Any]]], serve: Any, alone: Mapping[int, NDArray[np.uint8]]
) -> dict[str, float]:
    """Submit jobs at their times while `serve` draws, and say how long they took.

    Raises:
        RuntimeError: a job failed, or its picture isn't the one that is drawn `alone` for its seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(folder)
        first: dict[str, float] = {}

        def heard(job_id: str) -> None:
            if job_id not in first and any(event.name != "queued" for event in store.events(job_id)):
                first[job_id] = time.time()

        store.subscribe(heard)
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
        for job in done:
            kept = store.image(job.id, 0)
            picture = Image.open(io.BytesIO(kept[1] if kept else b""))
            if not np.array_equal(np.asarray(picture), alone[job.request["seed"]]):
                raise RuntimeError(f"the picture of {job} is another than that of the job alone")
        store.close()
    latencies = [(job.finished or 0.0) - job.created for job in done]
    short = [latency for latency, job in zip(latencies, done, strict=True) if job.request["steps"] == min(STEPS)]
    lasted = max(job.finished or 0.0 for job in done) - min(job.created for job in done)
    return {
        "pictures_per_second": len(jobs) / lasted,
        **percentiles(latencies),
        "short": percentiles(short)["mean"],
        "first": percentiles([first[job.id] - job.created for job in done])["mean"],
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


def sizes_up_to(slots: int) -> tuple[int, ...]:
    """The batches that an engine of so many slots may form; it takes those that were measured to be best."""
    return tuple(size for size in BATCH_SIZES if size <= slots)


@contextmanager
def with_engine(pipe: Pipeline, store: Store, slots: int) -> Iterator[None]:
    """Draw with the engine."""
    engine = GenerationEngine(pipe, store, batch_sizes=sizes_up_to(slots), slots=slots)
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


def warm_up(pipe: Pipeline, sizes: Iterable[int]) -> dict[int, float]:
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
    times = "  ".join(f"{name} {result[name]:6.2f}" for name in ("mean", "p50", "p95", "p99", "short", "first"))
    speed = f"{result['pictures_per_second']:6.2f} pictures/s"
    return f"load {result['load']:>7}  {result['way']:16} {speed}  seconds: {times}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="whatever Pipeline.from_pretrained takes; default: the bundled model")
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument(
        "--load",
        type=float,
        nargs="+",
        default=[0.5, 0.9, math.inf],
        help="arrivals, as a share of what one by one can do",
    )
    parser.add_argument("--together", type=int, default=4, help="size of the batches that begin and end together")
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 4], help="of the engine; several are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


if __name__ == "__main__":
    main()
