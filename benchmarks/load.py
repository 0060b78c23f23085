"""A server under load: `python -m benchmarks.load`.

It starts `sdjax serve` as a process, keeps its queue as full as it may be by default, and follows as many streams as
it is told at once; meanwhile it polls `/health`, and the server itself notes how late its event loop is. Then it has
many short jobs drawn, and compares the memory of the process early and late. It fails where a job is lost, a story has
a gap, a picture differs between the stream and its address, or a bar is missed.

The load comes from the same machine, and takes its share of it: "this program" is how late its own loop was.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.latency import SHOWN, histogram_percentiles, percentiles
from benchmarks.sides.served import Server

SUBMITTERS = 4
POLL_SECONDS = 0.02
BARRED, BAR_SECONDS = ("POST /v1/jobs", "GET /health", "event loop lag"), 0.1
"""Whose 99th percentiles must stay below what."""
BAR_GROWTH = 0.05
"""The share by which the memory may grow from early to late."""
PROMPTS = ("a red circle above a blue square", "a small yellow star", "a green ring on a black background")


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a server, print the table, and fail where a bar is missed."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    server = Server()
    try:
        report = {"ready_seconds": time.monotonic() - began, **asyncio.run(_measured(server, options))}
    finally:
        server.close()
    print("\n".join(lines(report)))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if report["missed"]:
        sys.exit("missed: " + "; ".join(report["missed"]))


@dataclass
class Load:
    """What clients have seen; times in seconds."""

    posts: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    own_lag: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    events: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


async def _measured(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.readers + SUBMITTERS)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
        await draw(client, Load(), 4, options)
        load = Load()
        before = await metrics(client)
        async with polled(client, load):
            await draw(client, load, options.jobs, options)
        after = await metrics(client)
        await check(client, load)
        memory = await remembered(client, load, options)
    rows = {
        "POST /v1/jobs": percentiles(load.posts),
        "GET /health": percentiles(load.health),
        "event loop lag": lag(before, after),
        "this program": percentiles(load.own_lag),
    }
    report = {
        "options": {"jobs": options.jobs, "readers": options.readers, "steps": options.steps},
        "seconds": load.seconds,
        "events": load.events,
        "jobs": percentiles(load.latencies),
        "rows": rows,
        "memory": memory,
        "wrong": load.wrong,
    }
    missed = [f"{name}, p99" for name in BARRED if rows[name]["p99"] >= BAR_SECONDS]
    sizes = list(memory.values())
    if sizes and sizes[-1] > (1 + BAR_GROWTH) * sizes[0]:
        missed.append("memory")
    return {**report, "missed": [*missed, *load.wrong[:5]]}


async def draw(
    client: httpx.AsyncClient, load: Load, count: int, options: argparse.Namespace, steps: int | None = None
) -> None:
    """Have `count` jobs drawn, with no more than `options.in_flight` at once, and follow each of them to its end."""
    room, submitted = asyncio.Semaphore(options.in_flight), asyncio.Queue[tuple[str, float] | None]()
    numbers = iter(range(count))

    async def submit() -> None:
        for number in numbers:
            await room.acquire()
            body = {
                "operation": "image_generation",
                "prompt": PROMPTS[number % len(PROMPTS)],
                "steps": steps or options.steps,
                "seed": number,
                "preview_every": 0 if steps else options.steps // 2,
            }
            began = time.monotonic()
            answer = await client.post("/v1/jobs", json=body)
            load.posts.append(time.monotonic() - began)
            if answer.status_code == 200:
                submitted.put_nowait((answer.json()["job_id"], began))
            else:
                room.release()
                load.wrong.append(f"a job was refused: {answer.text}")

    async def read() -> None:
        while (given := await submitted.get()) is not None:
            job_id, began = given
            load.digests[job_id] = await follow(client, load, job_id)
            load.latencies.append(time.monotonic() - began)
            room.release()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(options.readers):
            group.create_task(read())
        async with asyncio.TaskGroup() as submitters:
            for _ in range(SUBMITTERS):
                submitters.create_task(submit())
        for _ in range(options.readers):
            submitted.put_nowait(None)
    load.seconds = time.monotonic() - began


async def follow(client: httpx.AsyncClient, load: Load, job_id: str) -> str:
    """Read a job's stream to its end: the digest of its picture. What is wrong with the story is noted."""
    number, name, data = 0, "", ""
    async with client.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                number += 1
                load.events += 1
                if line != f"id: {number}":
                    load.wrong.append(f"job {job_id}: {line}, and it should be {number}")
            elif line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
    if name != "complete":
        load.wrong.append(f"job {job_id} ended with {name!r}: {data[:200]}")
        return ""
    return sha256(json.loads(data)["image"].encode()).hexdigest()


@asynccontextmanager
async def polled(client: httpx.AsyncClient, load: Load) -> AsyncIterator[None]:
    """Ask for `/health` again and again, and note how late this program's own loop is."""

    async def poll() -> None:
        while True:
            due = time.monotonic() + POLL_SECONDS
            await asyncio.sleep(POLL_SECONDS)
            began = time.monotonic()
            load.own_lag.append(began - due)
            answer = await client.get("/health")
            load.health.append(time.monotonic() - began)
            if answer.status_code != 200:
                load.wrong.append(f"/health answered {answer.status_code}")

    polling = asyncio.create_task(poll())
    try:
        yield
    finally:
        polling.cancel()


async def check(client: httpx.AsyncClient, load: Load) -> None:
    """Every job is complete, and its picture is what its stream said."""
    for job_id, digest in load.digests.items():
        job = (await client.get(f"/v1/jobs/{job_id}")).json()
        if job["state"] != "complete":
            load.wrong.append(f"job {job_id} is {job['state']}")
            continue
        picture = (await client.get(job["images"][0])).content
        if sha256(b64encode(picture)).hexdigest() != digest:
            load.wrong.append(f"job {job_id} has another picture than its stream")


async def remembered(client: httpx.AsyncClient, load: Load, options: argparse.Namespace) -> dict[str, int]:
    """Resident bytes of the server after so many jobs of one step, by their number."""
    found: dict[str, int] = {}
    total = 0
    for count in options.memory_after:
        await draw(client, short := Load(), count - total, options, steps=1)
        load.wrong += short.wrong
        total = count
        await asyncio.sleep(1.0)
        found[str(count)] = int((await metrics(client))["process_resident_memory_bytes"])
    return found


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's numbers by name; those of the lag's histogram with their bound."""
    found = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            bound = f"<{sample.labels['le']}" if family.name == LAG and "le" in sample.labels else ""
            found[sample.name + bound] = sample.value
    return found


LAG = "sdjax_event_loop_lag_seconds"


def lag(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How late the server's loop was between two looks at its numbers."""
    since = {name: value - before.get(name, 0.0) for name, value in after.items()}
    buckets = {}
    for name, count in since.items():
        if name.startswith(f"{LAG}_bucket<"):
            bound = name.partition("<")[2]
            buckets[math.inf if bound == "+Inf" else float(bound)] = count
    return histogram_percentiles(buckets, since[f"{LAG}_sum"])


def lines(report: Mapping[str, Any]) -> list[str]:
    """The table."""
    options, jobs = report["options"], report["jobs"]
    count = options["jobs"]
    found = [
        f"{count} jobs of {options['steps']} steps, {options['readers']} readers: {count / report['seconds']:.2f} "
        f"jobs/s, {report['events']} events; a job p50 {jobs['p50']:.1f} s, p99 {jobs['p99']:.1f} s; "
        f"{'nothing lost' if not report['wrong'] else 'WRONG: ' + report['wrong'][0]}",
        f"{'milliseconds':16}" + "".join(f"{name:>9}" for name in SHOWN) + f"  bar on p99: {1000 * BAR_SECONDS:.0f}",
    ]
    for name, row in report["rows"].items():
        found.append(f"{name:16}" + "".join(f"{1000 * row[column]:9.1f}" for column in SHOWN))
    if report["memory"]:
        memory = ", ".join(f"{size / 2**20:.0f} MiB after {jobs} jobs" for jobs, size in report["memory"].items())
        found.append(f"memory of the process: {memory}; bar: {BAR_GROWTH:.0%} more")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--readers", type=int, default=64, help="streams that are followed at once")
    parser.add_argument("--in-flight", type=int, default=96, help="jobs that are not done, at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--memory-after", type=int, nargs="*", default=[200, 2000], help="jobs of one step after which to look at it"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


if __name__ == "__main__":
    main()
